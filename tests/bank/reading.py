"""What a bank reads from its files, seen from below."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest


@contextmanager
def counted():
    """Bytes of each read of a file."""
    reads, preadv = [], os.preadv

    def count(fd, buffers, offset, flags=0):
        done = preadv(fd, buffers, offset, flags)
        reads.append(done)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", count)
        yield reads
