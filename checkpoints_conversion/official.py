"""Reads official checkpoints, folds their adaLN and renames their tensors.

Reference: github.com/s-sahoo/Eso-LMs, `models/dit.py`, `models/ema.py`, `trainer_base.py`; Set
    Diffusion: github.com/kuleshov-group/setdlms, `src/backbone/dit.py`. The reference's denoiser
    does not depend on time, so its adaLN is one constant vector, which folds exactly into the
    norms' weights and biases and into the two output projections. The result is a plain pre-LN
    transformer; the fold is one way.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.runs.unpickling import load_torch_file, plain_value
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig

logger = logging.getLogger(__name__)

PREFIX = "backbone."
EMBEDDING = "vocab_embed.embedding"
ROTARY = "rotary_emb.inv_freq"
NORM_EPSILON = 1e-5
_REMEDY = "give a whole checkpoint of the reference"
ROTARY_BASE = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialOptions:
    """What the user states about an official checkpoint; None: the checkpoint states it."""

    objective: str | None = None
    variant: str | None = None
    num_heads: int | None = None
    length: int | None = None
    block_size: int | None = None
    set_size: int | None = None
    max_set_size: int | None = None
    bos_token_id: int | None = None
    """That of the tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialCheckpoint:
    """The part of an official checkpoint that the conversion uses."""

    path: Path
    tensors: dict[str, Tensor]
    """Raw or EMA weights by the reference's names without the prefix `backbone.`."""
    hyper_parameters: dict[str, Any]
    """Dicts, lists and scalars of `hyper_parameters.config`; empty if the file has none."""
    step: int | None
    head_dim: int
    weights: str
    sha256: str
    is_bare: bool
    """Whether the file has a backbone's tensors only."""

    @property
    def has_adaln(self) -> bool:
        """Whether the network has adaLN; the reference's AR model has none."""
        return any("adaLN_modulation" in name for name in self.tensors)

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the hyper-parameters; an empty one if it is missing."""
        section = self.hyper_parameters.get(name)
        return section if isinstance(section, dict) else {}


def read_official(
    path: str | Path, weights: str = "ema", options: OfficialOptions | None = None
) -> OfficialCheckpoint:
    """Read a checkpoint without executing anything that its pickle names.

    Args:
        path: A Lightning checkpoint in zip format, or a bare backbone in `.safetensors`.
        weights: `ema` or `raw`; a bare backbone has one kind.
        options: What the user states about the checkpoint.

    Raises:
        CheckpointError: The file is not a checkpoint of the reference, or lacks these weights.
        ConfigError: An option is missing for a bare backbone.
    """
    options = options or OfficialOptions()
    if Path(path).suffix == ".safetensors":
        return _read_backbone(Path(path), options)
    # The state dict of the transformer, without the prefix.
    content = load_torch_file(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError(
            f"{path}: no state_dict; give a Lightning checkpoint of the reference"
        )
    state = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in content["state_dict"].items()
        if isinstance(name, str) and name.startswith(PREFIX) and isinstance(tensor, Tensor)
    }
    if EMBEDDING not in state or ROTARY not in state:
        raise CheckpointError(
            f"{path}: state_dict has no {PREFIX}{EMBEDDING} or {PREFIX}{ROTARY}; give a "
            "checkpoint of the reference's transformer"
        )
    # The rotary frequencies state the head dimension; they are not parameters.
    head_dim = 2 * state.pop(ROTARY).numel()
    if options.num_heads is not None:
        head_dim = _divide_width(path, state, options.num_heads)
    if weights == "ema":
        state = _ema_weights(path, content.get("ema"), state)
    hyper_parameters = plain_value(content.get("hyper_parameters"))
    config = hyper_parameters.get("config") if isinstance(hyper_parameters, dict) else None
    step = content.get("global_step")
    return OfficialCheckpoint(
        path=Path(path),
        tensors=state,
        hyper_parameters=config if isinstance(config, dict) else {},
        step=step if isinstance(step, int) else None,
        head_dim=head_dim,
        weights=weights,
        sha256=file_sha256(path),
        is_bare=False,
    )


def _read_backbone(path: Path, options: OfficialOptions) -> OfficialCheckpoint:
    """Read a backbone of the reference or of Set Diffusion, which states nothing but tensors."""
    # The options that say what no tensor does.
    for option, value in {
        "--objective": options.objective,
        "--num-heads": options.num_heads,
        "--length": options.length,
    }.items():
        if value is None:
            raise ConfigError(f"{path}: is a bare backbone, which needs {option}")
    # The tensors; the rotary frequencies are not parameters.
    try:
        state = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_REMEDY}") from None
    if EMBEDDING not in state:
        raise CheckpointError(
            f"{path}: has no tensor {EMBEDDING}; give a backbone of the reference or of Set "
            "Diffusion"
        )
    state.pop(ROTARY, None)
    return OfficialCheckpoint(
        path=path,
        tensors=state,
        hyper_parameters={},
        step=None,
        head_dim=_divide_width(path, state, options.num_heads or 1),
        weights="raw",
        sha256=file_sha256(path),
        is_bare=True,
    )


def _divide_width(path: str | Path, state: Mapping[str, Tensor], num_heads: int) -> int:
    """Return the head dimension for a number of heads.

    Raises:
        ConfigError: The width is not a multiple of it.
    """
    width = state[EMBEDDING].shape[-1]
    if width % num_heads:
        raise ConfigError(f"{path}: --num-heads {num_heads} does not divide its width {width}")
    return width // num_heads


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ema_weights(path: str | Path, ema: Any, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the EMA weights by name: the list has the order of the state dict."""
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, list) or not shadow:
        raise CheckpointError(f"{path}: has no EMA weights; use --weights raw")
    if len(shadow) != len(raw):
        raise CheckpointError(
            f"{path}: ema.shadow_params has {len(shadow)} tensors for {len(raw)} parameters; use "
            "--weights raw"
        )
    named = dict(zip(raw, shadow, strict=True))
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.shape != raw[name].shape:
            raise CheckpointError(
                f"{path}: ema.shadow_params does not fit {PREFIX}{name} in shape; use --weights raw"
            )
    return named


