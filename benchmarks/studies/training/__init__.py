"""Runs that train memories on the atlas's corpus, several seeds of each, side by side.

``task`` says what a run is, ``parts`` and ``routes`` make what runs share, ``worker`` does one in a
process of its own, ``runs`` hands them out and keeps the results, ``report`` prints and draws.
"""
