"""The settings of a command: one flag per field of a dataclass, and the same as keys in YAML.

    add_settings(parser, TrainSettings)             --learning-rate and so on, and -c/--config FILE
    settings = read_settings(TrainSettings, args)   .values, .sources
    print(show_settings(settings))                  what was set, and what was left at its default

A flag wins over the file, the file over a default. Notable:
- Annotations say the type: ``int``, ``float``, ``str``, ``bool`` (``--flag``, ``--no-flag``),
  ``Path``, ``Literal`` (choices), ``tuple[int, ...]`` (``1 2 3`` or ``1,2,3``),
  ``tuple[float, float]``, and each of them ``| None`` (the word ``none``).
- ``field(metadata=...)`` says the rest, all optional: ``help``; ``flag``, another name for the
  flag (also taken in the file), or None for a setting without one; ``type``, a function of a text
  such as ``options.parse_bytes``; ``metavar``; ``default``, words for a default that the class
  method below gives; ``split``, False where a comma is part of a value.
- A class method ``defaults(given)`` may give defaults that depend on other settings: it gets all
  that was set, with the plain defaults of the rest, and returns defaults by field. What was set
  stays as it was set.
- In YAML 1.1 ``1e-4`` is a text; where a number is asked for it is taken for the number it looks
  like.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from math import isnan
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import ConfigError, HierMemError, InputError
from .tables import table
from .yaml_file import brief, read_yaml

T = TypeVar("T")

FLAG, FILE, DEFAULT = "flag", "file", "default"

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_NAMES[Path] = "a path"
_WIDEST = 64


@dataclass(frozen=True)
class Settings(Generic[T]):
    """Settings that were read.

    Attributes:
        values: an instance of the dataclass.
        sources: for each of its fields, in their order, "flag", "file" or "default".
    """

    values: T
    sources: dict[str, str]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """``{field: {"value": ..., "from": ...}}`` for JSON; a path is a text there."""
        return {
            name: {"value": _plain(getattr(self.values, name)), "from": source}
            for name, source in self.sources.items()
        }


def add_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add ``-c/--config FILE`` and one flag for each field of the dataclass ``cls``."""
    parser.add_argument(
        "-c", "--config", metavar="FILE",
        help="settings in a YAML file, named as the flags are; a flag wins over the file",
    )  # fmt: skip
    for setting in _settings(cls):
        if setting.flag is None:
            continue
        options: dict[str, Any] = {"dest": setting.dest, "help": setting.help}
        if setting.base is bool and not setting.many:
            # Not SUPPRESS, which some versions of Python would print as the default.
            options |= {"action": argparse.BooleanOptionalAction, "default": None}
        else:
            options |= {"default": argparse.SUPPRESS, "metavar": setting.metavar}
            if setting.many:
                options["nargs"] = "+"
        parser.add_argument(setting.flag, **options)


def read_settings(cls: type[T], args: argparse.Namespace) -> Settings[T]:
    """The settings from the flags that ``add_settings`` added, their file, and the defaults.

    Raises:
        InputError: a flag's value is not of its type, or a setting without default is missing.
        ConfigError: the file cannot be read or is not YAML; it names an unknown setting, or one
            with a value of a wrong type. The line is given.
        HierMemError: whatever ``cls`` raises when the values contradict each other.
    """
    settings = _settings(cls)
    given: dict[str, Any] = {}
    sources = dict.fromkeys((setting.name for setting in settings), DEFAULT)
    if getattr(args, "config", None) is not None:
        given = _read_file(Path(args.config).expanduser(), settings)
        sources |= dict.fromkeys(given, FILE)
    for setting in settings:
        raw = getattr(args, setting.dest, None)
        if setting.flag is not None and raw is not None:
            given[setting.name] = setting.from_flag(raw)
            sources[setting.name] = FLAG
    missing = [setting for setting in settings if setting.required and setting.name not in given]
    if missing:
        names = ", ".join(setting.flag or f"{setting.name} in the file" for setting in missing)
        one = len(missing) == 1
        words = missing[0].field.metadata.get("help") if one else None
        raise InputError(
            f"{names} {'is' if one else 'are'} missing{f' ({words})' if words else ''}; give "
            f"{'it' if one else 'them'} as a flag, or in the file of --config "
            f"({missing[0].name}: ...)"
        )
    values = {setting.name: setting.default() for setting in settings if setting.has_default}
    values |= given
    defaults: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(cls, "defaults", None)
    if defaults is not None:
        values |= defaults(dict(values)) | given
    return Settings(cls(**values), sources)