def infer_config(
    checkpoint: OfficialCheckpoint, mask_token_id: int | None, length: int | None = None
) -> NetworkConfig:
    """Derive the network from the shapes; the length alone is in none of them.

    Args:
        checkpoint: The checkpoint that was read.
        mask_token_id: None: the last row of the embedding.
        length: Largest number of positions; None: that of `hyper_parameters`.

    Raises:
        CheckpointError: Blocks are missing, shapes do not fit each other, or the mask token is not
            in the vocabulary.
    """
    # Sizes, by the shapes of the tensors.
    path, tensors = checkpoint.path, checkpoint.tensors
    embedding = tensors[EMBEDDING]
    if embedding.dim() != 2:
        raise CheckpointError(
            f"{path}: its tensors do not fit each other in shape ({PREFIX}vocab_embed.embedding "
            f"has {embedding.dim()} dimensions, not 2); {_REMEDY}"
        )
    vocab_size, hidden_size = embedding.shape
    layers = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    if layers != set(range(len(layers))) or not layers:
        numbers = ", ".join(map(str, sorted(layers))) or "none"
        raise CheckpointError(f"{path}: has the blocks {numbers}; some are missing; {_REMEDY}")
    if hidden_size % checkpoint.head_dim:
        raise CheckpointError(
            f"{path}: width {hidden_size} is not a multiple of the head dimension "
            f"{checkpoint.head_dim}; {_REMEDY}"
        )
    up_weight = tensors.get("blocks.0.mlp.0.weight")
    if up_weight is None:
        raise CheckpointError(f"{path}: has no tensor {PREFIX}blocks.0.mlp.0.weight; {_REMEDY}")
    # The length, which is in no shape.
    max_length = checkpoint.section("model").get("length") if length is None else length
    if not isinstance(max_length, int):
        max_length = 1024
        logger.warning("%s: states no model.length; max_length is set to %d", path, max_length)
    return NetworkConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=hidden_size // checkpoint.head_dim,
        num_key_value_heads=hidden_size // checkpoint.head_dim,
        head_dim=checkpoint.head_dim,
        intermediate_size=up_weight.shape[0],
        activation="gelu",
        normalization="LayerNorm",
        norm_epsilon=NORM_EPSILON,
        rotary_base=ROTARY_BASE,
        add_bias_linear=True,
        qk_layernorm=False,
        head_bias=True,
        tie_word_embeddings=False,
        mask_token_id=_choose_mask_token(path, mask_token_id, vocab_size),
        max_length=max_length,
    )


def _choose_mask_token(path: Path, chosen: int | None, vocab_size: int) -> int:
    if chosen is None:
        logger.warning(
            "%s: states no mask token; the last row of the embedding, %d, is taken: see "
            "--mask-token-id",
            path,
            vocab_size - 1,
        )
        return vocab_size - 1
    if not 0 <= chosen < vocab_size:
        raise CheckpointError(
            f"{path}: has a vocabulary of {vocab_size} tokens, which lacks --mask-token-id "
            f"{chosen}; give one from 0 to {vocab_size - 1}"
        )
    return chosen


