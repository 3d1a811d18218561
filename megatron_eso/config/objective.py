"""The section `objective`: what the model is trained for."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from megatron_eso.config.keys import DERIVED, Frozen, Largest, Logged, Only, describe_keys

MAX_SET = 2**20

ObjectiveName = Literal["eso_lm", "mdlm", "ar", "bd3_lm", "set_dlm", "any_order_ar"]
"""Objectives that can be trained."""
Order = Literal["uniform", "staggered", "left_to_right"]
"""Order of generation."""
FirstToken = Literal["mask", "bos", "none"]
"""Token before the first one of a sample."""
Prediction = Literal["own", "next"]
"""Row that predicts a token of the sequential phase."""
BLOCKED = Only("bd3_lm")
ORDERED = Only("eso_lm", "set_dlm", "any_order_ar")
TIMED = Only("eso_lm", "mdlm", "bd3_lm")
DEFAULT_ORDERS: dict[str, Order] = {"set_dlm": "staggered", "any_order_ar": "uniform"}
"""Orders by objective; every other one generates from left to right."""


def has_staggered_order(set_size: int, max_set_size: int, length: int) -> bool:
    """Return whether a staggered order of T = `length` positions has sets of these sizes."""
    # The mean area of the schedule must lie below its width.
    bound = 2 * length * max_set_size / (length + max_set_size - 1)
    return set_size <= length and (set_size in (1, max_set_size) or set_size < bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The training objective."""

    name: Annotated[ObjectiveName, Frozen("run"), Logged()] = "eso_lm"
    """What is trained; docs/objectives.md describes each."""
    variant: Annotated[Literal["a", "b"], Frozen("run"), Logged(), Only("eso_lm")] = "b"
    """Eso-LM variant: `b` is causal over slots; in `a` clean tokens read each other both ways."""
    alpha_0: Annotated[float, Interval(ge=0, le=1), Logged(), Only("eso_lm")] = 0.125
    """Share of tokens that the diffusion phase reveals: 1 is pure diffusion, 0 pure AR."""
    batch_split: Annotated[float, Interval(ge=0, le=1), Logged(), Only("eso_lm")] = DERIVED
    """Share of samples for the diffusion phase; by default 1 at alpha_0 = 1, 0 at 0, else 0.5."""
    alpha_0_warmup_steps: Annotated[int, Ge(0), Logged(), Only("eso_lm")] = 0
    """Steps over which alpha_0 rises from 0 to its value; validation always has that value."""
    loss_type: Annotated[Literal["elbo", "low_var"], Logged(), Only("eso_lm", "mdlm")] = "elbo"
    """Weight of a masked token in the diffusion phase: of the bound, or 1."""
    sampling_eps: Annotated[float, Interval(ge=0, lt=1), Logged(), TIMED] = 1e-3
    """Diffusion times are drawn from [sampling_eps, 1]."""
    sequential_prediction: Annotated[Prediction, Frozen("run"), Logged(), Only("eso_lm")] = "own"
    """What predicts a token one by one: `own`, a mask query; `next`, the token before it."""
    order: Annotated[Order, Logged(), ORDERED] = DERIVED
    """Order of the tokens that are predicted one by one; the default depends on the objective."""
    set_size: Annotated[int, Gt(0), Largest(MAX_SET), Logged(), ORDERED] = 8
    """Mean size of the sets of a `staggered` order."""
    max_set_size: Annotated[int, Gt(0), Largest(MAX_SET), Logged(), ORDERED] = DERIVED
    """Largest size of the sets of a `staggered` order; by default twice `set_size`."""
    block_size: Annotated[int, Gt(0), Largest(MAX_SET), Frozen("run"), Logged(), BLOCKED] = 16
    """Tokens of a block, which are generated together."""
    clip: Annotated[tuple[float, ...] | None, Largest(1), Logged(), BLOCKED] = None
    """`[low, high]`: times, and the masked share of each block, lie between; left out: [0, 1]."""
    prepend_token: Annotated[FirstToken, Frozen("run"), Logged(), Only("ar")] = "mask"
    """The token that predicts the first one of a sample; `none`: the first one is not predicted."""
    warm_start_steps: Annotated[int, Ge(0), Logged()] = 0
    """Steps over which the share of samples that train next-token prediction falls from 1 to 0."""

    def __post_init__(self) -> None:
        """Derive the keys that are left out; an objective of one phase takes all samples for it."""
        if self.batch_split is None:
            split = 1.0
            if self.has_key("batch_split"):
                split = self.alpha_0 if self.alpha_0 in (0, 1) else 0.5
            object.__setattr__(self, "batch_split", float(split))
        if self.order is None:
            object.__setattr__(self, "order", DEFAULT_ORDERS.get(self.name, "left_to_right"))
        if self.max_set_size is None:
            object.__setattr__(self, "max_set_size", 2 * self.set_size)

    def has_key(self, name: str) -> bool:
        """Return whether the configured objective has this key."""
        (key,) = (key for key in describe_keys("objective", type(self)) if key.name == name)
        return key.belongs_to(self.name)
