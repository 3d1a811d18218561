"""`sample` and `score`, and the imports of the package."""

import gzip
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch

from checkpoints_conversion.sampler_directory import write_sampler_directory
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import CheckpointError, ConfigError, DataError
from megatron_eso.sampler import EsoLM
from megatron_eso.sampler.__main__ import main

ROOT = Path(__file__).parents[3]
TEXT = "the cat sat on the mat and the dog ate the cat's hat. " * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]),
        model_writer=model,
        vocab_size=20,
        control_symbols=["<mask>"],
        minloglevel=2,
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


def write_model(make, directory: Path, tokenizer: Path | None, **changes: object) -> Path:
    model = make(torch.float32, **changes)
    fields = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__}
    description = {**fields, "alpha_0": 0.25, "variant": "b", "source": {}}
    tensors = model.network.state_dict()
    write_sampler_directory(
        directory, description, tensors, dtype=torch.float32, tokenizer=tokenizer
    )
    return directory


@pytest.fixture
def directory(make, tmp_path: Path, tokenizer: Path) -> Path:
    loaded = Tokenizer.load(tokenizer)
    sizes = {"vocab_size": loaded.vocab_size, "mask_token_id": loaded.mask_token_id}
    return write_model(make, tmp_path / "sampler", tokenizer, **sizes)


@pytest.fixture
def bare_directory(make, tmp_path: Path) -> Path:
    """Copy the sampler directory without its tokenizer."""
    return write_model(make, tmp_path / "bare", None)


