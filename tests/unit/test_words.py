"""Words that no text of the project uses, and steps that long functions name."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure.import_map import ROOT

FOLDERS = (
    "checkpoints_conversion",
    "data_tools",
    "docs",
    "megatron_eso",
    "pretrain",
    "slurm",
    "tests",
)
SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".toml", ".def"}
# Words that are hard to read in a second language, or that make a machine speak.
FORBIDDEN = re.compile(
    r"\b(mend(s|ed|ing)?|beside|doomed|deaf|fares?|for ever|in vain|go(es|ne)? on with|put aside|"
    r"told|tells|hears?|heard|asks|asked|sees to|survived)\b",
    re.IGNORECASE,
)
MAX_LINES_WITHOUT_STEPS = 25
MIN_COMMENTS = 2


def list_texts() -> list[Path]:
    """List the files whose words are checked; this one names the words."""
    found = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")]
    for folder in FOLDERS:
        found += sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return [path for path in found if path != Path(__file__).resolve()]


def find_words(text: str) -> Iterator[str]:
    """Yield the lines that hold a forbidden word; names of code count by their parts."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := FORBIDDEN.search(line.replace("_", " ")):
            yield f"{number}: {match.group(0)}"


def find_functions_without_steps(text: str) -> Iterator[str]:
    """Yield the functions of more than 25 lines of code that name no steps in comments."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.start[0] for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        last = node.end_lineno or 0
        if not body or last - body[0].lineno < MAX_LINES_WITHOUT_STEPS:
            continue
        first = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
        if sum((first or 0) < line <= last for line in comments) < MIN_COMMENTS:
            yield f"{node.lineno}: {node.name}"


def test_no_text_uses_a_forbidden_word() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): words
        for path in list_texts()
        if (words := list(find_words(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "folder", ["checkpoints_conversion", "data_tools", "docs", "megatron_eso", "pretrain", "tests"]
)
def test_long_functions_name_their_steps(folder: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix(): functions
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (functions := list(find_functions_without_steps(path.read_text(encoding="utf-8"))))
    }
    assert found == {}
