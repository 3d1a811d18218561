"""The interface of attention backends, and their table.

Shapes: R rows of all streams, Q strict queries, N keys, H heads, G key/value groups, D head
dimension. Head h reads group `h // (H / G)`; the scale is `D ** -0.5`.
"""

from typing import Protocol

from torch import Tensor

from megatron_eso.model.spans import QuerySpan
from megatron_eso.model.torch_attention import TorchAttention


class AttentionBackend(Protocol):
    """Computes attention over spans, with gradients; no communication."""

    def attend_causally(
        self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """Return causal attention within each stream, `[R, H, D]`.

        Args:
            q_RHD: Queries, rotated, one stream after the other.
            k_RGD: Keys, rotated.
            v_RGD: Values.
            lengths: Rows of each stream; they add up to R.
        """

    def attend_strictly(
        self,
        q_QHD: Tensor,
        k_NGD: Tensor,
        v_NGD: Tensor,
        own_k_QGD: Tensor,
        own_v_QGD: Tensor,
        spans: tuple[QuerySpan, ...],
    ) -> Tensor:
        """Return the attention of strict queries, `[Q, H, D]`.

        A query without keys returns its own value.

        Args:
            q_QHD: Queries, rotated, one span after the other.
            k_NGD: Keys of the streams, rotated.
            v_NGD: Their values.
            own_k_QGD: Each query's own key.
            own_v_QGD: Each query's own value.
            spans: Which keys the queries read.
        """


BACKENDS: dict[str, type[AttentionBackend]] = {
    "torch": TorchAttention,
}


def choose_backend() -> AttentionBackend:
    """Return the fastest backend that runs here."""
    return BACKENDS["torch"]()