def test_sample_prints_texts_that_begin_with_the_prompt(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", str(directory), "--num-samples", "2", "--seed", "1"]
    main([*arguments, "--prompt", "the cat", "--steps", "4", "--alpha-0", "0.5", "--top-p", "0.9"])
    first = capsys.readouterr().out
    lines = first.splitlines()
    assert lines[0].startswith("--- sample 1 of 2")
    assert lines[1].startswith("the cat")
    main([*arguments, "--prompt", "the cat", "--steps", "4", "--alpha-0", "0.5", "--top-p", "0.9"])
    assert capsys.readouterr().out == first


def test_a_hugging_face_tokenizer_can_be_used(
    make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=trained.pre_tokenizer.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    trained.train_from_iterator([TEXT], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    sizes = {"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_token_id}
    directory = write_model(make, tmp_path / "sampler", tmp_path / "tokenizer.json", **sizes)
    main(["sample", str(directory), "--seed", "1", "--prompt", "the cat"])
    assert capsys.readouterr().out.splitlines()[1].startswith("the cat")
    text = tmp_path / "text.txt"
    text.write_text("the <|endoftext|>")
    main(["score", str(directory), str(text)])
    score = json.loads(capsys.readouterr().out.splitlines()[0])
    assert score["tokens"] == len(tokenizer.encode("the <|endoftext|>")) > 3
    other = write_model(make, tmp_path / "other", tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="replace it by the network's tokenizer"):
        main(["sample", str(other)])


def test_sample_prints_ids_without_a_tokenizer(
    bare_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["sample", str(bare_directory), "--length", "5", "--seed", "1", "--temperature", "0.5"])
    ids = [int(token) for token in capsys.readouterr().out.splitlines()[1].split()]
    assert len(ids) == 5
    assert set(ids) <= set(range(11)) - {3}


def test_score_prints_the_exact_likelihood_of_texts_and_ids(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "long.txt"
    text.write_text(TEXT)
    lines = tmp_path / "some.jsonl"
    lines.write_text('{"text": "the cat"}\n{"tokens": [1, 2, 4, 5]}\n{"text": ""}\n')
    main(["score", str(directory), str(text), str(lines), "--batch-size", "3"])
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [score["name"] for score in scores[1:4]] == [f"{lines}:{i}" for i in (1, 2, 3)]
    model, ids = EsoLM.from_pretrained(directory), Tokenizer.load(directory).encode(TEXT)
    expected = 0.0
    for start in range(0, len(ids), 12):
        window = torch.tensor([ids[start : start + 12]])
        order = torch.arange(window.shape[1])[None]
        expected += float(model.log_likelihood(window, order))
    assert scores[0]["tokens"] == len(ids)
    assert scores[0]["log_likelihood"] == pytest.approx(expected, abs=1e-3)
    assert scores[0]["perplexity"] == pytest.approx(math.exp(-expected / len(ids)), rel=1e-5)
    assert scores[2]["tokens"] == 4
    assert scores[-1]["name"] == "total"
    assert scores[-1]["tokens"] == sum(score["tokens"] for score in scores[:-1])


def test_wrong_arguments_are_one_line_errors(
    directory: Path, bare_directory: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"tokens": [99999]}\n')
    worse = tmp_path / "worse.jsonl"
    worse.write_text('{"tokens": ["a"]}\n')
    cases = [
        (["sample", str(bare_directory), "--prompt", "x"], ConfigError, "--prompt"),
        (["sample", str(bare_directory), "--length", "99"], ConfigError, "max_length"),
        (["sample", str(directory), "--prompt", TEXT], ConfigError, "shorten"),
        (["sample", str(tmp_path)], CheckpointError, "config.json"),
        (["score", str(directory), str(bad)], DataError, "bad.jsonl:1"),
        (["score", str(directory), str(worse)], DataError, "worse.jsonl:1"),
        (["sample", str(directory), "--device", "cdua"], ConfigError, "--device cdua: "),
        (["sample", str(directory), "--device", "meta"], ConfigError, "--device meta: "),
        (["sample", str(directory), "--num-samples", "1e11"], ConfigError, "sample fewer at once"),
        (["sample", str(directory), "--steps", "1e11"], ConfigError, "steps is 100000000000, not"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            main(arguments)


def test_a_wrong_command_line_exits_with_2(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, name in (
        (["sample", str(tmp_path / "nowhere")], "SAMPLER_DIR: "),
        (["score", str(directory), str(tmp_path / "nowhere")], "FILE: "),
        (["score", str(directory), "--batch-size", "0"], "--batch-size: 0 is not a whole number"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version 3"),
        ({"variant": "c"}, "variant is 'c', none of a, b"),
        ({"objective": "duo"}, "objective 'duo' is unknown"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"num_hidden_layers": 3}, "tensor layers.2"),
        ({"hidden_size": 25}, r"in the weights, \(.*\) in the configuration"),
        ({"activation": "relu"}, "relu"),
        ({"vocab_size": None}, "config.json"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(
    bare_directory: Path, change: dict, message: str
) -> None:
    path = bare_directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        EsoLM.from_pretrained(bare_directory)


def test_damaged_weights_are_refused(bare_directory: Path) -> None:
    weights = bare_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        EsoLM.from_pretrained(bare_directory)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        EsoLM.from_pretrained(bare_directory)


def test_the_package_imports_neither_megatron_nor_transformers() -> None:
    program = (
        "import sys, megatron_eso.sampler\n"
        "bad = {'megatron', 'transformers', 'sentencepiece', 'checkpoints_conversion'}\n"
        "assert not bad & {name.partition('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_scores_are_json_and_texts_are_read_as_build_reads_them(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the cat", "the\u2028dog", "", "the hat"]
    content = "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n"
    plain = tmp_path / "some.jsonl"
    plain.write_text(content)
    zipped = tmp_path / "some.jsonl.gz"
    zipped.write_bytes(gzip.compress(content.encode()))
    for path in (plain, zipped):
        main(["score", str(directory), str(path)])
        lines = capsys.readouterr().out.splitlines()
        assert not any("NaN" in line or "Infinity" in line for line in lines)
        scores = [json.loads(line) for line in lines]
        assert [score["name"] for score in scores[:-1]] == [f"{path}:{n}" for n in (1, 3, 5, 7)]
        assert scores[2]["nats_per_token"] is None
        assert scores[2]["perplexity"] is None
        assert scores[0]["perplexity"] > 1
    zipped.write_bytes(zipped.read_bytes()[:-9])
    with pytest.raises(DataError, match="truncated gzip"):
        main(["score", str(directory), str(zipped)])


def test_the_number_of_samples_must_be_a_whole_number(directory: Path) -> None:
    model = EsoLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="num_samples is '4', not a whole number"):
        model.generate("4")  # type: ignore[arg-type]
