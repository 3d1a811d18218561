"""Distributed checkpoints: one format for every layout, and published atomically.

A checkpoint holds float32 tensors under the model's global names: the main parameters by their own
names, Adam's moments under `optimizer.state.{exp_avg,exp_avg_sq}.`, the EMA under `ema.`, a tied
embedding once. The weights that a bf16 model computes with are its main parameters rounded, so they
are not stored. Megatron-Core's own optimizer format differs between its optimizers, and its
distributed one cannot be loaded into torch's Adam; this one is read by any of them on any layout.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from megatron_eso.config import Config
from megatron_eso.config_io import config_to_dict, read_config
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.files import sync_path, sync_tree, write_atomically, write_json
from megatron_eso.safe_pickle import read_checkpoint_metadata
from megatron_eso.training.main_parameters import (
    MainParameter,
    gather_owned,
    publish_main_parameters,
)
from megatron_eso.training.run_directory import list_checkpoints
from megatron_eso.training.train_state import Counters, TrainState

FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS_KEYS = ("model.", "data.vocab_size", "data.mask_token_id")
RUN_KEYS = (*WEIGHTS_KEYS, "run.seed", "data.sequence_length")
# These shape neither tensors nor what they mean.
FREE_MODEL_KEYS = (
    "model.hidden_dropout",
    "model.init_method_std",
    "model.zero_init_head",
    "model.fp32_residual_connection",
)
PREFIXES = {"param": "", "ema": "ema."} | {name: f"optimizer.state.{name}." for name in MOMENTS}


logger = logging.getLogger(__name__)


class DirectSaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's torch_dist format, written by each rank itself.

    Megatron-Core 0.16.1 hands even a synchronous save to forked and spawned processes.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Write this rank's tensors to disk, and on rank 0 the index; collective over the world."""
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        save_state_dict(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of a run directory.

    Attributes:
        directory: `RUN_DIR/checkpoints`.
        keep_last: Number of the newest checkpoints that are kept.
        identity: What a run must not change: ids and versions of data, order and noise.
    """

    directory: Path
    keep_last: int
    identity: dict[str, Any]

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        steps = list_checkpoints(self.directory)
        return steps[-1] if steps else None

    def save(self, state: TrainState, config: Config, groups: ProcessGroupCollection) -> Path:
        """Write and publish a checkpoint of `state`; collective over the world.

        A kill at any instant leaves the previous one whole and findable.
        """
        final = self.directory / f"step_{state.counters.step:08d}"
        if final.exists():
            return final
        partial = final.with_suffix(".tmp")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(
            shards_to_save(state, groups), str(partial), DirectSaveStrategy("torch_dist", 1)
        )
        if dist.get_rank() == 0:
            write_json(partial / "config.json", config_to_dict(config))
            write_json(partial / "state.json", describe(state) | self.identity)
            sync_tree(partial)
            partial.replace(final)
            sync_path(self.directory)
            write_atomically(self.directory / "latest", final.name + "\n")
            self._remove_old()
        dist.barrier()
        return final

    def _remove_old(self) -> None:
        for old in list_checkpoints(self.directory)[: -self.keep_last]:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.with_suffix(".deleting")
            old.replace(doomed)
        for pattern in ("step_*.deleting", "step_*.tmp"):
            for doomed in self.directory.glob(pattern):
                shutil.rmtree(doomed)


def restore(state: TrainState, config: Config, checkpoints: Checkpoints) -> None:
    """Continue from the run's newest checkpoint, or start as configured; collective over the world.

    Raises:
        CheckpointError: The checkpoint is damaged or of another format.
        ConfigError: It is of another model, seed or data than the configuration.
    """
    newest = checkpoints.newest()
    if newest is None and config.checkpoint.init_from is None:
        logger.info("starting from fresh weights, seed %d", config.run.seed)
        return
    if newest is None:
        source = find_checkpoint(Path(str(config.checkpoint.init_from)))
        check_same(source, config, WEIGHTS_KEYS)
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
        for key, value in checkpoints.identity.items():
            if record.get(key) != value:
                raise ConfigError(
                    f"{newest}/state.json: {key} = {record.get(key)!r}, but this run has "
                    f"{value!r}: a run keeps its data; start another run.directory with "
                    f"checkpoint.init_from = {newest}"
                )
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


def describe(state: TrainState) -> dict[str, Any]:
    """What `state.json` says of a checkpoint."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": "training",
        **dataclasses.asdict(state.counters),
        "ema_updates": None if state.ema is None else state.ema.num_updates,
        "torch_version": str(torch.__version__),
    }


