"""Two float64 Eso-LMs in plain torch over the same parameters: the oracle, and the rows.

The oracle is written from the paper (arXiv 2506.01928) and the reference (models/dit.py, algo.py):
whole sequences, dense boolean masks, `2T x 2T` in the sequential phase, softmax spelled out. It
shares nothing with the package. The second forward is the package's way: rows, row attention,
loss rows only in the last layer, per-phase sums.

Parameters are a dict with the sampler directory's tensor names. What is optional goes by presence:
biases, `q_norm` and `k_norm`, `gate_proj` (SwiGLU), `lm_head.weight` (absent: tied). A norm
without bias is an RMSNorm.

Shapes: B samples, T slots, L attention length (T or 2T), R rows, E loss rows, H heads, G key/value
groups, D head dimension, V vocabulary; a star stands for any leading dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_eso.batches.dealing import Dealing
from megatron_eso.batches.loss import normalize_phases, sum_phases
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.model.attention_backend import AttentionBackend
from megatron_eso.model.row_attention import attend_loss_rows, attend_rows
from megatron_eso.objectives.noise.slots import Noise
from megatron_eso.objectives.objective import Objective

Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """What does not follow from the shapes of the tensors."""

    num_layers: int
    num_heads: int
    num_groups: int
    mask_token_id: int
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: tuple[float, float, float, float] | None = None
    """Llama 3.1's factor, low and high limit, and original length; None: frequencies are kept."""


@dataclass(frozen=True)
class DenseLosses:
    """Per-token `-log p` of each sample in slot order, zero elsewhere than on masked slots."""

    nll_BT: Tensor
    weights_B: Tensor
    elbo_weights_B: Tensor


def draw_parameters(
    config: OracleConfig,
    *,
    hidden_size: int,
    vocab_size: int,
    seed: int = 0,
    head_dim: int | None = None,
    head_bias: bool = True,
    biases: bool = True,
    qkv_biases: bool | None = None,
) -> Parameters:
    """Draws float64 parameters of a LayerNorm, tanh-GELU network; none is left at zero or one."""
    # Each kind of layer draws its parameters in the same way.
    generator = torch.Generator().manual_seed(seed)
    head_dim = head_dim or hidden_size // config.num_heads
    qkv_biases = biases if qkv_biases is None else qkv_biases
    parameters: Parameters = {}

    def draw(name: str, *shape: int, scale: float, shift: float = 0.0) -> None:
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        parameters[name] = (noise * scale + shift).requires_grad_()

    def draw_linear(name: str, size_out: int, size_in: int, *, bias: bool) -> None:
        draw(f"{name}.weight", size_out, size_in, scale=size_in**-0.5)
        if bias:
            draw(f"{name}.bias", size_out, scale=0.2)

    def draw_norm(name: str) -> None:
        draw(f"{name}.weight", hidden_size, scale=0.2, shift=1.0)
        draw(f"{name}.bias", hidden_size, scale=0.2)

    # The network, from the embedding to the head.
    draw("embed_tokens.weight", vocab_size, hidden_size, scale=1.0)
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        draw_norm(f"{layer}.input_layernorm")
        for name, heads in zip("qkv", (config.num_heads, *[config.num_groups] * 2), strict=True):
            draw_linear(
                f"{layer}.self_attn.{name}_proj", heads * head_dim, hidden_size, bias=qkv_biases
            )
        draw_linear(
            f"{layer}.self_attn.o_proj", hidden_size, config.num_heads * head_dim, bias=biases
        )
        draw_norm(f"{layer}.post_attention_layernorm")
        draw_linear(f"{layer}.mlp.up_proj", 4 * hidden_size, hidden_size, bias=biases)
        draw_linear(f"{layer}.mlp.down_proj", hidden_size, 4 * hidden_size, bias=biases)
    draw_norm("norm")
    draw_linear("lm_head", vocab_size, hidden_size, bias=head_bias)
    return parameters


# The oracle.


def diffusion_logits(
    parameters: Parameters, config: OracleConfig, z_t_BT: Tensor, permutation_BT: Tensor
) -> Tensor:
    """Raw logits `[B, T, V]` in slot order: variant B, causal over slots."""
    length = z_t_BT.shape[1]
    mask_TT = torch.ones(length, length, dtype=torch.bool).tril()
    z_sorted_BT = z_t_BT.gather(1, permutation_BT)
    return dense_logits(parameters, config, z_sorted_BT, permutation_BT, mask_TT)


