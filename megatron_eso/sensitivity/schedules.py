"""Orders of generation, parallel schedules and NELBOs, and the row plans of their likelihoods.

The orders of a sample are functions of its index in the validation set.

Shapes: B samples of a micro-batch, T positions.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.batches.sets import predict_in_sets
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.errors import ConfigError
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.noise.orders import OrderLaw, sort_slots
from megatron_eso.objectives.objective import VALIDATION_SEED, Samples
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose

Plan = Callable[[Samples], MicroBatch]
"""Returns the rows of samples of the validation set and their targets."""

Keys = Callable[[NDArray[np.uint64]], NDArray[np.uint64]]
"""Keys of orders, as in `noise/orders.py`, from 64 random bits for every position, `[B, T]`."""

PlanOrders = Callable[[Samples, NDArray[np.int64]], MicroBatch]
"""Returns the same with every token masked, in orders `permutation[b, slot] = position`."""

STRIDES = (2, 4, 8)
BLOCK_SIZES = (4, 16, 64)
ORDERED = ("eso_lm", "set_dlm", "any_order_ar")
"""Objectives with an exact likelihood in every order."""

NELBO_SETTINGS: dict[str, tuple[str, tuple[float, ...]]] = {
    "eso_lm": ("alpha_0", (0.0, 0.125, 0.25, 0.5, 1.0)),
    "bd3_lm": ("block_size", (1, 2, 4, 8, 16, 32, 64)),
}
"""For each objective whose NELBO has a free setting: its key and other values."""

REFUSALS = {
    "ar": "has one order, left to right; `pretrain.evaluate` reports its exact likelihood",
    "mdlm": "has one NELBO and no order; `pretrain.evaluate` reports it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A way to generate a text.

    Attributes:
        name: The order, or the setting of a NELBO.
        tokens_per_step: Tokens that a step generates; None for a NELBO.
        plan: Plans rows whose losses add up to the negative log-likelihood of a sample, or to its
            NELBO.
    """

    name: str
    tokens_per_step: int | None
    plan: Plan


def check_objective(config: ObjectiveConfig, source: str) -> None:
    """Refuse an objective with a single schedule.

    Args:
        config: The section `objective`.
        source: File of the configuration, for the error.

    Raises:
        ConfigError: The objective has one order, or one NELBO.
    """
    if config.name in REFUSALS:
        raise ConfigError(f'{source}: objective.name = "{config.name}" {REFUSALS[config.name]}')


def list_schedules(
    config: ObjectiveConfig, vocabulary: Vocabulary, *, length: int, num_samples: int
) -> list[Schedule]:
    """List the schedules of an objective; the first one is that of training.

    Args:
        config: The section `objective`.
        vocabulary: The vocabulary of the run.
        length: T, the tokens of a sample.
        num_samples: N, the samples of the validation set.
    """
    nelbos = list(_list_nelbos(config, vocabulary, length, num_samples))
    if config.name not in ORDERED:
        return nelbos
    orders = _list_order_plans(config, vocabulary, list_orders(config, length))
    # The parallel schedules, by mask queries; evenly spaced sets are those of the paper's block
    # sampler.
    queried = replace(config, sequential_prediction="own")
    sizes = [1 << number for number in range(1, length.bit_length())]
    names = ("trained",) if config.order == "uniform" else ("trained", "uniform")
    plans = _list_order_plans(queried, vocabulary, list_orders(config, length))
    parallel = [(name, size, plans[name]) for name in names for size in sizes]
    even = [size for size in sizes if length % size == 0 and size < length]
    spaced = {str(size): _strided_keys(length // size) for size in even}
    plans = _list_order_plans(queried, vocabulary, spaced)
    parallel += [("evenly spaced", size, plans[str(size)]) for size in even]
    reads_masks = config.name == "eso_lm"
    return [
        *(Schedule(name=name, tokens_per_step=1, plan=plan) for name, plan in orders.items()),
        *(
            Schedule(
                name=name, tokens_per_step=size, plan=partial(_plan_sets, plan, size, reads_masks)
            )
            for name, size, plan in parallel
        ),
        *nelbos,
    ]


def list_orders(config: ObjectiveConfig, length: int) -> dict[str, Keys]:
    """Return the orders of generation by name.

    Args:
        config: The section `objective`, with the sets of a staggered order.
        length: T, the tokens of a sample.
    """
    staggered = OrderLaw(
        name="staggered", set_size=config.set_size, max_set_size=config.max_set_size
    )
    sets = f"staggered {config.set_size}/{config.max_set_size}"
    return {
        "uniform": OrderLaw(name="uniform").keys,
        "left to right": OrderLaw(name="left_to_right").keys,
        "right to left": _right_to_left_keys,
        **{f"strided by {stride}": _strided_keys(stride) for stride in STRIDES if stride < length},
        **{f"blocks of {size}": _block_keys(size) for size in BLOCK_SIZES if size < length},
        **({sets: staggered.keys} if staggered.fits(length) else {}),
    }


def _list_order_plans(
    config: ObjectiveConfig, vocabulary: Vocabulary, orders: Mapping[str, Keys]
) -> dict[str, Plan]:
    """Return the plan of the trained order, and those of other orders by name."""
    objective: Any = build_objective(
        replace(config, warm_start_steps=0), vocabulary, seed=VALIDATION_SEED
    )
    plan_orders: PlanOrders = objective.plan_orders
    return {
        "trained": partial(objective.plan_order, number=0),
        **{
            name: partial(_plan_order, keys=keys, plan_orders=plan_orders)
            for name, keys in orders.items()
        },
    }


def _plan_order(samples: Samples, *, keys: Keys, plan_orders: PlanOrders) -> MicroBatch:
    """Plan samples with every token masked and predicted from those before it in an order."""
    num_tokens = samples.tokens_BT.shape[1]
    bits = [
        random_bits(VALIDATION_SEED, Purpose.ANY_ORDER, int(index), num_tokens)
        for index in samples.indices_B
    ]
    keys_BT = keys(np.stack(bits))
    is_real_BT = np.arange(num_tokens) < samples.length_B[:, None]
    permutation_BT = sort_slots(
        is_real_BT, is_real_BT, clean_keys_BT=keys_BT, masked_keys_BT=keys_BT
    )
    return plan_orders(samples, permutation_BT)


def _plan_sets(plan: Plan, set_size: int, reads_masks: bool, samples: Samples) -> MicroBatch:
    """Plan an order in sets."""
    return predict_in_sets(plan(samples), set_size, reads_masks=reads_masks)


def _list_nelbos(
    config: ObjectiveConfig, vocabulary: Vocabulary, length: int, num_samples: int
) -> Iterator[Schedule]:
    """Yield the NELBO of training, then those with other values of its setting."""
    configs = {"NELBO": config}
    if config.name in NELBO_SETTINGS:
        key, values = NELBO_SETTINGS[config.name]
        trained = getattr(config, key)
        others = [value for value in values if value <= length and value != trained]
        configs = {
            f"NELBO, {key} = {value:g}": replace(config, **{key: value})
            for value in (trained, *others)
        }
    for name, each in configs.items():
        objective = build_objective(each, vocabulary, seed=VALIDATION_SEED)
        plan = partial(objective.plan_validation, num_samples=num_samples)
        yield Schedule(name=name, tokens_per_step=None, plan=plan)


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
