"""Megatron-Core 0.16.1 on machines without a GPU, over gloo.

Megatron-Core names CUDA devices in many places. If torch has none, `install_cpu_backend` makes
these names mean the CPU: torch's factory functions accept a CUDA device, `Tensor.cuda` is the
identity, and a few functions of `torch.cuda` describe the CPU. It wraps functions instead of a
TorchFunctionMode, since a mode is not active in backward and would break recompute.

This is the only module that changes Megatron-Core or torch. It refuses every other version of
Megatron-Core, and changes nothing if there is a CUDA device.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron_eso.errors import ConfigError

SUPPORTED_MEGATRON_CORE = "0.16.1"

FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)

logger = logging.getLogger(__name__)


def install_cpu_backend() -> bool:
    """Make Megatron-Core run on the CPU if there is no CUDA device; call it before its first use.

    Returns:
        Whether the CPU replaces a GPU.

    Raises:
        ConfigError: Megatron-Core has another version than this module supports.
    """
    if getattr(torch.cuda.current_device, "stands_in", False):
        return True
    if torch.cuda.is_available():
        return False
    _import_without_compiler()
    import megatron.core
    from megatron.core.tensor_parallel import random as megatron_random

    if megatron.core.__version__ != SUPPORTED_MEGATRON_CORE:
        raise ConfigError(
            f"megatron-core {megatron.core.__version__} is installed, and without a GPU only "
            f"{SUPPORTED_MEGATRON_CORE} runs: pip install megatron-core=={SUPPORTED_MEGATRON_CORE}"
        )
    for name in FACTORIES:
        setattr(torch, name, _place_on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _name_cuda_type(torch.Tensor.type)  # type: ignore[method-assign]
    _replace_cuda_functions()
    megatron_random._set_cuda_rng_state = _set_rng_state
    # Its tracker warns that the random streams of CPU and GPU move together: here they are one.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    logger.info("no CUDA device: Megatron-Core runs on the CPU over gloo")
    return True


def _import_without_compiler() -> None:
    """Import Megatron-Core with its fused functions left as they are.

    It passes them to `torch.compile`, which imports the compiler: a third of a start's time. No run
    calls a fused function, since `model/transformer_config.py` sets every fusion to False.
    """
    compile_function = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_function


class _NullStream:
    """A CUDA stream of the CPU, on which everything runs in order."""

    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


def _place_on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _name_cuda_type(plain_type: Callable[..., Any]) -> Callable[..., Any]:
    """Name types "torch.cuda.FloatTensor" and so on: Megatron-Core compares these names."""

    @functools.wraps(plain_type)
    def name_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        return answer if args or kwargs else answer.replace("torch.", "torch.cuda.", 1)

    return name_type


def _set_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(state)


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda

    def current_device() -> torch.device:
        return torch.device("cpu")

    current_device.stands_in = True  # type: ignore[attr-defined]
    cuda.current_device = current_device
    cuda.synchronize = lambda *_args, **_kwargs: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    cuda.default_stream = cuda.current_stream = lambda *_args: _NullStream()
