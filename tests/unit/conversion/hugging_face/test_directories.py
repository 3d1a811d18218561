"""Models of transformers keep their logits in a sampler directory, and come back bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoints_conversion.__main__ import main
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.sampler import load
from megatron_eso.sampler.network.directory import read_weights
from tests.support.hugging_face import make_gpt2, make_llama3
from tests.support.hugging_face_models import LLAMA3, MODELS, SIZES, save_model

TOLERANCE = 1e-5
WEIGHTS = "model.safetensors"
NUM_TOKENS = SIZES["vocab_size"]


def draw_texts(num_tokens: int = NUM_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, num_tokens, (3, 40), generator=generator)


def read_any(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in directory.glob("model*.safetensors")
        for name, tensor in load_file(path).items()
    }


def convert_back(folder: Path) -> Path:
    """Convert `folder/hf` to `folder/sampler` and back to `folder/back`; compare each bit."""
    main(["from-hf", str(folder / "hf"), str(folder / "sampler")])
    main(["to-hf", str(folder / "sampler"), str(folder / "back")])
    expected, found = read_any(folder / "hf"), read_any(folder / "back")
    assert found
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    return folder / "back"


@torch.no_grad()
def compute_logits(model: PreTrainedModel, texts: Tensor) -> Tensor:
    logits: Tensor = model(texts).logits
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_the_way_back_is_bitwise(
    name: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "hf", name)
    back = convert_back(tmp_path)
    expected = compute_logits(model, draw_texts())
    found = load(tmp_path / "sampler").logits(draw_texts())
    assert found.shape == (3, 40, NUM_TOKENS + 1)
    assert expected.std() > 0.5
    torch.testing.assert_close(found[..., :NUM_TOKENS], expected, atol=TOLERANCE, rtol=0)
    # Transformers finds the class of the result by itself.
    again, report = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert type(again) is type(model)
    assert not any(report.values())
    torch.testing.assert_close(compute_logits(again, draw_texts()), expected, atol=0, rtol=0)


def test_the_mask_token_is_one_more_row_near_the_mean_of_the_others(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    rows = {}
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        main(["from-hf", str(tmp_path / "hf"), str(tmp_path / name), "--seed", str(seed)])
        rows[name] = read_weights(tmp_path / name)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["vocab_size"], config["mask_token_id"]) == (NUM_TOKENS + 1, NUM_TOKENS)
    assert (config["objective"], config["prepend_token"]) == ("ar", "none")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        *others, row = rows["a"][name]
        std, mean = torch.std_mean(torch.stack(others), dim=0)
        distance = ((row - mean) / std).abs()
        assert 0 < distance.max() < 0.05
        assert torch.equal(rows["b"][name], rows["a"][name])
        assert not torch.equal(rows["c"][name][-1], row)


def test_rows_beyond_the_tokenizer_are_never_predicted_and_are_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_gpt2()
    num_tokens = tokenizer.get_vocab_size()
    model = save_model(tmp_path / "hf", vocab_size=num_tokens + 21)
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    back = convert_back(tmp_path)
    assert f"21 of the {num_tokens + 21} rows are beyond the tokenizer" in caplog.text
    sampler = load(tmp_path / "sampler")
    assert sampler.config.vocab_size == num_tokens + 1
    assert sampler.config.mask_token_id == num_tokens
    texts = draw_texts(num_tokens)
    expected = compute_logits(model, texts)[..., :num_tokens]
    found = sampler.logits(texts)[..., :num_tokens]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    # The tokenizer of the sampler has the mask token, and that of the export has none.
    assert Tokenizer.load(tmp_path / "sampler").vocab_size == num_tokens + 1
    assert "mask_token" in (tmp_path / "sampler" / "tokenizer_config.json").read_text()
    assert "mask_token" not in (back / "tokenizer_config.json").read_text()
    assert (back / "tokenizer.json").read_bytes() == (
        tmp_path / "hf" / "tokenizer.json"
    ).read_bytes()


def test_a_tokenizer_with_a_mask_token_keeps_its_row(tmp_path: Path) -> None:
    tokenizer = make_llama3()
    save_model(tmp_path / "hf", vocab_size=tokenizer.get_vocab_size())
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    convert_back(tmp_path)
    sampler = load(tmp_path / "sampler")
    assert sampler.config.vocab_size == tokenizer.get_vocab_size()
    assert sampler.config.mask_token_id == tokenizer.token_to_id("<|mask|>")


def test_shards_and_their_dtype_are_kept(tmp_path: Path) -> None:
    model = save_model(tmp_path / "whole").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    back = convert_back(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(back)
    assert again.dtype == torch.bfloat16
    found = load(tmp_path / "sampler").logits(draw_texts())[..., :NUM_TOKENS]
    expected = compute_logits(again.float(), draw_texts())
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_stored_tied_head_and_rotary_frequencies_are_left_out(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "llama, tied")
    tensors = load_file(tmp_path / "hf" / WEIGHTS)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file({**tensors, **extra}, tmp_path / "hf" / WEIGHTS)
    main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "sampler")])
    main(["to-hf", str(tmp_path / "sampler"), str(tmp_path / "back")])
    found = load_file(tmp_path / "back" / WEIGHTS)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_config_of_transformers_4_is_read(tmp_path: Path) -> None:
    model = save_model(tmp_path / "hf", "llama 3.1, wide heads")
    path = tmp_path / "hf" / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    path.write_text(json.dumps(config))
    convert_back(tmp_path)
    found = load(tmp_path / "sampler").logits(draw_texts())[..., :NUM_TOKENS]
    expected = compute_logits(model, draw_texts())
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_rope_scaling_comes_before_rope_parameters_as_in_transformers(tmp_path: Path) -> None:
    """A user adds `rope_scaling` to a file that transformers 5 wrote."""
    save_model(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    assert config["rope_parameters"]["rope_type"] == "default"
    path.write_text(json.dumps({**config, "rope_scaling": LLAMA3}))
    convert_back(tmp_path)
    expected = compute_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), draw_texts())
    found = load(tmp_path / "sampler").logits(draw_texts())[..., :NUM_TOKENS]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "qwen3, tied"])
def test_verify_compares_directories_of_transformers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "hf", name)
    back = convert_back(tmp_path)
    for other in ("sampler", back.name):
        assert main(["verify", str(tmp_path / "hf"), str(tmp_path / other)]) == 0
    assert "directory of transformers, raw weights" in capsys.readouterr().out
    tensors = load_file(back / WEIGHTS)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, back / WEIGHTS)
    assert main(["verify", str(tmp_path / "hf"), str(back)]) == 1
    assert "1 in norm.weight" in capsys.readouterr().out


def test_a_mask_token_that_predicts_the_first_token_is_exported(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "sampler")])
    path = tmp_path / "sampler" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prepend_token": "mask"}))
    main(["to-hf", str(tmp_path / "sampler"), str(tmp_path / "back")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.config.bos_token_id == NUM_TOKENS
    assert model.generation_config.suppress_tokens == [NUM_TOKENS]
    begin = torch.full((3, 1), NUM_TOKENS)
    found = compute_logits(model, torch.cat([begin, draw_texts()], dim=1))[:, 1:]
    expected = load(tmp_path / "sampler").logits(draw_texts())
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
