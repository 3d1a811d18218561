"""The corpora of a run: the samples, changes on resume, and refusals."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import (
    Config,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    Vocabulary,
)
from megatron_eso.data.samples.blend import BLOCK_SAMPLES
from megatron_eso.data.samples.training_data import TrainingData, open_run_data
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import ConfigError, DataError, UserError

MakeDataset = Callable[..., npt.NDArray[np.int64]]
Corpora = dict[str, npt.NDArray[np.int64]]

LENGTH = 50
RECORD_TOKENS = 1010
NUM_TOKENS = {"a": 60_000, "b": 30_000, "c": 9_999}
SOURCE = "runs/x/checkpoints/step_00000100"
ORIGINS = {"data.train": "command line"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_dataset: MakeDataset) -> Path:
    """Write corpora a, b and c, and shards of other tokenizers."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, num_tokens in NUM_TOKENS.items():
        make_dataset(folder / name, num_tokens, RECORD_TOKENS)
    make_dataset(folder / "other_pieces", 20_000, RECORD_TOKENS, pieces_sha256="f" * 64)
    make_dataset(folder / "other_vocabulary", 20_000, RECORD_TOKENS, vocab_size=49_999)
    make_dataset(folder / "other_file", 20_000, RECORD_TOKENS, model_sha256="f" * 64)
    make_dataset(folder / "tiny", 400, RECORD_TOKENS)
    make_dataset(folder / "short", 40, RECORD_TOKENS)
    make_dataset(folder / "framed", 20_000, RECORD_TOKENS, bos_token_id=1)
    return folder


def configure(folder: Path, names: str | list[str], seed: int = 3, **changes: Any) -> Config:
    train = (
        str(folder / names)
        if isinstance(names, str)
        else tuple(str(folder / name) for name in names)
    )
    data: dict[str, Any] = {"train": train, "sequence_length": LENGTH} | changes
    return Config(
        run=RunConfig(directory="runs/x", seed=seed),
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        data=DataConfig(**data),
        train=TrainConfig(num_steps=1, global_batch_size=8, micro_batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )


def open_data(config: Config) -> TrainingData:
    return TrainingData.open(config.data, config.run.seed)


def open_run(config: Config) -> tuple[TrainingData, ValidationData | None]:
    return open_run_data(config.data, config.run.seed)


def read_rows(folder: Path, name: str) -> npt.NDArray[np.int64]:
    """Read all data rows of a corpus from its dataset, in order."""
    dataset = TokenDataset.open(folder / name)
    return dataset.rows(np.arange(dataset.num_rows(LENGTH)), LENGTH)


def checkpoint(data: TrainingData) -> dict[str, Any]:
    """Return the state after a checkpoint is written and read."""
    state: dict[str, Any] = json.loads(json.dumps(data.state))
    return state


def resume(config: Config, state: dict[str, Any], consumed_samples: int) -> TrainingData:
    data = open_data(config)
    data.resume(state, consumed_samples=consumed_samples, source=SOURCE, origins=ORIGINS)
    return data


def refuse(config: Config, state: dict[str, Any], consumed_samples: int = 100) -> str:
    """Return the error of a refused resume."""
    with pytest.raises(ConfigError) as raised:
        resume(config, state, consumed_samples)
    return str(raised.value)


def test_samples_are_the_rows_that_locate_names(folder: Path) -> None:
    names = ["b", "a", "c"]
    data = open_data(configure(folder, names, train_weights=(0.5, 0.25, 0.25)))
    samples = np.random.default_rng(0).integers(0, 20_000, 3000)
    places, found = data.locate(samples), data.rows(samples)
    assert found.dtype == np.int64
    for number, name in enumerate(names):
        is_drawn = places.corpus_N == number
        assert np.array_equal(found[is_drawn], read_rows(folder, name)[places.row_N[is_drawn]])
    assert data.describe() == (
        f"{folder / 'b'} 50.00% (2048/4096), {folder / 'a'} 25.00% (1024/4096), "
        f"{folder / 'c'} 25.00% (1024/4096)"
    )


def test_shares_follow_the_rows_where_no_weights_are_given(folder: Path) -> None:
    data = open_data(configure(folder, ["a", "b", "c"]))
    rows = np.array([len(read_rows(folder, name)) for name in "abc"])
    shares = np.array(data.blend.phases[0].quotas) / BLOCK_SAMPLES
    assert np.allclose(shares, rows / rows.sum(), atol=1 / BLOCK_SAMPLES)


def test_framing_leaves_two_tokens_less_of_text(folder: Path) -> None:
    data = open_data(configure(folder, "framed", framing="bos_eos"))
    assert data.rows(np.arange(3)).shape == (3, LENGTH - 2)
    framed = data.samples(np.arange(3))
    assert np.array_equal(framed[:, 1:-1], data.rows(np.arange(3)))
    assert (framed[:, [0, -1]] == [1, 2]).all()
    with pytest.raises(ConfigError, match="no BOS token"):
        open_data(configure(folder, "a", framing="bos_eos"))


def test_the_validation_set_is_every_row_in_order(folder: Path) -> None:
    config = configure(folder, "a", validation=str(folder / "b"))
    train, validation = open_run(config)
    assert validation is not None
    rows = read_rows(folder, "b")
    assert validation.num_samples == len(rows)
    assert np.array_equal(validation.samples(np.arange(len(rows))), rows)
    expected = Vocabulary(size=50_000, mask_token_id=4, eos_token_id=2)
    assert validation.vocabulary == train.vocabulary == expected
    assert len(validation.sources) == len(train.sources) == 1
    assert ValidationData.open(configure(folder, "a").data) is None
    with pytest.raises(DataError, match="has no data row of 50 tokens"):
        ValidationData.open(configure(folder, "a", validation=str(folder / "short")).data)


def test_a_corpus_that_would_never_be_drawn_is_refused(folder: Path) -> None:
    for changes in ({"train_weights": (1e6, 1.0)}, {"train_weights": (1.0, 1e-5)}):
        with pytest.raises(ConfigError, match=r"tiny: its share 1e-0[56] .* 1/4096: leave it out"):
            open_data(configure(folder, ["a", "tiny"], **changes))
    open_data(configure(folder, ["a", "tiny"], train_weights=(1.0, 0.0)))


def test_the_same_dataset_under_two_names_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(folder / "a")
    config = configure(folder, ["a", "b"])
    train = (str(folder / "a"), str(tmp_path / "again"))
    with pytest.raises(ConfigError, match="two of these are the same dataset"):
        open_data(dataclasses.replace(config, data=dataclasses.replace(config.data, train=train)))


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("other_pieces", f"pieces_sha256 {'f' * 64}, not {'1' * 64}"),
        ("other_vocabulary", "vocab_size 49999, not 50000"),
    ],
)
def test_shards_of_another_tokenizer_are_refused(folder: Path, name: str, difference: str) -> None:
    validation = str(folder / name)
    for config, key in (
        (configure(folder, ["a", name]), "data.train"),
        (configure(folder, "a", validation=validation), "data.validation"),
    ):
        with pytest.raises(ConfigError) as raised:
            open_run(config)
        assert f"{key} = {folder / name}: its tokenizer is not that" in str(raised.value)
        assert difference in str(raised.value)
    state = checkpoint(open_data(configure(folder, "a")))
    line = refuse(configure(folder, name), state)
    assert difference in line
    assert "checkpoint.init_other_tokenizer = true" in line
    # The same pieces in another file, as training with more threads writes it.
    open_run(configure(folder, ["a", "other_file"]))