def sequential_logits(
    parameters: Parameters,
    config: OracleConfig,
    z_0_BT: Tensor,
    x_0_BT: Tensor,
    permutation_BT: Tensor,
) -> Tensor:
    """Raw logits `[B, T, V]` in slot order, those of clean slots included.

    The input is `[z_0 ; x_0]` in slot order with the positions of both: z rows see themselves and
    the x rows strictly before, x rows are causal among themselves.
    """
    length = z_0_BT.shape[1]
    ones = torch.ones(length, length, dtype=torch.bool)
    mask_LL = torch.cat(
        [
            torch.cat([torch.eye(length, dtype=torch.bool), ones.tril(-1)], dim=1),
            torch.cat([torch.zeros_like(ones), ones.tril()], dim=1),
        ]
    )
    tokens_BL = torch.cat([z_0_BT.gather(1, permutation_BT), x_0_BT.gather(1, permutation_BT)], 1)
    positions_BL = torch.cat([permutation_BT, permutation_BT], dim=1)
    return dense_logits(parameters, config, tokens_BL, positions_BL, mask_LL)[:, :length]


def dense_losses(
    parameters: Parameters,
    config: OracleConfig,
    x_0_BT: Tensor,
    noise: Noise,
    *,
    alpha_0: float,
    loss_type: str,
) -> DenseLosses:
    """Losses of the samples of a micro-batch, each in its phase."""
    nll, weights, elbo_weights = [], [], []
    for b, length in enumerate(noise.length_B.tolist()):
        # A sample is what it would be alone and of its own length.
        x_0 = x_0_BT[b : b + 1, :length]
        is_masked = torch.from_numpy(noise.is_masked_BT[b : b + 1, :length])
        permutation = torch.from_numpy(noise.permutation_BT[b : b + 1, :length])
        z = x_0.masked_fill(is_masked, config.mask_token_id)
        if noise.is_sequential_B[b]:
            logits = sequential_logits(parameters, config, z, x_0, permutation)
            elbo_weight = 1.0
        else:
            logits = diffusion_logits(parameters, config, z, permutation)
            t = (1 - 1e-3) * float(noise.t_B[b])
            elbo_weight = alpha_0 * (1 - 1e-3) / (1 - alpha_0 * (1 - t))
        targets = x_0.gather(1, permutation)
        losses = token_losses(logits, targets, config.mask_token_id)
        losses = losses * is_masked.gather(1, permutation)
        nll.append(functional.pad(losses, (0, x_0_BT.shape[1] - length)))
        elbo_weights.append(elbo_weight)
        weights.append(elbo_weight if loss_type == "elbo" else 1.0)
    return DenseLosses(
        torch.cat(nll), _as_float32_values(weights), _as_float32_values(elbo_weights)
    )


def token_losses(logits_BTV: Tensor, targets_BT: Tensor, mask_token_id: int) -> Tensor:
    """`-log p(target)` `[B, T]` under SUBS: the mask token has probability zero."""
    is_mask_V = torch.arange(logits_BTV.shape[-1]) == mask_token_id
    logits_BTV = logits_BTV.masked_fill(is_mask_V, -math.inf)
    log_z_BT = logits_BTV.logsumexp(-1)
    return log_z_BT - logits_BTV.gather(-1, targets_BT[..., None])[..., 0]


def dense_objective(losses: DenseLosses, noise: Noise, dealing: Dealing) -> Tensor:
    """Compute the loss of a global batch from its losses: both phases over all their tokens."""
    is_sequential_B = torch.from_numpy(noise.is_sequential_B)
    sum_B = losses.nll_BT.sum(1) * losses.weights_B
    length_B = torch.from_numpy(noise.length_B)
    assert is_sequential_B.sum() == (1 - dealing.share) * dealing.global_batch_size
    total = torch.zeros((), dtype=torch.float64)
    for in_phase_B in (~is_sequential_B, is_sequential_B):
        if in_phase_B.any():
            total = total + sum_B[in_phase_B].sum() / length_B[in_phase_B].sum()
    return total


