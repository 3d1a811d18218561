"""The checkpoints of a run: written as training continues, published whole, checked before use.

A save holds the step for a copy to host memory only; a thread on each rank writes it. A checkpoint
gets its name once all ranks' files, with an index of their hashes, are on disk.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_eso.config.loading import config_to_dict
from megatron_eso.config.sections import CheckpointConfig, Config
from megatron_eso.errors import CheckpointError
from megatron_eso.runs.checkpoint_folder import begin, make_newest, publish
from megatron_eso.runs.checkpoint_state import STATE_FILE
from megatron_eso.runs.run_directory import CONFIG_FILE
from megatron_eso.runs.steps import list_checkpoints, step_name, step_number
from megatron_eso.training.checkpointing.files import find_damaged_files, run_on_first, write_files
from megatron_eso.training.checkpointing.staleness import (
    Parts,
    StateSample,
    describe_still,
    find_still,
    refuse_stale,
    take_sample,
)
from megatron_eso.training.checkpointing.state import describe_state, list_parts
from megatron_eso.training.checkpointing.tensor_parts import TensorPart
from megatron_eso.training.steps.batches import TrainingBatches
from megatron_eso.training.steps.train_state import TrainState

LONG_WAIT_SECONDS = 1.0
"""A longer wait for the save before is logged."""

logger = logging.getLogger(__name__)


Documents = Mapping[str, dict[str, Any]]


class Checkpoints:
    """The checkpoints of a run directory; made by all ranks together.

    The process group must outlive a save in the background: `wait` before it ends.

    Args:
        directory: `RUN_DIR/checkpoints`.
        config: Which checkpoints are kept, and how saves are made.
        batches: The run's samples, whose state a checkpoint holds.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, batches: TrainingBatches) -> None:
        self.directory = directory
        self.config = config
        self.batches = batches
        # The collectives of the writing threads must not mix with those of the steps.
        self._group = dist.new_group(backend="gloo")
        self._is_first = self._group.rank() == 0
        self._host = HostCopies()
        self._sample: StateSample | None = None
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def prepare(self, state: TrainState, groups: ProcessGroupCollection) -> None:
        """Take the host memory that saves in the background need, before the first step."""
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

        A kill at any instant leaves the previous one whole and findable. A save waits for the one
        before it. Where there is a checkpoint of this step, nothing is done.

        Args:
            state: To be written.
            config: The run's.
            groups: Of the layout.
            val_nelbo: Of the validation at this step, if there was one.
            in_background: Return once the state is copied; `take_failure` returns how it went.

        Returns:
            The folder that the checkpoint is, or will be.

        Raises:
            CheckpointError: It could not be written, on whichever rank.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if in_background and waited > LONG_WAIT_SECONDS and self._is_first:
            logger.warning(
                "the checkpoint before was still being written: the run waited %.0f s for it; "
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
        """Sample the state, and log which tensors have stood still since the save before."""
        before, self._sample = self._sample, take_sample(state, parts, groups)
        if before is not None:
            decay = 0.0 if state.ema is None else state.ema.decay
            still = find_still(before, self._sample, parts, decay)
            if still:
                logger.error("%s: %s", final.name, describe_still(still))
        return self._sample

    @property
    def is_saving(self) -> bool:
        """Whether a save is running in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in the background, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_failure(self) -> str | None:
        """Return once why the last save in the background failed; the same on every rank."""
        failure, self._failure = self._failure, None
        return failure

    def _write_in_background(
        self, final: Path, parts: Parts, sample: StateSample, documents: Documents
    ) -> None:
        try:
            self._write(final, parts, sample, documents)
        except CheckpointError as error:
            self._failure = str(error)
        except Exception as error:  # another rank has died, or a mistake of ours
            logger.exception("%s could not be saved", final.name)
            self._failure = f"{final.name} could not be saved: {error!r}"

    def _write(self, final: Path, parts: Parts, sample: StateSample, documents: Documents) -> None:
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
            if self._is_first:
                shutil.rmtree(unfinished, ignore_errors=True)  # it may have filled the disk
            raise CheckpointError(f"{final.name} could not be saved: {error}") from error

    def find_valid(self) -> Path | None:
        """Find the newest checkpoint without damage; damaged ones are renamed. Collective.

        Raises:
            CheckpointError: All are damaged.
        """
        return self._find(lambda step: True)

    def find_good(self, last_step: int) -> Path | None:
        """Find the newest valid checkpoint up to a step; later ones are removed. Collective.

        Args:
            last_step: What came after may hold what has made updates fail.

        Returns:
            None where there is none; nothing is removed then.

        Raises:
            CheckpointError: All are damaged.
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
            if self._is_first:
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


class HostCopies:
    """Copies of tensors in host memory, which is kept from one save to the next.

    Fresh memory costs many times what a copy into memory in use does. It is pinned with a GPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def copy(self, parts: Parts) -> Parts:
        """Return the parts with values of their own, which replace those of the last call."""
        copies = {kind: [self._copy_part(part) for part in parts[kind]] for kind in parts}
        torch.cuda.synchronize()
        return copies

    def _copy_part(self, part: TensorPart) -> TensorPart:
        values = part.values
        buffer = self._buffers.get((part.key, part.offsets))
        if buffer is None or buffer.shape != values.shape:
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[part.key, part.offsets] = buffer
        buffer.copy_(values, non_blocking=True)
        return replace(part, values=buffer)
