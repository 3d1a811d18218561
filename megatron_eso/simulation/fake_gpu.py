"""A GPU that is not there: tensors with shapes and without values, on a device of their own.

Torch lets Python define a device (`torch.utils.backend_registration`, experimental in torch 2.13).
Under `FakeTensorMode` its tensors take no memory, and an operation on tensors of two devices is an
error. Inside `fake_gpu`, the names of CUDA devices and functions mean this device.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.optim import adam
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megatron_eso.training.distributed.cpu_backend import FACTORIES

DEVICE_TYPE = "gpu"
FLASH_DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def fake_device() -> torch.device:
    """Return the device; it is registered with torch once per process."""
    _setup_privateuseone_for_python_backend(DEVICE_TYPE)
    return torch.device(DEVICE_TYPE, 0)


@contextmanager
def fake_gpu(wait: Callable[[str], None]) -> Iterator[FakeTensorMode]:
    """Let torch and Megatron-Core use the fake device as their GPU inside the context.

    Args:
        wait: Called with the reason where the host would wait for the device.
    """
    device = fake_device()
    logger = logging.getLogger(megatron_random.__name__)
    level = logger.level
    with ExitStack() as stack:
        for owner, name, stand_in in _list_stand_ins(device, wait):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        for supported in (
            torch_optimizer._foreach_supported_types,
            _foreach_utils._foreach_supported_types,
        ):
            supported.append(FakeTensor)
            stack.callback(supported.remove, FakeTensor)
        # Its tracker warns that the CPU's random stream moves with the GPU's.
        logger.setLevel(logging.ERROR)
        stack.callback(logger.setLevel, level)
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


class _Stream:
    """A CUDA stream or event; the timeline of the recorder orders what runs."""

    def __init__(self, wait: Callable[[str], None]) -> None:
        self._wait = wait

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        self._wait("stream or event synchronize")


def _list_stand_ins(
    device: torch.device, wait: Callable[[str], None]
) -> list[tuple[Any, str, Any]]:
    """List what is replaced: its owner, its name, and what stands in for it."""
    cuda: Any = torch.cuda
    plain_type = Tensor.type

    def name_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron-Core compares with "torch.cuda.FloatTensor" and the like.
        answer = plain_type(self, *args, **kwargs)
        return answer if args or kwargs else f"torch.cuda.{answer.split('.')[-1]}"

    def stream(*_args: Any, **_kwargs: Any) -> _Stream:
        return _Stream(wait)

    def ignore(*_args: Any, **_kwargs: Any) -> None: ...

    create_tensor = _create_tensor(torch.tensor, device, wait)
    found: list[tuple[Any, str, Any]] = [
        (torch, name, _place(getattr(torch, name), device)) for name in FACTORIES
    ]
    return [
        *(each for each in found if each[1] != "tensor"),
        (torch, "tensor", create_tensor),
        (
            Tensor,
            "new_tensor",
            lambda self, data, **kwargs: create_tensor(
                data, **{"device": self.device, "dtype": self.dtype} | kwargs
            ),
        ),
        (Tensor, "cuda", lambda self, *_args, **_kwargs: self.to(device)),
        (Tensor, "type", name_type),
        (nn.Module, "cuda", lambda self, *_args: _move(self, device)),
        # Parameters are made in the compute type; a conversion would replace them.
        (nn.Module, "bfloat16", lambda self: self),
        (functional, "scaled_dot_product_attention", _attend),
        # Its fused kernel for GPUs keeps and moves what that of LayerNorm does.
        (
            functional,
            "rms_norm",
            lambda x, shape, weight, eps: functional.layer_norm(x, shape, weight, None, eps),
        ),
        (cuda, "is_available", lambda: True),
        (cuda, "current_device", lambda: device),
        (cuda, "synchronize", lambda *_args: wait("torch.cuda.synchronize")),
        (cuda, "manual_seed", ignore),
        (cuda, "get_rng_state", lambda *_args, **_kwargs: torch.get_rng_state()),
        (cuda.random, "get_rng_state", lambda *_args, **_kwargs: torch.get_rng_state()),
        (cuda, "set_rng_state", ignore),
        (cuda.random, "set_rng_state", ignore),
        (megatron_random, "_set_cuda_rng_state", ignore),
        (cuda, "default_stream", stream),
        (cuda, "current_stream", stream),
        (cuda, "Stream", stream),
        (cuda, "Event", stream),
        (dist, "all_gather_object", _gather_objects),
        # Adam divides by a function of the number of its steps, which is at least one.
        (adam, "_get_value", lambda value: 1.0 if isinstance(value, Tensor) else value),
    ]


def _place(factory: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Make a factory function of torch put CUDA tensors on the fake device."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = device
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _create_tensor(
    plain: Callable[..., Tensor], device: torch.device, wait: Callable[[str], None]
) -> Callable[..., Tensor]:
    """Make `torch.tensor` take values of the device, and put numbers of Python on it."""

    def read(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.item()
        return [read(each) for each in value] if isinstance(value, list | tuple) else value

    def create(data: Any, **kwargs: Any) -> Tensor:
        wanted = torch.device(kwargs.pop("device", None) or "cpu")
        made = plain(read(data), **kwargs)
        if wanted.type == "cpu":
            return made
        wait("numbers are copied from the host")
        return torch.empty(made.shape, dtype=made.dtype, device=device)

    return create


def _move(module: nn.Module, device: torch.device) -> nn.Module:
    """Move parameters and buffers to the device, with the attributes that Megatron-Core set."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is None:
                continue
            moved = nn.Parameter(
                torch.empty(parameter.shape, dtype=parameter.dtype, device=device),
                requires_grad=parameter.requires_grad,
            )
            internal = moved.__dict__.keys()
            marks = {key: value for key, value in parameter.__dict__.items() if key not in internal}
            moved.__dict__.update(marks)
            child._parameters[name] = moved
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else buffer.to(device)
    return module


def _attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, enable_gqa: bool) -> Any:
    """Stand in for SDPA: the kernel that torch chooses on a GPU, flash or memory-efficient."""
    if query.dtype in FLASH_DTYPES:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal)[0]
    if enable_gqa:
        key, value = (
            each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value)
        )
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, None, True, 0.0, is_causal)[0]


def _gather_objects(found: list[Any], own: Any, group: Any = None) -> None:
    """Stand in for `dist.all_gather_object`: every rank has what this one has."""
    found[:] = [own] * len(found)
