"""Rotary position embedding: the angles of rows by their positions, and the rotation of heads.

Shape suffixes: R rows, 1 a dimension for the heads, H heads, D head size, F half of it.
"""

import math

import torch
from torch import Tensor

from megatron_eso.config.model import ModelConfig


def rotary_table(positions_R: Tensor, model: ModelConfig) -> Tensor:
    """Return cosine and sine of every row's rotary angles, [2, R, 1, F] float32.

    The angle of a row depends on its position in the text, not on its slot.

    Args:
        positions_R: Positions of the rows in the text.
        model: The section `model`.
    """
    size = model.kv_channels
    exponents_F = torch.arange(0, size, 2, device=positions_R.device).float() / size
    frequencies_F = model.rotary_base**-exponents_F
    if model.rope_scaling:
        frequencies_F = scale_frequencies(frequencies_F, model)
    angles_R1F = (positions_R.float()[:, None] * frequencies_F)[:, None]
    return torch.stack((angles_R1F.cos(), angles_R1F.sin()))


def scale_frequencies(frequencies_F: Tensor, model: ModelConfig) -> Tensor:
    """Divide the low frequencies by `rope_scaling_factor`, and keep the high ones.

    Between the two limits, which count the turns within the original length, the share of the
    undivided frequency grows from 0 to 1. Source: Llama 3.1, as `rope_type` llama3 of transformers;
    Megatron-Core's RotaryEmbedding has this formula with the default limits and length.

    Args:
        frequencies_F: Radians for each position.
        model: The section `model`.
    """
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    turns_F = model.rope_original_length / (2 * math.pi / frequencies_F)
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return (1 - kept_F) * frequencies_F / model.rope_scaling_factor + kept_F * frequencies_F


def rotate(states_RHD: Tensor, table_2R1F: Tensor) -> Tensor:
    """Rotate the two halves of each head by its row's angle, in float32.

    Args:
        states_RHD: Queries or keys.
        table_2R1F: The output of `rotary_table` for these rows.

    Returns:
        The rotated states in their own dtype.
    """
    first_RHF, second_RHF = states_RHD.float().chunk(2, dim=-1)
    cosine_R1F, sine_R1F = table_2R1F
    rotated = (
        first_RHF * cosine_R1F - second_RHF * sine_R1F,
        second_RHF * cosine_R1F + first_RHF * sine_R1F,
    )
    return torch.cat(rotated, dim=-1).to(states_RHD.dtype)
