"""BOS and EOS around the text, in training, validation and any-order evaluation."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.framing import Framing
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError
from tests.ranks.training import open_batches, open_held_out
from tests.support.training import Overrides, tiny_config

T = 24
FRAMED: Overrides = {"data.framing": '"bos_eos"', "data.sequence_length": T}


def samples_of(micro_batches: Iterable[MicroBatch], mask_token_id: int) -> NDArray[np.int64]:
    """Return the tokens of a plan's samples by position, from its rows and targets; [N, T]."""
    samples = []
    for batch in micro_batches:
        plan = batch.rows
        tokens = plan.tokens_R.numpy().copy()
        tokens[plan.loss_rows_E] = batch.loss.targets_E
        positions = plan.positions_R.numpy()
        first_keys = plan.reads_4R[0, : plan.num_rows].numpy()
        for first_key in np.unique(first_keys):
            of_sample = np.flatnonzero(first_keys == first_key)
            sample = np.full(T, mask_token_id)
            sample[positions[of_sample]] = tokens[of_sample]
            samples.append(sample)
    return np.stack(samples)


def assert_framed(
    samples: NDArray[np.int64], text: NDArray[np.int64], dataset: TokenDataset
) -> None:
    tokenizer = dataset.manifest.tokenizer
    assert (samples[:, 0] == tokenizer.bos_token_id).all()
    assert (samples[:, -1] == tokenizer.eos_token_id).all()
    assert {row.tobytes() for row in samples[:, 1:-1]} == {row.tobytes() for row in text}


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    # Every sample has masked tokens.
    return tiny_config(tmp_path, tiny_data, FRAMED | {"objective.alpha_0": 0.25})


def test_every_sample_has_bos_text_and_eos(config: Config, tiny_data: Path) -> None:
    train = TrainingData.open(config.data, config.run.seed)
    validation = TokenDataset.open(tiny_data / "validation")
    mask = train.vocabulary.mask_token_id
    batches = open_batches(config, 1)
    samples = samples_of(batches.plan_step(batches.step(10, 80), 0).micro_batches, mask)
    assert_framed(samples, train.rows(80 + np.arange(8)), validation)

    held_out = open_held_out(config)
    num_samples = held_out.num_samples
    assert num_samples == validation.num_rows(T - 2) > validation.num_rows(T)
    text = validation.rows(np.arange(num_samples), T - 2)
    samples = samples_of(held_out.plan(0, 1), mask)
    assert len(samples) == 2 * num_samples
    assert_framed(samples, text, validation)
    samples = samples_of(held_out.plan_order(0, 0, 1), mask)
    assert len(samples) == num_samples
    assert_framed(samples, text, validation)


def test_both_tokens_are_masked_like_any_other(config: Config) -> None:
    """Count masks in 2 phases x 190 samples: each phase has a rate of at least 1 - alpha_0, 3/4."""
    held_out = open_held_out(config)
    targets = [
        (rows.positions_R[rows.loss_rows_E], rows.num_loss_rows)
        for rows in (batch.rows for batch in held_out.plan(0, 1))
    ]
    masked = np.concatenate([positions[:number] for positions, number in targets])
    counts = np.bincount(masked, minlength=T)
    assert counts[[0, T - 1]].min() > 0.6 * 2 * held_out.num_samples


def test_validation_samples_are_never_cut(config: Config) -> None:
    data = dataclasses.replace(config.data, ssl_ratio=1.0)
    whole, cut = (open_held_out(some) for some in (config, dataclasses.replace(config, data=data)))
    for planned, expected in (
        (cut.plan(0, 1), whole.plan(0, 1)),
        (cut.plan_order(0, 0, 1), whole.plan_order(0, 0, 1)),
    ):
        spans, of_whole = ([b.rows.spans for b in found] for found in (planned, expected))
        assert spans == of_whole


def test_tokens_are_added_around_rows_of_text() -> None:
    text = np.arange(6).reshape(2, 3)
    assert Framing().frame(text) is text
    assert Framing(before=(7,), after=(8,)).frame(text).tolist() == [
        [7, 0, 1, 2, 8],
        [7, 3, 4, 5, 8],
    ]


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_tokenizer_without_the_tokens_is_refused(
    name: str, config: Config, tiny_data: Path
) -> None:
    tokenizer = TokenDataset.open(tiny_data / "train").manifest.tokenizer
    tokenizer = dataclasses.replace(tokenizer, **{f"{name}_token_id": None})
    with pytest.raises(ConfigError, match=f"no {name.upper()} token"):
        Framing.resolve(config.data, tokenizer)
    unframed = dataclasses.replace(config.data, framing="none")
    assert Framing.resolve(unframed, tokenizer) == Framing()
