"""OpenLM: its configs and the names of its state dict, there and back."""
