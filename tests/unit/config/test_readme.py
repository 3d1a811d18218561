"""The README's reference of the configuration says what the code says."""

import ast
import re
from pathlib import Path

from megatron_eso.config.loading import HINTS, SECTIONS

ROOT = Path(__file__).resolve().parents[3]


def read_docstrings() -> dict[str, str]:
    """The line under each field of megatron_eso/config/sections.py, by `section.key`."""
    section_of = {section.__name__: name for name, section in SECTIONS.items()}
    tree = ast.parse((ROOT / "megatron_eso" / "config" / "sections.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in section_of:
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    assert isinstance(text, ast.Expr), f"{field.target.id} has no line of its own"
                    assert isinstance(text.value, ast.Constant)
                    found[f"{section_of[node.name]}.{field.target.id}"] = str(text.value.value)
    return found


def test_every_key_is_described_in_the_code() -> None:
    keys = {f"{section}.{key}" for section, hints in HINTS.items() for key in hints}
    assert set(read_docstrings()) == keys


def test_the_readme_describes_every_key_as_the_code_does() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+\.\w+)` \| [^|]+ \| [^|]+ \| (.+) \|$", readme, re.MULTILINE)
    assert dict(rows) == read_docstrings()
    assert len(rows) == len(dict(rows))