def dense_logits(
    parameters: Parameters,
    config: OracleConfig,
    tokens_BL: Tensor,
    positions_BL: Tensor,
    mask_LL: Tensor,
) -> Tensor:
    """Raw logits `[B, L, V]` of a network whose rows read what the mask allows."""
    hidden = parameters["embed_tokens.weight"][tokens_BL]
    for i in range(config.num_layers):
        q, k, v = _project_qkv(parameters, config, i, hidden, positions_BL)
        k, v = (x.repeat_interleave(config.num_heads // config.num_groups, dim=2) for x in (k, v))
        scores_BHLL = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        probabilities = scores_BHLL.masked_fill(~mask_LL, -math.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", probabilities, v)
        hidden = _finish_layer(parameters, config, i, hidden, mixed)
    return _head(parameters, _normalize(parameters, "norm", hidden, config.norm_epsilon))


def _as_float32_values(weights: list[float]) -> Tensor:
    """Round to float32, as the plan's weights are: the comparison is of what is done with them."""
    return torch.tensor(weights, dtype=torch.float32).double()


# The package's way.


def row_losses(
    parameters: Parameters, config: OracleConfig, batch: MicroBatch, backend: AttentionBackend
) -> Tensor:
    """`-log p(target)` `[E]` of a micro-batch's loss rows, padding included."""
    rows = batch.rows
    hidden = parameters["embed_tokens.weight"][rows.tokens_R]
    for i in range(config.num_layers):
        q, k, v = _project_qkv(parameters, config, i, hidden, rows.positions_R)
        if i < config.num_layers - 1:
            mixed = attend_rows(q, k, v, rows, backend)
        else:
            mixed = attend_loss_rows(q[rows.loss_rows_E], k, v, rows, backend)
            hidden = hidden[rows.loss_rows_E]
        hidden = _finish_layer(parameters, config, i, hidden, mixed)
    hidden = _normalize(parameters, "norm", hidden, config.norm_epsilon)
    logits_1EV = _head(parameters, hidden)[None]
    return token_losses(logits_1EV, batch.loss.targets_E[None], config.mask_token_id)[0]


def row_objective(
    parameters: Parameters,
    config: OracleConfig,
    batches: list[MicroBatch],
    objective: Objective,
    tokens: Sequence[int],
    backend: AttentionBackend,
) -> Tensor:
    """Compute the loss of a global batch from its micro-batches and real tokens."""
    sums_P = torch.stack(
        [
            sum_phases(
                row_losses(parameters, config, batch, backend),
                batch.loss.weights_E.double(),
                batch.loss,
                len(tokens),
            )
            for batch in batches
        ]
    ).sum(0)
    return objective.combine(normalize_phases(sums_P, tokens))


def gradients(loss: Tensor, parameters: Parameters) -> dict[str, Tensor]:
    """Return the gradient of every parameter; zeros where the loss does not depend on it."""
    found = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


# Parts of a layer that know nothing of masks and rows.


def _project_qkv(
    parameters: Parameters, config: OracleConfig, i: int, hidden: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries `[*, H, D]`, rotated keys and values `[*, G, D]`."""
    layer = f"layers.{i}"
    normed = _normalize(parameters, f"{layer}.input_layernorm", hidden, config.norm_epsilon)
    heads = {"q": config.num_heads, "k": config.num_groups, "v": config.num_groups}
    projected = {}
    for name, number in heads.items():
        states = _project(parameters, f"{layer}.self_attn.{name}_proj", normed)
        states = states.unflatten(-1, (number, -1))
        if f"{layer}.self_attn.{name}_norm.weight" in parameters:
            norm = f"{layer}.self_attn.{name}_norm"
            states = _normalize(parameters, norm, states, config.norm_epsilon)
        projected[name] = states
    q, k = (_rotate(projected[name], positions, config) for name in "qk")
    return q, k, projected["v"]


def _finish_layer(
    parameters: Parameters, config: OracleConfig, i: int, hidden: Tensor, mixed: Tensor
) -> Tensor:
    """Add the attention branch of mixed values `[*, H, D]` and the MLP branch."""
    layer = f"layers.{i}"
    hidden = hidden + _project(parameters, f"{layer}.self_attn.o_proj", mixed.flatten(-2))
    name = f"{layer}.post_attention_layernorm"
    normed = _normalize(parameters, name, hidden, config.norm_epsilon)
    up = _project(parameters, f"{layer}.mlp.up_proj", normed)
    if f"{layer}.mlp.gate_proj.weight" in parameters:
        gate = _project(parameters, f"{layer}.mlp.gate_proj", normed)
        inner = gate * gate.sigmoid() * up
    else:
        inner = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return hidden + _project(parameters, f"{layer}.mlp.down_proj", inner)


def _head(parameters: Parameters, hidden: Tensor) -> Tensor:
    weight = parameters.get("lm_head.weight", parameters["embed_tokens.weight"])
    logits = hidden @ weight.T
    return logits + parameters["lm_head.bias"] if "lm_head.bias" in parameters else logits


def _project(parameters: Parameters, name: str, states: Tensor) -> Tensor:
    projected = states @ parameters[f"{name}.weight"].T
    return projected + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else projected


def _normalize(parameters: Parameters, name: str, states: Tensor, epsilon: float) -> Tensor:
    if f"{name}.bias" in parameters:
        states = states - states.mean(-1, keepdim=True)
    normed = states / (states.square().mean(-1, keepdim=True) + epsilon).sqrt()
    normed = normed * parameters[f"{name}.weight"]
    return normed + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else normed


def _rotate(states: Tensor, positions: Tensor, config: OracleConfig) -> Tensor:
    """Rotates pairs (d, d + D/2) of `[*, heads, D]` by `position * base^(-2d/D)`, or scaled."""
    half = states.shape[-1] // 2
    frequencies = [_scale(config.rotary_base ** (-d / half), config) for d in range(half)]
    angles = positions[..., None, None].double() * torch.tensor(frequencies, dtype=torch.float64)
    first, second = states[..., :half], states[..., half:]
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ],
        dim=-1,
    )


def _scale(frequency: float, config: OracleConfig) -> float:
    """Scales a frequency as Llama 3.1 does: by its wavelength, in three cases."""
    if config.rope_scaling is None:
        return frequency
    factor, low, high, length = config.rope_scaling
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    share = (length / wavelength - low) / (high - low)
    return (1 - share) * frequency / factor + share * frequency
