"""from-hf and to-hf refuse what they cannot convert, in one line, and write nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkpoints_conversion.__main__ import main
from megatron_eso.errors import ConfigError, UserError
from tests.support.hugging_face import make_gpt2
from tests.support.hugging_face_models import save_model

WEIGHTS = "model.safetensors"

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "mistral"}, "model_type is 'mistral'; give a Llama, Qwen2 or Qwen3"),
    "class": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures is ['LlamaForSequenceClassification']; give a model of LlamaForCausalLM",
    ),
    "sliding windows": ({"use_sliding_window": True}, "use_sliding_window is True"),
    "windows of layers": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types has sliding_attention",
    ),
    "biases of attention": ({"attention_bias": True}, "attention_bias is True"),
    "biases of the MLP": ({"mlp_bias": True}, "mlp_bias is True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the network has only 'silu'"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    "partly rotary": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    "llama3 without its numbers": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor is None, not a positive number",
    ),
    "no size": ({"hidden_size": None}, "hidden_size is None, not a positive number"),
    "uneven heads": ({"head_dim": 7}, "head_dim 7 is odd; give another model"),
}
for kind in ("linear", "dynamic", "yarn", "longrope"):
    CONFIGS[kind] = ({"rope_scaling": {"type": kind, "factor": 2.0}}, f"rope_type is '{kind}'")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(tmp_path / "hf")
    return tmp_path / "hf"


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read_refusal(directory: Path, *options: str, command: str = "from-hf") -> UserError:
    out = directory.parent / "out"
    with pytest.raises(UserError) as caught:
        main([command, str(directory), str(out), *options])
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize("case", CONFIGS)
def test_a_model_that_the_network_does_not_compute_is_refused_by_name(
    case: str, directory: Path
) -> None:
    changes, message = CONFIGS[case]
    change_config(directory, **changes)
    error = read_refusal(directory)
    assert f"{directory / 'config.json'}: {message}" in str(error)
    assert error.exit_code == 2


def keep_pickle(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def name_missing_shard(directory: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def store_in_float64(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
    save_file(tensors, directory / WEIGHTS)


def drop_tensor(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, directory / WEIGHTS)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str, int]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: cannot be read", 2),
    "damaged config": (
        lambda path: (path / "config.json").write_text("{"),
        "config.json: is not valid JSON",
        1,
    ),
    "a pickle alone": (keep_pickle, "has only pytorch_model.bin, a pickle, which is not read", 2),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), f"{WEIGHTS}: is missing", 2),
    "a missing shard": (name_missing_shard, "model-00001-of-00002.safetensors", 1),
    "cut weights": (
        lambda path: (path / WEIGHTS).write_bytes(b"1234"),
        "its weights are damaged",
        1,
    ),
    "two dtypes": (store_in_float64, "its tensors have the dtypes torch.float32, torch.float64", 2),
    "a missing tensor": (drop_tensor, "layers.1.self_attn.q_proj.weight: missing", 1),
    "another vocabulary": (
        lambda path: change_config(path, vocab_size=96),
        "embed_tokens.weight has the shape (97, 32), but config.json states (96, 32)",
        1,
    ),
    "a head that is not tied": (
        lambda path: change_config(path, tie_word_embeddings=True),
        "tie_word_embeddings is true, but lm_head.weight is not the embedding",
        2,
    ),
    "fewer rows than tokens": (
        lambda path: make_gpt2().save(str(path / "tokenizer.json")),
        "vocab_size is 97, but the tokenizer",
        2,
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_directory_that_cannot_be_read_is_refused(case: str, directory: Path) -> None:
    damage, message, exit_code = DAMAGES[case]
    damage(directory)
    error = read_refusal(directory)
    assert message in str(error)
    assert error.exit_code == exit_code


SAMPLERS: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "mdlm"}, "objective is 'mdlm'; Llama, Qwen2 and Qwen3 are auto"),
    "activation": ({"activation": "gelu"}, "activation is 'gelu', 'swiglu' in Llama, Qwen2"),
    "norm": ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm', 'RMSNorm' in Llama"),
    "head bias": ({"head_bias": True}, "head_bias is True, False in Llama"),
    "width": ({"hidden_size": 33}, "hidden_size is 33, in LlamaForCausalLM a multiple of 4 heads"),
    "both": ({"add_qkv_bias": True, "qk_layernorm": True}, "has add_qkv_bias and qk_layernorm"),
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_a_sampler_directory_of_another_shape_is_not_exported(case: str, directory: Path) -> None:
    sampler = directory.parent / "sampler"
    main(["from-hf", str(directory), str(sampler)])
    changes, message = SAMPLERS[case]
    change_config(sampler, **changes)
    error = read_refusal(sampler, command="to-hf")
    assert message in str(error)
    assert error.exit_code == 2


def test_other_files_are_not_overwritten(directory: Path) -> None:
    sampler = directory.parent / "sampler"
    main(["from-hf", str(directory), str(sampler)])
    main(["from-hf", str(directory), str(sampler)])  # a sampler directory is replaced
    before = {path: path.read_bytes() for path in directory.iterdir()}
    for command in (["from-hf", str(directory)], ["to-hf", str(sampler)]):
        with pytest.raises(ConfigError, match="exists and holds something else"):
            main([*command, str(directory)])
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
