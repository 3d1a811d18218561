"""The interface of attention backends, and their table.

Shapes: R rows of all streams, Q strict queries, N keys, H heads, G key/value groups, D head
dimension. Head h reads group `h // (H / G)`; the scale is `D ** -0.5`.
"""

from typing import Protocol

from torch import Tensor

from megatron_eso.model.spans import QuerySpan
from megatron_eso.model.torch_attention import TorchAttention


class AttentionBackend(Protocol):
    """A backend that computes attention over query spans, with gradients, without communication."""

    def attend_causally(
        self, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """Return causal attention within each stream, `[R, H, D]`.

        Args:
            q_RHD: Rotated queries, one stream after another.
            k_RGD: Rotated keys.
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
            q_QHD: Rotated queries, one query span after another.
            k_NGD: Rotated keys of the streams.
            v_NGD: Values of the streams.
            own_k_QGD: The own key of each query, rotated.
            own_v_QGD: The own value of each query.
            spans: The query spans, with the keys that they read.
        """


BACKENDS: dict[str, type[AttentionBackend]] = {
    "torch": TorchAttention,
}


def choose_backend() -> AttentionBackend:
    """Return the fastest backend that runs on this machine."""
    return BACKENDS["torch"]()
