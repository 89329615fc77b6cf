"""A client's JSON, read strictly: every field has a type and a range, and none is unknown."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from .errors import ApiError, invalid, shown

_MISSING = object()  # a field that is not there, where null would be something else


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a request's body is.

    Raises:
        ApiError: 400; it is not UTF-8, not JSON, nested too deeply, names a key twice, holds NaN
            or Infinity or a number beyond the range of float64, or is no object.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(None, f"the body is not UTF-8 text (byte {error.start + 1})") from None
    try:
        found = json.loads(
            text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise invalid(None, "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise invalid(
            None, f"the body is not JSON ({error.msg}: line {error.lineno} column {error.colno})"
        ) from None
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise invalid(None, "the body holds a number of too many digits") from None
    if not isinstance(found, dict):
        raise invalid(None, f"the body is {shown(found)}; expected a JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise invalid(None, f"the body names {shown(key)} twice in one object")
            seen.add(key)
    return found


def _no_constant(text: str) -> float:
    raise invalid(None, f"the body holds {text}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise invalid(None, f"the body holds a number that is too large ({shown(text)})")
    return value


class Fields:
    """The fields of one object. Reading a field takes it out; ``end`` refuses what is left.

    Args:
        given: the object; a field that is null counts as absent.
        where: the name of the object within the body; "" for the body itself.
    """

    def __init__(self, given: Mapping[str, Any], where: str = "") -> None:
        self._left = dict(given)
        self._where = where

    def name(self, key: str) -> str:
        """The field's name from the body on, such as ``memory.path``."""
        return f"{self._where}.{key}" if self._where else key

    def take(self, key: str) -> Any:
        """The field's value, unchecked; None if it is absent or null."""
        return self._left.pop(key, None)

    def text(self, key: str, default: str | None = None, longest: int | None = None) -> str | None:
        """A string of valid Unicode."""
        value = self.take(key)
        return default if value is None else check_text(value, self.name(key), longest)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid(self.name(key), f"{shown(value)} given; expected true or false")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number of a range, ends included."""
        value = self.take(key)
        return default if value is None else check_integer(value, self.name(key), low, high)

    def number(self, key: str, low: float, high: float, default: float) -> float:
        """A number of a range, ends included."""
        value = self.take(key)
        return default if value is None else check_number(value, self.name(key), low, high)

    def neutral(self, key: str, *accepted: Any) -> None:
        """A field of OpenAI's that this server does not have: only what changes nothing passes.

        Raises:
            ApiError: 400, naming the field.
        """
        value = self._left.pop(key, _MISSING)
        if value is _MISSING or value is None:
            return
        if not any(type(value) is type(one) and value == one for one in accepted):
            raise invalid(self.name(key), "not supported by this server; leave it out")

    def end(self, known: Collection[str] = ()) -> None:
        """Refuse the fields that nobody has read.

        Args:
            known: names that OpenAI's API has, for a better message.
        """
        for key, value in self._left.items():
            if key in known and value is None:
                continue
            name = shown(self.name(key), 80).strip("'")
            why = "not supported by this server" if key in known else "unknown field"
            raise invalid(name, f"{why}; leave it out", "unknown_parameter")


def check_text(value: Any, name: str, longest: int | None = None) -> str:
    """A string of valid Unicode, of at most ``longest`` characters.

    Raises:
        ApiError: 400, naming the field.
    """
    if not isinstance(value, str):
        raise invalid(name, f"{shown(value)} given; expected a string")
    if longest is not None and len(value) > longest:
        raise invalid(name, f"{len(value)} characters; expected at most {longest}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(name, f"no valid Unicode (character {error.start + 1})") from None
    return value


def check_integer(value: Any, name: str, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``.

    Raises:
        ApiError: 400, naming the field.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(name, f"{shown(value)} given; expected a whole number")
    if not low <= value <= high:
        raise invalid(name, f"{shown(value)} is out of range; expected {low} to {high}")
    return value


def check_number(value: Any, name: str, low: float, high: float) -> float:
    """A number from ``low`` to ``high``.

    Raises:
        ApiError: 400, naming the field.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(name, f"{shown(value)} given; expected a number")
    if not low <= value <= high:
        raise invalid(name, f"{shown(value)} is out of range; expected {low:g} to {high:g}")
    return float(value)


def check_list(value: Any, name: str, longest: int, what: str) -> list[Any]:
    """A list of at most ``longest`` entries.

    Raises:
        ApiError: 400, naming the field.
    """
    if not isinstance(value, list):
        raise invalid(name, f"{shown(value)} given; expected a list of {what}")
    if len(value) > longest:
        raise invalid(name, f"{len(value)} entries; expected at most {longest}")
    return value


def check_object(value: Any, name: str) -> dict[str, Any]:
    """An object.

    Raises:
        ApiError: 400, naming the field.
    """
    if not isinstance(value, dict):
        raise invalid(name, f"{shown(value)} given; expected an object")
    return value


def not_found(what: str, code: str, param: str | None = None) -> ApiError:
    """A 404."""
    return ApiError(404, f"{what}; GET /v1/models lists what there is", param, code)
