"""What benchmarks measure on ranks."""

import os
import statistics
import time
from pathlib import Path

import torch.distributed as dist

from megatron_eso.config.combinations import with_vocabulary
from megatron_eso.config.loading import load_config
from megatron_eso.estimates.flops import training_flops_per_token
from megatron_eso.training.checkpointing.restore import restore
from megatron_eso.training.checkpointing.staleness import refuse_stale, take_sample
from megatron_eso.training.checkpointing.state import list_parts
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.checkpoints import build
from tests.ranks.training import open_batches, take_step
from tests.support.planning import objective_of
from tests.support.training import Overrides, tiny_arguments, tiny_config

NUM_REPEATS = 3
NUM_STEPS = 5


def measure(run: Path, data: Path, overrides: Overrides) -> dict[str, float]:
    """Medians over several saves of each kind, in seconds, and the size of a checkpoint."""
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        names = ("step", "at once", "held", "step during a save", "check")
        seconds: dict[str, list[float]] = {name: [] for name in names}

        def timed(what, action) -> None:  # type: ignore[no-untyped-def]
            dist.barrier()
            began = time.perf_counter()
            action()
            dist.barrier()
            seconds[what].append(time.perf_counter() - began)

        def step() -> None:
            take_step(config, state, batches, groups)

        # The first step and the preparation are not timed.
        step()
        checkpoints.prepare(state, groups)
        for _ in range(NUM_REPEATS):
            timed("step", step)
            timed("at once", lambda: checkpoints.save(state, config, groups))
            timed("step", step)
            timed("held", lambda: checkpoints.save(state, config, groups, in_background=True))
            timed("step during a save", step)
            checkpoints.wait()
            assert checkpoints.take_failure() is None
        # The check of a save alone.
        parts = list_parts(state, groups)
        for _ in range(NUM_REPEATS):
            timed("check", lambda: refuse_stale(take_sample(state, parts, groups), parts))
        found = {what: statistics.median(times) for what, times in seconds.items()}
        (last,) = (run / "checkpoints").glob("step_*")
        return found | {"bytes": float(sum(file.stat().st_size for file in last.iterdir()))}


def resume(run: Path, data: Path, overrides: Overrides) -> float:
    """Seconds to check and load the newest checkpoint, none of it in the page cache."""
    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, _, state, checkpoints = build(run, data, overrides, groups)
        for path in (run / "checkpoints").rglob("*.distcp"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()
        began = time.perf_counter()
        restore(state, config, checkpoints)
        dist.barrier()
        assert state.counters.step > 0
        return time.perf_counter() - began


def time_steps(run: Path, data: Path, overrides: Overrides) -> float:
    """Median seconds of a step on one rank, after a first one."""
    config = tiny_config(run, data, overrides)
    seconds = []
    with model_parallel_groups(config.parallel) as groups:
        state = build_train_state(config, groups)
        batches = open_batches(config, groups.dp.size())
        for _ in range(NUM_STEPS + 1):
            began = time.perf_counter()
            take_step(config, state, batches, groups)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def compare_objectives(
    run: Path, data: Path, overrides: Overrides, family: dict[str, Overrides], vocab_size: int
) -> dict[str, tuple[float, float]]:
    """Measure the CPU seconds of a step (median) and its FLOPs; the objectives alternate."""
    objectives, seconds = {}, {name: [] for name in family}
    flops = {}
    for name, settings in family.items():
        loaded = load_config(tiny_arguments(run, data, overrides | settings)).config
        config = with_vocabulary(
            loaded, vocab_size=vocab_size, mask_token_id=vocab_size - 1, source="benchmark"
        )
        objectives[name] = config
        length = config.data.sequence_length
        per_token = training_flops_per_token(config.model, vocab_size, objective_of(config), length)
        flops[name] = per_token * length * config.train.global_batch_size
    with model_parallel_groups(config.parallel) as groups:
        states = {name: build_train_state(config, groups) for name, config in objectives.items()}
        batches = {
            name: open_batches(config, groups.dp.size()) for name, config in objectives.items()
        }
        for _ in range(NUM_STEPS + 1):
            for name, config in objectives.items():
                began = time.process_time()
                take_step(config, states[name], batches[name], groups)
                seconds[name].append(time.process_time() - began)
    return {name: (statistics.median(seconds[name][1:]), flops[name]) for name in family}
