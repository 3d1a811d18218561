"""The layers of the network in plain torch, and the configuration of the network.

A sampler directory holds a copy of this file and of `network_eso_lm.py`, so this file imports torch
only. Paper: arXiv 2506.01928.

Shape suffixes: B samples, R rows of a forward pass, K keys, H heads, G key/value groups,
D head dimension, V vocabulary, C width of the model, F width of the MLP, E rows given to the head.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Shape and arithmetic of the network, by the names of `config.json`."""

    vocab_size: int
    """Number of tokens with the mask token; embedding and head have this many rows."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    """`gelu` (tanh approximation) or `swiglu`."""
    normalization: str
    """`LayerNorm` (weight and bias) or `RMSNorm` (weight)."""
    norm_epsilon: float
    rotary_base: float
    use_rope_scaling: bool = False
    """Whether low rotary frequencies are divided, by `rope_type` llama3 of transformers."""
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    add_bias_linear: bool
    add_qkv_bias: bool = False
    """Biases of queries, keys and values, where `add_bias_linear` gives none."""
    qk_layernorm: bool
    head_bias: bool
    tie_word_embeddings: bool
    mask_token_id: int
    max_length: int
    """Largest number of positions of a text."""

    def __post_init__(self) -> None:
        """Check the combination of values.

        Raises:
            ValueError: No network has this combination.
        """
        if self.activation not in ("gelu", "swiglu"):
            raise ValueError(f"activation {self.activation!r} is neither gelu nor swiglu")
        if self.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(
                f"normalization {self.normalization!r} is neither LayerNorm nor RMSNorm"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd")
        if self.use_rope_scaling and not (
            self.rope_scaling_factor >= 1
            and 0 < self.rope_low_freq_factor < self.rope_high_freq_factor
            and self.rope_original_length > 0
        ):
            raise ValueError("the factors and the original length scale no rotary frequencies")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is not in 0..{self.vocab_size - 1}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Take the fields from the content of a `config.json`, and ignore its other keys.

        A directory of an older version lacks the fields that have a default.

        Raises:
            ValueError: A field is missing or has another type, or no network has these values.
        """
        found = {}
        for field in fields(cls):
            default = None if field.default is MISSING else field.default
            value = found[field.name] = values.get(field.name, default)
            if type(value) is not field.type and not (field.type is float and type(value) is int):
                raise ValueError(
                    f"{field.name} is {value!r}, no {getattr(field.type, '__name__', '')}"
                )
        return cls(**found)


