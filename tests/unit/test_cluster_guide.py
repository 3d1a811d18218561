"""docs/cluster.md and the job scripts: a shell reads the commands, and the layouts can be dealt."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config
from megatron_eso.estimates.dry_run import format_dry_run
from megatron_eso.estimates.memory import estimate_stages
from megatron_eso.quantities import GIB
from tests.support.planning import objective_of
from tests.support.shipped import VOCABULARY, load_shipped

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", GUIDE, re.M | re.S)
LAYOUTS = re.findall(
    r"^\| [\w., ]+ \| (\d+) \| `([^`]+)` \| ([\d.]+) \| ([\d,]+) \| ([\d,]+) \|$", GUIDE, re.M
)
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


@pytest.mark.parametrize(("num_gpus", "arguments", "memory", "speed", "gpu_hours"), LAYOUTS)
def test_layouts_can_be_dealt_and_cost_what_the_table_says(
    num_gpus: str, arguments: str, memory: str, speed: str, gpu_hours: str
) -> None:
    layers, world_size = arguments.split(), int(num_gpus)
    loaded = load_config([*layers, "data.vocab_size=32001"], folder=SHIPPED_CONFIGS)
    assert f"# layout: {num_gpus} ranks" in format_dry_run(loaded, world_size)
    # The table's memory is the simulator's, to which other tests hold the dry run within 5 %.
    config = load_shipped(*layers)
    data_parallel_size = world_size // config.parallel.model_parallel_size
    stages = estimate_stages(config, VOCABULARY, objective_of(config), data_parallel_size)
    assert float(memory) * GIB == pytest.approx(max(each.total for each in stages), rel=0.055)
    # Its hours are those of its speed.
    train = config.train
    tokens = train.num_steps * train.global_batch_size * config.data.sequence_length
    hours = tokens / float(speed.replace(",", "")) / 3600
    assert float(gpu_hours.replace(",", "")) == pytest.approx(hours, rel=0.002)


def test_there_are_layouts_and_variables() -> None:
    assert len(LAYOUTS) > 5
    script = (ROOT / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    described = {name for names in VARIABLES.findall(GUIDE) for name in names if name}
    assert described >= set(re.findall(r"^#   ([A-Z_]+)  ", script, re.M)) - {"CHAIN"}
