"""Converts initial weights of a sampler directory to a checkpoint that a run can load."""

import shutil
from pathlib import Path

from checkpoints_conversion.conversions import convert_to_megatron
from checkpoints_conversion.sampler_directory import is_sampler_directory
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import newest


def convert_initial_weights(init_from: str | None, run: RunDirectory) -> None:
    """Convert `checkpoint.init_from` to `RUN_DIR/init_from` if it is a sampler directory.

    Rank 0 calls this, since it writes the run directory. Each start converts again until the run
    has a checkpoint; after that, the conversion is removed.

    Args:
        init_from: Value of `checkpoint.init_from`.
        run: The run directory.

    Raises:
        CheckpointError: The sampler directory is damaged.
    """
    shutil.rmtree(run.initial, ignore_errors=True)
    is_new = newest(run.checkpoints) is None
    if is_new and init_from is not None and is_sampler_directory(Path(init_from)):
        convert_to_megatron(Path(init_from), run.initial)
