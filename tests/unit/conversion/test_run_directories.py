"""Run directories, and the weights and steps that `to-sampler` takes from them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints_conversion.__main__ import main
from checkpoints_conversion.run_network import write_run_directory
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.runs.checkpoint import open_checkpoint
from megatron_eso.runs.file_index import FILE_INDEX
from megatron_eso.sampler import load
from megatron_eso.sampler.network.directory import read_description, read_weights
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig
from megatron_eso.sampler.objectives.any_order_ar import AnyOrderAR
from tests.support.run_directories import STEP_0, convert, describe, read_run, rewrite


def test_every_network_returns_from_a_run_directory_bit_for_bit(
    tmp_path: Path, config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    write_run_directory(tmp_path / "run", describe(config), tensors, tokenizer=None)
    main(["to-sampler", str(tmp_path / "run"), str(tmp_path / "sampler")])
    found = read_weights(tmp_path / "sampler")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert NetworkConfig.from_dict(read_description(tmp_path / "sampler")) == config


def test_a_run_directory_names_and_describes_its_checkpoint(run_directory: Path) -> None:
    assert (run_directory / "checkpoints/latest").read_text().strip() == STEP_0.name
    state = json.loads((run_directory / STEP_0 / "state.json").read_text())
    assert state == {"format_version": 1, "step": 0, "consumed_samples": 0, "kind": "weights"}
    checkpoint = open_checkpoint(run_directory)
    assert checkpoint.config.model.head_bias
    assert checkpoint.config.data.vocab_size == 98
    embedding = read_run(run_directory / STEP_0)["embedding.word_embeddings.weight"]
    assert embedding.shape == (128, 64)
    qkv_bias = read_run(run_directory / STEP_0)["decoder.layers.0.self_attention.linear_qkv.bias"]
    assert not qkv_bias.any()


def test_raw_weights_are_the_float32_main_parameters_where_there_are_any(
    tmp_path: Path, run_directory: Path, tiny_directory: Path
) -> None:
    step = run_directory / STEP_0
    model = read_run(step)
    mains = {f"optimizer.state.fp32_param.{key}": tensor for key, tensor in model.items()}
    shadows = {f"ema.{key}": tensor + 1 for key, tensor in model.items()}
    halves = {key: tensor.bfloat16() for key, tensor in model.items()}
    rewrite(step, halves | mains | shadows)
    convert(run_directory, tmp_path / "raw", "--weights", "raw")
    convert(run_directory, tmp_path / "default")
    expected = read_weights(tiny_directory)
    raw, ema = read_weights(tmp_path / "raw"), read_weights(tmp_path / "default")
    assert all(torch.equal(raw[name], expected[name]) for name in expected)
    assert all(torch.equal(ema[name], expected[name] + 1) for name in expected)
    assert read_description(tmp_path / "default")["source"]["weights"] == "ema"
    rewrite(step, halves)
    with pytest.raises(CheckpointError, match="no EMA"):
        convert(run_directory, tmp_path / "none", "--weights", "ema")
    convert(run_directory, tmp_path / "halves")
    found = read_weights(tmp_path / "halves")
    assert all(torch.equal(found[name], expected[name].bfloat16().float()) for name in expected)


def test_residual_gates_are_folded(tmp_path: Path, run_directory: Path) -> None:
    step = run_directory / STEP_0
    tensors = read_run(step)
    gates = {
        f"decoder.layers.{i}.{name}.gate": torch.full((64,), 2.0)
        for i in range(3)
        for name in ("self_attention.linear_proj", "mlp.linear_fc2")
    }
    rewrite(step, tensors | gates)
    path = step / "config.json"
    config = json.loads(path.read_text())
    config["model"]["residual_gates"] = True
    path.write_text(json.dumps(config))
    convert(run_directory, tmp_path / "out")
    found = read_weights(tmp_path / "out")
    name = "decoder.layers.1.mlp.linear_fc2.bias"
    assert torch.equal(found["layers.1.mlp.down_proj.bias"], 2 * tensors[name])


def test_the_newest_checkpoint_is_taken_by_default(tmp_path: Path, run_directory: Path) -> None:
    """Take the newest complete checkpoint, even if `latest` names another."""
    other = run_directory / "checkpoints/step_00000005"
    shutil.copytree(run_directory / STEP_0, other)
    state = json.loads((other / "state.json").read_text())
    (other / "state.json").write_text(json.dumps(state | {"step": 5}))
    (other / FILE_INDEX).unlink()
    assert (run_directory / "checkpoints/latest").read_text() == f"{STEP_0.name}\n"
    convert(run_directory, tmp_path / "newest")
    convert(run_directory, tmp_path / "first", "--step", "0")
    assert read_description(tmp_path / "newest")["source"]["step"] == 5
    assert read_description(tmp_path / "first")["source"]["step"] == 0
    with pytest.raises(ConfigError, match="step_00000005"):
        convert(run_directory, tmp_path / "none", "--step", "6")
    with pytest.raises(SystemExit) as end:
        convert(run_directory, tmp_path / "none", "--step", "-1")
    assert end.value.code == 2


def test_existing_steps_are_listed_in_plain_text(tmp_path: Path, run_directory: Path) -> None:
    with pytest.raises(ConfigError, match="no complete checkpoint; there are step_00000000$"):
        main(["to-sampler", str(run_directory), str(tmp_path / "out"), "--step", "7"])


def test_a_run_of_any_order_ar_becomes_its_model_and_a_run_again(
    tmp_path: Path, run_directory: Path
) -> None:
    step = run_directory / STEP_0
    config = json.loads((step / "config.json").read_text())
    config["objective"] = {"name": "any_order_ar", "order": "left_to_right"}
    (step / "config.json").write_text(json.dumps(config))
    (step / FILE_INDEX).unlink()
    convert(run_directory, tmp_path / "sampler")
    model = load(tmp_path / "sampler")
    assert isinstance(model, AnyOrderAR)
    assert model.law.name == "left_to_right"
    main(["to-megatron", str(tmp_path / "sampler"), str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / STEP_0 / "config.json").read_text())
    assert again["objective"]["name"] == "any_order_ar"
    assert again["objective"]["order"] == "left_to_right"
