"""Checks of a configuration's fields. Every error names the field, its value and the expected value."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any

SHOWN = 60  # characters of a value in an error


class FieldError(ValueError):
    """A field with an unsupported value. field: its name, such as width or encoder.width[1]."""

    def __init__(self, field: str, value: Any, expected: str):
        super().__init__(field, value, expected)
        self.field, self.value, self.expected = field, value, expected

    def __str__(self) -> str:
        value = repr(self.value)
        value = value if len(value) <= SHOWN else value[:SHOWN] + "..."
        return f"{self.field}={value}; expected {self.expected}"


class AbsentError(ValueError):
    """A required field is absent. field: its name."""

    def __init__(self, field: str):
        super().__init__(field)
        self.field = field

    def __str__(self) -> str:
        return f"{self.field!r} is absent"


def whole(field: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
        raise FieldError(field, value, f"a whole number from {least} to {most}")


def number(field: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        raise FieldError(field, value, f"a number from {least:g} to {most:g}")


def flag(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise FieldError(field, value, "true or false")


def word(field: str, value: Any, known: Collection[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise FieldError(field, value, f"one of {', '.join(known)}")


def text(field: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise FieldError(field, value, "a text")


def entries(field: str, value: Any, count: int | None = None) -> Iterator[tuple[str, Any]]:
    """The entries of a list with their names, such as width[1]."""
    if not isinstance(value, list | tuple):
        raise FieldError(field, value, "a list")
    if count is not None and len(value) != count:
        raise FieldError(field, value, f"{count} entries, one for each stage")
    return ((f"{field}[{i}]", entry) for i, entry in enumerate(value))


class Section:
    """The fields in a file, or in a part of it. prefix: comes before the names in errors, as in "encoder."."""

    def __init__(self, given: Any, prefix: str = ""):
        if not isinstance(given, Mapping):
            raise FieldError(prefix.rstrip("."), given, "an object with named fields")
        self.given, self.prefix = given, prefix

    def __getitem__(self, name: str) -> Any:
        if name not in self.given:
            raise AbsentError(self.prefix + name)
        return self.given[name]

    def get(self, name: str, default: Any) -> Any:
        return self.given.get(name, default)

    def only(self, known: Collection[str]) -> None:
        """Raise FieldError for an unknown field. A name that begins with _ is a comment."""
        for name, value in self.given.items():
            if name not in known and not name.startswith("_"):
                raise FieldError(self.prefix + name, value, f"no field but {', '.join(known)}")

    def same(self, expected: Mapping[str, Any]) -> None:
        """Raise FieldError if a field is present with another value. A list of equal values equals one value."""
        for name, value in expected.items():
            if name in self.given and once(self.given[name]) != once(value):
                raise FieldError(self.prefix + name, self.given[name], repr(value))

    def values(self, name: str) -> Any:
        """A list as a tuple; anything else as it is."""
        return tuple(self[name]) if isinstance(self[name], list) else self[name]

    def word(self, name: str, table: Mapping[str, str], default: str | None = None) -> str:
        """The table's entry for the word in a field, or for the default if the field is absent."""
        value = self[name] if default is None else self.get(name, default)
        word(self.prefix + name, value, table)
        return table[value]

    def words(self, name: str, table: Mapping[str, str], count: int) -> tuple[str, ...]:
        """The table's entries for a list of words; for a single word, its entry `count` times."""
        value = self[name]
        if not isinstance(value, list | tuple):
            return (self.word(name, table),) * count
        for entry, each in entries(self.prefix + name, value):
            word(entry, each, table)
        return tuple(table[each] for each in value)

    def build(self, cls: type) -> Any:
        """Make a dataclass of the fields. Raises FieldError or AbsentError."""
        known = {field.name: field for field in fields(cls)}
        self.only(known)
        required = [name for name, field in known.items() if field.default is field.default_factory is MISSING]
        with renamed({}, self.prefix):
            return cls(**{name: self[name] for name in known if name in self.given or name in required})


def once(values: Any) -> Any:
    """A list of equal values as that value; anything else as it is."""
    return values[0] if isinstance(values, list) and values and values.count(values[0]) == len(values) else values


@contextmanager
def renamed(names: Mapping[str, str], prefix: str = "") -> Iterator[None]:
    """Rename the field in a FieldError raised inside: a new name from `names`, after the prefix."""
    try:
        yield
    except FieldError as error:
        name, bracket, index = error.field.partition("[")
        raise FieldError(prefix + names.get(name, name) + bracket + index, error.value, error.expected) from None
