"""Checks of JSON from outside: a value is what its field says, or one error names the file and the field.

A kind is a function (value, where) -> the value, cleaned. In a record a field that is absent or null is left out,
and a field that nobody knows is dropped: files of older and newer versions are read alike.
"""

from collections.abc import Callable, Iterable
from typing import Any

from qectomy.errors import clean, shown

Kind = Callable[[Any, str], Any]


class WrongField(Exception):
    """A field whose value is of another type or range than it should be."""


def wrong(value: Any, where: str, wanted: str) -> WrongField:
    found = clean(shown(value))
    found = found if len(found) <= 60 else found[:57] + "..."
    return WrongField(f"{clean(where)[:200] or 'the file'} is {found}, not {wanted}")


def string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong(value, where, "text")
    return clean(value)


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(value, where, "true or false")
    return value


def number(value: Any, where: str, wanted: str = "a finite number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:  # NaN too
        raise wrong(value, where, wanted)
    return float(value)


def positive(value: Any, where: str) -> float:
    if number(value, where, wanted := "a number above 0") <= 0:
        raise wrong(value, where, wanted)
    return float(value)


def amount(value: Any, where: str) -> float:
    if number(value, where, wanted := "a number of 0 or more") < 0:
        raise wrong(value, where, wanted)
    return float(value)


def share(value: Any, where: str) -> float:
    if not 0 <= number(value, where, wanted := "a share between 0 and 1") <= 1:
        raise wrong(value, where, wanted)
    return float(value)


def count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**18:
        raise wrong(value, where, "a whole number of 0 or more")
    return value


def interval(value: Any, where: str) -> tuple[float, float]:
    low, high = pair(value, where)
    if low > high:
        raise wrong(value, where, "an interval [low, high]")
    return low, high


def pair(value: Any, where: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise wrong(value, where, "an interval [low, high]")
    return number(value[0], f"{where}[0]"), number(value[1], f"{where}[1]")


def listed(kind: Kind, or_null: bool = False) -> Kind:
    """The kind of a list whose every item is of `kind`."""

    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong(value, where, "a list")
        return [None if or_null and item is None else kind(item, f"{where}[{i}]") for i, item in enumerate(value)]

    return check


def mapping(kind: Kind, or_null: bool = False) -> Kind:
    """The kind of an object of any keys, whose every value is of `kind`; nulls are left out, or kept if allowed."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(value, where, "an object")
        return {
            clean(key): None if item is None else kind(item, f"{where}.{key}")
            for key, item in value.items()
            if or_null or item is not None
        }

    return check


def record(fields: dict[str, Kind], required: Iterable[str] = ()) -> Kind:
    """The kind of an object with these fields."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(value, where, "an object")
        for name in required:
            if value.get(name) is None:
                raise WrongField(f"{where + '.' if where else ''}{name} is missing")
        return {
            name: kind(value[name], f"{where}.{name}" if where else name)
            for name, kind in fields.items()
            if value.get(name) is not None
        }

    return check


def plain(value: Any, where: str) -> str | int | float | bool:
    """A text, a number or a truth value: the settings of something."""
    if isinstance(value, str | bool):
        return string(value, where) if isinstance(value, str) else value
    return int(value) if isinstance(value, int) and abs(value) < 10**18 else number(value, where)
