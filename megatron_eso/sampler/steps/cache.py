"""Keys and values of generation, and the forward pass of a step's rows.

Shape suffixes: N samples, S rows of a whole sample, R rows of a step (contiguous rows of each
sample), K keys, G key/value groups, D head dimension, C width of the model.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..network.layers_eso_lm import NetworkConfig
from ..network.network_eso_lm import EsoNetworkMixin

Int64 = NDArray[np.int64]
Mask = Callable[[Tensor, int], Tensor]
"""Returns which keys the rows read, bool `[N, R, K]`, from rows `[N, R]` and the number K."""


class RowCache:
    """Keys and values of a sample's rows; a step overwrites those of rows that it computes."""

    def __init__(
        self, config: NetworkConfig, num_samples: int, num_rows: int, like: Tensor
    ) -> None:
        """Allocate `num_rows` rows, and one more that padding rows write to."""
        shape = (
            config.num_hidden_layers,
            num_samples,
            num_rows + 1,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.samples_N1 = torch.arange(num_samples, device=like.device)[:, None]
        self.rows_NR = torch.empty(0)
        self.num_keys = 0

    def place(self, rows_NR: Tensor, num_keys: int) -> None:
        """Set the rows of the next step, int64 `[N, R]`, and its number of keys."""
        self.rows_NR = rows_NR
        self.num_keys = num_keys

    def extend(self, layer: int, key_BRGD: Tensor, value_BRGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the rows of one layer; return its keys and values, each `[N, K, G, D]`."""
        self.keys[layer][self.samples_N1, self.rows_NR] = key_BRGD
        self.values[layer][self.samples_N1, self.rows_NR] = value_BRGD
        return self.keys[layer][:, : self.num_keys], self.values[layer][:, : self.num_keys]


def cache_bytes(config: NetworkConfig, num_samples: int, num_rows: int, element_bytes: int) -> int:
    """Return the size of a `RowCache` in bytes."""
    per_row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return num_samples * (num_rows + 1) * per_row * element_bytes


def memory_bytes(device: torch.device) -> int:
    """Return the memory of a device in bytes; for a CPU, the memory of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """The rows of one step: for each sample `first .. end - 1`, then padding rows."""

    first_N: Int64
    end_N: Int64

    @property
    def numbers(self) -> Int64:
        """The numbers of the rows, `[N, R]`; padding rows have numbers from `end`."""
        rows_NR: Int64 = self.first_N[:, None] + np.arange((self.end_N - self.first_N).max())
        return rows_NR

    @property
    def is_real(self) -> NDArray[np.bool_]:
        """Which rows are not padding, `[N, R]`."""
        is_real_NR: NDArray[np.bool_] = self.numbers < self.end_N[:, None]
        return is_real_NR


def forward_rows(
    network: EsoNetworkMixin,
    cache: RowCache,
    tokens_NS: Tensor,
    positions_NS: Tensor,
    step: StepRows,
    mask: Mask,
) -> Tensor:
    """Compute the hidden states `[N, R, C]` of a step's rows.

    Args:
        network: The network in evaluation mode.
        cache: Has the keys and values of the rows before the step's.
        tokens_NS: The token of each row, int64.
        positions_NS: The position of each row for the rotary angles, int64.
        step: The rows.
        mask: Which rows each row reads; padding rows get the number of the last key.
    """
    num_rows = tokens_NS.shape[1]
    placed_NR = torch.from_numpy(np.where(step.is_real, step.numbers, num_rows))
    placed_NR = placed_NR.to(tokens_NS.device)
    num_keys = int(step.end_N.max())
    cache.place(placed_NR, num_keys)
    readable_NR = placed_NR.clamp(max=num_keys - 1)
    return network.hidden_states(
        tokens_NS.gather(1, readable_NR),
        positions_NS.gather(1, readable_NR),
        mask(readable_NR, num_keys),
        cache,
    )
