"""Set Diffusion: sets of tokens are generated together, in staggered orders (arXiv 2607.01775).

Training needs no sets: the rows, the loss and the phase are those of any-order AR. The orders are
staggered, so a token is mostly predicted from the tokens on its left. The sampler generates sets.
"""

from dataclasses import dataclass

from megatron_eso.objectives.any_order_ar import AnyOrderArObjective


@dataclass(frozen=True, kw_only=True, slots=True)
class SetDlmObjective(AnyOrderArObjective):
    """The Set Diffusion objective, whose order is by default staggered."""