def test_a_resumed_run_reads_the_samples_of_an_uninterrupted_one(folder: Path) -> None:
    config = configure(folder, ["a", "b"], train_weights=(3.0, 1.0))
    straight = open_data(config)
    state = checkpoint(straight)
    assert len(json.dumps(state)) < 1024
    swapped = configure(folder, ["b", "a"], train_weights=(0.25, 0.75))
    for consumed in (0, 1, 4095, 4096, 9001):
        samples = consumed + np.arange(300)
        for again in (config, swapped):
            resumed = resume(again, state, consumed)
            assert np.array_equal(resumed.rows(samples), straight.rows(samples))
            assert checkpoint(resumed) == state


def test_another_blend_is_a_new_phase_or_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Without the next number of a phase, another blend is refused.
    first = open_data(configure(folder, ["a", "b"], train_weights=(3.0, 1.0)))
    state = checkpoint(first)
    changed = {"train_weights": (1.0, 1.0, 2.0)}
    line = refuse(configure(folder, ["a", "b", "c"], **changed), state)
    assert "set data.phase = 2; else restore" in line
    assert f"another run.directory with checkpoint.init_from = {SOURCE}" in line
    for phase in (3, 7):
        line = refuse(configure(folder, ["a", "b", "c"], phase=phase, **changed), state)
        assert line.startswith(f"default: data.phase = {phase}: {SOURCE} is in phase 1 of")

    # With it, the new blend begins at the next block.
    with caplog.at_level(logging.INFO):
        second = resume(configure(folder, ["a", "b", "c"], phase=2, **changed), state, 5000)
    (record,) = caplog.records
    assert "data.phase 1 -> 2 from sample 8192 on" in record.message
    assert "a 75.00% (3072/4096)" in record.message.split(" -> ")[1]
    assert "c 50.00% (2048/4096)" in record.message.split(" -> ")[2]
    before, after = np.arange(5000, 8192), np.arange(8192, 8192 + BLOCK_SAMPLES)
    assert np.array_equal(second.rows(before), first.rows(before))
    assert np.bincount(second.locate(after).corpus_N).tolist() == [1024, 1024, 2048]

    # A resume in the new phase changes nothing; a return to the old blend needs another phase.
    state = checkpoint(second)
    third = resume(configure(folder, ["a", "b", "c"], phase=2, **changed), state, 8000)
    assert checkpoint(third) == state
    line = refuse(configure(folder, ["a", "b"], train_weights=(3.0, 1.0)), state)
    assert "data.phase = 1" in line
    assert "set data.phase = 3" in line
    assert len(json.dumps(state)) < 1500