def read_state_json(checkpoint: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint.

    Raises:
        CheckpointError: It is missing, unreadable or of another format version.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
        version = state["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint's state ({error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}, this version reads {FORMAT_VERSION}: "
            f"use the megatron-eso that wrote it"
        )
    return dict(state)


def shards_to_save(state: TrainState, groups: ProcessGroupCollection) -> dict[str, Any]:
    """The tensors that this rank writes, by global name; collective over data parallelism."""
    shards = {}
    for kind, values in _state_values(state).items():
        for parameter, whole in gather_owned(state.parameters, values, groups.dp_cp):
            sharded = _place(parameter, PREFIXES[kind], whole)
            # Replicas over data-parallel ranks are left to the owner, which is this rank; those
            # over tensor-parallel ranks, and a tied embedding's copy, to the first.
            replica = (*sharded.replica_id[:-1], 0)
            if not any(replica):
                shards[sharded.key] = dataclasses.replace(sharded, replica_id=replica)
    return shards


@torch.no_grad()
def load_weights(checkpoint: Path, state: TrainState, *, prefix: str = "") -> None:
    """Read weights, and nothing else, into the main parameters, and publish them; collective."""
    read_checkpoint_metadata(checkpoint)  # refuses an index whose pickle is more than an index
    for parameter, whole in _load(checkpoint, state.parameters, prefix):
        if parameter.main is not None:
            parameter.main.copy_(parameter.take_range(whole))
    publish_main_parameters(state.chunks, state.optimizer)


@torch.no_grad()
def load_training_state(checkpoint: Path, state: TrainState) -> None:
    """Continue `state` from a checkpoint of any layout; collective over the world.

    Raises:
        CheckpointError: It is damaged, of another format, or holds weights only.
    """
    record = read_state_json(checkpoint)
    if record["kind"] != "training":
        load_weights(checkpoint, state)
        if state.ema is not None:
            state.ema.restart()
        return
    counters = Counters(**{f.name: record[f.name] for f in dataclasses.fields(Counters)})
    load_weights(checkpoint, state)
    state.counters = counters
    moments = {name: _load(checkpoint, state.parameters, PREFIXES[name]) for name in MOMENTS}
    for name, loaded in moments.items():
        for parameter, whole in loaded:
            if parameter.main is not None:
                value = parameter.take_range(whole).clone()
                parameter.inner.state[parameter.main][name] = value
    _set_optimizer_step(state, counters.step - counters.skipped_steps)
    if state.ema is None:
        return
    if record["ema_updates"] is None:
        state.ema.restart()
        return
    state.ema.num_updates = record["ema_updates"]
    loaded = _load(checkpoint, state.parameters, PREFIXES["ema"])
    for average, (parameter, whole) in zip(state.ema.averages, loaded, strict=True):
        if average is not None:
            average.copy_(parameter.take_range(whole))


def _state_values(state: TrainState) -> dict[str, list[Tensor | None]]:
    """This rank's range of every kind of state, aligned with `state.parameters`."""
    values: dict[str, list[Tensor | None]] = {"param": [p.main for p in state.parameters]}
    for name in MOMENTS:
        values[name] = [
            None if p.main is None else p.inner.state[p.main].get(name, torch.zeros_like(p.main))
            for p in state.parameters
        ]
    if state.ema is not None:
        values["ema"] = state.ema.averages
    return values


def _place(parameter: MainParameter, prefix: str, whole: Tensor) -> Any:
    """`whole` as the part of the global tensor `prefix + name` that `parameter` is."""
    changes = {"key": prefix + parameter.sharded.key, "data": whole.detach()}
    if isinstance(parameter.sharded, ShardedTensor):
        changes["dtype"] = whole.dtype
    return dataclasses.replace(parameter.sharded, **changes)


def _load(
    checkpoint: Path, parameters: list[MainParameter], prefix: str
) -> Iterable[tuple[MainParameter, Tensor]]:
    """Read one kind of state whole for every parameter; collective over the world."""
    wanted = {}
    for number, parameter in enumerate(parameters):
        whole = torch.empty(parameter.model.shape, device=parameter.model.device)
        # A shorter vocabulary's padding is zero-filled by Megatron-Core where it allows it.
        wanted[str(number)] = _place(parameter, prefix, whole)
    try:
        loaded = dist_checkpointing.load(wanted, str(checkpoint), validate_access_integrity=False)
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
        written_by = read_state_json(checkpoint).get("torch_version", "an unknown version")
        raise CheckpointError(
            f"{checkpoint}: cannot be read by torch {torch.__version__} ({error}); it was written "
            f"by torch {written_by}: use that, or remove the checkpoint to go on from an older one"
        ) from error
    return [(parameter, loaded[str(number)]) for number, parameter in enumerate(parameters)]


def _set_optimizer_step(state: TrainState, step: int) -> None:
    """Tell Adam how many updates its moments have seen: torch's per tensor, fused per group."""
    for parameter in state.parameters:
        if parameter.main is not None and isinstance(parameter.inner, torch.optim.AdamW):
            parameter.inner.state[parameter.main]["step"] = torch.tensor(float(step))
    if not isinstance(state.parameters[0].inner, torch.optim.AdamW):
        for group in state.parameters[0].inner.param_groups:
            group["step"] = step
