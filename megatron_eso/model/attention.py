"""Attention over packed rows, and the last layer, which continues with the loss rows only.

The rows are an argument of each call, Megatron-Core's `packed_seq_params`. Recomputation keeps this
argument in its closure, so a micro-batch never reads the rows of another one.

Shape suffixes: R rows, E loss rows, 1 the batch dimension of Megatron-Core's [rows, 1, hidden],
H heads and G key/value groups of this tensor-parallel rank, D head size, F half of it.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_eso.batches.rows import Rows
from megatron_eso.model.attention_backend import choose_backend
from megatron_eso.model.rotary import rotate
from megatron_eso.model.row_attention import attend_loss_rows, attend_rows


class RowCoreAttention(torch.nn.Module):
    """Core attention of the body: causal streams, and mask queries strictly before their slot."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.backend = choose_backend()

    def forward(self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, rows: Rows) -> Tensor:
        """Return the attention of all rows, [R, H, D]; zeros at padding rows."""
        return attend_rows(q_RHD, k_RGD, v_RGD, rows, self.backend)


class LossRowCoreAttention(torch.nn.Module):
    """Core attention of the last layer: loss rows are the queries, all rows are keys."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.backend = choose_backend()

    def forward(self, q_EHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, rows: Rows) -> Tensor:
        """Return the attention of the loss rows, [E, H, D]; zeros at padding rows."""
        return attend_loss_rows(q_EHD, k_RGD, v_RGD, rows, self.backend)


class RowSelfAttention(SelfAttention):
    """Megatron-Core's self-attention with a rotary angle for each row."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: Rows,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the rows; collective over TP.

        Args:
            hidden_states: Hidden states of the rows, [R, 1, hidden] (R / TP under sequence
                parallelism).
            rotary_pos_emb: The output of `rotary_table` for the rows.
            packed_seq_params: The rows.

        Returns:
            The projected output and its bias, which is None without one.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        q_RHD, k_RGD, v_RGD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        q_RHD, q_table = self.select_queries(q_RHD, rotary_pos_emb, packed_seq_params)
        mixed = self.core_attention(
            rotate(q_RHD, q_table), rotate(k_RGD, rotary_pos_emb), v_RGD, packed_seq_params
        )
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(mixed.flatten(1).unsqueeze(1))
        return projected

    def select_queries(
        self, q_RHD: Tensor, table_2R1F: Tensor, _rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Return the queries of all rows, with their rotary table."""
        return q_RHD, table_2R1F


class LossRowSelfAttention(RowSelfAttention):
    """Self-attention that computes its output for the loss rows only."""

    def select_queries(
        self, q_RHD: Tensor, table_2R1F: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Return the queries of the loss rows, with their rotary table."""
        return q_RHD.index_select(0, rows.loss_rows_E), table_2R1F.index_select(1, rows.loss_rows_E)


class LossRowTransformerLayer(TransformerLayer):
    """The last layer: its input is [R, 1, hidden], its output [E, 1, hidden].

    The rows without loss give only keys and values.
    """

    def _forward_attention(
        self,
        hidden_states: Tensor,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: Rows,
        **_: Any,
    ) -> tuple[Tensor, None]:
        output_with_bias = self.self_attention(
            self.input_layernorm(hidden_states),
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        residual = self.select_loss_rows(hidden_states, packed_seq_params)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return add(output_with_bias, residual, self.hidden_dropout), None

    def select_loss_rows(self, hidden_states: Tensor, rows: Rows) -> Tensor:
        """Select the loss rows of the residual stream; collective over TP if sequence-parallel.

        The backward pass of the scatter gathers the whole gradient of the selected rows on each
        rank. The backward pass of the gather must therefore split this gradient
        (`tensor_parallel_output_grad=False`). A sum would multiply it by the size of the group.
        """
        if not self.config.sequence_parallel:
            return hidden_states.index_select(0, rows.loss_rows_E)
        gathered = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
        )
        chosen: Tensor = scatter_to_sequence_parallel_region(
            gathered.index_select(0, rows.loss_rows_E), group=self.tp_group
        )
        return chosen
