"""The class that `transformers.AutoModel.from_pretrained(dir, trust_remote_code=True)` loads."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_eso_lm import EsoLMConfig
from .layers_eso_lm import NetworkConfig
from .network_eso_lm import EsoNetworkMixin


@dataclass
class EsoLMOutput(ModelOutput):
    """Logits `[B, T, V]`, and the permutation `[B, T]` of the slots, if the objective has slots."""

    logits: Tensor | None = None
    permutation: Tensor | None = None


class EsoLMModel(EsoNetworkMixin, PreTrainedModel):  # type: ignore[no-untyped-call]
    """The network and the logits of its objective, as a model of transformers."""

    config_class = EsoLMConfig
    base_model_prefix = ""
    _no_split_modules = ["Layer"]

    def __init__(self, config: EsoLMConfig) -> None:
        """Build the network."""
        super().__init__(config)
        values = {field.name: getattr(config, field.name) for field in fields(NetworkConfig)}
        self.build_network(NetworkConfig(**values))
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        """Return None: a tied head reads the embedding itself, so transformers must not tie it."""

    def forward(
        self,
        input_ids: Tensor,
        permutation: Tensor | None = None,
        x_0: Tensor | None = None,
    ) -> EsoLMOutput:
        """Compute the logits of the objective that `config.json` names.

        `eso_lm`, `set_dlm` and `any_order_ar` have slots: the logits are those of masked slots from
        the known ones, or with `x_0` each from the slots before it. They are in slot order where a
        permutation is given, else in natural order.

        The others take no permutation, and their logits are in natural order: `mdlm` those of every
        position, `bd3_lm` those of every block from the blocks of `x_0` before it, `ar` those of
        the next token.

        Args:
            input_ids: Text in natural order, int64 `[B, T]`, with the mask token where unknown.
            permutation: Order of the slots, int64 `[B, T]`: `permutation[b, slot] = position`; by
                default the clean positions, then the masked ones, each left to right.
            x_0: The clean text in natural order, int64 `[B, T]`.

        Raises:
            ValueError: A tensor is missing, wrong, or not used by the objective.
        """
        objective = self.config.objective
        if objective in ("mdlm", "bd3_lm", "ar"):
            if permutation is not None or (x_0 is None) == (objective == "bd3_lm"):
                wanted = "input_ids and x_0" if objective == "bd3_lm" else "input_ids alone"
                raise ValueError(f"objective {objective} takes {wanted}")
            return EsoLMOutput(logits=self._compute_natural_logits(input_ids, x_0))
        # Without a permutation the logits go back to natural order.
        order = permutation
        if order is None:
            is_masked = input_ids == self.network_config.mask_token_id
            order = torch.argsort(is_masked.to(torch.int64), dim=1, stable=True)
        logits = self._compute_slot_logits(input_ids, order, x_0)
        if permutation is None:
            logits = logits[
                torch.arange(len(order), device=order.device)[:, None], order.argsort(1)
            ]
        return EsoLMOutput(logits=logits, permutation=order)

    def _compute_natural_logits(self, tokens: Tensor, x_0: Tensor | None) -> Tensor:
        if x_0 is not None:
            return self.block_logits(tokens, x_0, self.config.block_size)
        if self.config.objective == "mdlm":
            return self.two_way_logits(tokens)
        prepended = {
            "none": None,
            "mask": self.network_config.mask_token_id,
            "bos": getattr(self.config, "bos_token_id", None),
        }[self.config.prepend_token]
        return self.next_token_logits(tokens, prepended)[:, -tokens.shape[1] :]

    def _compute_slot_logits(self, z: Tensor, permutation: Tensor, x_0: Tensor | None) -> Tensor:
        is_variant_a = self.config.objective == "eso_lm" and self.config.variant == "a"
        if x_0 is not None:
            return self.sequential_logits(
                z,
                x_0,
                permutation,
                two_way_prefix=is_variant_a,
                predicts_next=self.config.sequential_prediction == "next",
            )
        if self.config.objective == "eso_lm":
            return self.diffusion_logits(z, permutation, two_way_prefix=is_variant_a)
        return self.set_logits(z, permutation)
