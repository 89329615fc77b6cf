"""Errors that a user can act on.

Every error raised on purpose by this package derives from :class:`HierMemError`.
Its text is one line: what is wrong, where, what was expected, what to do. The
command line prints that line and exits with code 2; anything else is a fault of
ours and exits with code 1.
"""

from __future__ import annotations


class HierMemError(Exception):
    """Base class of all errors that come from wrong use or bad input."""


class ConfigError(HierMemError):
    """A configuration is unknown, incomplete or contradicts itself or the files."""


class FormatError(HierMemError):
    """A file is missing, truncated, altered, or not what its name and place say."""


class PathError(HierMemError):
    """A cluster path or cluster does not exist in the tree."""


class BudgetError(HierMemError):
    """A memory budget cannot hold what has to be held."""


class InputError(HierMemError):
    """A prompt, text or option cannot be used."""


class TrainingError(HierMemError):
    """Training cannot start or go on."""
