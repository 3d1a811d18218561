"""How long a save holds the step, compared with a save that waits; how long a resume takes.

The state is a GiB or more: parameters, both moments and the average. What a step waits for is all
between two steps: the list of what is to be saved, the copy, and the slowest rank. Nothing is
gathered, with the distributed optimizer neither.
"""

import os
import statistics
import time
from pathlib import Path

import pytest

from tests.parallel.test_checkpoints import build
from tests.support.training import DISTRIBUTED, Overrides, take_step
from tests.support.world import World

NUM_REPEATS = 3
LIMIT_SECONDS = 900.0
LARGE: Overrides = {
    "model.num_layers": 6,
    "model.hidden_size": 1024,
    "model.num_attention_heads": 8,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": "false",
}


def measure(run: Path, data: Path, overrides: Overrides) -> dict[str, float]:
    """Medians over several saves of each kind, in seconds, and the size of a checkpoint."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    import torch.distributed as dist

    from megatron_eso.training.checkpointing.staleness import refuse_stale, take_sample
    from megatron_eso.training.checkpointing.state import list_parts
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

    with model_parallel_groups(tiny_config(run, data, overrides).parallel) as groups:
        config, batches, state, checkpoints = build(run, data, overrides, groups)
        names = ("step", "at once", "held", "step beside", "check")
        seconds: dict[str, list[float]] = {name: [] for name in names}

        def timed(what, action) -> None:  # type: ignore[no-untyped-def]
            dist.barrier()
            began = time.perf_counter()
            action()
            dist.barrier()
            seconds[what].append(time.perf_counter() - began)

        def step() -> None:
            take_step(config, state, batches, groups)

        step()
        checkpoints.prepare(state, groups)
        for _ in range(NUM_REPEATS):
            timed("step", step)
            timed("at once", lambda: checkpoints.save(state, config, groups))
            timed("step", step)
            timed("held", lambda: checkpoints.save(state, config, groups, in_background=True))
            timed("step beside", step)
            checkpoints.wait()
            assert checkpoints.take_failure() is None
        parts = list_parts(state, groups)
        for _ in range(NUM_REPEATS):
            timed("check", lambda: refuse_stale(take_sample(state, parts, groups), parts))
        found = {what: statistics.median(times) for what, times in seconds.items()}
        (last,) = (run / "checkpoints").glob("step_*")
        return found | {"bytes": float(sum(file.stat().st_size for file in last.iterdir()))}


def resume(run: Path, data: Path, overrides: Overrides) -> float:
    """Seconds to check and load the newest checkpoint, none of it in the page cache."""
    from megatron_eso.training.distributed.cpu_backend import install_cpu_backend

    install_cpu_backend()
    import torch.distributed as dist

    from megatron_eso.training.checkpointing.restore import restore
    from megatron_eso.training.distributed.parallel import model_parallel_groups
    from tests.support.training import tiny_config

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


@pytest.mark.bench
@pytest.mark.parallel
@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize(
    ("name", "num_ranks", "overrides"),
    [("1 rank", 1, {}), ("2 ranks, distributed optimizer", 2, DISTRIBUTED)],
)
def test_save_and_resume(
    name: str,
    num_ranks: int,
    overrides: Overrides,
    world: World,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    arguments = (tmp_path, tiny_data, LARGE | overrides)
    found = world.run(measure, num_ranks, *arguments, timeout_seconds=LIMIT_SECONDS)[0]
    resumed = world.run(resume, num_ranks, *arguments, timeout_seconds=LIMIT_SECONDS)[0]
    print(
        f"\n{name}, {found['bytes'] / 1e9:.2f} GB: a save beside the training holds it "
        f"{found['held']:.3f} s, one at once {found['at once']:.2f} s: "
        f"{100 * found['held'] / found['at once']:.1f} %; a step takes {found['step']:.2f} s, "
        f"{found['step beside']:.2f} s beside a save; resumed in {resumed:.1f} s; the check for "
        f"stale tensors takes {1000 * found['check']:.1f} ms"
    )
