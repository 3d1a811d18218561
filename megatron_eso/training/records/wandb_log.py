"""Sends the curves to Weights & Biases as well, if `run.wandb_project` names a project.

Its environment variables apply (WANDB_MODE=offline, WANDB_API_KEY, WANDB_ENTITY ...). A failure of
it never ends a run.
"""

import importlib
import importlib.util
import logging
import uuid
from pathlib import Path
from typing import Any

from megatron_eso.config.origins import TracedConfig
from megatron_eso.files import write_text

ID_FILE = "wandb_id"

logger = logging.getLogger(__name__)


def check_wandb(traced: TracedConfig) -> None:
    """Refuse a project if the package wandb is missing.

    Raises:
        ConfigError: The package is missing; the message names the extra to install.
    """
    traced.require(
        traced.config.run.wandb_project is None or importlib.util.find_spec("wandb") is not None,
        "run.wandb_project",
        "the package wandb is not installed; pip install 'megatron-eso[wandb]', or leave the key "
        "out",
    )


class WandbLog:
    """The W&B run of all jobs of a run directory.

    It keeps the first values of a step; a resumed run repeats the same values.

    Args:
        folder: The run directory.
        project: The project of the run.
        config: The configuration to show.
    """

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")  # an extra
        self._run: Any = None
        path = folder / ID_FILE
        if not path.exists():
            write_text(path, uuid.uuid4().hex[:16] + "\n")
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=path.read_text().strip(),
                resume="allow",
                dir=str(folder),
                config=config,
            )
        except Exception as error:  # no network, no key, a service that is down
            logger.warning("Weights & Biases: %s; the run continues without it", error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values by tag."""
        if self._run is None:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:
            logger.warning("Weights & Biases: %s; the run continues without it", error)
            self._run = None

    def close(self) -> None:
        """Send the rest."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            logger.warning("Weights & Biases: %s", error)
