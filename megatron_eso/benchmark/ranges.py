"""Profiler ranges of a step: each operation runs in one that carries the name of its part."""

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_eso.simulation.collectives import KINDS, Collective, read_message
from megatron_eso.simulation.operations import Cost, UnknownOperationError, cost_of
from megatron_eso.simulation.parts import HAS_PRODUCTS, PRODUCTS, PartFinder
from megatron_eso.simulation.recorder import PRODUCT_OPERATIONS, PartUse


class PartRanges(TorchDispatchMode):
    """Ranges around the operations of a step while it is entered, and counts of what they do.

    A range is named after the part of the step, the same as in a simulation, or after the
    collective. Each operation costs the host some more time; kernels take as long as without.

    Attributes:
        parts: Operations, FLOPs and bytes of each part; no seconds.
        collectives: How often each collective ran, by the name of its range.
        by_range: Each collective by the name of its range; no seconds.
        unstated: Operations without a registered cost, whose FLOPs and bytes are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: defaultdict[str, PartUse] = defaultdict(PartUse)
        self.collectives: Counter[str] = Counter()
        self.by_range: dict[str, Collective] = {}
        self.unstated: Counter[str] = Counter()
        self._finder = PartFinder()
        self._device_type = torch.device(torch.cuda.current_device()).type

    def __torch_dispatch__(
        self, operation: Any, _types: Any, arguments: Any = (), by_name: Any = None
    ) -> Any:
        """Run an operation of torch in its range."""
        by_name = by_name or {}
        name = operation._schema.name
        if name.startswith("c10d::"):
            with record_function(self._count_collective(name, arguments)):
                return operation(*arguments, **by_name)
        part = self._finder.find()
        if name in PRODUCT_OPERATIONS and part in HAS_PRODUCTS:
            part = PRODUCTS
        with record_function(part):
            output = operation(*arguments, **by_name)
        self._count(name, part, (*arguments, *by_name.values()), output)
        return output

    def find_purpose(self, label: str) -> str:
        """Return which parallelism the collectives of a range serve."""
        found = self.by_range.get(label)
        return label if found is None else found.purpose

    def _count(self, name: str, part: str, given: Any, output: Any) -> None:
        """Count what an operation on the device does."""
        tensors = [each for each in tree_leaves((given, output)) if isinstance(each, Tensor)]
        if all(each.device.type != self._device_type for each in tensors):
            return
        try:
            cost = cost_of(name, given, output)
        except UnknownOperationError:
            self.unstated[name] += 1
            cost = Cost(kernels=1)
        if cost.kernels:
            self.parts[part].add(PartUse(0.0, cost.kernels, cost.flops, cost.moved))

    def _count_collective(self, name: str, arguments: Any) -> str:
        """Count a collective; return the name of its range."""
        kind, _ = KINDS.get(name, (name.removeprefix("c10d::"), 0.0))
        message = read_message(name, arguments)
        ranks = len(message.members)
        found = Collective(kind, message.purpose, ranks, message.size, 0.0)
        label = f"{kind} of {message.size:,} bytes, {ranks} ranks ({message.purpose})"
        self.collectives[label] += 1
        self.by_range[label] = found
        return label
