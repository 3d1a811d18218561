"""The entries of `config.json` that an objective has besides those of the network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ORDERS = ("left_to_right", "uniform", "staggered")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveField:
    """An entry of `config.json` that an objective reads."""

    accepts: Callable[[Any], bool]
    """Returns whether a value is legal."""
    expected: str
    """The legal values, for errors."""
    default: Any = None
    """Value of a directory without this entry; None where the entry may be missing."""


def one_of(*values: str, default: str | None = None) -> ObjectiveField:
    """Return a field with these values."""
    expected = f"none of {', '.join(values)}"
    return ObjectiveField(accepts=lambda value: value in values, expected=expected, default=default)


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


ALPHA_0 = ObjectiveField(
    accepts=lambda value: is_number(value) and 0 <= value <= 1, expected="no number in [0, 1]"
)
SIZE = ObjectiveField(
    accepts=lambda value: isinstance(value, int) and value >= 1, expected="no whole number from 1"
)
SET_SIZE = ObjectiveField(
    accepts=lambda value: value is None or SIZE.accepts(value), expected=SIZE.expected
)
TOKEN = ObjectiveField(
    accepts=lambda value: value is None or (isinstance(value, int) and value >= 0),
    expected="no token",
)
SETS = {"set_size": SET_SIZE, "max_set_size": SET_SIZE}

OBJECTIVE_FIELDS: dict[str, dict[str, ObjectiveField]] = {
    "eso_lm": {
        "variant": one_of("a", "b"),
        "alpha_0": ALPHA_0,
        "sequential_prediction": one_of("own", "next", default="own"),
        "order": one_of(*ORDERS, default="left_to_right"),
        **SETS,
    },
    "mdlm": {},
    "ar": {"prepend_token": one_of("mask", "bos", "none", default="mask"), "bos_token_id": TOKEN},
    "bd3_lm": {"block_size": SIZE},
    "set_dlm": {"order": one_of(*ORDERS, default="staggered"), **SETS},
    "any_order_ar": {"order": one_of(*ORDERS, default="uniform"), **SETS},
}
"""The objectives that the sampler implements, with the fields of each."""


def read_objective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry `objective` of a `config.json`, and the fields of that objective.

    Args:
        config: The content of the file; without `objective` it is an Eso-LM's.

    Raises:
        ValueError: The objective is unknown, a value is not legal, or the values do not fit each
            other.
    """
    name = config.get("objective", "eso_lm")
    if not isinstance(name, str) or name not in OBJECTIVE_FIELDS:
        known = ", ".join(OBJECTIVE_FIELDS)
        raise ValueError(f"objective {name!r} is unknown, this version samples {known}")
    values = {}
    for key, field in OBJECTIVE_FIELDS[name].items():
        value = config.get(key, field.default)
        if not field.accepts(value):
            raise ValueError(f"{key} is {value!r}, {field.expected}")
        values[key] = value
    # Values that need others.
    if values.get("order") == "staggered" and None in (values["set_size"], values["max_set_size"]):
        raise ValueError("order is 'staggered' without set_size and max_set_size")
    if values.get("prepend_token") == "bos" and values["bos_token_id"] is None:
        raise ValueError("prepend_token is 'bos' without bos_token_id")
    return {"objective": name, **values}