def show_settings(settings: Settings[Any]) -> str:
    """A table of every setting, its value, and whether a flag, the file or a default set it."""
    rows = [
        (name, _shown(getattr(settings.values, name)), source)
        for name, source in settings.sources.items()
    ]
    return table(("setting", "value", "from"), rows)


# ---- one setting -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """A field of the dataclass, with its annotation taken apart."""

    field: Field[Any]
    base: type
    optional: bool = False
    many: bool = False
    length: int | None = None
    choices: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def dest(self) -> str:
        """Its attribute of the parsed arguments, which hold names of their own, such as ``run``."""
        return f"setting_{self.name}"

    @property
    def flag(self) -> str | None:
        flag = self.field.metadata.get("flag", self.name)
        return None if flag is None else "--" + flag.lstrip("-").replace("_", "-")

    @property
    def parse(self) -> Callable[[str], Any] | None:
        return self.field.metadata.get("type")

    @property
    def has_default(self) -> bool:
        return self.field.default is not MISSING or self.field.default_factory is not MISSING

    @property
    def required(self) -> bool:
        """Whether it has no default, nor one from the class method (told by its words)."""
        return not self.has_default and "default" not in self.field.metadata

    def default(self) -> Any:
        factory = self.field.default_factory
        return self.field.default if factory is MISSING else factory()

    @property
    def metavar(self) -> str:
        if "metavar" in self.field.metadata:
            return self.field.metadata["metavar"]
        if self.choices:
            return "{" + ",".join(map(str, self.choices)) + "}"
        return {int: "N", float: "X", Path: "PATH"}.get(self.base, "TEXT")

    @property
    def help(self) -> str:
        words = self.field.metadata.get("help", "")
        default = self.field.metadata.get("default")
        if default is None and self.has_default and self.default() is not None:
            default = _shown(self.default())
        if default is not None:
            words += f" (default: {default})"
        elif self.required:
            words += " (required)"
        return words.strip().replace("%", "%%")

    @property
    def expected(self) -> str:
        if self.choices:
            name = f"one of {', '.join(map(str, self.choices))}"
        else:
            name = _NAMES[self.base]
        if self.many:
            count = f"{self.length} values" if self.length is not None else "a list"
            name = f"{count}, each {name}"
        return f"{name}, or none" if self.optional else name

    def from_flag(self, raw: Any) -> Any:
        """The value of what argparse found: a text, a list of texts, or a bool."""
        try:
            if isinstance(raw, bool):
                return raw
            if not self.many:
                return None if self._is_none(raw) else self._value(raw)
            if len(raw) == 1 and self._is_none(raw[0]):
                return None
            if self.field.metadata.get("split", True) and (self.base is not str or len(raw) == 1):
                raw = [piece for text in raw for piece in text.split(",")]
            return self._values([text.strip() for text in raw])
        except _Wrong as error:
            raise InputError(f"{self.flag}: {error}") from None

    def from_file(self, raw: Any) -> Any:
        """The value of what YAML made of it."""
        if raw is None or self._is_none(raw):
            if self.optional:
                return None
            raise _Wrong(f"found nothing (null); expected {self.expected}")
        if not self.many:
            return self._value(raw)
        if isinstance(raw, str) and self.field.metadata.get("split", True):
            return self._values([text.strip() for text in raw.split(",")])
        return self._values(raw if isinstance(raw, list) else [raw])

    def _is_none(self, raw: Any) -> bool:
        return self.optional and raw == "none" and "none" not in self.choices

    def _values(self, raw: list[Any]) -> tuple[Any, ...]:
        if self.length is not None and len(raw) != self.length:
            raise _Wrong(f"found {len(raw)} values; expected {self.expected}")
        return tuple(self._value(one) for one in raw)

    def _value(self, raw: Any) -> Any:
        value = self._convert(raw)
        if self.choices and value not in self.choices:
            close = get_close_matches(str(value), [str(choice) for choice in self.choices], 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise _Wrong(f"found {brief(raw)}; expected {self.expected}{hint}")
        return value

    def _convert(self, raw: Any) -> Any:
        if isinstance(raw, bool) and self.base is bool:
            return raw
        if isinstance(raw, bool) or raw == "":
            raise self._mismatch(raw)
        try:
            if self.parse is not None and isinstance(raw, str | int | float):
                return self.parse(str(raw))
            if self.base is int and isinstance(raw, str | int):
                return int(raw)
            if self.base is float and isinstance(raw, str | int | float) and not isnan(float(raw)):
                return float(raw)
            if self.base in (str, Path) and isinstance(raw, str):
                return raw if self.base is str else Path(raw).expanduser()
        except HierMemError as error:
            raise _Wrong(str(error)) from None
        except (ValueError, TypeError, OverflowError, RuntimeError, argparse.ArgumentTypeError):
            pass  # not a number, no home folder, or what a type function raises
        raise self._mismatch(raw)

    def _mismatch(self, raw: Any) -> _Wrong:
        quotes = self.base is str and isinstance(raw, int | float)
        advice = ", in quotes" if quotes else ""
        return _Wrong(f"found {brief(raw)}; expected {self.expected}{advice}")


class _Wrong(Exception):
    """A value that a setting cannot take; its text lacks where it stood."""


def _settings(cls: type) -> list[_Setting]:
    hints = typing.get_type_hints(cls)
    return [_setting(field, hints[field.name]) for field in fields(cls) if field.init]


def _setting(field: Field[Any], hint: Any) -> _Setting:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [one for one in typing.get_args(hint) if one is not types.NoneType]
        optional, hint = len(rest) < len(typing.get_args(hint)), rest[0]
        if len(rest) > 1:
            raise TypeError(f"{field.name}: a setting cannot be one of several types")
    many, length = typing.get_origin(hint) is tuple, None
    if many:
        items = typing.get_args(hint)
        length = None if items[-1] is Ellipsis else len(items)
        if len(set(items) - {Ellipsis}) > 1:
            raise TypeError(f"{field.name}: the values of a setting have to be of one type")
        hint = items[0]
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    base = type(choices[0]) if choices else hint
    if base not in _NAMES:
        raise TypeError(f"{field.name}: no flag can be made of {hint!r}")
    return _Setting(field, base, optional, many, length, choices)


def _read_file(path: Path, settings: list[_Setting]) -> dict[str, Any]:
    """Field -> value from a YAML file; a setting goes by its own name and by its flag's."""
    names = {
        name.lstrip("-").replace("-", "_"): setting
        for setting in settings
        for name in (setting.flag or setting.name, setting.name)
    }
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for entry in read_yaml(path):
        setting = names.get(entry.key.replace("-", "_"))
        if setting is None:
            close = get_close_matches(entry.key.replace("-", "_"), list(names), 1)
            known = ", ".join(setting.name for setting in settings)
            hint = f"did you mean {close[0]}?" if close else f"known are {known}"
            raise ConfigError(f"{entry.where} is no setting; {hint}")
        if setting.name in values:
            raise ConfigError(
                f"{entry.where} is set twice, first in line {lines[setting.name]}; leave one out"
            )
        try:
            values[setting.name] = setting.from_file(entry.value())
        except _Wrong as error:
            raise ConfigError(f"{entry.where}: {error}") from None
        lines[setting.name] = entry.line
    return values


# ---- words -----------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    """A value as the table and ``--help`` show it; a long list is cut."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    text = ",".join(map(_shown, value)) if isinstance(value, tuple) else str(value)
    if len(text) <= _WIDEST:
        return text or "(empty)"
    more = f" ({len(value)} values)" if isinstance(value, tuple) else ""
    return f"{text[: _WIDEST - 1 - len(more)]}…{more}"
