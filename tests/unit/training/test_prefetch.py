"""Steps planned ahead: the same plans, at any place, and errors where they are waited for."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import DataError
from megatron_eso.objectives.noise import slots
from megatron_eso.objectives.objective import Step
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose
from megatron_eso.training.steps.batches import StepPlan, TrainingBatches, ValidationBatches
from megatron_eso.training.steps.prefetch import StepPrefetcher, plan_ahead
from tests.support.planning import objective_of
from tests.support.processes import HANG_SECONDS
from tests.support.training import tiny_config

BATCH = 8
STEPS_AHEAD = 2


class RecordedBatches(TrainingBatches):
    """Real batches that note which steps were planned, and by which thread."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.places: list[int] = []
        self.threads: set[threading.Thread] = set()

    def plan_step(self, step: Step, data_parallel_rank: int) -> StepPlan:
        plan = super().plan_step(step, data_parallel_rank)
        self.places.append(step.first_index)
        self.threads.add(threading.current_thread())
        return plan


def make_batches(data: Path, folder: Path) -> RecordedBatches:
    overrides = {"data.ssl_ratio": 0.5, "train.global_batch_size": BATCH}
    config = tiny_config(folder / "run", data, overrides)
    dataset = TokenDataset.open(data / "train", retry_seconds=())
    data_of_run = TrainingData(config.data, config.run.seed, (dataset,))
    return RecordedBatches(
        objective_of(config), data_of_run, config.train, data_parallel_size=2, row_multiple=1
    )


def assert_equal(first: StepPlan, second: StepPlan) -> None:
    assert first.tokens == second.tokens
    for one, other in zip(first.micro_batches, second.micro_batches, strict=True):
        assert np.array_equal(one.indices_B, other.indices_B)
        assert np.array_equal(one.phase_B, other.phase_B)
        for part, expected_part in ((one.rows, other.rows), (one.loss, other.loss)):
            for field in dataclasses.fields(part):
                value, expected = getattr(part, field.name), getattr(expected_part, field.name)
                same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert same(value, expected), field.name


def step_at(number: int) -> Step:
    return Step(number=number, first_index=number * BATCH, batch_size=BATCH)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def threads_of(batches: RecordedBatches) -> list[threading.Thread]:
    return [thread for thread in batches.threads if thread is not threading.main_thread()]


@pytest.mark.parametrize("steps_ahead", [0, 1, STEPS_AHEAD])
def test_plans_are_those_of_the_batches_wherever_planning_starts(
    steps_ahead: int, tiny_data: Path, tmp_path: Path
) -> None:
    """One after the other; back and on again; far ahead; the same place twice."""
    batches, plain = make_batches(tiny_data, tmp_path), make_batches(tiny_data, tmp_path)
    with StepPrefetcher(batches, 1, steps_ahead) as prefetcher:
        for step in (3, 4, 5, 6, 4, 5, 1000, 1001, 1001):
            assert_equal(prefetcher.take(step_at(step)), plain.plan_step(step_at(step), 1))
    assert bool(threads_of(batches)) == (steps_ahead > 0)
    assert not any(thread.is_alive() for thread in threads_of(batches))


def test_the_next_steps_are_ready_before_they_are_taken(tiny_data: Path, tmp_path: Path) -> None:
    batches = make_batches(tiny_data, tmp_path)
    with StepPrefetcher(batches, 0, STEPS_AHEAD) as prefetcher:
        prefetcher.take(step_at(0))
        wait_until(lambda: len(batches.places) == 1 + STEPS_AHEAD)
        (thread,) = threads_of(batches)
        assert thread.daemon
        thread.join(0.1)  # no more than these
        assert batches.places == [0, BATCH, 2 * BATCH]
        prefetcher.take(step_at(1))
        wait_until(lambda: batches.places[3:] == [3 * BATCH])
    assert not thread.is_alive()


