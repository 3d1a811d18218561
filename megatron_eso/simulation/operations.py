"""FLOPs, bytes and kernels of the operations that a training step consists of.

Every operation that runs on the device is registered here with the rule of its cost; another one
is an error, so that a new kernel cannot be free of charge by accident.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_leaves

# Of the kernel that torch runs over lists of tensors (ATen/native/cuda/MultiTensorApply.cuh).
LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36}
LIST_ELEMENTS = 320 * 65536


class UnknownOperationError(Exception):
    """An operation without a registered cost."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation takes.

    Attributes:
        flops: Floating-point operations, a multiplication and an addition as two.
        moved: Bytes that it reads and writes in the device's memory.
        kernels: Kernels that it starts.
        unit: What computes its FLOPs.
    """

    flops: float = 0.0
    moved: float = 0.0
    kernels: int = 0
    unit: Literal["gemm", "flash", "fp32"] = "fp32"


Arguments = Sequence[Any]
Rule = Callable[[Arguments, Any], Cost]
FREE = Cost()


def cost_of(operation: str, arguments: Arguments, output: Any) -> Cost:
    """Return the cost of an operation.

    Args:
        operation: Its name in torch, without the overload: `aten::mm`.
        arguments: Positional arguments, then those by name.
        output: What it returned.

    Raises:
        UnknownOperationError: It is not registered.
    """
    rule = RULES.get(operation)
    if rule is None:
        raise UnknownOperationError(
            f"{operation} has no registered cost: give it a rule in "
            f"megatron_eso/simulation/operations.py"
        )
    return rule(arguments, output)


def size_of(tensor: Tensor) -> int:
    """Return the bytes of memory behind a tensor's elements, those of an expanded one once."""
    used = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        used *= size if stride else min(size, 1)
    return used * tensor.element_size()


def _sizes(values: Any) -> int:
    return sum(size_of(each) for each in tree_leaves(values) if isinstance(each, Tensor))


def _view(_arguments: Arguments, _output: Any) -> Cost:
    """Return no cost: views, allocations, and reads of a tensor's shape move nothing."""
    return FREE


def _fill(_arguments: Arguments, output: Any) -> Cost:
    """Count the output as written; nothing is read."""
    return Cost(moved=_sizes(output), kernels=1)


def _stream(arguments: Arguments, output: Any) -> Cost:
    """Count every input as read once, every output as written once."""
    return Cost(moved=_sizes(arguments) + _sizes(output), kernels=1)


def _copy(arguments: Arguments, _output: Any) -> Cost:
    """Count the second tensor as read, the first as written."""
    return Cost(moved=size_of(arguments[0]) + size_of(arguments[1]), kernels=1)


def _gather(arguments: Arguments, output: Any) -> Cost:
    """Count the selected values as read and written, and the indices as read."""
    indices = _sizes(arguments[1:])
    return Cost(moved=2 * _sizes(output) + indices, kernels=1)


def _place(arguments: Arguments, _output: Any) -> Cost:
    """Count values that are written to rows of the target, and the indices as read."""
    *_, indices, values = arguments
    return Cost(moved=_sizes(indices) + 2 * _sizes(values), kernels=1)


def _scatter(arguments: Arguments, _output: Any) -> Cost:
    """Count values that are added to the target; the indices are sorted before."""
    return Cost(moved=3 * _sizes(arguments[1:]), kernels=4)


def _scatter_new(arguments: Arguments, output: Any) -> Cost:
    """Count values that are added to a new target; the indices are sorted before."""
    return Cost(moved=3 * _sizes(arguments) + _sizes(output), kernels=5)


