"""Maps the tensors of a distributed checkpoint to those of the sampler, and back; torch only.

Two pure functions apply a table of entries. Three arrangements differ: Megatron-Core keeps the
query, key and value rows of a group together (`[q_1..q_r, k, v]` per group), keeps SwiGLU's gate
and up projection in one matrix, and pads the vocabulary. Residual gates (a scale per output
channel) are folded into the output projections of the sampler.

Shape suffixes: G key/value groups, S = heads per group + 2, D head dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from megatron_eso.errors import CheckpointError
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig


class Layout(Enum):
    """Arrangement of the rows of a Megatron tensor, as seen from the sampler's tensors."""

    SAME = "same"
    QKV = "qkv"
    """Three tensors, interleaved by group."""
    HALVES = "halves"
    """Two tensors, one above the other."""
    VOCABULARY = "vocabulary"
    """One tensor, padded at the end."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a distributed checkpoint, and the sampler's tensors that it holds."""

    key: str
    """Name in the distributed checkpoint."""
    names: tuple[str, ...]
    """Names in the sampler."""
    layout: Layout = Layout.SAME
    gate: str | None = None
    """Name of the residual gate that scales the rows; None: no gate scales them."""


def list_entries(config: NetworkConfig) -> list[Entry]:
    """List the tensors of a network, in the order of its layers."""
    entries = [
        Entry("embedding.word_embeddings.weight", ("embed_tokens.weight",), Layout.VOCABULARY)
    ]
    for layer in range(config.num_hidden_layers):
        entries += _list_layer(config, f"decoder.layers.{layer}.", f"layers.{layer}.")
    entries += [
        Entry(f"decoder.final_layernorm.{kind}", (f"norm.{kind}",)) for kind in _norm_kinds(config)
    ]
    if not config.tie_word_embeddings:
        entries.append(Entry("output_layer.weight", ("lm_head.weight",), Layout.VOCABULARY))
    if config.head_bias:
        entries.append(Entry("output_layer.bias", ("lm_head.bias",), Layout.VOCABULARY))
    return entries


def _norm_kinds(config: NetworkConfig) -> tuple[str, ...]:
    return ("weight", "bias") if config.normalization == "LayerNorm" else ("weight",)


def _list_layer(config: NetworkConfig, old: str, new: str) -> list[Entry]:
    """List the tensors of one layer.

    Args:
        config: Describes the network.
        old: Prefix of the layer in a distributed checkpoint.
        new: Prefix of the layer in the sampler.
    """
    is_gated = config.activation == "swiglu"
    attention, mlp = f"{old}self_attention.", f"{old}mlp."
    up_names = ("gate_proj", "up_proj") if is_gated else ("up_proj",)
    # The norms, which Megatron-Core fuses into the projections that read them.
    entries = []
    for kind in _norm_kinds(config):
        fused = f"layer_norm_{kind}"
        entries += [
            Entry(f"{attention}linear_qkv.{fused}", (f"{new}input_layernorm.{kind}",)),
            Entry(f"{mlp}linear_fc1.{fused}", (f"{new}post_attention_layernorm.{kind}",)),
        ]
        if config.qk_layernorm:
            entries += [
                Entry(
                    f"{attention}{which}_layernorm.{kind}", (f"{new}self_attn.{which}_norm.{kind}",)
                )
                for which in ("q", "k")
            ]
    # The projections.
    for kind in ("weight", "bias"):
        is_weight = kind == "weight"
        if is_weight or config.add_bias_linear or config.add_qkv_bias:
            qkv = tuple(f"{new}self_attn.{name}_proj.{kind}" for name in ("q", "k", "v"))
            entries.append(Entry(f"{attention}linear_qkv.{kind}", qkv, Layout.QKV))
        if not (is_weight or config.add_bias_linear):
            continue
        up = tuple(f"{new}mlp.{name}.{kind}" for name in up_names)
        entries += [
            Entry(
                f"{attention}linear_proj.{kind}",
                (f"{new}self_attn.o_proj.{kind}",),
                gate=f"{attention}linear_proj.gate",
            ),
            Entry(f"{mlp}linear_fc1.{kind}", up, Layout.HALVES if is_gated else Layout.SAME),
            Entry(
                f"{mlp}linear_fc2.{kind}",
                (f"{new}mlp.down_proj.{kind}",),
                gate=f"{mlp}linear_fc2.gate",
            ),
        ]
    return entries