def test_an_error_in_the_thread_is_raised_where_its_step_is_taken(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Return the steps planned before the error; after the file is repaired, it is read again."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    batches, plain = make_batches(data, tmp_path), make_batches(tiny_data, tmp_path)
    whole = {shard: shard.read_bytes() for shard in (data / "train").glob("*.tar")}
    with StepPrefetcher(batches, 0, STEPS_AHEAD) as prefetcher:
        prefetcher.take(step_at(0))
        wait_until(lambda: len(batches.places) == 1 + STEPS_AHEAD)
        for shard in whole:
            shard.write_bytes(b"")
        for step in (1, 2):
            assert_equal(prefetcher.take(step_at(step)), plain.plan_step(step_at(step), 0))
        with pytest.raises(DataError, match=r"shard-\d+\.tar, .*sample 2\d") as raised:
            prefetcher.take(step_at(3))
        with pytest.raises(DataError) as direct:
            batches.plan_step(step_at(3), 0)
        assert str(raised.value) == str(direct.value)
        assert not any(thread.is_alive() for thread in threads_of(batches))
        for shard, content in whole.items():
            shard.write_bytes(content)
        assert_equal(prefetcher.take(step_at(3)), plain.plan_step(step_at(3), 0))


def test_leaving_on_an_error_ends_the_thread(tiny_data: Path, tmp_path: Path) -> None:
    batches = make_batches(tiny_data, tmp_path)

    def fail() -> None:
        with StepPrefetcher(batches, 0, STEPS_AHEAD) as prefetcher:
            prefetcher.take(step_at(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert threads_of(batches)
    assert not any(thread.is_alive() for thread in threads_of(batches))


class RecordedValidation(ValidationBatches):
    """Real validation batches that note which thread plans them."""

    planners: set[str]

    def plan(self, data_parallel_rank: int, data_parallel_size: int) -> Iterator[MicroBatch]:
        self.planners = set()
        for micro_batch in super().plan(data_parallel_rank, data_parallel_size):
            self.planners.add(threading.current_thread().name)
            yield micro_batch


def make_validation(data: Path, folder: Path) -> RecordedValidation:
    overrides = {"validation.num_samples": 15, "validation.micro_batch_size": 2}
    config = tiny_config(folder / "run", data, overrides)
    held_out = ValidationData.open(config.data)
    assert held_out is not None
    return RecordedValidation(objective_of(config), held_out, config.validation, row_multiple=1)


@pytest.mark.parametrize(("rank", "number"), [(0, 4), (1, 4), (15, 0)])
def test_a_validation_is_planned_by_a_thread(
    rank: int, number: int, tiny_data: Path, tmp_path: Path
) -> None:
    batches = make_validation(tiny_data, tmp_path)
    num_ranks = max(2, rank + 1)
    expected = list(batches.plan(rank, num_ranks))
    assert batches.count(rank, num_ranks) == len(expected) == number
    with plan_ahead(batches.plan(rank, num_ranks)) as planned:
        for mine, other in zip(planned, expected, strict=True):
            assert_equal(
                StepPlan(micro_batches=[mine], tokens=()),
                StepPlan(micro_batches=[other], tokens=()),
            )
    assert batches.planners == ({"prefetch"} if number else set())


def test_a_validation_that_cannot_be_planned_fails_where_it_is_waited_for(
    tiny_data: Path, tmp_path: Path
) -> None:
    first = next(make_validation(tiny_data, tmp_path).plan(0, 1))

    def fail() -> Iterator[MicroBatch]:
        yield first
        raise DataError("a damaged shard")

    with plan_ahead(fail()) as planned:
        next(planned)
        with pytest.raises(DataError, match="a damaged shard"):
            next(planned)


def test_a_validation_that_ends_early_ends_its_thread(tiny_data: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    with plan_ahead(make_validation(tiny_data, tmp_path).plan(0, 1)) as planned:
        next(planned)
    assert threading.active_count() == before


def test_the_strata_of_a_validation_set_are_dealt_once(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purposes = []

    def draw(seed: int, purpose: Purpose, *rest: int) -> NDArray[np.uint64]:
        purposes.append(purpose)
        return random_bits(seed, purpose, *rest)

    monkeypatch.setattr(slots, "random_bits", draw)
    slots._deal_validation_strata.cache_clear()
    assert len(list(make_validation(tiny_data, tmp_path).plan(0, 1))) > 1
    assert purposes.count(Purpose.VALIDATION_STRATUM) == 1
