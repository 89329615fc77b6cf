"""Documents in, packed sequences with their cluster out: read, embed, assign, pack."""
