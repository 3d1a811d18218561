"""Writes the checkpoints of a run in the background, and finds the newest one without damage.

A save stops the steps only for a copy to host memory; then a thread on each rank writes the files.
A checkpoint gets its name when all ranks' files, and an index of their hashes, are on disk.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.loading import config_to_dict
from megatron_eso.config.sections import CheckpointConfig, Config
from megatron_eso.errors import CheckpointError
from megatron_eso.ranks import is_first_rank
from megatron_eso.runs.checkpoint_folder import begin, make_newest, publish
from megatron_eso.runs.checkpoint_state import STATE_FILE
from megatron_eso.runs.run_directory import CONFIG_FILE
from megatron_eso.runs.steps import list_checkpoints, step_name, step_number
from megatron_eso.training.checkpointing.files import find_damaged_files, run_on_first, write_files
from megatron_eso.training.checkpointing.host_copies import HostCopies
from megatron_eso.training.checkpointing.staleness import (
    Parts,
    StateSample,
    describe_still,
    find_still,
    refuse_stale,
    take_sample,
)
from megatron_eso.training.checkpointing.state import describe_state, list_parts
from megatron_eso.training.steps.batches import TrainingBatches
from megatron_eso.training.steps.train_state import TrainState

LONG_WAIT_SECONDS = 1.0
"""A wait for the previous save is logged if it is longer than this."""

logger = logging.getLogger(__name__)


Documents = Mapping[str, dict[str, Any]]


class Checkpoints:
    """The checkpoints of a run directory.

    Construction is collective over the world. Call `wait` before the process group is destroyed,
    because a save in the background uses it.

    Args:
        directory: `RUN_DIR/checkpoints`.
        config: The section `checkpoint`: which checkpoints are kept, and how they are written.
        batches: The run's samples; a checkpoint records their state.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, batches: TrainingBatches) -> None:
        self.directory = directory
        self.config = config
        self.batches = batches
        # The writing threads need their own group: their collectives run during the steps.
        self._group = dist.new_group(backend="gloo")
        self._host = HostCopies()
        self._sample: StateSample | None = None
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def prepare(self, state: TrainState, groups: ProcessGroupCollection) -> None:
        """Allocate the host memory for saves in the background; call it before the first step."""
        if self.config.async_save and (self.config.interval or self.config.interval_minutes):
            self._host.copy(list_parts(state, groups))

    def save(
        self,
        state: TrainState,
        config: Config,
        groups: ProcessGroupCollection,
        *,
        val_nelbo: float | None = None,
        in_background: bool = False,
    ) -> Path:
        """Write and publish a checkpoint of `state`; collective over the world.

        If the process is killed at any instant, the previous checkpoint is still complete and is
        found. A save first waits for the previous one. If a checkpoint of this step exists, nothing
        is written.

        Args:
            state: The state to write.
            config: The run's configuration, which is written too.
            groups: The groups of the layout.
            val_nelbo: The NELBO of the validation at this step, in nats per token; None without
                one.
            in_background: Return as soon as the state is copied. `take_failure` then returns
                whether the save failed.

        Returns:
            The checkpoint's folder, which may not exist yet if `in_background`.

        Raises:
            CheckpointError: Any rank could not write its files.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if in_background and waited > LONG_WAIT_SECONDS and is_first_rank():
            logger.warning(
                "the previous checkpoint was still being written: the run waited %.0f s for it; "
                "a longer checkpoint.interval avoids that",
                waited,
            )
        final = self.directory / step_name(state.counters.step)
        parts = list_parts(state, groups)
        sample = self._sample_state(final, state, parts, groups)
        documents = {
            CONFIG_FILE: config_to_dict(config),
            STATE_FILE: describe_state(state, self.batches.state, val_nelbo).to_json(),
        }
        if in_background:
            arguments = (final, self._host.copy(parts), sample, documents)
            self._thread = threading.Thread(
                target=self._write_in_background, args=arguments, name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(final, parts, sample, documents)
        return final

    def _sample_state(
        self, final: Path, state: TrainState, parts: Parts, groups: ProcessGroupCollection
    ) -> StateSample:
        """Sample the state, and log which tensors have not changed since the previous save."""
        before, self._sample = self._sample, take_sample(state, parts, groups)
        if before is not None:
            decay = 0.0 if state.ema is None else state.ema.decay
            still = find_still(before, self._sample, parts, decay)
            if still:
                logger.error("%s: %s", final.name, describe_still(still))
        return self._sample

    @property
    def is_saving(self) -> bool:
        """Return whether a save is running in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the save in the background has ended, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_failure(self) -> str | None:
        """Return why the last save in the background failed, and forget it; equal on all ranks."""
        failure, self._failure = self._failure, None
        return failure

    def _write_in_background(
        self, final: Path, parts: Parts, sample: StateSample, documents: Documents
    ) -> None:
        try:
            self._write(final, parts, sample, documents)
        except CheckpointError as error:
            self._failure = str(error)
        except Exception as error:  # another rank has died, or the code has a bug
            logger.exception("%s could not be saved", final.name)
            self._failure = f"{final.name} could not be saved: {error!r}"

    def _write(self, final: Path, parts: Parts, sample: StateSample, documents: Documents) -> None:
        """Write and publish a checkpoint; collective over the group of the saves."""
        unfinished = final.with_suffix(".tmp")
        own = [part for of_kind in parts.values() for part in of_kind]
        num_bytes = torch.tensor(sum(part.values.nbytes for part in own))

        def start() -> bool:
            is_new = not final.exists()
            if is_new:
                begin(unfinished, int(num_bytes))
            return is_new

        try:
            dist.all_reduce(num_bytes, group=self._group)
            if run_on_first(self._group, start):
                check = partial(refuse_stale, sample, parts)
                write_files(unfinished, own, documents, self._group, check)
                run_on_first(self._group, partial(publish, unfinished, final, self.config))
        except CheckpointError as error:
            if is_first_rank():
                # The unfinished folder may be what fills the disk.
                shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(f"{final.name} could not be saved: {error}") from error

    def find_valid(self) -> Path | None:
        """Find the newest checkpoint without damage, and rename damaged ones to `*.damaged`.

        Collective over the world.

        Returns:
            None if the run has no checkpoint.

        Raises:
            CheckpointError: All checkpoints are damaged.
        """
        return self._find(lambda step: True)

    def find_good(self, last_step: int) -> Path | None:
        """Find the newest checkpoint without damage up to a step, and remove later ones.

        Collective over the world.

        Args:
            last_step: Later checkpoints may hold the values that make updates fail.

        Returns:
            None if there is no such checkpoint; then nothing is removed.

        Raises:
            CheckpointError: All checkpoints are damaged.
        """
        return self._find(lambda step: step <= last_step)

    def _find(self, is_wanted: Callable[[int], bool]) -> Path | None:
        self.wait()
        damaged: list[Path] = []
        unwanted: list[Path] = []
        for step in reversed(run_on_first(self._group, lambda: list_checkpoints(self.directory))):
            if not is_wanted(step_number(step)):
                unwanted.append(step)
                continue
            problems = find_damaged_files(step, self._group)
            if not problems:
                run_on_first(self._group, partial(make_newest, step, damaged, unwanted))
                return step
            damaged.append(step)
            if is_first_rank():
                more = f" and {len(problems) - 1} more" if problems[1:] else ""
                logger.warning(
                    "%s is damaged: %s%s; falling back to an older one", step, problems[0], more
                )
        if damaged and not unwanted:
            raise CheckpointError(
                f"{self.directory}: all checkpoints are damaged: restore one, or move the folder "
                f"away to start again"
            )
        return None
