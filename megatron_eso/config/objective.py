"""The section `objective`: what the model is trained for."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from megatron_eso.config.keys import DERIVED, Frozen, Logged, Only, describe_keys

Order = Literal["uniform", "left_to_right"]
"""Order of generation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The training objective."""

    name: Annotated[Literal["eso_lm", "any_order_ar"], Frozen("run"), Logged()] = "eso_lm"
    """What is trained: diffusion and sequential generation, or the tokens in any order."""
    variant: Annotated[Literal["b"], Frozen("run"), Logged(), Only("eso_lm")] = "b"
    """Eso-LM variant: `b` has causal attention over slots."""
    alpha_0: Annotated[float, Interval(ge=0, le=1), Logged(), Only("eso_lm")] = 0.125
    """Share of tokens that the diffusion phase reveals: 1 is pure diffusion, 0 pure AR."""
    batch_split: Annotated[float, Interval(ge=0, le=1), Logged(), Only("eso_lm")] = DERIVED
    """Share of samples for the diffusion phase; by default 1 at alpha_0 = 1, 0 at 0, else 0.5."""
    loss_type: Annotated[Literal["elbo", "low_var"], Logged(), Only("eso_lm")] = "elbo"
    """Weight of a masked token in the diffusion phase: of the bound, or 1."""
    sampling_eps: Annotated[float, Interval(ge=0, lt=1), Logged(), Only("eso_lm")] = 1e-3
    """Diffusion times are drawn from [sampling_eps, 1]."""
    order: Annotated[Order, Logged(), Only("any_order_ar")] = "uniform"
    """Order of generation: of each sample its own, uniformly random, or left to right."""

    def __post_init__(self) -> None:
        """Derive the split; an objective of one phase takes all samples for it."""
        if self.batch_split is None:
            split = 1.0
            if self.has_key("batch_split"):
                split = self.alpha_0 if self.alpha_0 in (0, 1) else 0.5
            object.__setattr__(self, "batch_split", float(split))

    def has_key(self, name: str) -> bool:
        """Return whether the configured objective has this key."""
        (key,) = (key for key in describe_keys("objective", type(self)) if key.name == name)
        return key.belongs_to(self.name)