def _list(arguments: Arguments, output: Any) -> Cost:
    """Count lists of tensors; one kernel processes many of them."""
    lists = [each for each in arguments if isinstance(each, list | tuple) and each]
    tensors = [each for each in lists[0] if isinstance(each, Tensor)]
    outputs = _sizes(output) if output is not None else _sizes(lists[0])
    depth = min(len(lists) + (output is not None), max(LIST_TENSORS))
    by_number = -(-len(tensors) // LIST_TENSORS[depth])
    by_size = -(-sum(each.numel() for each in tensors) // LIST_ELEMENTS)
    return Cost(moved=_sizes(arguments) + outputs, kernels=max(by_number, by_size, 1))


def _multiply(first: int) -> Rule:
    """Return the rule of a matrix product of the arguments `first` and `first + 1`."""

    def cost(arguments: Arguments, output: Any) -> Cost:
        left, right = arguments[first], arguments[first + 1]
        unit: Literal["gemm", "fp32"] = "gemm" if left.element_size() == 2 else "fp32"
        flops = 2.0 * left.numel() * right.shape[-1]
        return Cost(flops, _sizes(arguments) + _sizes(output), 1, unit)

    return cost


def _attend(first: int, products: float) -> Rule:
    """Causal attention whose queries and keys are the arguments `first` and `first + 1`."""

    def cost(arguments: Arguments, output: Any) -> Cost:
        query, key = arguments[first], arguments[first + 1]
        batch, heads, length, channels = query.shape
        is_causal = any(each is True for each in arguments)
        pairs = batch * heads * length * key.shape[2] * (0.5 if is_causal else 1.0)
        unit: Literal["flash", "fp32"] = "flash" if query.element_size() == 2 else "fp32"
        return Cost(
            2.0 * products * pairs * channels,
            _sizes(arguments) + _sizes(output),
            1 if first == 0 else 3,
            unit,
        )

    return cost


def _register(rule: Rule, names: Iterable[str]) -> dict[str, Rule]:
    return {f"aten::{name}": rule for name in names}


VIEWS = """
    _local_scalar_dense _reshape_alias _unsafe_view alias as_strided detach diagonal empty
    empty_like empty_strided expand is_same_size lift_fresh narrow new_empty new_empty_strided
    permute record_stream resize_ select set_ slice split split_with_sizes squeeze t transpose
    unbind unsqueeze view
"""
FILLS = "arange fill_ full full_like new_full new_ones new_zeros ones ones_like scalar_tensor zero_"
FILLS += " zeros zeros_like"
STREAMS = """
    _softmax _softmax_backward_data abs add add_ addcdiv_ addcmul_ all amax any argmax bernoulli_
    bitwise_and bitwise_not bitwise_or cat clamp clone cos cumsum div div_ eq exp exp_ ge gelu
    gelu_backward gt isfinite isinf isnan le lerp_ linalg_vector_norm log logaddexp logical_and
    logical_not logical_or logsumexp lt masked_fill masked_fill_ max maximum mean minimum mul mul_
    native_dropout native_dropout_backward native_layer_norm native_layer_norm_backward ne neg
    nll_loss_forward pow prod reciprocal reciprocal_ rsqrt rsub select_backward sigmoid silu
    silu_backward sin slice_backward sqrt sqrt_ square stack sub sub_ sum tanh tril_ triu_ uniform_
    where _fused_rms_norm _fused_rms_norm_backward
"""
LISTS = """
    _foreach_add _foreach_add_ _foreach_addcdiv_ _foreach_addcmul_ _foreach_copy_ _foreach_div_
    _foreach_lerp_ _foreach_mul _foreach_mul_ _foreach_norm _foreach_sqrt _foreach_sqrt_
    _foreach_zero_ _fused_adamw_ _fused_adam_
"""

RULES: dict[str, Rule] = {
    "prim::device": _view,
    **_register(_view, VIEWS.split()),
    **_register(_fill, FILLS.split()),
    **_register(_stream, STREAMS.split()),
    **_register(_copy, ["copy_"]),
    **_register(_stream, ["_to_copy"]),
    **_register(_list, LISTS.split()),
    **_register(_gather, ["index", "index_select", "embedding", "gather"]),
    **_register(_place, ["index_copy_"]),
    **_register(_scatter, ["index_put_", "index_add_", "scatter_add_"]),
    **_register(
        _scatter_new,
        ["index_put", "index_add", "index_copy", "embedding_dense_backward"],
    ),
    **_register(_multiply(0), ["mm", "bmm"]),
    **_register(_multiply(1), ["addmm", "baddbmm", "addmm_", "baddbmm_"]),
    **_register(
        _attend(0, 2),
        ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"],
    ),
    **_register(
        _attend(1, 5),
        [
            "_scaled_dot_product_flash_attention_backward",
            "_scaled_dot_product_efficient_attention_backward",
        ],
    ),
}