def test_a_corpus_is_kept_until_its_last_block(folder: Path) -> None:
    state = checkpoint(open_data(configure(folder, ["a", "b"])))
    line = refuse(configure(folder, "a", phase=2), state, 100)
    assert line.startswith("command line: data.train = ")
    assert "up to sample 4096: name it too, with weight 0 in data.train_weights" in line
    kept = configure(folder, ["a", "b"], phase=2, train_weights=(1.0, 0.0))
    data = resume(kept, state, 100)
    data.rows(np.arange(9000))
    assert set(data.locate(np.arange(4096, 9000)).corpus_N) == {0}
    # At the boundary, no draw of this corpus remains.
    resume(configure(folder, "a", phase=2), state, 4096).rows(np.arange(4096, 9000))


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"sequence_length": 49}, "data.row_tokens = 50"), ({"seed": 4}, "data.seed = 3")],
)
def test_another_order_is_refused(folder: Path, changes: dict[str, Any], key: str) -> None:
    state = checkpoint(open_data(configure(folder, "a")))
    line = refuse(configure(folder, "a", **changes), state)
    assert key in line
    assert "a run keeps its order" in line


def test_damage_names_the_sample_and_the_entry_for_quarantine(
    tmp_path: Path, make_dataset: MakeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    # Read sound samples, then flip a bit in one record.
    for name, num_tokens in NUM_TOKENS.items():
        make_dataset(tmp_path / name, num_tokens, RECORD_TOKENS)
    config = configure(tmp_path, ["a", "b"])
    data = open_data(config)
    sound = data.rows(np.arange(3000))
    places = data.locate(np.arange(3000))
    dataset = TokenDataset.open(tmp_path / "b")
    layout, bad_record = dataset.manifest.layout, 17
    shard = tmp_path / "b" / dataset.manifest.shards[bad_record // layout.shard_records].name
    content = bytearray(shard.read_bytes())
    content[layout.record_offset(bad_record) + 1] ^= 4
    shard.write_bytes(content)

    # Reading names the first data row of the record, its sample, and the line for the list.
    is_bad = (places.corpus_N == 1) & (places.row_N // (RECORD_TOKENS // LENGTH) == bad_record)
    (samples,) = np.nonzero(is_bad)
    datasets = tuple(TokenDataset.open(tmp_path / name, retry_seconds=()) for name in "ab")
    impatient = TrainingData(config.data, config.run.seed, datasets)
    with pytest.raises(UserError) as raised:
        impatient.rows(np.arange(samples[0] - 5, samples[0] + 5))
    line = str(raised.value)
    assert f"data row {places.row_N[samples[0]]}, sample {samples[0]} is damaged" in line
    assert f"list record {bad_record} of dataset {dataset.dataset_id} in data.quarantine" in line

    # With the list, data rows of other records replace those of the record.
    listed = tmp_path / "quarantine.json"
    records = {dataset.dataset_id: [bad_record], "0" * 64: [1]}
    listed.write_text(json.dumps({"format_version": 1, "records": records}))
    repaired = configure(tmp_path, ["a", "b"], quarantine=str(listed))
    with caplog.at_level(logging.WARNING):
        again, _ = open_run(repaired)
        again.resume(checkpoint(data), consumed_samples=100, source=SOURCE)
    assert "no dataset of this run" in caplog.messages[0]
    assert "data.quarantine: the list differs from that of" in caplog.messages[1]
    assert checkpoint(again)["quarantine_sha256"] != checkpoint(data)["quarantine_sha256"]
    found = again.rows(np.arange(3000))
    assert np.array_equal(found[~is_bad], sound[~is_bad])
    read = again.locate(np.arange(3000))
    assert np.array_equal(read.row_N[~is_bad], places.row_N[~is_bad])
    expected = read_rows_without(tmp_path / "b", bad_record)
    assert all(tuple(row) in expected for row in found[is_bad].tolist())


def read_rows_without(directory: Path, record: int) -> set[tuple[int, ...]]:
    dataset, per_record = TokenDataset.open(directory), RECORD_TOKENS // LENGTH
    rows = np.arange(dataset.num_rows(LENGTH))
    return set(map(tuple, dataset.rows(rows[rows // per_record != record], LENGTH).tolist()))
