"""The memory bank on disk and in memory: its format, how it is written, held, fetched and changed.

A path is a sequence of integers and a block is bytes here; what the numbers of a block mean is
known to ``memories`` alone, and where a path comes from to ``routing`` alone.

- ``layout``, ``header``, ``manifest``, ``checksums``, ``blocked``: which files a bank has and what
  each holds; ``writer`` writes them, ``reader`` reads them (NumPy only);
- ``stored``: how the bytes of a block lie; ``slots``: buffers that a fetch fills and the model
  computes from; ``fill``: what brings a block there; ``prefetch``: the same, ahead of time;
- ``tiers``, ``cache``: what is held in memory;
- ``store``: :class:`~mlx_hiermem.bank.store.MemoryBank`, which fetches;
- ``verify``, ``quantize``, ``journal``, ``edit``: what is done to a whole bank.

The format is told in ``docs/format.md``, the store in ``docs/bank.md``.
"""
