"""Orders of generation and parallel schedules, and the row plans of their likelihoods.

The orders of a sample are functions of its index in the validation set.

Shapes: B samples of a micro-batch, T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.batches.sets import predict_in_sets
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.any_order_ar import AnyOrderArObjective
from megatron_eso.objectives.noise.orders import OrderLaw, sort_slots
from megatron_eso.objectives.objective import VALIDATION_SEED, Objective, Samples
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose

Keys = Callable[[NDArray[np.uint64]], NDArray[np.uint64]]
"""Keys of orders, as in `noise/orders.py`, from 64 random bits for every position, `[B, T]`."""

TRAINED = "trained"
STRIDES = (2, 4, 8)
BLOCK_SIZES = (4, 16, 64)
REFUSALS = {
    "ar": "has one order, left to right; `pretrain.evaluate` reports its exact likelihood",
    "mdlm": "has no exact likelihood in an order; `pretrain.evaluate` reports its NELBO",
    "bd3_lm": "has no exact likelihood in an order; `pretrain.evaluate` reports its NELBO",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """An order of generation, and the number of tokens that a step generates.

    Attributes:
        order: Name of the order.
        keys: Keys of the order; None: the order that the objective trains on.
        set_size: Tokens of a step.
    """

    order: str
    keys: Keys | None
    set_size: int = 1

    def plan(self, objective: Objective, mask_token_id: int, samples: Samples) -> MicroBatch:
        """Plan samples with every token predicted from the sets before its own.

        Args:
            objective: An objective with an exact likelihood in every order.
            mask_token_id: The mask token.
            samples: Samples of the validation set.
        """
        if self.keys is None:
            batch = objective.plan_order(samples, 0)
        else:
            # With every token masked, all these objectives have the rows of any-order AR.
            planner = AnyOrderArObjective(
                seed=VALIDATION_SEED, mask_token_id=mask_token_id, order=OrderLaw(name="uniform")
            )
            batch = planner.plan_orders(samples, _draw_orders(samples, self.keys))
        return batch if self.set_size == 1 else predict_in_sets(batch, self.set_size)


def check_objective(config: ObjectiveConfig, source: str) -> None:
    """Refuse an objective without an exact likelihood in several orders.

    Args:
        config: The section `objective`.
        source: File of the configuration, for the error.

    Raises:
        ConfigError: The objective has one order or none.
    """
    if config.name in REFUSALS:
        raise ConfigError(f'{source}: objective.name = "{config.name}" {REFUSALS[config.name]}')


def list_schedules(config: ObjectiveConfig, length: int) -> list[Schedule]:
    """List the schedules: the trained order first, then other orders, then sets of 2, 4, 8 ...

    Sets follow the trained order, and the uniform one where that is another.

    Args:
        config: The section `objective`.
        length: T, the tokens of a sample.
    """
    staggered = OrderLaw(
        name="staggered", set_size=config.set_size, max_set_size=config.max_set_size
    )
    uniform = OrderLaw(name="uniform").keys
    orders: dict[str, Keys] = {
        "uniform": uniform,
        "left to right": OrderLaw(name="left_to_right").keys,
        "right to left": _right_to_left_keys,
        **{f"strided by {s}": _strided_keys(s) for s in STRIDES if s < length},
        **{f"blocks of {b}": _block_keys(b) for b in BLOCK_SIZES if b < length},
        f"staggered {config.set_size}/{config.max_set_size}": staggered.keys,
    }
    in_sets = {TRAINED: None} if config.order == "uniform" else {TRAINED: None, "uniform": uniform}
    powers = [1 << number for number in range(1, length.bit_length()) if 1 << number < length]
    sizes = [*powers, length] if length > 1 else []
    return [
        Schedule(order=TRAINED, keys=None),
        *(Schedule(order=name, keys=keys) for name, keys in orders.items()),
        *(
            Schedule(order=name, keys=keys, set_size=size)
            for name, keys in in_sets.items()
            for size in sizes
        ),
    ]


def _draw_orders(samples: Samples, keys: Keys) -> NDArray[np.int64]:
    """Return `permutation[b, slot] = position` of each sample."""
    num_tokens = samples.tokens_BT.shape[1]
    bits = [
        random_bits(VALIDATION_SEED, Purpose.ANY_ORDER, int(index), num_tokens)
        for index in samples.indices_B
    ]
    keys_BT = keys(np.stack(bits))
    is_real_BT = np.arange(num_tokens) < samples.length_B[:, None]
    return sort_slots(is_real_BT, is_real_BT, clean_keys_BT=keys_BT, masked_keys_BT=keys_BT)


def _right_to_left_keys(bits_BT: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the keys of the reversed natural order."""
    descending = np.arange(bits_BT.shape[1], dtype=np.uint64)[::-1]
    return np.broadcast_to(descending, bits_BT.shape)


def _strided_keys(stride: int) -> Keys:
    """Return keys of the positions 0, s, 2s ..., then 1, s + 1 ..., and so on."""

    def keys(bits_BT: NDArray[np.uint64]) -> NDArray[np.uint64]:
        positions = np.arange(bits_BT.shape[1], dtype=np.uint64)
        first, number = positions % np.uint64(stride), positions // np.uint64(stride)
        return np.broadcast_to(first * np.uint64(len(positions)) + number, bits_BT.shape)

    return keys


def _block_keys(size: int) -> Keys:
    """Return keys of blocks from left to right, each in random order."""

    def keys(bits_BT: NDArray[np.uint64]) -> NDArray[np.uint64]:
        block_T = np.arange(bits_BT.shape[1], dtype=np.uint64) // np.uint64(size)
        keys_BT: NDArray[np.uint64] = (block_T << np.uint64(40)) | (bits_BT >> np.uint64(24))
        return keys_BT

    return keys