def list_keys(config: NetworkConfig, *, residual_gates: bool) -> list[str]:
    """List the names of the tensors that `map_to_sampler` needs."""
    entries = list_entries(config)
    gates = {entry.gate for entry in entries if entry.gate is not None}
    return [entry.key for entry in entries] + (sorted(gates) if residual_gates else [])


def map_to_sampler(
    config: NetworkConfig,
    tensors: Mapping[str, Tensor],
    *,
    residual_gates: bool,
    source: object = "checkpoint",
) -> dict[str, Tensor]:
    """Rename, split, fold and cut the tensors of a distributed checkpoint.

    Args:
        config: Describes the network.
        tensors: The tensors by Megatron-Core's names; each is used.
        residual_gates: Whether the checkpoint has residual gates.
        source: Where the tensors come from, for errors.

    Raises:
        CheckpointError: A tensor is missing, left over, or of a shape that does not fit.
    """
    keys = list_keys(config, residual_gates=residual_gates)
    for key in sorted(set(keys) ^ tensors.keys()):
        problem = "unknown" if key in tensors else "missing"
        raise CheckpointError(
            f"{source}: tensor {key} is {problem}; its configuration is of another model"
        )
    mapped: dict[str, Tensor] = {}
    for entry in list_entries(config):
        tensor = tensors[entry.key]
        if residual_gates and entry.gate is not None:
            gate = tensors[entry.gate]
            tensor = tensor * gate.reshape(-1, *[1] * (tensor.dim() - 1))
        try:
            parts = _split(config, entry, tensor)
        except (RuntimeError, ValueError):
            raise CheckpointError(
                f"{source}: tensor {entry.key} has the shape {tuple(tensor.shape)}, which does not "
                "fit its configuration; that is of another model"
            ) from None
        mapped |= zip(entry.names, parts, strict=True)
    return {name: tensor.contiguous() for name, tensor in mapped.items()}


def map_to_megatron(
    config: NetworkConfig, tensors: Mapping[str, Tensor], *, padded_vocab_size: int
) -> dict[str, Tensor]:
    """Invert `map_to_sampler` without residual gates, and pad the vocabulary with zeros.

    Args:
        config: Describes the network.
        tensors: The tensors by the sampler's names.
        padded_vocab_size: Rows of embedding and head, with padding.
    """
    mapped = {}
    for entry in list_entries(config):
        parts = [tensors[name] for name in entry.names]
        if entry.layout is Layout.VOCABULARY:
            padding = padded_vocab_size - config.vocab_size
            parts = [torch.cat([parts[0], parts[0].new_zeros(padding, *parts[0].shape[1:])])]
        elif entry.layout is Layout.QKV:
            groups = [
                part.reshape(config.num_key_value_heads, -1, *part.shape[1:]) for part in parts
            ]
            parts = [torch.cat(groups, dim=1).flatten(0, 1)]
        mapped[entry.key] = torch.cat(parts).contiguous()
    return mapped


def _split(config: NetworkConfig, entry: Entry, tensor: Tensor) -> list[Tensor]:
    if entry.layout is Layout.VOCABULARY:
        if tensor.shape[0] < config.vocab_size:
            raise ValueError("fewer rows than the vocabulary has tokens")
        return [tensor[: config.vocab_size]]
    if entry.layout is Layout.HALVES:
        return list(tensor.chunk(2))
    if entry.layout is Layout.QKV:
        groups = config.num_key_value_heads
        heads_per_group = config.num_attention_heads // groups
        rows_GSD = tensor.reshape(groups, heads_per_group + 2, config.head_dim, *tensor.shape[1:])
        parts = torch.split(rows_GSD, [heads_per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]
    return [tensor]
