"""The checkpoints of a run: written beside the training, published atomically, checked before use.

A save holds the step for a copy to host memory only; a thread on each rank writes it. A checkpoint
gets its name once all ranks' files, with an index of their hashes, are on disk.
"""

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_eso.config import CheckpointConfig, Config
from megatron_eso.config_io import config_to_dict, read_config
from megatron_eso.data.batches import TrainingBatches
from megatron_eso.data.manifest import TokenizerFingerprint
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.files import sync_path, write_atomically
from megatron_eso.training.checkpoint_files import find_damaged_files, run_on_first, write_files
from megatron_eso.training.checkpoint_pieces import Piece
from megatron_eso.training.checkpoint_state import (
    describe,
    list_pieces,
    load_training_state,
    load_weights,
    read_state_json,
)
from megatron_eso.training.run_directory import list_checkpoints
from megatron_eso.training.train_state import TrainState

WEIGHTS_KEYS = ("model.", "data.vocab_size", "data.mask_token_id")
RUN_KEYS = ("model.", "run.seed", "data.sequence_length", "data.framing")
# These shape neither tensors nor what they mean.
FREE_MODEL_KEYS = (
    "model.hidden_dropout",
    "model.init_method_std",
    "model.zero_init_head",
    "model.fp32_residual_connection",
)

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run directory; made by all ranks together.

    Args:
        directory: `RUN_DIR/checkpoints`.
        config: Says which checkpoints are kept.
        batches: The run's samples, whose state a checkpoint holds.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, batches: TrainingBatches) -> None:
        self.directory = directory
        self.config = config
        self.batches = batches
        # The writing threads must not meet the collectives of the steps.
        self._group = dist.new_group(backend="gloo")
        self._host = HostCopies()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        steps = list_checkpoints(self.directory)
        return steps[-1] if steps else None

    def prepare(self, state: TrainState, groups: ProcessGroupCollection) -> None:
        """Take the host memory that saving beside the training needs, before the first step."""
        self._host.copy(list_pieces(state, groups))

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
        before it.

        Args:
            state: To be written.
            config: The run's.
            groups: Of the layout.
            val_nelbo: Of the validation at this step, if there was one.
            in_background: Return once the state is copied; `wait` tells how it went.

        Returns:
            The folder that the checkpoint is, or will be.

        Raises:
            CheckpointError: It could not be written, on whichever rank.
        """
        self.wait()
        final = self.directory / f"step_{state.counters.step:08d}"
        if final.exists():
            return final
        pieces = list_pieces(state, groups)
        documents = {
            "config.json": config_to_dict(config),
            "state.json": describe(state) | {"val_nelbo": val_nelbo} | self.batches.state,
        }
        if not in_background:
            self._write(final, pieces, documents)
            return final
        pieces = self._host.copy(pieces)

        def write() -> None:
            try:
                self._write(final, pieces, documents)
            except CheckpointError as error:
                self._failure = str(error)

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        return final

    @property
    def is_saving(self) -> bool:
        """Whether a save goes on in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in the background, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_failure(self) -> str | None:
        """Why the last save in the background failed, told once; the same on every rank."""
        failure, self._failure = self._failure, None
        return failure

    def _write(
        self, final: Path, pieces: list[Piece], documents: dict[str, dict[str, Any]]
    ) -> None:
        partial = final.with_suffix(".tmp")

        def make_folder() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

        def publish() -> None:
            partial.replace(final)
            sync_path(self.directory)
            write_atomically(self.directory / "latest", final.name + "\n")
            self._remove_old()

        try:
            run_on_first(self._group, make_folder)
            write_files(partial, pieces, documents, self._group)
            run_on_first(self._group, publish)
        except CheckpointError as error:
            if self._group.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # perhaps it has filled the disk
            raise CheckpointError(f"{final.name} could not be saved: {error}") from error

    def _remove_old(self) -> None:
        for doomed in set(list_checkpoints(self.directory)) - self._list_kept():
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed.replace(doomed.with_suffix(".deleting"))
        for pattern in ("step_*.deleting", "step_*.tmp"):
            for doomed in self.directory.glob(pattern):
                shutil.rmtree(doomed)

    def _list_kept(self) -> set[Path]:
        """The last ones, every n-th, and the best."""
        steps = list_checkpoints(self.directory)
        kept = set(steps[-self.config.keep_last :])
        every = self.config.keep_every
        kept |= {step for step in steps if every and int(step.name[5:]) % every == 0}
        if self.config.keep_best:
            scored = [(read_state_json(step).get("val_nelbo"), step) for step in steps]
            best = min(((nelbo, step) for nelbo, step in scored if nelbo is not None), default=None)
            kept |= {best[1]} if best else set()
        return kept

    def find_valid(self) -> Path | None:
        """The newest checkpoint without damage; damaged ones are put aside. Collective.

        Raises:
            CheckpointError: All are damaged.
        """
        steps = list_checkpoints(self.directory)
        damaged: list[Path] = []
        for step in reversed(steps):
            problems = find_damaged_files(step)
            if not problems:
                self._put_aside(damaged)
                return step
            logger.warning(
                "%s is damaged: %s%s; falling back to an older one",
                step,
                problems[0],
                f" and {len(problems) - 1} more" if problems[1:] else "",
            )
            damaged.append(step)
        if damaged:
            raise CheckpointError(
                f"{self.directory}: all checkpoints are damaged: restore one, or move the folder "
                f"away to start again"
            )
        return None

    def _put_aside(self, damaged: list[Path]) -> None:
        """Keep them for whoever wants to look, under a name that is no checkpoint's."""

        def rename() -> None:
            for step in damaged:
                shutil.rmtree(step.with_suffix(".damaged"), ignore_errors=True)
                step.replace(step.with_suffix(".damaged"))

        run_on_first(self._group, rename)


