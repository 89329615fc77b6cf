"""A YAML file that holds one mapping of names to plain values, read with the line of each name.

Notable: only YAML's safe types are made, so no tag can make an object or run code; a name that
is there twice is given twice (PyYAML alone would drop the first); values are made one at a time,
so that an error names its line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, one_line

# Settings are a page of text; whoever names a corpus by mistake learns so at once.
_MAX_FILE = 1 << 20
_WIDEST = 64


@dataclass(frozen=True)
class Entry:
    """One line of the mapping.

    Attributes:
        key: the name.
        line: from 1.
        where: file, line and name, for an error.
        value: makes the value; raises ConfigError where that cannot be.
    """

    key: str
    line: int
    where: str
    value: Callable[[], Any]


def read_yaml(path: Path) -> Iterator[Entry]:
    """The entries of the file in their order; none if it is empty.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds something else than a mapping.
    """
    import yaml  # lazily: --help and runs without a file can do without

    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise ConfigError(f"{path}: more than {_MAX_FILE} bytes; expected settings in YAML")
        loader = yaml.SafeLoader(data.decode("utf-8-sig"))
        root = loader.get_single_node()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected settings in YAML") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; expected settings in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line}: not valid YAML ({one_line(error.problem or error.context)})"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({one_line(error)})") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else "one value"
        raise ConfigError(f"{path}: holds {found}; expected lines such as learning_rate: 0.0001")
    for key, node in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}, line {line}: a list or mapping as a name; expected a word")
        where = f"{path}, line {line}: {brief(key.value)}"

        def value(node: Any = node, where: str = where) -> Any:
            try:
                return loader.construct_object(node, deep=True)
            except yaml.YAMLError as error:  # a tag that makes an object, for one
                problem = getattr(error, "problem", error)
                raise ConfigError(f"{where}: {one_line(problem)}; write a plain value") from None
            except (ValueError, TypeError, RecursionError) as error:  # a day that does not exist
                raise ConfigError(f"{where}: not a value ({one_line(error)})") from None

        yield Entry(key.value, line, where, value)


def brief(value: Any) -> str:
    """A value in an error: one line, cut. Not the content of lists, which aliases can blow up."""
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping | set):
        return "a mapping"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of very many digits"
    text = repr(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"
