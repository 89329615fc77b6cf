"""The atlas: the small model that ships, and everything that makes it.

Facts (``facts``) -> sentences (``wordings``) -> a corpus with a Zipf law (``corpus``)
-> a tokenizer (``tokenizer``) -> anchor, tree and memory bank (``build``).
"""
