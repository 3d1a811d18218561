"""The order of a run's samples, from its directory or from what its training is given."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_eso.config.loading import load_config, read_config
from megatron_eso.config.sections import Config
from megatron_eso.config.shipped import SHIPPED_CONFIGS
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.errors import DataError


def open_run_order(arguments: Sequence[str]) -> tuple[Config, TrainingData]:
    """A run's configuration and order, continued from the newest checkpoint where there is one.

    Args:
        arguments: a run directory, or what training is given.

    Raises:
        ConfigError: the configuration does not hold together, or does not continue the run.
        DataError: a corpus or the checkpoint is missing or damaged.
    """
    is_run = len(arguments) == 1 and Path(arguments[0]).is_dir()
    if is_run:
        config = read_config(Path(arguments[0]) / "config.json")
        run = Path(arguments[0])
    else:
        config = load_config(arguments, folder=SHIPPED_CONFIGS).config
        run = Path(config.run.directory)
    data = TrainingData.open(config.data, config.run.seed)
    try:
        newest = (run / "checkpoints" / "latest").read_text().strip()
    except FileNotFoundError:
        return config, data
    checkpoint = run / "checkpoints" / newest
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        order, consumed_samples = state["data"], state["consumed_samples"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{checkpoint / 'state.json'}: tells no order of samples ({error!r}); "
            "name another run.directory"
        ) from error
    data.resume(
        order,
        consumed_samples=consumed_samples,
        source=str(checkpoint),
    )
    return config, data
