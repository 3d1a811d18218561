"""The map between Megatron's and the sampler's tensors equals layouts written by hand."""

import pytest
import torch
from torch import Tensor

from checkpoints_conversion.parameter_map import list_keys, map_to_megatron, map_to_sampler
from megatron_eso.errors import CheckpointError
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig

PADDED = 16


def test_the_inverse_map_restores_every_bit(
    config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    megatron = map_to_megatron(config, tensors, padded_vocab_size=PADDED)
    back = map_to_sampler(config, megatron, residual_gates=False)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert list_keys(config, residual_gates=False) == list(megatron)


def test_queries_keys_and_values_are_interleaved_by_group(
    config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    megatron = map_to_megatron(config, tensors, padded_vocab_size=PADDED)
    size, repeats = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    has_bias = config.add_bias_linear or config.add_qkv_bias
    for kind in ("weight", "bias") if has_bias else ("weight",):
        rows = []
        for group in range(config.num_key_value_heads):
            heads = [("q", head) for head in range(group * repeats, (group + 1) * repeats)]
            for name, head in [*heads, ("k", group), ("v", group)]:
                tensor = tensors[f"layers.1.self_attn.{name}_proj.{kind}"]
                rows.append(tensor[head * size : (head + 1) * size])
        found = megatron[f"decoder.layers.1.self_attention.linear_qkv.{kind}"]
        assert torch.equal(found, torch.cat(rows))


def test_the_gate_half_comes_first_and_the_vocabulary_is_padded_with_zeros(
    config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    megatron = map_to_megatron(config, tensors, padded_vocab_size=PADDED)
    fc1 = megatron["decoder.layers.0.mlp.linear_fc1.weight"]
    names = ("gate_proj", "up_proj") if config.activation == "swiglu" else ("up_proj",)
    assert torch.equal(fc1, torch.cat([tensors[f"layers.0.mlp.{n}.weight"] for n in names]))
    embedding = megatron["embedding.word_embeddings.weight"]
    assert torch.equal(embedding[: config.vocab_size], tensors["embed_tokens.weight"])
    assert embedding.shape[0] == PADDED
    assert not embedding[config.vocab_size :].any()
    assert ("output_layer.weight" in megatron) == (not config.tie_word_embeddings)
    assert ("output_layer.bias" in megatron) == config.head_bias


def test_padding_of_any_content_is_cut(config: NetworkConfig, tensors: dict[str, Tensor]) -> None:
    megatron = map_to_megatron(config, tensors, padded_vocab_size=PADDED)
    megatron["embedding.word_embeddings.weight"][config.vocab_size :] = 7.0
    back = map_to_sampler(config, megatron, residual_gates=False)
    assert torch.equal(back["embed_tokens.weight"], tensors["embed_tokens.weight"])


def test_residual_gates_fold_into_weight_and_bias(
    config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    megatron = map_to_megatron(config, tensors, padded_vocab_size=PADDED)
    keys = list_keys(config, residual_gates=True)
    gates = [key for key in keys if key.endswith(".gate")]
    assert len(gates) == 2 * config.num_hidden_layers
    generator = torch.Generator().manual_seed(1)
    values = {key: torch.randn(config.hidden_size, generator=generator) for key in gates}
    folded = map_to_sampler(config, megatron | values, residual_gates=True)
    x = torch.randn(5, config.intermediate_size, generator=generator)
    weight = tensors["layers.1.mlp.down_proj.weight"]
    bias = tensors.get("layers.1.mlp.down_proj.bias", torch.zeros(config.hidden_size))
    gated = (x @ weight.T + bias) * values["decoder.layers.1.mlp.linear_fc2.gate"]
    folded_bias = folded.get("layers.1.mlp.down_proj.bias", torch.zeros(config.hidden_size))
    found = x @ folded["layers.1.mlp.down_proj.weight"].T + folded_bias
    torch.testing.assert_close(found, gated, atol=1e-4, rtol=1e-5)


def test_missing_left_over_and_wrong_tensors_are_refused(
    config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    megatron = map_to_megatron(config, tensors, padded_vocab_size=PADDED)
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    without = {name: tensor for name, tensor in megatron.items() if name != key}
    for changed, message in (
        (without, f"{key} is missing"),
        (megatron | {"decoder.layers.7.x": torch.zeros(1)}, "layers.7.x is unknown"),
        (megatron | {key: megatron[key][:-1]}, "does not fit"),
        (megatron | {"embedding.word_embeddings.weight": torch.zeros(2, 2)}, r"\(2, 2\)"),
    ):
        with pytest.raises(CheckpointError, match=f"^runs/a: tensor .*{message}"):
            map_to_sampler(config, changed, residual_gates=False, source="runs/a")
