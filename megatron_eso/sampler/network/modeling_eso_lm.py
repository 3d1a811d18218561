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
    """Logits `[B, T, V]` in slot order, and the permutation `[B, T]` of these slots."""

    logits: Tensor | None = None
    permutation: Tensor | None = None


class EsoLMModel(EsoNetworkMixin, PreTrainedModel):  # type: ignore[no-untyped-call]
    """An Eso-LM of variant B as a model of transformers."""

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
        """Compute the logits of the diffusion phase, or with `x_0` those of the sequential phase.

        Args:
            input_ids: Text in natural order, int64 `[B, T]`, with the mask token where unknown.
            permutation: Order of the slots, int64 `[B, T]`: `permutation[b, slot] = position`; by
                default the clean positions, then the masked ones, each left to right.
            x_0: The clean text in natural order, int64 `[B, T]`.

        Raises:
            ValueError: As `EsoNetworkMixin.sequential_logits`.
        """
        if permutation is None:
            is_masked = input_ids == self.network_config.mask_token_id
            permutation = torch.argsort(is_masked.to(torch.int64), dim=1, stable=True)
        if x_0 is None:
            logits = self.diffusion_logits(input_ids, permutation)
        else:
            logits = self.sequential_logits(input_ids, x_0, permutation)
        return EsoLMOutput(logits=logits, permutation=permutation)
