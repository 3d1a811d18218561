"""The Eso-LM on Megatron-Core: one pipeline stage's part of embedding, transformer and head.

Shape suffixes: R packed rows, E loss rows, V the vocabulary's part of this tensor-parallel rank.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_eso.batches.rows import Rows
from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.model.layer_specs import build_block_submodules
from megatron_eso.model.rotary import rotary_table


class EsoModel(LanguageModule):
    """A transformer over packed rows, which say what each of them reads.

    Args:
        model: The section `model`.
        vocabulary: The token ids; padded entries and the mask token are never predicted.
        transformer_config: The configuration for Megatron-Core.
        pg_collection: Process groups of this rank.
        pre_process: Whether this part holds the embedding.
        post_process: Whether this part holds the head and computes the loss.
        vp_stage: Number of the model chunk in an interleaved pipeline; None without one.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocabulary: Vocabulary,
        transformer_config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(transformer_config, pg_collection=pg_collection)
        padded_size = model.pad_vocabulary(vocabulary.size)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights
        self.model = model
        # The first stage embeds tokens.
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=transformer_config,
                vocab_size=padded_size,
                max_sequence_length=0,  # used for learned positions only
                position_embedding_type="rope",
                tp_group=pg_collection.tp,
            )
            # The reference applies dropout to the residual branches only, not to the embedding.
            self.embedding.embedding_dropout.p = 0.0
        # Every stage has a part of the layers.
        self.decoder = TransformerBlock(
            config=transformer_config,
            spec=build_block_submodules(
                model, transformer_config, pg_collection.pp.rank(), vp_stage
            ),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        # The last stage has the head, and the entries that it must never predict.
        if post_process:
            tied = self.share_embeddings_and_output_weights
            self.output_layer = ColumnParallelLinear(
                model.hidden_size,
                padded_size,
                config=transformer_config,
                init_method=transformer_config.init_method,
                bias=model.head_bias,
                skip_weight_param_allocation=tied and pre_process,
                tp_group=pg_collection.tp,
            )
            part = padded_size // pg_collection.tp.size()
            ids_V = torch.arange(part) + part * pg_collection.tp.rank()
            impossible_V = (ids_V == vocabulary.mask_token_id) | (ids_V >= vocabulary.size)
            self.register_buffer("impossible_V", impossible_V, persistent=False)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Store the output of the previous stage; Megatron-Core's schedules call this."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(tensors[0])

    def forward(self, rows: Rows, targets_E: Tensor) -> Tensor:
        """Run this stage's layers over the rows; collective over TP.

        Args:
            rows: The rows of the micro-batch.
            targets_E: The targets of the loss rows.

        Returns:
            On the last stage, the negative log-likelihood of each loss row's target in nats,
            float32 [E], with any value at padding. On other stages, the hidden states for the next
            stage.
        """
        hidden: Tensor = self.decoder(
            hidden_states=self.embed(rows) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=rotary_table(rows.positions_R, self.model),
            packed_seq_params=rows,
        )
        if not self.post_process:
            return hidden
        logits_E1V = self.compute_logits(hidden)
        nll_E1: Tensor = vocab_parallel_cross_entropy(logits_E1V, targets_E[:, None])
        return nll_E1[:, 0]

    def embed(self, rows: Rows) -> Tensor:
        """Embed the rows' tokens, [R, 1, hidden] (R / TP under sequence parallelism)."""
        embedded: Tensor = self.embedding(
            input_ids=rows.tokens_R[None], position_ids=rows.positions_R[None]
        )
        return embedded

    def compute_logits(self, hidden_E1D: Tensor) -> Tensor:
        """Return this rank's logits [E, 1, V], float32; mask token and padded entries are -inf."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        logits_E1V, _ = self.output_layer(hidden_E1D, weight=weight)
        masked: Tensor = logits_E1V.float().masked_fill(self.impossible_V, float("-inf"))
        return masked

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the sharded tensors of this part for a checkpoint; a tied embedding comes once."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Linear layers add an empty extra state that only Transformer Engine needs.
        return {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}
