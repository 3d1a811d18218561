"""Opens the order of a run's samples, from its directory or its configuration."""

from collections.abc import Sequence
from pathlib import Path

from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config, read_config
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.errors import DataError
from megatron_eso.runs.checkpoint_state import STATE_FILE, read_checkpoint_state
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import newest


def open_run_order(arguments: Sequence[str]) -> tuple[Config, TrainingData]:
    """Open a run's configuration and the order of its samples.

    If the run has a checkpoint, the order continues from the newest one.

    Args:
        arguments: A run directory, or configuration layers and overrides as for training.

    Raises:
        ConfigError: The configuration is wrong, or does not continue the run.
        CheckpointError: The checkpoint is damaged.
        DataError: A corpus is missing or damaged, or the checkpoint states no order of samples.
    """
    is_run = len(arguments) == 1 and Path(arguments[0]).is_dir()
    if is_run:
        run = RunDirectory(Path(arguments[0]))
        config = read_config(run.config)
    else:
        config = load_config(arguments, folder=SHIPPED_CONFIGS).config
        run = RunDirectory(Path(config.run.directory))
    data = TrainingData.open(config.data, config.run.seed)
    checkpoint = newest(run.checkpoints)
    if checkpoint is None:
        return config, data
    state = read_checkpoint_state(checkpoint)
    if state.data is None:
        raise DataError(
            f"{checkpoint / STATE_FILE}: states no order of samples; name another run.directory"
        )
    consumed_samples = state.counters.consumed_samples
    data.resume(state.data, consumed_samples=consumed_samples, source=str(checkpoint))
    return config, data
