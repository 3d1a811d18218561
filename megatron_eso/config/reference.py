"""The reference of all keys, which `python -m megatron_eso.config.reference` prints.

`docs/configuration.md` is its output; a test compares the two.
"""

import ast
import inspect
import json
import math
import sys
import typing
from typing import Any

from megatron_eso.config.keys import Key, Start, describe_keys
from megatron_eso.config.sections import SECTIONS

INTRODUCTION = """\
# Configuration

A configuration is one or more TOML files and `section.key=value` arguments; the later value of a
key wins. A mistake is one line with file, key, value and remedy, and exit code 2.
`python -m pretrain.train CONFIG.toml ... --dry-run` prints the resolved configuration and starts
nothing.

- **default**: `required`: there is none; `derived`: it is computed from other keys, as the meaning
  explains; `left out`: the key has no value unless it is set.
- **range**: the numbers that are accepted; for a list, each of its numbers.
- **on resume**: `fixed`: a run that continues from its checkpoint keeps the value, and another one
  is refused; `free`: the value may change, and the change is logged. The shards have their own
  check: a run keeps its tokenizer and its data, and `data.phase` changes a blend.
- **other weights**: what holds for a run that starts from the weights of another
  (`checkpoint.init_from`). `fixed`: it keeps the value of that run; `logged`: the value may change,
  and the change is logged; `free`: the values are not compared.

This file is the output of `python -m megatron_eso.config.reference`.
"""
HEADER = """\
| key | type | default | range | on resume | other weights | meaning |
|---|---|---|---|---|---|---|
"""


def format_reference() -> str:
    """Return the reference of all keys as Markdown, a table per section."""
    parts = [INTRODUCTION]
    for name, section in SECTIONS.items():
        meanings = read_meanings(section)
        rows = [format_row(key, meanings[key.name]) for key in describe_keys(name, section)]
        parts.append(f"## `[{name}]`\n\n{section.__doc__}\n\n{HEADER}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def read_meanings(section: type) -> dict[str, str]:
    """Return the docstring below each key of a section, by the name of the key."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[ast.unparse(field.target)] = str(ast.literal_eval(text.value))
    return found


def format_row(key: Key, meaning: str) -> str:
    """Return the table row of one key."""
    if key.objectives:
        names = ", ".join(f"`{name}`" for name in key.objectives)
        meaning = f"{meaning} Only for {names}."
    cells = (
        f"`{key.path}`",
        format_type(key),
        format_default(key),
        format_range(key),
        "fixed" if key.is_frozen("run") else "free",
        format_weights_policy(key),
        meaning,
    )
    return f"| {' | '.join(cells)} |"


def format_type(key: Key) -> str:
    """Return the legal types, or the legal values where the key lists them."""
    if key.choices:
        return ", ".join(f"`{choice}`" for choice in key.choices)
    return " or ".join(map(_format_type, key.accepted_types))


def _format_type(kind: Any) -> str:
    items = typing.get_args(kind)
    return f"list of {items[0].__name__}" if items else str(kind.__name__)


def format_default(key: Key) -> str:
    """Return the default as TOML, or the reason why there is none."""
    if key.is_required:
        return "required"
    if key.default is None:
        return "derived" if key.is_derived else "left out"
    return f"`{json.dumps(key.default)}`"


def format_range(key: Key) -> str:
    """Return the bounds and the upper limit as inequalities; empty without any."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [(sign, getattr(key.interval, name)) for name, sign in signs.items()]
    if key.largest < math.inf:
        bounds.append(("<=", key.largest))
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


def format_weights_policy(key: Key) -> str:
    """Return what a change means for a run that starts from other weights."""
    start: Start = "weights"
    if key.is_frozen(start):
        return "fixed"
    return "logged" if key.is_logged else "free"


if __name__ == "__main__":
    sys.stdout.write(format_reference())
