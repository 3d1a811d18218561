"""Going back to a checkpoint when updates cannot be applied, and past the data that caused it."""

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
    """The ways back of a run.

    Attributes:
        checkpoints: Of the run.
        train: When to go back, and how often.
        optimizer: Of the learning-rate schedule, which starts anew at the checkpoint's step.
        watchdog: Watches the reading.
    """

    checkpoints: Checkpoints
    train: TrainConfig
    optimizer: OptimizerConfig
    watchdog: Watchdog
    _last_step: int | None = field(init=False, default=None)
    """Step of the checkpoint that the run has gone back to last."""

    def is_due(self, counters: Counters) -> bool:
        """Whether enough updates in a row were skipped to go back."""
        return 0 < self.train.max_skipped_in_row <= counters.skipped_in_row

    def go_back(self, state: TrainState) -> None:
        """Continue `state` from a sound checkpoint with later samples; collective over the world.

        From the newest checkpoint before the updates that could not be applied; from one before it
        if the run has just come from that.

        Raises:
            TrainingError: There is none, or the run has gone back often enough.
            CheckpointError: All checkpoints are damaged.
        """
        counters = state.counters
        what = f"{counters.skipped_in_row} updates in a row were skipped"
        if counters.rollbacks >= self.train.max_rollbacks:
            raise TrainingError(
                f"step {counters.step}: {what}, after going back {counters.rollbacks} times "
                f"(train.max_rollbacks): look at the losses before, lower "
                f"optimizer.learning_rate, or start from an older checkpoint"
            )
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
