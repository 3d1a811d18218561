"""What is wrong with which node."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pretrain.preflight.measurement import Measurement
from pretrain.preflight.node_facts import Facts


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is too little or too much.

    Attributes:
        clock_skew_seconds: Between a node's clock and the first one's.
        free_gib: Free space where the run directory is.
        bandwidth: Bus bandwidth of the all-reduce over all ranks in GB/s; 0: any.
    """

    clock_skew_seconds: float
    free_gib: float
    bandwidth: float


def judge_facts(facts: Sequence[Facts], limits: Limits) -> list[str]:
    """What is wrong with which node; versions and GPUs are compared with what most nodes have."""
    nodes = list({each.node: each for each in facts}.values())
    faults = find_odd(nodes, "GPUs", lambda each: str(each.num_gpus))
    faults += find_odd(nodes, "the GPU", lambda each: each.gpu or "none")
    for name in nodes[0].versions:
        faults += find_odd(nodes, name, partial(read_version, name))
    for each in nodes:
        if 0 < each.num_gpus < each.num_ranks:
            faults.append(f"node {each.node}: {each.num_ranks} ranks on {each.num_gpus} GPUs")
        if not each.disk_error and each.free_gib < limits.free_gib:
            faults.append(
                f"node {each.node}: {each.free_gib:.1f} GiB free for the run directory, needs "
                f"{limits.free_gib:g} (--min-free-gib)"
            )
    errors = {each.node: each.disk_error for each in facts if each.disk_error}
    return faults + [f"node {node}: {error}" for node, error in errors.items()]


def read_version(name: str, facts: Facts) -> str:
    """Return the version of a package, or of Python."""
    return facts.versions[name]


def find_odd(nodes: Sequence[Facts], what: str, read: Callable[[Facts], str]) -> list[str]:
    """The nodes that differ from most."""
    usual = statistics.mode(read(each) for each in nodes)
    return [
        f"node {each.node}: {what} {read(each)}, elsewhere {usual}"
        for each in nodes
        if read(each) != usual
    ]


def judge_measurements(measurements: Sequence[Measurement], limits: Limits) -> list[str]:
    """What is wrong with which node, each fault of a node once."""
    faults = []
    for each in measurements:
        if each.error:
            faults.append(f"node {each.node}: all-reduce failed: {each.error}")
        if abs(each.clock_skew_seconds) > limits.clock_skew_seconds:
            faults.append(
                f"node {each.node}: clock off by {each.clock_skew_seconds:+.0f} s "
                f"(--max-clock-skew {limits.clock_skew_seconds:g})"
            )
        if not each.sees_first:
            faults.append(f"node {each.node}: does not share the run directory with the first node")
        if not each.is_sum_exact:
            faults.append(f"node {each.node}: all-reduce gives a wrong sum")
    slowest = min(measurements, key=lambda each: each.bandwidth)
    if len(measurements) > 1 and slowest.bandwidth < limits.bandwidth and not faults:
        faults.append(
            f"node {slowest.node}: all-reduce at {slowest.bandwidth:.2f} GB/s, needs "
            f"{limits.bandwidth:g} (--min-bandwidth)"
        )
    return list(dict.fromkeys(faults))
