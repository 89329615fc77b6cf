"""The server: one thread that owns the model and answers many requests in one batch, over HTTP."""
