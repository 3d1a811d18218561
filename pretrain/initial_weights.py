"""Initial weights from a sampler directory, made readable as a run's checkpoint."""

import shutil
from pathlib import Path

from checkpoints_conversion.conversions import convert_to_megatron
from checkpoints_conversion.sampler_directory import is_sampler_directory
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import newest


def convert_initial_weights(init_from: str | None, run: RunDirectory) -> None:
    """Convert `checkpoint.init_from` to `RUN_DIR/init_from`, if it is a sampler directory.

    The conversion is made anew at each start until the run has a checkpoint of its own, and then
    removed. On rank 0, which holds the run's directory.

    Raises:
        CheckpointError: The sampler directory is damaged.
    """
    shutil.rmtree(run.initial, ignore_errors=True)
    is_new = newest(run.checkpoints) is None
    if is_new and init_from is not None and is_sampler_directory(Path(init_from)):
        convert_to_megatron(Path(init_from), run.initial)
