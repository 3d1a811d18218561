"""`blend` and `order`, compared with counts of the samples and with their texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.__main__ import main
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import config_to_dict, load_config
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import CheckpointError, ConfigError, DataError
from megatron_eso.runs.checkpoint_state import CheckpointState
from megatron_eso.runs.counters import Counters

RECORD_TOKENS = 3000
LENGTH = 64
ROWS_PER_RECORD = RECORD_TOKENS // LENGTH
SHUFFLE_SEED = 5

Run = Callable[..., str]
Documents = dict[str, tuple[str, list[int]]]


@pytest.fixture(scope="module")
def corpora(small_corpus: Path, tokenizer_directory: Path) -> list[Path]:
    """Build a dataset of two files in their order, and one of a file in random order."""
    folder = small_corpus.parent / "corpora"
    folder.mkdir()
    lines = small_corpus.read_text(encoding="ascii").splitlines(keepends=True)
    files = [folder / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for number, file in enumerate(files):
        file.write_text("".join(lines[number::3]), encoding="ascii")
    options = [
        *("--tokenizer", str(tokenizer_directory), "--workers", "1"),
        *("--record-tokens", str(RECORD_TOKENS), "--shard-records", "4"),
    ]
    out = [folder / "first", folder / "second"]
    main(["build", "--input", *map(str, files[:2]), "--out", str(out[0]), *options])
    shuffle = ["--shuffle", str(SHUFFLE_SEED)]
    main(["build", "--input", str(files[2]), "--out", str(out[1]), *options, *shuffle])
    return out


@pytest.fixture
def layers(corpora: list[Path], tmp_path: Path) -> list[str]:
    """Return a configuration that draws three samples of the first for one of the second."""
    return [
        "quickstart.toml",
        f"data.train={json.dumps([str(corpus) for corpus in corpora])}",
        "data.train_weights=[3, 1]",
        f"data.sequence_length={LENGTH}",
        f"run.directory={tmp_path / 'run'}",
    ]


def open_data(layers: list[str]) -> TrainingData:
    config = load_config(layers, folder=SHIPPED_CONFIGS).config
    return TrainingData.open(config.data, config.run.seed)


def write_checkpoint(directory: Path, layers: list[str], consumed_samples: int) -> None:
    """Write the files of a run that state the order of its samples."""
    config = load_config(layers, folder=SHIPPED_CONFIGS).config
    checkpoint = directory / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_to_dict(config)))
    state = CheckpointState(
        kind="training",
        counters=Counters(step=1, consumed_samples=consumed_samples),
        data=open_data(layers).state,
    )
    (checkpoint / "state.json").write_text(json.dumps(state.to_json()))
    (directory / "checkpoints" / "latest").write_text("step_00000001\n")


def test_blend_counts_the_samples_of_each_corpus(layers: list[str], run: Run) -> None:
    data = open_data(layers)
    for arguments, num_samples in (
        ([], 640 * 16),
        (["--tokens", "5000"], 79),
        (["--tokens", "1e6"], 15_625),
    ):
        report = json.loads(run("blend", *layers, *arguments, "--json"))
        assert report["num_samples"] == num_samples
        drawn = np.bincount(data.blend.locate(np.arange(num_samples)).corpus_N, minlength=2)
        for corpus, count in zip(report["corpora"], drawn.tolist(), strict=True):
            assert corpus["num_samples"] == count
            assert corpus["sample_tokens"] == count * LENGTH
            assert corpus["epochs"] == pytest.approx(count / corpus["num_rows"])
    for corpus, dataset in zip(report["corpora"], data.datasets.values(), strict=True):
        full, last = divmod(dataset.num_tokens, RECORD_TOKENS)
        assert corpus["unused_tokens"] == full * (RECORD_TOKENS % LENGTH) + last % LENGTH
        assert corpus["num_tokens"] == dataset.num_tokens
    assert [corpus["quota"] for corpus in report["corpora"]] == [3072, 1024]


def test_blend_warns(layers: list[str], run: Run) -> None:
    report = json.loads(run("blend", *layers, "--json"))
    too_often = [corpus["epochs"] > 4 for corpus in report["corpora"]]
    assert any(too_often)
    assert len(report["warnings"]) == sum(too_often) + 2
    shown = run("blend", *layers)
    assert shown.count("epochs, more than 4") == sum(too_often)
    assert "1.9% of its tokens lie in tails" in shown
    quiet = run("blend", *layers, "data.sequence_length=60", "--tokens", "1000")
    assert "warning" not in quiet
    assert "75.000%" in quiet
    coarse = ["data.train_weights=[9994, 6]", "data.sequence_length=60", "--tokens", "1000"]
    assert "its share 0.0600% is rounded to 2 of 4096 samples, 0.0488%" in run(
        "blend", *layers, *coarse
    )
    with pytest.raises(ConfigError, match="less than the smallest, 1/4096"):
        run("blend", *layers, "data.train_weights=[99999, 1]")


def read_texts(corpora: list[Path], tokenizer: Tokenizer) -> list[dict[str, list[list[int]]]]:
    """Encode the documents of each file by the tokenizer alone."""
    folder = corpora[0].parent
    texts = {
        file.name: [
            tokenizer.encode(json.loads(line)["text"])
            for line in file.read_text(encoding="ascii").splitlines()
        ]
        for file in sorted(folder.glob("*.jsonl"))
    }
    return [
        {name: texts[name] for name in names} for names in (("a.jsonl", "b.jsonl"), ("c.jsonl",))
    ]


def test_order_names_the_texts_of_a_sample(
    corpora: list[Path], layers: list[str], run: Run
) -> None:
    data = open_data(layers)
    tokenizer = Tokenizer.load(data.tokenizer_directory)
    texts = read_texts(corpora, tokenizer)
    samples = [0, 1, 2, 3, 4, 4095, 4096, 50_000]
    found = json.loads(run("order", *layers, "--sample", *samples, "--json"))["samples"]
    assert {sample["corpus"] for sample in found} == {0, 1}
    tokens_NS = data.rows(np.array(samples))
    for sample, tokens in zip(found, tokens_NS.tolist(), strict=True):
        place, corpus = sample["place"], sample["corpus"]
        assert sample["location"] == str(corpora[corpus])
        shard = (corpora[corpus] / place["shard"]).read_bytes()
        on_disk = np.frombuffer(shard[place["offset"] :][: 2 * LENGTH], "<u2")
        assert on_disk.tolist() == tokens
        first = sample["row"] % ROWS_PER_RECORD * LENGTH
        assert (place["record"], place["first_token"]) == (sample["row"] // ROWS_PER_RECORD, first)
        assert tokenizer.decode(tokens).startswith(sample["text"].split("<end of text>")[0])
        check_sources(place["documents"], tokens, texts[corpus], tokenizer.eos_token_id)


def check_sources(
    parts: list[dict[str, Any]],
    tokens: list[int],
    texts: dict[str, list[list[int]]],
    eos: int | None,
) -> None:
    """Check that the named documents hold the tokens, and are whole between first and last."""
    assert [part["start"] for part in parts[1:]] == [part["stop"] for part in parts[:-1]]
    assert (parts[0]["start"], parts[-1]["stop"]) == (0, len(tokens))
    for part in parts:
        # "document 3 of 40 kept of a.jsonl"
        words = part["source"].split()
        document = [*texts[words[-1]][int(words[1])], eos]
        piece = tokens[part["start"] : part["stop"]]
        starts = [n for n in range(len(document)) if document[n : n + len(piece)] == piece]
        assert starts, part
        assert part is parts[0] or 0 in starts
        assert part is parts[-1] or len(document) - len(piece) in starts


def test_order_follows_a_run_through_its_data_phases(
    layers: list[str], run: Run, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    boundary = 8192
    begun = json.loads(run("order", *layers, "--sample", 100, boundary - 1, boundary, "--json"))
    write_checkpoint(directory, layers, consumed_samples=5000)
    resumed = json.loads(run("order", directory, "--sample", 100, boundary - 1, boundary, "--json"))
    assert resumed == begun
    changed = [*layers, "data.train_weights=[1, 3]"]
    with pytest.raises(ConfigError, match="set data.phase = 2"):
        run("order", *changed, "--sample", 100)
    changed.append("data.phase=2")
    found = json.loads(run("order", *changed, "--sample", 100, boundary - 1, boundary, "--json"))
    assert found["samples"][:2] == begun["samples"][:2]
    assert [sample["phase"] for sample in found["samples"]] == [1, 1, 2]
    assert "phase          2" in run("order", *changed, "--sample", boundary)
    # The run has two blend blocks of the first data phase, then the second.
    report = json.loads(run("blend", *changed, "--tokens", 3 * 4096 * LENGTH, "--json"))
    drawn = [corpus["num_samples"] for corpus in report["corpora"]]
    assert drawn == [2 * 3072 + 1024, 2 * 1024 + 3072]


def test_order_refuses_what_is_no_run(layers: list[str], run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        run("order", tmp_path, "--sample", 0)
    write_checkpoint(tmp_path / "run", layers, consumed_samples=0)
    (state,) = (tmp_path / "run").glob("checkpoints/*/state.json")
    state.write_text("{}")
    with pytest.raises(CheckpointError, match="not readable as a checkpoint's state"):
        run("order", tmp_path / "run", "--sample", 0)
    weights = CheckpointState(kind="weights", counters=Counters())
    state.write_text(json.dumps(weights.to_json()))
    with pytest.raises(DataError, match="states no order of samples"):
        run("order", tmp_path / "run", "--sample", 0)
    with pytest.raises(SystemExit):
        run("order", *layers, "--sample", -1)
