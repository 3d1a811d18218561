"""How long a save holds the step, compared with a save that waits; how long a resume takes.

The state is a GiB or more: parameters, both moments and the average. What a step waits for is all
between two steps: the list of what is to be saved, the copy, and the slowest rank. Nothing is
gathered, with the distributed optimizer neither.
"""

from pathlib import Path

import pytest

from tests.ranks.benchmarks import measure, resume
from tests.support.training import DISTRIBUTED, Overrides
from tests.support.world import World

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
        f"\n{name}, {found['bytes'] / 1e9:.2f} GB: a save during the training holds it "
        f"{found['held']:.3f} s, one at once {found['at once']:.2f} s: "
        f"{100 * found['held'] / found['at once']:.1f} %; a step takes {found['step']:.2f} s, "
        f"{found['step during a save']:.2f} s during a save; resumed in {resumed:.1f} s; the check "
        f"for stale tensors takes {1000 * found['check']:.1f} ms"
    )
