"""Memory banks: what the keys of a PyTorch checkpoint mean, and writing them as a bank of ours."""
