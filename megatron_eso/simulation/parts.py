"""Which part of the step an operation belongs to: found on the Python stack, also in backward.

A backward operation has no frame of the model above it. Its autograd node has the sequence number
that was given out just before the forward operation ran, which names the part.
"""

import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.cross_entropy import _VocabParallelCrossEntropy
from megatron.core.tensor_parallel.random import CheckpointFunction
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.layers import (
    GatedRowParallelLinear,
    LayerNorm,
    RMSNorm,
    get_bias_dropout_add,
)
from megatron_eso.model.rotary import rotary_table, rotate
from megatron_eso.model.row_attention import attend_loss_rows, attend_rows
from megatron_eso.model.torch_attention import TorchAttention
from megatron_eso.training.optimization.ema import ExponentialMovingAverage
from megatron_eso.training.optimization.gradients import apply_gradients, measure_gradients
from megatron_eso.training.steps.step import (
    clear_gradients,
    forward_step,
    reduce_over_world,
)

OTHER = "other"
LAYERS = "layers, other"
PRODUCTS = "matrix products"
GATES = "gates, bias, residual"
ACTIVATION = "activation function"
HEAD = "head and loss"
GRADIENTS = "gradients: accumulate"
SYNCHRONIZATION = "gradients: clear, scale"
OPTIMIZER = "optimizer and EMA"
REPORTS = "reports"
HAS_PRODUCTS = (LAYERS, GATES, ACTIVATION)
"""Parts of a layer whose matrix products are counted by themselves."""
ONCE = (OPTIMIZER, SYNCHRONIZATION, REPORTS)
"""Parts that come once in a step, however many micro-batches it has."""

# The innermost of these on the stack decides.
PARTS: dict[Callable[..., Any], str] = {
    EsoModel.embed: "embedding",
    EsoModel.compute_logits: HEAD,
    vocab_parallel_cross_entropy: HEAD,
    _VocabParallelCrossEntropy: HEAD,
    forward_step: HEAD,  # its loss function; the model's parts are further inside
    TransformerBlock: LAYERS,
    rotary_table: "rotary",
    rotate: "rotary",
    LayerNorm: "norms",
    RMSNorm: "norms",
    GatedRowParallelLinear: GATES,
    get_bias_dropout_add: GATES,
    MLP: ACTIVATION,
    attend_rows: "split and join rows",
    attend_loss_rows: "split and join rows",
    TorchAttention.attend_streams: "attention within streams",
    TorchAttention.attend_prefixes: "attention of queries",
    DistributedDataParallel._make_backward_post_hook: GRADIENTS,
    DistributedDataParallel: SYNCHRONIZATION,
    _ParamAndGradBucketGroup: SYNCHRONIZATION,
    finalize_model_grads: SYNCHRONIZATION,
    clear_gradients: SYNCHRONIZATION,
    measure_gradients: OPTIMIZER,
    apply_gradients: OPTIMIZER,
    ExponentialMovingAverage: OPTIMIZER,
    reduce_over_world: REPORTS,
}

_NAMES = {(key.__module__, key.__qualname__): part for key, part in PARTS.items()}


class PartFinder:
    """Finds the part of the operation that runs now."""

    def __init__(self) -> None:
        self._of_code: dict[CodeType, str | None] = {}
        self._of_node: dict[tuple[int, int], str] = {}
        self._main = threading.get_ident()

    def find(self) -> str:
        """Return the part; call it once for every operation, before the operation runs."""
        part, recomputes = self._search_stack()
        thread = threading.get_ident()
        if part is not None:
            # The first operation after a node was numbered is the forward operation of the node.
            number = torch._C._autograd._get_sequence_nr() - 1
            self._of_node.setdefault((thread, number), part)
            return part
        node = torch._C._current_autograd_node()
        if node is None:
            return OTHER
        forward_thread = thread if recomputes else self._main
        return self._of_node.get((forward_thread, node._sequence_nr()), OTHER)

    def forget(self) -> None:
        """Forget the nodes of a step that is over."""
        self._of_node.clear()

    def _search_stack(self) -> tuple[str | None, bool]:
        """Return the part of the innermost frame that has one, and whether a layer recomputes."""
        frame: FrameType | None = sys._getframe(2)
        recomputes = False
        while frame is not None:
            code = frame.f_code
            if code not in self._of_code:
                self._of_code[code] = _name_part(frame)
            part = self._of_code[code]
            if part is not None:
                return part, recomputes
            recomputes = recomputes or code is CheckpointFunction.backward.__code__
            frame = frame.f_back
        return None, recomputes


def _name_part(frame: FrameType) -> str | None:
    """Return the part of the function that a frame runs; functions in it count as itself."""
    module = frame.f_globals.get("__name__", "")
    names = frame.f_code.co_qualname.split(".")
    for length in range(len(names), 0, -1):
        part = _NAMES.get((module, ".".join(names[:length])))
        if part is not None:
            return part
    return None
