"""What the device did in a profile, by the range that it belongs to."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._autograd import DeviceType

from megatron_eso.simulation.parts import OPTIMIZER, OTHER

MICROSECOND = 1e-6
OPTIMIZER_STEP = "Optimizer.step#"
"""How torch names its own range around the step of an optimizer."""
NCCL = "nccl"
UNKNOWN = "unknown collective"


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel, an operation of the CPU or a collective: its range, start and end in seconds."""

    label: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """What the device did in a step: collectives, and all other work."""

    kernels: list[Work]
    collectives: list[Work]


def list_work(
    events: Sequence[Any], parts: Collection[str], collectives: Collection[str]
) -> DeviceWork:
    """List what the device did.

    With a GPU these are its kernels and copies. Without one, they are the operations inside the
    ranges, and gloo's collectives from their call to their end.

    Args:
        events: Of torch's profiler.
        parts: Names of the ranges around operations.
        collectives: Names of the ranges around collectives.
    """
    host = [each for each in events if each.device_type == DeviceType.CPU and not each.is_async]
    calls = _Calls([each for each in host if each.name in collectives])
    kernels = [
        each
        for each in events
        if each.device_type == DeviceType.CUDA and not each.is_user_annotation
    ]
    if kernels:
        return _list_kernels(host, kernels, parts, calls)
    gloo = [each for each in events if each.name.startswith("gloo:")]
    return DeviceWork(
        [_work(own, each.name) for each in host if each.name in parts for own in each.cpu_children],
        [_work(each, calls.find(each.time_range.start)) for each in gloo],
    )


def measure_exposed(kernels: Iterable[Work], collectives: Iterable[Work]) -> dict[str, float]:
    """Measure how long collectives ran while no kernel did.

    Args:
        kernels: All other work of the device.
        collectives: They may overlap each other; such time counts for the one that began first.

    Returns:
        Seconds by the label of the collective.
    """
    changes = [(time, each, False) for each in kernels for time in (each.start, each.end)]
    changes += [(time, each, True) for each in collectives for time in (each.start, each.end)]
    exposed: defaultdict[str, float] = defaultdict(float)
    running: dict[int, Work] = {}
    kernels_running: set[int] = set()
    before = 0.0
    for time, each, is_collective in sorted(changes, key=lambda change: change[0]):
        first = next(iter(running.values()), None)
        if first is not None and not kernels_running:
            exposed[first.label] += time - before
        before = time
        # The first change of a work is its start, the second its end.
        if is_collective:
            if running.pop(id(each), None) is None:
                running[id(each)] = each
        else:
            kernels_running ^= {id(each)}
    return dict(exposed)


class _Calls:
    """The ranges in the order in which they began, to find the one that a work was started in."""

    def __init__(self, ranges: list[Any]) -> None:
        self._ranges = sorted(ranges, key=lambda each: each.time_range.start)
        self._starts = [each.time_range.start for each in self._ranges]

    def find(self, time: float) -> str:
        """Return the name of the last range that began until `time`."""
        index = bisect_right(self._starts, time) - 1
        return self._ranges[index].name if index >= 0 else UNKNOWN


def _list_kernels(
    host: list[Any], kernels: list[Any], parts: Collection[str], calls: _Calls
) -> DeviceWork:
    """List the kernels of a GPU, each with the range of the operation that launched it."""
    launchers = {each.id: each for each in host if not each.linked_correlation_id}
    found = DeviceWork([], [])
    for kernel in kernels:
        launcher = launchers.get(kernel.linked_correlation_id)
        if NCCL in kernel.name.lower():
            # Several collectives can be launched together, after the calls of all.
            launched = kernel if launcher is None else launcher
            found.collectives.append(_work(kernel, calls.find(launched.time_range.start)))
        else:
            found.kernels.append(_work(kernel, _find_part(launcher, parts)))
    return found


def _find_part(launcher: Any, parts: Collection[str]) -> str:
    """Return the innermost range around an operation, or what is known without one."""
    while launcher is not None:
        if launcher.name in parts:
            return str(launcher.name)
        if launcher.name.startswith(OPTIMIZER_STEP):
            return OPTIMIZER
        launcher = launcher.cpu_parent
    return OTHER


def _work(event: Any, label: str) -> Work:
    interval = event.time_range
    return Work(label, interval.start * MICROSECOND, interval.end * MICROSECOND)
