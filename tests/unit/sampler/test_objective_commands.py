"""`load`, `sample` and `score` on a sampler directory of each objective."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion.sampler_directory import write_sampler_directory
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.sampler import EsoLM, load
from megatron_eso.sampler.__main__ import main
from megatron_eso.sampler.network.directory import choose_version
from tests.support.recomputed_logits import CASES, make_sampler

WITH_LIKELIHOOD = [case for case in CASES if case not in ("mdlm", "bd3_lm")]


def write_case(case: str, directory: Path) -> Path:
    model = make_sampler(case, torch.float32)
    description = {**asdict(model.config), **CASES[case], "source": {}}
    tensors = model.network.state_dict()
    write_sampler_directory(directory, description, tensors, dtype=torch.float32, tokenizer=None)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_a_directory_of_each_objective_is_opened(case: str, tmp_path: Path) -> None:
    model = load(write_case(case, tmp_path / "out"))
    assert type(model) is type(make_sampler(case))
    assert CASES[case].items() <= model.description.items()
    if case.startswith("eso_lm"):
        assert isinstance(model, EsoLM)
        return
    with pytest.raises(CheckpointError, match=f"objective is {model.objective}, not eso_lm; open"):
        EsoLM.from_pretrained(tmp_path / "out")


def test_a_directory_of_an_older_version_is_an_eso_lm(tmp_path: Path) -> None:
    path = write_case("eso_lm_b", tmp_path / "out") / "config.json"
    fields = json.loads(path.read_text())
    added = ("use_rope_scaling", "rope_scaling_factor", "add_qkv_bias", "objective", "order")
    for name in added:
        del fields[name]
    path.write_text(json.dumps(fields))
    model = load(path.parent)
    assert not model.config.use_rope_scaling
    assert not model.config.add_qkv_bias
    assert isinstance(model, EsoLM)
    assert model.law.name == "left_to_right"


def test_only_a_directory_that_older_versions_would_misread_has_a_new_format(
    tmp_path: Path,
) -> None:
    for case, version in (("eso_lm_b", 1), ("eso_lm_next", 2), ("ar_mask", 1)):
        path = write_case(case, tmp_path / case) / "config.json"
        assert json.loads(path.read_text())["format_version"] == version
    assert choose_version({"use_rope_scaling": True}) == 2


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("ar_mask", {"prepend_token": "eos"}, "prepend_token is 'eos', none of mask, bos, none"),
        ("ar_bos", {"bos_token_id": None}, "prepend_token is 'bos' without bos_token_id"),
        ("bd3_lm", {"block_size": 0}, "block_size is 0, no whole number from 1"),
        ("bd3_lm", {"block_size": None}, "block_size is None, no whole number from 1"),
        ("set_dlm", {"order": "random"}, "order is 'random', none of left_to_right"),
        ("set_dlm", {"set_size": None}, "order is 'staggered' without set_size and max_set_size"),
        ("eso_lm_b", {"alpha_0": 2}, r"alpha_0 is 2, no number in \[0, 1\]"),
        ("mdlm", {"objective": ["mdlm"]}, r"objective \['mdlm'\] is unknown"),
    ],
)
def test_a_wrong_field_of_an_objective_is_refused(
    tmp_path: Path, case: str, change: dict[str, Any], message: str
) -> None:
    path = write_case(case, tmp_path / "out") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(path.parent)


@pytest.mark.parametrize("case", [case for case in CASES if case != "ar_none"])
def test_sample_prints_texts_of_each_objective(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_case(case, tmp_path / "out")
    main(["sample", str(directory), "--num-samples", "2", "--length", "8", "--seed", "1"])
    lines = capsys.readouterr().out.splitlines()
    expected = load(directory).generate(2, length=8, seed=1)
    assert [len(line.split()) for line in lines[1::2]] == [8, 8]
    if case != "mdlm" and not case.startswith("eso_lm"):  # these take `steps` from the directory
        assert lines[1].split() == [str(token) for token in expected.sequences[0].tolist()]


@pytest.mark.parametrize("case", WITH_LIKELIHOOD)
def test_score_prints_the_left_to_right_likelihood_of_each_objective(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_case(case, tmp_path / "out")
    ids = [5, 1, 0, 7, 8, 2, 4]
    lines = tmp_path / "some.jsonl"
    lines.write_text(json.dumps({"tokens": ids}) + "\n")
    main(["score", str(directory), str(lines)])
    score = json.loads(capsys.readouterr().out.splitlines()[0])
    expected = load(directory).score_left_to_right(torch.tensor([ids]))
    assert score["tokens"] == expected.numel() == (6 if case == "ar_none" else 7)
    assert score["log_likelihood"] == pytest.approx(float(expected.sum()), abs=1e-4)


def test_what_an_objective_does_not_have_is_a_one_line_error(tmp_path: Path) -> None:
    cases = [
        ("mdlm", ["score"], "objective mdlm, which has no exact likelihood"),
        ("bd3_lm", ["score"], "objective bd3_lm, which has no exact likelihood"),
        ("mdlm", ["sample", "--alpha-0", "0.5"], "alpha_0 is 0.5, but objective mdlm has none"),
        ("ar_none", ["sample"], "give a prompt with the first token"),
        ("ar_mask", ["sample", "--steps", "3"], "steps: an AR model reveals one token"),
    ]
    text = tmp_path / "some.jsonl"
    text.write_text('{"tokens": [1, 2]}\n')
    for number, (case, (command, *options), message) in enumerate(cases):
        directory = write_case(case, tmp_path / str(number))
        arguments = [str(text)] if command == "score" else options
        with pytest.raises(ConfigError, match=message):
            main([command, str(directory), *arguments])
