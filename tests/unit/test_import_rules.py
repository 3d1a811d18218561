"""Imports point one way: which part of the repository may import which.

`config, randomness <- objectives, data, runs <- model <- training <- pretrain`; `sampler` needs
torch alone.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure.modules import PACKAGES, find_imports, find_modules, is_in
from tests.support.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("tests", "slurm", "setup")

ERRORS = ("megatron_eso.errors",)
COMMAND_LINE = ("megatron_eso.command_line",)
COMPRESSION = ("megatron_eso.compression",)
BASE = (
    *ERRORS,
    *COMMAND_LINE,
    *COMPRESSION,
    "megatron_eso.files",
    "megatron_eso.locks",
    "megatron_eso.progress",
    "megatron_eso.quantities",
    "megatron_eso.retries",
)
CONFIG = ("megatron_eso.config",)
SECTIONS = ("megatron_eso.config.sections",)
ORIGINS = ("megatron_eso.config.origins",)
RANKS = ("megatron_eso.ranks",)
RANDOMNESS = ("megatron_eso.randomness",)
BATCHES = ("megatron_eso.batches",)
OBJECTIVES = ("megatron_eso.objectives", *BATCHES)
RUNS = ("megatron_eso.runs",)
ESTIMATES = ("megatron_eso.estimates",)
TOKENIZERS = ("megatron_eso.data.tokenizers",)
FINGERPRINT = ("megatron_eso.data.tokenizers.fingerprint",)
SHARDS = ("megatron_eso.data.shards", *FINGERPRINT)
REMOTE = ("megatron_eso.data.remote", *SHARDS)
SAMPLES = ("megatron_eso.data.samples",)
MODEL = ("megatron_eso.model",)
# The floors of training, from below.
DISTRIBUTED = ("megatron_eso.training.distributed",)
OPTIMIZATION = ("megatron_eso.training.optimization", *DISTRIBUTED)
STEPS = ("megatron_eso.training.steps", *OPTIMIZATION)
GUARDS = ("megatron_eso.training.guards",)
RECORDS = ("megatron_eso.training.records",)
SAMPLER = ("megatron_eso.sampler",)

# Room -> other parts that it may import; the longest name that fits a module counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "megatron_eso.errors": RANKS,
    "megatron_eso.compression": (),
    "megatron_eso.command_line": ("megatron_eso.quantities", *RANKS),
    "megatron_eso.quantities": (),
    "megatron_eso.ranks": (),
    "megatron_eso.retries": (),
    "megatron_eso.locks": ERRORS,
    "megatron_eso.files": (*ERRORS, "megatron_eso.locks"),
    "megatron_eso.progress": ("megatron_eso.quantities",),
    "megatron_eso.config": ERRORS,
    "megatron_eso.randomness": (),
    "megatron_eso.batches": CONFIG,
    "megatron_eso.objectives": ERRORS + CONFIG + RANDOMNESS + BATCHES,
    "megatron_eso.objectives.noise": CONFIG + RANDOMNESS + ("megatron_eso.batches.dealing",),
    "megatron_eso.sensitivity": ERRORS + CONFIG + RANDOMNESS + OBJECTIVES,
    "megatron_eso.runs": ERRORS
    + ("megatron_eso.files", "megatron_eso.locks", "megatron_eso.quantities")
    + (*SECTIONS, "megatron_eso.config.loading"),
    "megatron_eso.estimates": (*ERRORS, "megatron_eso.quantities", *CONFIG, *OBJECTIVES),
    "megatron_eso.data": (),
    "megatron_eso.data.tokenizers": ERRORS,
    "megatron_eso.data.shards": BASE + RANDOMNESS + FINGERPRINT,
    "megatron_eso.data.remote": BASE + SHARDS,
    "megatron_eso.data.samples": ERRORS + SECTIONS + ORIGINS + RANDOMNESS + REMOTE,
    "megatron_eso.model": ERRORS + CONFIG + RANDOMNESS + BATCHES,
    "megatron_eso.training.distributed": ERRORS + RANKS + SECTIONS,
    "megatron_eso.training.optimization": SECTIONS + MODEL + DISTRIBUTED,
    "megatron_eso.training.steps": ERRORS
    + (SECTIONS + ("megatron_eso.config.model",) + RANDOMNESS + OBJECTIVES)
    + (RUNS + SAMPLES + MODEL + OPTIMIZATION),
    "megatron_eso.training.guards": ("megatron_eso.quantities",)
    + (ERRORS + RANKS + SECTIONS + OBJECTIVES + RUNS + STEPS),
    "megatron_eso.training.records": ("megatron_eso.files", "megatron_eso.quantities")
    + (ERRORS + RANKS + ORIGINS + OBJECTIVES + ESTIMATES + RUNS + SAMPLES + STEPS + GUARDS)
    + SECTIONS,
    "megatron_eso.training.records.tags": (),
    "megatron_eso.training.checkpointing": ("megatron_eso.files", "megatron_eso.retries")
    + (ERRORS + RANKS + CONFIG + RUNS + FINGERPRINT + STEPS + GUARDS + RECORDS),
    "megatron_eso.training": ("megatron_eso.progress", "megatron_eso.sensitivity")
    + (ERRORS + RANKS + CONFIG + OBJECTIVES + RUNS + ESTIMATES + SAMPLES),
    "megatron_eso.simulation": (*ERRORS, "megatron_eso.quantities")
    + CONFIG
    + OBJECTIVES
    + ESTIMATES
    + MODEL
    + DISTRIBUTED
    + OPTIMIZATION
    + STEPS,
    "megatron_eso.benchmark": (*ERRORS, "megatron_eso.quantities")
    + (RANKS + SECTIONS + OBJECTIVES + ESTIMATES + SAMPLES + STEPS + RECORDS)
    + ("megatron_eso.simulation",),
    "megatron_eso.sampler": ERRORS + RANDOMNESS + ("megatron_eso.objectives.noise",),
    "megatron_eso.sampler.__main__": ERRORS + COMMAND_LINE + SAMPLER,
    "megatron_eso.sampler.texts": ERRORS + COMMAND_LINE + COMPRESSION + SAMPLER + TOKENIZERS,
    "data_tools": BASE + REMOTE + TOKENIZERS,
    "data_tools.text": BASE + TOKENIZERS,
    "data_tools.builds.output": BASE,
    "data_tools.builds": BASE
    + (SHARDS + TOKENIZERS + RANDOMNESS + ("data_tools.text", "data_tools.builds.output")),
    "data_tools.imports": BASE + SHARDS + TOKENIZERS + ("data_tools.builds.output",),
    "data_tools.reports": BASE
    + (CONFIG + RUNS + REMOTE + TOKENIZERS + SAMPLES + ("data_tools.builds.document_order",)),
    "checkpoints_conversion": ERRORS
    + COMMAND_LINE
    + ("megatron_eso.files",)
    + (CONFIG + RANDOMNESS + RUNS + TOKENIZERS + SAMPLER),
    "checkpoints_conversion.parameter_map": ERRORS + SAMPLER,
    "checkpoints_conversion.network_fields": ERRORS + CONFIG + ("megatron_eso.sampler.network",),
    "pretrain": ("megatron_eso", "checkpoints_conversion"),
}
USES_MEGATRON = (
    "megatron_eso.model",
    "megatron_eso.training",
    "megatron_eso.simulation",
    "megatron_eso.benchmark",
    "pretrain",
)
HOLDS_PARALLEL_STATE = "megatron_eso.training.distributed.parallel"
VAGUE_NAMES = {"utils", "util", "helpers", "common", "misc"}


def find_violations(root: Path) -> list[str]:
    modules = find_modules(root)
    found = []
    for module, source in modules.items():
        part = max((part for part in ALLOWED if is_in(module, (part,))), key=len, default=None)
        if part is None:
            found.append(f"{module}: has no rule in {Path(__file__).name}")
            continue
        if module.rpartition(".")[2] in VAGUE_NAMES:
            found.append(f"{module}: a name that says nothing")
        for target in (found.target for found in find_imports(source, modules)):
            if is_in(target, PACKAGES) and not is_in(target, (part, *ALLOWED[part])):
                found.append(f"{module}: imports {target}")
            if is_in(target, OUTSIDE) or is_in(target, ("megatron.training",)):
                found.append(f"{module}: imports {target}")
            if is_in(target, ("megatron",)) and not is_in(module, USES_MEGATRON):
                found.append(f"{module}: imports {target}")
            is_state = is_in(target, ("megatron.core.parallel_state", "megatron.core.mpu"))
            if is_state and module != HOLDS_PARALLEL_STATE:
                found.append(f"{module}: imports {target}")
    return found


def test_imports_point_one_way() -> None:
    assert len(find_modules(ROOT)) > 10
    assert find_violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "violation"),
    [
        ("megatron_eso/data/shards/x.py", "import megatron.core", "imports megatron.core"),
        ("megatron_eso/batches/rows.py", "import megatron_eso.data.samples.blend", "imports"),
        ("megatron_eso/batches/rows.py", "from ..data import samples", "imports megatron_eso"),
        ("megatron_eso/errors.py", "import megatron_eso.config", "imports megatron_eso.config"),
        ("megatron_eso/sampler/model.py", "from megatron_eso.model import x", "imports"),
        ("megatron_eso/model/block.py", "from megatron.core import parallel_state", "parallel_st"),
        ("megatron_eso/training/loop.py", "import megatron.training.x", "megatron.training"),
        ("megatron_eso/training/loop.py", "import pretrain.train", "imports pretrain.train"),
        ("megatron_eso/training/steps/step.py", "import megatron_eso.training.loop", "imports"),
        ("megatron_eso/training/guards/x.py", "import megatron_eso.training.records", "imports"),
        ("megatron_eso/training/records/x.py", "import megatron_eso.training.job", "imports"),
        ("pretrain/train.py", "from tests.support import world", "imports tests.support"),
        ("megatron_eso/data/shards/utils.py", "", "a name that says nothing"),
        ("megatron_eso/extra.py", "", "has no rule"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, line: str, violation: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"def late():\n    {line or 'pass'}\n", encoding="utf-8")
    found = find_violations(tmp_path)
    assert found
    assert violation in found[0]


@pytest.mark.parametrize(
    ("blocked", "modules"),
    [
        (
            "megatron torch numpy",
            "megatron_eso.config.loading megatron_eso.errors megatron_eso.files "
            "megatron_eso.progress megatron_eso.retries megatron_eso.training.records.tags "
            "megatron_eso.runs.run_directory megatron_eso.runs.checkpoint_state "
            "megatron_eso.runs.restarts pretrain.status",
        ),
        (
            # A run that is refused before its start is refused without an import of torch.
            "megatron torch",
            "megatron_eso.data.samples.training_data megatron_eso.data.remote.copies "
            "megatron_eso.runs.file_index pretrain.train data_tools.__main__",
        ),
        (
            "megatron",
            "megatron_eso.objectives.build megatron_eso.data.samples.training_data "
            "megatron_eso.estimates.dry_run "
            "megatron_eso.sampler megatron_eso.runs.torch_dist "
            "checkpoints_conversion.parameter_map",
        ),
    ],
)
def test_parts_import_without(blocked: str, modules: str) -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {blocked.split()!r}: sys.modules[name] = None\n"
        f"for name in {modules.split()!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=HANG_SECONDS)