class KeyValueStore(Protocol):
    """A store of the keys and values of this and earlier forward passes."""

    def extend(self, layer: int, key_BRGD: Tensor, value_BRGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the rows of one layer; return all its keys and values, each `[B, K, G, D]`."""
        ...


def residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of residual stream, norms and logits: at least float32, as in training."""
    return torch.promote_types(dtype, torch.float32)


class WideLayerNorm(nn.LayerNorm):
    """Layer norm in at least float32; the result has the weights' dtype."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise the last dimension."""
        wide = residual_dtype(self.weight.dtype)
        normed = F.layer_norm(
            input.to(wide),
            self.normalized_shape,
            self.weight.to(wide),
            self.bias.to(wide),
            self.eps,
        )
        return normed.to(self.weight.dtype)


class WideRMSNorm(nn.Module):
    """Root-mean-square norm in at least float32; the result has the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        """Create the weight, which is one at first."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise the last dimension."""
        wide = input.to(residual_dtype(self.weight.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(self.weight.dtype)


def build_norm(config: NetworkConfig, size: int) -> nn.Module:
    """Build the norm that the configuration names, over a last dimension of this size."""
    if config.normalization == "LayerNorm":
        return WideLayerNorm(size, eps=config.norm_epsilon)
    return WideRMSNorm(size, eps=config.norm_epsilon)


def scale_frequencies(config: NetworkConfig, frequencies: Tensor) -> Tensor:
    """Divide the low rotary frequencies by the factor, and keep the high ones (Llama 3.1).

    Between the two limits, which count the turns within the original length, the share of the
    undivided frequency grows from 0 to 1.
    """
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_length / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / config.rope_scaling_factor + kept * frequencies


def rotary_tables(config: NetworkConfig, positions_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the rotary angles, float32 `[B, R, 1, D]`, with equal halves."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions_BR.device)
    inverse_frequency = 1.0 / (config.rotary_base ** (exponents / config.head_dim))
    if config.use_rope_scaling:
        inverse_frequency = scale_frequencies(config, inverse_frequency)
    angles = positions_BR.to(torch.float32)[..., None] * inverse_frequency
    angles = torch.cat([angles, angles], dim=-1)[:, :, None, :]
    return angles.cos(), angles.sin()


def _rotate(x_BRHD: Tensor, cos_BR1D: Tensor, sin_BR1D: Tensor) -> Tensor:
    wide = x_BRHD.to(residual_dtype(x_BRHD.dtype))
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (wide * cos_BR1D + rotated * sin_BR1D).to(x_BRHD.dtype)


class Attention(nn.Module):
    """Self-attention with rotary angles of the rows' positions in the text."""

    def __init__(self, config: NetworkConfig, layer: int) -> None:
        """Build the projections of layer number `layer`."""
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads_per_group = config.num_attention_heads // config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        bias = config.add_bias_linear or config.add_qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.add_bias_linear)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_layernorm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if config.qk_layernorm else nn.Identity()

    def forward(
        self,
        x_BRC: Tensor,
        rotary: tuple[Tensor, Tensor],
        is_visible_BRK: Tensor | None,
        cache: KeyValueStore | None,
    ) -> Tensor:
        """Attend; without `is_visible_BRK` each row reads itself and the rows before it."""
        q_BRHD = self.q_norm(self.q_proj(x_BRC).unflatten(-1, (-1, self.head_dim)))
        k_BRGD = self.k_norm(self.k_proj(x_BRC).unflatten(-1, (-1, self.head_dim)))
        v_BRGD = self.v_proj(x_BRC).unflatten(-1, (-1, self.head_dim))
        q_BRHD, k_BRGD = _rotate(q_BRHD, *rotary), _rotate(k_BRGD, *rotary)
        k_BKGD, v_BKGD = k_BRGD, v_BRGD
        if cache is not None:
            k_BKGD, v_BKGD = cache.extend(self.layer, k_BRGD, v_BRGD)
        out_BHRD = F.scaled_dot_product_attention(
            q_BRHD.transpose(1, 2),
            k_BKGD.repeat_interleave(self.heads_per_group, dim=2).transpose(1, 2),
            v_BKGD.repeat_interleave(self.heads_per_group, dim=2).transpose(1, 2),
            attn_mask=None if is_visible_BRK is None else is_visible_BRK[:, None],
            is_causal=is_visible_BRK is None,
        )
        out_BRC: Tensor = self.o_proj(out_BHRD.transpose(1, 2).flatten(2))
        return out_BRC


class MLP(nn.Module):
    """Feed-forward network with GELU (tanh approximation) or SwiGLU."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build the projections."""
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.add_bias_linear
        self.is_gated = config.activation == "swiglu"
        if self.is_gated:
            self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BRC: Tensor) -> Tensor:
        """Transform each row."""
        up_BRF = self.up_proj(x_BRC)
        if self.is_gated:
            up_BRF = F.silu(self.gate_proj(x_BRC)) * up_BRF
        else:
            up_BRF = F.gelu(up_BRF, approximate="tanh")
        out_BRC: Tensor = self.down_proj(up_BRF)
        return out_BRC


class Layer(nn.Module):
    """Pre-LN attention and MLP on a residual stream."""

    def __init__(self, config: NetworkConfig, layer: int) -> None:
        """Build layer number `layer`."""
        super().__init__()
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BRC: Tensor,
        rotary: tuple[Tensor, Tensor],
        is_visible_BRK: Tensor | None,
        cache: KeyValueStore | None,
    ) -> Tensor:
        """Add both branches to the residual stream."""
        x_BRC = x_BRC + self.self_attn(self.input_layernorm(x_BRC), rotary, is_visible_BRK, cache)
        out_BRC: Tensor = x_BRC + self.mlp(self.post_attention_layernorm(x_BRC))
        return out_BRC


class Head(nn.Module):
    """Projection to the logits of the vocabulary; a tied head has no weight."""

    def __init__(self, config: NetworkConfig) -> None:
        """Create the parameters that the configuration has, with zeros."""
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.weight = None if config.tie_word_embeddings else nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None

    def forward(self, x_EC: Tensor, embedding_VC: Tensor) -> Tensor:
        """Compute logits `[..., V]` in at least float32; the mask token's column is not masked."""
        weight = embedding_VC if self.weight is None else self.weight
        logits = F.linear(x_EC, weight, self.bias)
        return logits.to(residual_dtype(logits.dtype))
