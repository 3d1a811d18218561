"""Goes back to an earlier checkpoint when updates are skipped, and leaves out the later samples."""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path

from megatron_eso.config.sections import OptimizerConfig, TrainConfig
from megatron_eso.errors import TrainingError
from megatron_eso.runs.counters import Counters
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.state import load_training_state
from megatron_eso.training.guards.watchdog import Watchdog
from megatron_eso.training.optimization.optimizer import build_scheduler
from megatron_eso.training.records.log import log_once
from megatron_eso.training.steps.train_state import TrainState

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Rollbacks:
    """The rollbacks of a run: when they are due, and which checkpoint is used.

    Attributes:
        checkpoints: The run's checkpoints.
        train: The section `train`: when to go back, and how often.
        optimizer: The section `optimizer`: the learning-rate schedule, which is built again.
        watchdog: Limits the time for reading a checkpoint.
    """

    checkpoints: Checkpoints
    train: TrainConfig
    optimizer: OptimizerConfig
    watchdog: Watchdog
    _last_step: int | None = field(init=False, default=None)
    """The step of the checkpoint that the last rollback used."""

    def is_due(self, counters: Counters) -> bool:
        """Return whether so many updates in a row were skipped that the run has to go back."""
        return 0 < self.train.max_skipped_in_row <= counters.skipped_in_row

    def go_back(self, state: TrainState) -> None:
        """Load an earlier checkpoint, and continue with later samples; collective over the world.

        It is the newest checkpoint before the skipped updates. If the last rollback used that one,
        it is the checkpoint before it, where there is one.

        Raises:
            TrainingError: There is no such checkpoint, or the run has gone back
                `train.max_rollbacks` times.
            CheckpointError: All checkpoints are damaged.
        """
        # Refuse to go back without end.
        counters = state.counters
        what = f"{counters.skipped_in_row} updates in a row were skipped"
        if counters.rollbacks >= self.train.max_rollbacks:
            raise TrainingError(
                f"step {counters.step}: {what}, after going back {counters.rollbacks} times "
                f"(train.max_rollbacks): look at the losses before, lower "
                f"optimizer.learning_rate, or start from an older checkpoint"
            )
        # Load the checkpoint, and start the schedule at its step.
        with self.watchdog.deadline("checkpoint", "to go back to"):
            checkpoint = self._find(counters.step - counters.skipped_in_row)
            if checkpoint is None:
                raise TrainingError(
                    f"step {counters.step}: {what}, and there is no checkpoint to go back to: "
                    f"lower optimizer.learning_rate, or look at the losses before"
                )
            load_training_state(checkpoint, state)
            restored = state.counters
            state.scheduler = build_scheduler(self.optimizer, self.train.num_steps, state.optimizer)
            state.scheduler.step(restored.step)
        # The samples that were consumed stay consumed.
        self._last_step = restored.step
        state.counters = dataclasses.replace(
            restored,
            consumed_samples=counters.consumed_samples,
            rollbacks=counters.rollbacks + 1,
            skipped_in_row=0,
        )
        log_once(
            logger,
            logging.WARNING,
            f"{what}: went back from step {counters.step} to {checkpoint.name}; samples "
            f"{restored.consumed_samples} to {counters.consumed_samples - 1} are left out",
        )

    def _find(self, last_applied: int) -> Path | None:
        checkpoint = None
        if self._last_step == last_applied:
            checkpoint = self.checkpoints.find_good(last_applied - 1)
        return checkpoint or self.checkpoints.find_good(last_applied)
