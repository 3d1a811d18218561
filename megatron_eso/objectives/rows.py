"""The row plan: a micro-batch as a list of (token, position) rows, in place of a dense mask.

A sample has n real tokens: T, or fewer where it was cut short. Rows are packed as
- diffusion streams, n rows each, slot order;
- clean streams of the sequential samples, n - 1 rows each, slot order: the clean token of the last
  slot is read by nobody;
- mask queries of the sequential samples, one for each masked token, slot order;
- padding.

In the body of the network, streams attend causally, and each query reads the clean stream of its
sample strictly before its slot, and itself: exactly the 2T x 2T mask of the reference
(models/dit.py, BD3-LM mask of block size 1) without the rows that nobody reads. In the last layer
every loss row of either phase is such a query, over the first n - 1 rows of its stream.

Shapes: B samples, T positions or slots, R rows, E loss rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_eso.objectives.noise import Noise
from megatron_eso.objectives.schedule import LogLinearSchedule


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowPlan:
    """Rows of a micro-batch, and which of them carry loss.

    Tensors lie on one device, lengths are Python integers. Samples without a masked token carry no
    loss and have no rows.

    Attributes:
        tokens_R: int64, token of each row: the mask token for masked slots, queries and padding.
        positions_R: int64, the token's original position; 0 for padding.
        stream_lengths: n of each diffusion sample, then n - 1 of each sequential one.
        num_diffusion_streams: Streams of diffusion samples; they come first.
        query_lengths: Mask queries of each sequential stream.
        loss_rows_E: int64, row of each loss row: masked rows of diffusion streams, then queries,
            then padding (0).
        loss_lengths: Loss rows of each stream.
        targets_E: int64, the token to predict; 0 for padding.
        weights_E: float32, weight in the objective; 0 for padding.
        elbo_weights_E: float32, weight in the NELBO; 0 for padding.
        is_sequential_E: bool, loss rows of the sequential phase.
        sample_E: int64, sample of each loss row, as numbered in the micro-batch; 0 for padding.
        num_rows: Rows without padding.
        num_loss_rows: Loss rows without padding.
    """

    tokens_R: Tensor
    positions_R: Tensor
    stream_lengths: tuple[int, ...]
    num_diffusion_streams: int
    query_lengths: tuple[int, ...]
    loss_rows_E: Tensor
    loss_lengths: tuple[int, ...]
    targets_E: Tensor
    weights_E: Tensor
    elbo_weights_E: Tensor
    is_sequential_E: Tensor
    sample_E: Tensor
    num_rows: int
    num_loss_rows: int

    def to(self, device: torch.device | str) -> Self:
        """Returns the plan with its tensors on a device."""
        tensors = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if field.type is Tensor
        }
        return replace(self, **tensors)

    def pin_memory(self) -> Self:
        """Returns the plan with its tensors in pinned memory: `to` a GPU then waits for nothing."""
        tensors = {
            field.name: getattr(self, field.name).pin_memory()
            for field in fields(self)
            if field.type is Tensor
        }
        return replace(self, **tensors)


def plan_rows(
    x_0_BT: Tensor | NDArray[np.int64],
    noise: Noise,
    *,
    schedule: LogLinearSchedule,
    loss_type: str,
    mask_token_id: int,
    row_multiple: int,
) -> RowPlan:
    """Plans the rows of a micro-batch.

    Args:
        x_0_BT: int64, clean tokens in natural order; anything beyond a sample's length.
        noise: Lengths, masks, slot orders, times and phases of the samples.
        schedule: Gives the weights of the diffusion phase.
        loss_type: Objective of the diffusion phase: "elbo" weighs a masked token by
            `schedule.elbo_weight(t)`, "low_var" by 1. The sequential phase weighs by 1 in both.
        mask_token_id: The mask token.
        row_multiple: Rows and loss rows are padded to a multiple of this, and to at least one
            multiple.

    Returns:
        The plan, on the CPU.

    Raises:
        ValueError: `loss_type` is unknown, or a shape does not fit.
    """
    if loss_type not in ("elbo", "low_var"):
        raise ValueError(f"loss_type {loss_type!r} is neither 'elbo' nor 'low_var'")
    x_0 = x_0_BT.cpu().numpy() if isinstance(x_0_BT, Tensor) else np.asarray(x_0_BT)
    if x_0.shape != noise.permutation_BT.shape:
        raise ValueError(f"x_0 has shape {x_0.shape}, its noise {noise.permutation_BT.shape}")
    length_B = noise.length_B
    sorted_BT = np.take_along_axis(x_0, noise.permutation_BT, axis=1)
    num_masked_B = noise.is_masked_BT.sum(axis=1)
    diffusion = np.flatnonzero(~noise.is_sequential_B & (num_masked_B > 0))
    sequential = np.flatnonzero(noise.is_sequential_B & (num_masked_B > 0))
    samples = np.concatenate([diffusion, sequential])
    counts = num_masked_B[samples]

    slot_T = np.arange(x_0.shape[1])
    is_real_BT = slot_T < length_B[:, None]
    is_masked_BT = is_real_BT & (slot_T >= (length_B - num_masked_B)[:, None])
    is_loss, is_query = is_masked_BT[diffusion], is_masked_BT[sequential]
    in_stream, in_clean = is_real_BT[diffusion], slot_T < length_B[sequential, None] - 1
    queries = noise.permutation_BT[sequential][is_query]
    tokens = [
        np.where(is_loss, mask_token_id, sorted_BT[diffusion])[in_stream],
        sorted_BT[sequential][in_clean],
        np.full(len(queries), mask_token_id),
    ]
    positions = [
        noise.permutation_BT[diffusion][in_stream],
        noise.permutation_BT[sequential][in_clean],
        queries,
    ]
    num_rows = sum(len(part) for part in tokens)
    loss_rows = [np.flatnonzero(is_loss[in_stream]), np.arange(num_rows - len(queries), num_rows)]

    elbo_weight_B = np.ones(len(x_0))
    elbo_weight_B[diffusion] = schedule.elbo_weight(noise.t_B[diffusion])
    sample = np.repeat(samples, counts)
    elbo_weights = elbo_weight_B[sample]
    num_loss_rows = len(sample)

    def pad(parts: Sequence[NDArray[Any]], fill: int, dtype: type[np.generic]) -> Tensor:
        size = sum(len(part) for part in parts)
        padding = np.full(_round_up(size, row_multiple) - size, fill)
        return torch.from_numpy(np.concatenate([*parts, padding]).astype(dtype, copy=False))

    return RowPlan(
        tokens_R=pad(tokens, mask_token_id, np.int64),
        positions_R=pad(positions, 0, np.int64),
        stream_lengths=(*length_B[diffusion].tolist(), *(length_B[sequential] - 1).tolist()),
        num_diffusion_streams=len(diffusion),
        query_lengths=tuple(num_masked_B[sequential].tolist()),
        loss_rows_E=pad(loss_rows, 0, np.int64),
        loss_lengths=tuple(counts.tolist()),
        targets_E=pad(
            [sorted_BT[diffusion][is_loss], sorted_BT[sequential][is_query]],
            0,
            np.int64,
        ),
        weights_E=pad(
            [elbo_weights if loss_type == "elbo" else np.ones(num_loss_rows)], 0, np.float32
        ),
        elbo_weights_E=pad([elbo_weights], 0, np.float32),
        is_sequential_E=pad([noise.is_sequential_B[sample]], 0, np.bool_),
        sample_E=pad([sample], 0, np.int64),
        num_rows=num_rows,
        num_loss_rows=num_loss_rows,
    )


def _round_up(size: int, multiple: int) -> int:
    return max(-(-size // multiple), 1) * multiple
