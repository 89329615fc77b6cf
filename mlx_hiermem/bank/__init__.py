"""The memory bank on disk and in memory: its format, how it is written and how it is fetched.

A path is a sequence of integers and a block is a 1-D array here; what the numbers of a block
mean is known to ``memories`` alone, and where a path comes from to ``routing`` alone.

- ``layout``: which files a bank has and how they are written (NumPy only);
- ``store``: :class:`~mlx_hiermem.bank.store.MemoryBank`, which fetches;
- ``manifest``, ``header``, ``files``, ``dtypes``, ``cache``, ``report``: their parts.

The format itself is told in ``docs/format.md``.
"""
