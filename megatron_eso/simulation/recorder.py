"""Follows every operation of a step: kernels, bytes, FLOPs, time, memory, waits, collectives."""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_eso.estimates.gpus import EFFICIENCY, Gpu
from megatron_eso.simulation.collectives import Collective, TimedWork, describe_collective
from megatron_eso.simulation.fake_gpu import DEVICE_TYPE
from megatron_eso.simulation.memory import Memory
from megatron_eso.simulation.operations import Cost, cost_of
from megatron_eso.simulation.parts import (
    GRADIENTS,
    HAS_PRODUCTS,
    HEAD,
    OPTIMIZER,
    PRODUCTS,
    SYNCHRONIZATION,
    PartFinder,
)
from megatron_eso.simulation.timeline import Timeline

PRODUCT_OPERATIONS = ("aten::mm", "aten::addmm", "aten::bmm")
LABELS = {
    HEAD: "head",
    GRADIENTS: "communication",
    SYNCHRONIZATION: "communication",
    OPTIMIZER: "update",
}
"""What memory that a part allocates during a step is counted as; all other is activations."""
ACTIVATIONS = "activations"
COMMUNICATION = "communication"
OWN_CODE = ("megatron_eso.", "megatron.core.")
TOOLS = ("megatron_eso.simulation.", "megatron_eso.benchmark.")


@dataclass(slots=True)
class PartUse:
    """What a part of the step took."""

    seconds: float = 0.0
    kernels: float = 0
    flops: float = 0.0
    moved: float = 0.0

    def add(self, other: "PartUse", share: float = 1.0) -> None:
        """Add a share of what another part took."""
        self.seconds += share * other.seconds
        self.kernels += share * other.kernels
        self.flops += share * other.flops
        self.moved += share * other.moved


class Recorder(TorchDispatchMode):
    """Records the operations on the fake device while it is entered.

    Attributes:
        memory: Bytes alive on the device.
        peak_part: The part of the step in which most were alive since `restart`.
        parts: What each part took since `restart`.
        waits: How often the host waited for the device, by reason and place in the code.
        collectives: How often each collective ran.
        timeline: When kernels and collectives ran.
    """

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu
        self.memory = Memory(DEVICE_TYPE)
        self._finder = PartFinder()
        self._rates = {
            "gemm": gpu.bf16_flops * EFFICIENCY.gemm,
            "flash": gpu.bf16_flops * EFFICIENCY.flash,
            "fp32": gpu.fp32_flops * EFFICIENCY.fp32,
        }
        self.restart()

    def restart(self) -> None:
        """Forget everything but the memory that is alive."""
        self.parts: defaultdict[str, PartUse] = defaultdict(PartUse)
        self.waits: Counter[tuple[str, str]] = Counter()
        self.collectives: Counter[Collective] = Counter()
        self.timeline = Timeline()
        self._works: list[TimedWork] = []
        self.memory.restart()
        self.peak_part = ""
        self._finder.forget()

    def wait(self, reason: str) -> None:
        """Record that the host waits for the device."""
        self.waits[reason, find_place()] += 1

    def __torch_dispatch__(
        self, operation: Any, _types: Any, arguments: Any = (), by_name: Any = None
    ) -> Any:
        """Run an operation of torch, and record it if it is one of the device."""
        by_name = by_name or {}
        name = operation._schema.name
        if name.startswith("c10d::"):
            return self._communicate(operation, arguments)
        if name == "aten::_local_scalar_dense":
            return self._read(arguments[0])
        part = self._finder.find()
        output = operation(*arguments, **by_name)
        if name == "aten::all":
            output.is_conjunction = True
        given = (*arguments, *by_name.values())
        outputs = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        devices = {
            each.device.type for each in (*tree_leaves(given), *outputs) if isinstance(each, Tensor)
        }
        if DEVICE_TYPE not in devices:
            return output
        if name in ("aten::_to_copy", "aten::copy_") and len(devices) > 1:
            self._transfer(name, arguments, by_name)
        else:
            self._compute(name, part, cost_of(name, given, output))
        for tensor in outputs:
            if self.memory.add(tensor, LABELS.get(part, ACTIVATIONS)):
                self.peak_part = part
        return output

    def _compute(self, name: str, part: str, cost: Cost) -> None:
        """Record kernels of the device."""
        if not cost.kernels:
            return
        seconds = max(
            cost.flops / self._rates[cost.unit],
            cost.moved / (self.gpu.bandwidth * EFFICIENCY.bandwidth),
            cost.kernels * EFFICIENCY.kernel_seconds,
        )
        if name in PRODUCT_OPERATIONS and part in HAS_PRODUCTS:
            part = PRODUCTS
        self.parts[part].add(PartUse(seconds, cost.kernels, cost.flops, cost.moved))
        self.timeline.compute(seconds)

    def _transfer(self, name: str, arguments: Any, by_name: dict[str, Any]) -> None:
        """Record a copy between host and device; without `non_blocking` the host waits for it."""
        is_copy = name == "aten::copy_"
        is_async = by_name.get("non_blocking") or (is_copy and len(arguments) > 2 and arguments[2])
        if not is_async:
            source = arguments[1] if is_copy else arguments[0]
            to_host = source.device.type == DEVICE_TYPE
            self.wait("copy to the host" if to_host else "copy from the host")

    def _read(self, tensor: Tensor) -> Any:
        """Return a value that the host reads: zero, or true for a condition on all elements.

        A step in which every value is finite is then a step in which nothing is wrong.
        """
        if tensor.device.type == DEVICE_TYPE:
            self.wait("a value is read")
        if tensor.dtype == torch.bool:
            return getattr(tensor, "is_conjunction", False)
        return 0.0 if tensor.dtype.is_floating_point else 0

    def _communicate(self, operation: Any, arguments: Any) -> Any:
        """Record a collective; its output exists at once, and its time counts where code waits."""
        found = describe_collective(operation._schema.name, arguments, self.gpu)
        self.collectives[found] += 1
        end = self.timeline.start(found.purpose, found.seconds)
        work = TimedWork(self.timeline, found.purpose, end)
        # C++ calls the method `wait` of a Python object that is alive, and else its own.
        self._works.append(work)
        is_alone = len(operation._schema.returns) == 1
        return work.boxed() if is_alone else (arguments[0], work.boxed())


def find_place() -> str:
    """Return file and line of the innermost frame of this project and of Megatron-Core."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(OWN_CODE) and not module.startswith(TOOLS):
            path = frame.f_code.co_filename
            roots = [root for root in ("/megatron_eso/", "/megatron/core/") if root in path]
            start = path.rindex(roots[0]) + 1 if roots else 0
            return f"{path[start:]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
