"""docs/cluster.md and the job scripts: a shell reads the commands, and the layouts can be dealt."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config
from megatron_eso.estimates.dry_run import format_dry_run

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", GUIDE, re.M | re.S)
LAYOUTS = re.findall(r"^\| ([\w., ]+) \| (\d+) \| `([^`]+)` \|$", GUIDE, re.M)
SCRIPTS = sorted((ROOT / "slurm").glob("*.s*"))
VARIABLES = re.compile(r"^\| `([A-Z_]+)`(?:, `([A-Z_]+)`)? \|", re.M)


def read_as_shell(text: str) -> str:
    checked = subprocess.run(
        ["bash", "-n"], input=text, capture_output=True, text=True, check=False, timeout=600
    )
    return checked.stderr


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_commands_are_shell(number: int) -> None:
    assert read_as_shell(BLOCKS[number]) == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    assert read_as_shell(script.read_text(encoding="utf-8")) == ""


def test_commands_of_the_repository_name_the_interpreter_that_was_installed() -> None:
    """The guide activates no environment, so a bare `python` would be another one."""
    assert [block for block in BLOCKS if re.search(r"(^|[ '])python ", block)] == []


@pytest.mark.parametrize(("model", "num_gpus", "arguments"), LAYOUTS)
def test_layouts_can_be_dealt(model: str, num_gpus: str, arguments: str) -> None:
    loaded = load_config([*arguments.split(), "data.vocab_size=50258"], folder=SHIPPED_CONFIGS)
    assert f"# layout: {num_gpus} ranks" in format_dry_run(loaded, int(num_gpus))


def test_there_are_layouts_and_variables() -> None:
    assert len(LAYOUTS) > 5
    script = (ROOT / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    described = {name for names in VARIABLES.findall(GUIDE) for name in names if name}
    assert described >= set(re.findall(r"^#   ([A-Z_]+)  ", script, re.M)) - {"CHAIN"}
