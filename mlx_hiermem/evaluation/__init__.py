"""What a model is worth: facts, routing, perplexity, each with its memory on, swapped and off."""
