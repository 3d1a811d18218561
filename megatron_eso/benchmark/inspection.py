"""One real step under torch's profiler: where its time goes, its collectives and host waits."""

import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_eso.benchmark.device_work import DeviceWork, Work, list_work, measure_exposed
from megatron_eso.benchmark.ranges import PartRanges
from megatron_eso.simulation.collectives import Collective
from megatron_eso.simulation.recorder import PartUse, find_place
from megatron_eso.simulation.timeline import Timeline

SYNCHRONIZES = "called a synchronizing CUDA operation"
"""The warning of `torch.cuda.set_sync_debug_mode`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A step that was measured part by part.

    Attributes:
        seconds: The whole step, longer than without the profiler.
        parts: Each part of it.
        timeline: Seconds of collectives by purpose, and of these while no kernel ran.
        collectives: How often each collective ran, with its mean time.
        waits: How often the host waited for the GPU, by reason and place; none without a GPU.
        unstated: Operations whose FLOPs and bytes are not counted.
    """

    seconds: float
    parts: dict[str, PartUse]
    timeline: Timeline
    collectives: dict[Collective, int]
    waits: dict[tuple[str, str], int]
    unstated: dict[str, int]


def inspect_step(take_step: Callable[[], object], trace: Path | None) -> Inspection:
    """Take a step under the profiler.

    Args:
        take_step: Takes it; every rank does so at once.
        trace: File to write for Perfetto and TensorBoard; its folder exists.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        with _record_waits() as waits, PartRanges() as ranges:
            take_step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    work = list_work(profiler.events(), ranges.parts, ranges.by_range)
    return Inspection(
        seconds=seconds,
        parts=_sum_parts(work.kernels, ranges.parts),
        timeline=_sum_collectives(work, ranges),
        collectives=_list_collectives(work, ranges),
        waits=dict(waits),
        unstated=dict(ranges.unstated),
    )


def _sum_parts(kernels: list[Work], counted: Mapping[str, PartUse]) -> dict[str, PartUse]:
    """Return what each part took: its time, and the FLOPs and bytes that were counted."""
    # A GPU may launch other kernels than the registered costs count.
    has_gpu = torch.cuda.is_available()
    parts = {
        name: PartUse(0.0, 0 if has_gpu else use.kernels, use.flops, use.moved)
        for name, use in counted.items()
    }
    for each in kernels:
        use = parts.setdefault(each.label, PartUse())
        use.add(PartUse(each.seconds, 1 if has_gpu else 0))
    return parts


def _sum_collectives(work: DeviceWork, ranges: PartRanges) -> Timeline:
    """Return the time of the collectives by purpose."""
    timeline = Timeline()
    for each in work.collectives:
        timeline.busy[ranges.find_purpose(each.label)] += each.seconds
    for label, exposed in measure_exposed(work.kernels, work.collectives).items():
        timeline.exposed[ranges.find_purpose(label)] += exposed
    return timeline


def _list_collectives(work: DeviceWork, ranges: PartRanges) -> dict[Collective, int]:
    """Return how often each collective ran, with its mean time."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for each in work.collectives:
        seconds[each.label] += each.seconds
    return {
        replace(found, seconds=seconds[label] / ranges.collectives[label]): ranges.collectives[
            label
        ]
        for label, found in ranges.by_range.items()
    }


@contextmanager
def _record_waits() -> Iterator[Counter[tuple[str, str]]]:
    """Count the places where torch warns that the host waits for the GPU."""
    waits: Counter[tuple[str, str]] = Counter()
    if not torch.cuda.is_available():
        yield waits
        return
    with warnings.catch_warnings():
        show = warnings.showwarning

        def record(message: Any, *arguments: Any, **by_name: Any) -> None:
            if SYNCHRONIZES in str(message):
                waits[SYNCHRONIZES, find_place()] += 1
            else:
                show(message, *arguments, **by_name)

        warnings.filterwarnings("always", message=SYNCHRONIZES)
        warnings.showwarning = record
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