def fold_official(checkpoint: OfficialCheckpoint) -> dict[str, Tensor]:
    """Return the sampler's tensors in float32, by the sampler's names.

    Each tensor of the checkpoint is used exactly once.

    Raises:
        CheckpointError: A tensor is missing, left over, or of a shape that does not fit.
    """
    source = dict(checkpoint.tensors)
    try:
        tensors = _fold(source, checkpoint.has_adaln)
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.path}: has no tensor {PREFIX}{error.args[0]}; {_REMEDY}"
        ) from None
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: its tensors do not fit each other in shape ({error}); {_REMEDY}"
        ) from None
    if source:
        names = ", ".join(sorted(source))
        raise CheckpointError(f"{checkpoint.path}: its tensors {names} are unknown; {_REMEDY}")
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}


def _fold(source: dict[str, Tensor], has_adaln: bool) -> dict[str, Tensor]:
    """Fold the constant adaLN, in float64, so that the result is rounded once.

    Args:
        source: The tensors by the reference's names; each that is used is taken out.
        has_adaln: Whether the network has adaLN; without it nothing is folded.
    """

    def take(name: str) -> Tensor:
        return source.pop(name).to(torch.float64)

    condition = _constant_condition(source) if has_adaln else None

    def modulation(prefix: str, chunks: int, like: Tensor) -> list[Tensor]:
        if condition is None:
            neutral = [torch.zeros_like(like), torch.zeros_like(like), torch.ones_like(like)]
            return (neutral * 2)[:chunks]
        weight, bias = (
            take(f"{prefix}adaLN_modulation.weight"),
            take(f"{prefix}adaLN_modulation.bias"),
        )
        return list((weight @ condition + bias).chunk(chunks))

    # The embedding, then the layers: norms with scale and shift, output projections with gates.
    tensors = {"embed_tokens.weight": take(EMBEDDING)}
    num_layers = sum(name.endswith("norm1.weight") for name in source)
    for layer in range(num_layers):
        old, new = f"blocks.{layer}.", f"layers.{layer}."
        norm_1, norm_2 = take(f"{old}norm1.weight"), take(f"{old}norm2.weight")
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(old, 6, norm_1)
        tensors[f"{new}input_layernorm.weight"] = norm_1 * (1 + scale_1)
        tensors[f"{new}input_layernorm.bias"] = shift_1
        qkv = take(f"{old}attn_qkv.weight").chunk(3)
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
            tensors[f"{new}self_attn.{name}.weight"] = weight
            tensors[f"{new}self_attn.{name}.bias"] = torch.zeros_like(norm_1)
        tensors[f"{new}self_attn.o_proj.weight"] = gate_1[:, None] * take(f"{old}attn_out.weight")
        tensors[f"{new}self_attn.o_proj.bias"] = torch.zeros_like(norm_1)
        tensors[f"{new}post_attention_layernorm.weight"] = norm_2 * (1 + scale_2)
        tensors[f"{new}post_attention_layernorm.bias"] = shift_2
        tensors[f"{new}mlp.up_proj.weight"] = take(f"{old}mlp.0.weight")
        tensors[f"{new}mlp.up_proj.bias"] = take(f"{old}mlp.0.bias")
        tensors[f"{new}mlp.down_proj.weight"] = gate_2[:, None] * take(f"{old}mlp.2.weight")
        tensors[f"{new}mlp.down_proj.bias"] = gate_2 * take(f"{old}mlp.2.bias")
    # The last norm, with its scale and shift, and the head.
    final = take("output_layer.norm_final.weight")
    shift, scale = modulation("output_layer.", 2, final)
    tensors["norm.weight"] = final * (1 + scale)
    tensors["norm.bias"] = shift
    tensors["lm_head.weight"] = take("output_layer.linear.weight")
    tensors["lm_head.bias"] = take("output_layer.linear.bias")
    return tensors


def _constant_condition(source: dict[str, Tensor]) -> Tensor:
    """Compute SiLU of the reference's timestep embedding at sigma = 0, float64.

    The embedding of 0 is the cosines of 0, then the sines of 0.
    """
    weights = [
        source.pop(f"sigma_map.mlp.{i}.{kind}") for i in (0, 2) for kind in ("weight", "bias")
    ]
    weight_0, bias_0, weight_2, bias_2 = (weight.to(torch.float64) for weight in weights)
    half = weight_0.shape[1] // 2
    frequencies = torch.cat([torch.ones(half), torch.zeros(weight_0.shape[1] - half)])
    hidden = F.silu(weight_0 @ frequencies.to(torch.float64) + bias_0)
    return F.silu(weight_2 @ hidden + bias_2)
