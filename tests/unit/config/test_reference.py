"""The references of the configuration in `docs` agree with the code."""

import ast
import inspect
import itertools
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from megatron_eso.config.keys import describe_keys
from megatron_eso.config.reference import format_reference, read_meanings
from megatron_eso.config.sections import KEYS, SECTIONS
from tests.support.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
REMEDY = "python -m megatron_eso.config.reference > docs/configuration.md"


def test_every_key_has_a_line_of_its_own() -> None:
    for name, section in SECTIONS.items():
        meanings = read_meanings(section)
        assert set(meanings) == {key.name for key in describe_keys(name, section)}
        assert all(text.endswith(".") and "|" not in text for text in meanings.values())


@pytest.mark.parametrize("section", SECTIONS.values())
def test_a_key_is_one_line_and_its_docstring_another(section: type) -> None:
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    lines = [
        (node.lineno, node.end_lineno, following.lineno, following.end_lineno)
        for node, following in itertools.pairwise(definition.body)
        if isinstance(node, ast.AnnAssign)
    ]
    assert len(lines) == len(describe_keys("", section))
    assert all((end, start, last) == (line, line + 1, line + 1) for line, end, start, last in lines)


def test_the_reference_is_the_output_of_the_code() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == format_reference(), f"run {REMEDY}"
    command = [sys.executable, "-m", "megatron_eso.config.reference"]
    assert subprocess.check_output(command, text=True, cwd=ROOT, timeout=HANG_SECONDS) == written


def test_the_reference_says_what_a_line_of_the_code_says() -> None:
    rows = format_reference().splitlines()
    for row in (
        "| `model.rotary_base` | int | `10000` | > 0 | fixed | logged | "
        "Base of the rotary position embedding. |",
        '| `objective.loss_type` | `elbo`, `low_var` | `"elbo"` |  | free | logged | '
        "Weight of a masked token in the diffusion phase: of the bound, or 1. "
        "Only for `eso_lm`, `mdlm`. |",
        "| `optimizer.adam_eps` | float | `1e-08` | > 0, <= 1 | free | free | "
        "Added to the root of the mean square. |",
        "| `watchdog.validation_seconds` | float | `3600.0` | >= 0, <= 1000000000 | free | free | "
        "Deadline of a validation. |",
        "| `data.train` | str or list of str | required |  | free | free | "
        "Directory or URL of the training shards, or a list of them: a blend of corpora. |",
        "| `optimizer.ema_decay` | float | `0.0` | >= 0, < 1 | free | free | "
        "Decay of the moving average of the weights; 0: none is kept. |",
    ):
        assert row in rows
    assert len([row for row in rows if row.startswith("| `")]) == len(KEYS)


def test_the_document_names_the_keys_that_a_resumed_run_keeps() -> None:
    document = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert "(configuration.md)" in document
    (row,) = re.findall(r"^\| refused \| (.+) \|$", document, re.MULTILINE)
    kept, _, free = row.partition(" but ")
    patterns, exceptions = (re.findall(r"`([\w.*]+)`", part) for part in (kept, free))
    named = {path for path in KEYS if any(fnmatch(path, pattern) for pattern in patterns)}
    assert named - set(exceptions) == {path for path, key in KEYS.items() if key.is_frozen("run")}
    assert set(exceptions) <= named
