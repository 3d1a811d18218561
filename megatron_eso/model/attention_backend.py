"""The interface of attention backends, and their table.

Shapes: R rows, Q queries, H heads, G key/value groups, D head dimension. Head h reads group
`h // (H / G)`; the scale is `D ** -0.5`.
"""

from typing import Protocol

from torch import Tensor

from megatron_eso.batches.rows import Span
from megatron_eso.model.torch_attention import TorchAttention


class AttentionBackend(Protocol):
    """A backend that computes attention over spans, with gradients, without communication."""

    def attend_streams(
        self,
        q_QHD: Tensor,
        k_QGD: Tensor,
        v_QGD: Tensor,
        lengths: tuple[int, ...],
        *,
        is_causal: bool,
    ) -> Tensor:
        """Return the attention within each stream, `[Q, H, D]`.

        Args:
            q_QHD: Rotated queries, one stream after another.
            k_QGD: Rotated keys.
            v_QGD: Values.
            lengths: Rows of each stream; they add up to Q.
            is_causal: Whether a row reads the rows up to itself, or all rows of its stream.
        """

    def attend_prefixes(
        self,
        q_QHD: Tensor,
        k_RGD: Tensor,
        v_RGD: Tensor,
        reads_4Q: Tensor,
        spans: tuple[Span, ...],
    ) -> Tensor:
        """Return the attention of queries that read the first keys of a stream, `[Q, H, D]`.

        Each query also reads a run of rows of its own: itself, or its block.

        Args:
            q_QHD: Rotated queries, one span after another.
            k_RGD: Rotated keys of all rows.
            v_RGD: Values of all rows.
            reads_4Q: int64, the keys and the own rows of each query, as in `Rows`.
            spans: The spans of the queries, all STRICT or all BLOCK.
        """


BACKENDS: dict[str, type[AttentionBackend]] = {
    "torch": TorchAttention,
}


def choose_backend() -> AttentionBackend:
    """Return the fastest backend that runs on this machine."""
    return BACKENDS["torch"]()
