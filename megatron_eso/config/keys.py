"""The annotations of a key, and what they mean for ranges, resume and objectives.

A key of the configuration is one line of its section and a docstring of one line:

    rotary_base: Annotated[int, Gt(0), Frozen("run"), Logged()] = 10000

The type comes first. Where the type alone does not limit the legal values, the range follows in
the words of annotated-types (`Gt`, `Ge`, `Lt`, `Le`, `Interval`). The markers below come last: they
define what a change of the key means to a checkpoint, and which objectives have the key.
"""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

DERIVED: Any = None
"""Default of a value that is derived from others; `dataclasses.replace` keeps the derived value."""

Start = Literal["run", "weights"]
"""What a checkpoint is read for. `run`: the run that wrote it continues. `weights`: a run takes its
weights alone, by `checkpoint.init_from` or from a converted run directory."""

BOUNDS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
"""How a number is compared with a bound, by the bound's name in annotated-types."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A mark: the key keeps the value of the checkpoint, and another value is refused."""

    start: Start | None = None
    """The start for which this is so; None: both."""


@dataclass(frozen=True, slots=True)
class Logged:
    """A mark: a change is logged where only weights are taken; a resumed run logs every change."""


@dataclass(frozen=True, slots=True, init=False)
class Only:
    """A mark: the key belongs to some objectives, and has its default under the others."""

    objectives: tuple[str, ...]

    def __init__(self, *objectives: str) -> None:
        object.__setattr__(self, "objectives", objectives)


@dataclass(frozen=True, slots=True)
class Largest:
    """A mark: the largest legal number; no machine needs more, and nothing overflows up to it."""

    value: float


@dataclass(frozen=True, slots=True)
class Location:
    """A mark: the key names a file or folder, or several of them."""

    may_be_url: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """The description of one key, read from its line in a section."""

    path: str
    """`section.name`."""
    type: Any
    """The type of the annotation, without markers."""
    default: Any
    """`dataclasses.MISSING` where the key is required."""
    markers: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The key without its section."""
        return self.path.partition(".")[2]

    @property
    def is_required(self) -> bool:
        """Whether a configuration has to set the key."""
        return self.default is dataclasses.MISSING

    @property
    def is_optional(self) -> bool:
        """Whether a resolved configuration may lack the key."""
        return type(None) in typing.get_args(self.type)

    @property
    def is_derived(self) -> bool:
        """Whether the value is derived from others where the key is left out."""
        return self.default is None and not self.is_optional

    @property
    def accepted_types(self) -> tuple[Any, ...]:
        """The types of a legal value, without None: the key is left out instead."""
        if typing.get_origin(self.type) is Literal:
            return (str,)
        if isinstance(self.type, types.UnionType):
            return tuple(kind for kind in typing.get_args(self.type) if kind is not type(None))
        return (self.type,)

    @property
    def choices(self) -> tuple[str, ...]:
        """The legal values of a key that lists them."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else ()

    @property
    def interval(self) -> Interval:
        """The legal numbers; without bounds where the key has no range."""
        return read_interval(self.markers)

    @property
    def is_logged(self) -> bool:
        """Whether a change is logged where only weights are taken."""
        return Logged() in self.markers

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives that have the key; empty: all of them."""
        return next((mark.objectives for mark in self.markers if isinstance(mark, Only)), ())

    @property
    def largest(self) -> float:
        """The largest number that is accepted, in a list too; infinite without a limit."""
        return next((mark.value for mark in self.markers if isinstance(mark, Largest)), math.inf)

    @property
    def location(self) -> Location | None:
        """What the key may name; None where it does not name files or folders."""
        return next((mark for mark in self.markers if isinstance(mark, Location)), None)

    def belongs_to(self, objective: str) -> bool:
        """Return whether the objective of this name has the key."""
        return not self.objectives or objective in self.objectives

    def is_frozen(self, start: Start) -> bool:
        """Return whether the key keeps the value of the checkpoint that is read for `start`."""
        return any(
            isinstance(mark, Frozen) and mark.start in (None, start) for mark in self.markers
        )


def describe_keys(section: str, section_type: type) -> list[Key]:
    """Return the keys of a section, in the order of its lines.

    Args:
        section: Name of the section.
        section_type: The dataclass of the section, with annotations as this file describes.
    """
    hints = typing.get_type_hints(section_type, include_extras=True)
    return [
        _describe(f"{section}.{field.name}", hints[field.name], field.default)
        for field in dataclasses.fields(section_type)
    ]


def _describe(path: str, hint: Any, default: Any) -> Key:
    markers: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *found = typing.get_args(hint)
        markers = tuple(found)
    return Key(path=path, type=hint, default=default, markers=markers)


def read_interval(markers: Iterable[Any]) -> Interval:
    """Return the interval of all bounds among `markers`; other markers are ignored."""
    bounds = {
        name: getattr(marker, name)
        for marker in markers
        for name in BOUNDS
        if getattr(marker, name, None) is not None
    }
    return Interval(**bounds)


def is_inside(value: Any, interval: Interval) -> bool:
    """Return whether a number is in the interval."""
    bounds = {name: getattr(interval, name) for name in BOUNDS}
    return all(bound is None or BOUNDS[name](value, bound) for name, bound in bounds.items())


def describe_interval(interval: Interval) -> str:
    """Describe the interval, such as "at least 0 and below 1"; empty without bounds."""
    if interval.ge is not None and interval.le is not None:
        return f"between {interval.ge} and {interval.le}"
    words = []
    if interval.gt is not None:
        words.append(f"greater than {interval.gt}")
    if interval.ge is not None:
        has_end = interval.lt is not None
        words.append(f"at least {interval.ge}" if has_end else f"{interval.ge} or greater")
    if interval.lt is not None:
        words.append(f"below {interval.lt}")
    if interval.le is not None:
        words.append(f"at most {interval.le}")
    return " and ".join(words)