class HostCopies:
    """Copies of tensors in host memory, which is kept from one save to the next.

    Fresh memory costs many times what a copy into memory in use does. It is pinned with a GPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def copy(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces with values of their own, in place of the last ones that were given."""
        copies = []
        for piece in pieces:
            values = piece.values
            buffer = self._buffers.get((piece.key, piece.offsets))
            if buffer is None or buffer.shape != values.shape:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                self._buffers[piece.key, piece.offsets] = buffer
            buffer.copy_(values, non_blocking=True)
            copies.append(Piece(piece.key, piece.global_shape, piece.offsets, buffer))
        torch.cuda.synchronize()
        return copies


def restore(state: TrainState, config: Config, checkpoints: Checkpoints) -> None:
    """Continue from the run's newest checkpoint, or start as configured; collective over the world.

    Raises:
        CheckpointError: The checkpoint is damaged or of another format.
        ConfigError: It is of another model, seed or data than the configuration.
    """
    newest = checkpoints.find_valid()
    if newest is None and config.checkpoint.init_from is None:
        logger.info("starting from fresh weights, seed %d", config.run.seed)
        return
    if newest is None:
        source = find_checkpoint(Path(str(config.checkpoint.init_from)))
        refuse_damage(source)
        check_initial_weights(source, config, checkpoints.batches.data.tokenizer)
        load_weights(source, state)
        if state.ema is not None:
            state.ema.restart()
        logger.info("starting from the weights of %s; optimizer and counters are fresh", source)
        return
    record = read_state_json(newest)
    if record["kind"] != "training":
        check_same(newest, config, WEIGHTS_KEYS)
    else:
        check_same(newest, config, RUN_KEYS)
        checkpoints.batches.resume(record, str(newest))
    load_training_state(newest, state)
    state.scheduler.step(state.counters.step)
    logger.info("resuming from %s, step %d", newest, state.counters.step)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest of a run directory.

    Raises:
        ConfigError: There is none.
    """
    if (path / "state.json").exists():
        return path
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise ConfigError(
            f"checkpoint.init_from = {path}: holds no checkpoint; name a run directory, or one of "
            f"its checkpoints/step_* folders"
        )
    return found[-1]


def refuse_damage(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are not those of its index; collective over the world.

    Raises:
        CheckpointError: Names the first damaged file.
    """
    problems = find_damaged_files(checkpoint)
    if problems:
        raise CheckpointError(f"{problems[0]}; take another checkpoint than {checkpoint}")


def check_initial_weights(
    checkpoint: Path, config: Config, tokenizer: TokenizerFingerprint
) -> None:
    """Refuse weights of another model, or of another tokenizer unless that is deliberate.

    Raises:
        CheckpointError: The checkpoint's state cannot be read.
        ConfigError: One line with key, both values and the remedy.
    """
    if config.checkpoint.init_other_tokenizer:
        check_same(checkpoint, config, ("model.", "data.vocab_size"))
        return
    data = read_state_json(checkpoint).get("data")
    if data is not None and data["tokenizer"] != tokenizer.identity:
        raise ConfigError(
            f"checkpoint.init_from = {checkpoint}: these weights were trained with another "
            f"tokenizer (pieces {data['tokenizer']['pieces_sha256'][:12]}, not "
            f"{tokenizer.pieces_sha256[:12]}): name shards of theirs, or set "
            f"checkpoint.init_other_tokenizer = true if their embeddings may mean other tokens"
        )
    check_same(checkpoint, config, WEIGHTS_KEYS)


def check_same(checkpoint: Path, config: Config, keys: tuple[str, ...]) -> None:
    """Refuse a configuration that changes what a checkpoint fixes, and log what else it changes.

    Raises:
        ConfigError: One line with key, both values and the remedy.
    """
    old = _flatten(config_to_dict(read_config(checkpoint / "config.json")))
    new = _flatten(config_to_dict(config))
    for key in sorted(old.keys() & new.keys()):
        if old[key] == new[key]:
            continue
        if key.startswith(keys) and key not in FREE_MODEL_KEYS:
            raise ConfigError(
                f"{key} = {new[key]!r}, but {checkpoint} was written with {old[key]!r}: a resumed "
                f"run keeps it; restore the value or choose another run.directory"
            )
        logger.info("changed since %s: %s: %r -> %r", checkpoint.name, key, old[key], new[key])


def _flatten(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, section in sections.items()
        if isinstance(section, dict)
        for key, value in section.items()
    }
