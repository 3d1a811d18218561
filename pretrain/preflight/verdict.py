"""What is wrong with which node, GPU or connection."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pretrain.preflight.measurement import Measurement
from pretrain.preflight.node_facts import NodeFacts, RankFacts

Pair = tuple[str, str]
MAX_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is too little or too much.

    Attributes:
        clock_skew_seconds: Between a node's clock and the first one's.
        free_gib: Free space where the run directory is.
        bandwidth: Bus bandwidth of the all-reduce over all ranks in GB/s; 0: any.
        share: A GPU, node or pair below this share of the fastest one is at fault; 0: none.
        may_idle: Whether GPUs without a rank are right.
    """

    clock_skew_seconds: float
    free_gib: float
    bandwidth: float
    share: float
    may_idle: bool


def judge_nodes(nodes: Sequence[NodeFacts], limits: Limits) -> list[str]:
    """Return the faults; versions and GPUs are compared with what most nodes have."""
    faults = find_odd(nodes, "the GPU", lambda each: each.gpu or "none")
    for name in nodes[0].versions:
        faults += find_odd(nodes, name, partial(read_version, name))
    for each in nodes:
        if not each.disk_error and each.free_gib < limits.free_gib:
            faults.append(
                f"node {each.node}: {each.free_gib:.1f} GiB free for the run directory, needs "
                f"{limits.free_gib:g} (--min-free-gib)"
            )
        if each.disk_error:
            faults.append(f"node {each.node}: {each.disk_error}")
    return faults


def read_version(name: str, facts: NodeFacts) -> str:
    """Return the version of a package, or of Python."""
    return facts.versions[name]


def find_odd(nodes: Sequence[NodeFacts], what: str, read: Callable[[NodeFacts], str]) -> list[str]:
    """Return a fault for each node that differs from most."""
    usual = statistics.mode(read(each) for each in nodes)
    return [
        f"node {each.node}: {what} {read(each)}, elsewhere {usual}"
        for each in nodes
        if read(each) != usual
    ]


def judge_gpus(nodes: Sequence[NodeFacts], ranks: Sequence[RankFacts], limits: Limits) -> list[str]:
    """Return the faults of the ranks' GPUs: none visible, too few, or some without a rank."""
    faults = []
    visible = {node.node: visible_gpus(node.node, ranks) for node in nodes}
    usual = statistics.mode(map(len, visible.values()))
    for node in nodes:
        of_node = [each for each in ranks if each.node == node.node]
        num_visible, num_used = len(visible[node.node]), len({r.gpu for r in of_node if r.gpu})
        if node.num_devices and not num_visible:
            faults.append(
                f"node {node.node}: torch sees none of {node.num_devices} GPUs: a CPU build of "
                "torch, the driver, or a container without --nv"
            )
            continue
        if num_visible != usual:
            faults.append(f"node {node.node}: GPUs {num_visible}, elsewhere {usual}")
        if num_visible > 0 and num_used < len(of_node):
            faults.append(f"node {node.node}: {len(of_node)} ranks on {num_used} GPUs")
        elif num_used < num_visible and not limits.may_idle:
            faults.append(
                f"node {node.node}: ranks on {num_used} of {num_visible} GPUs: "
                f"RANKS_PER_NODE={num_visible} uses all (--allow-idle-gpus)"
            )
    return faults


def visible_gpus(node: str, ranks: Sequence[RankFacts]) -> set[str]:
    """Return the GPUs of a node that its ranks see together."""
    return {gpu for each in ranks if each.node == node for gpu in each.visible_gpus}


def judge_measurements(measurements: Sequence[Measurement], limits: Limits) -> list[str]:
    """Return the faults of what ranks measured, each fault of a node once."""
    faults = find_failures(measurements)
    for each in measurements:
        if abs(each.clock_skew_seconds) > limits.clock_skew_seconds:
            faults.append(
                f"node {each.node}: clock off by {each.clock_skew_seconds:+.0f} s "
                f"(--max-clock-skew {limits.clock_skew_seconds:g})"
            )
        if not each.sees_first:
            faults.append(f"node {each.node}: does not share the run directory with the first node")
    faults += find_wrong(measurements)
    if not faults:
        faults = find_slow(measurements, limits)
    return list(dict.fromkeys(faults))


def find_failures(measurements: Sequence[Measurement]) -> list[str]:
    """Return the failures of the earliest stage that failed: later ones follow from it."""
    failed = [each for each in measurements if each.failed_stage >= 0]
    earliest = min((each.failed_stage for each in failed), default=-1)
    nodes: dict[str, list[str]] = {}
    for each in failed:
        if each.failed_stage == earliest:
            nodes.setdefault(each.error, []).append(each.node)
    return [f"{name_nodes(found)}: {error}" for error, found in nodes.items()]


def find_wrong(measurements: Sequence[Measurement]) -> list[str]:
    """Return who got wrong data: of the connections with the fewest ranks among those that fail."""
    for prefix in ("all-reduce within", "messages", "all-reduce of"):
        nodes: dict[str, list[str]] = {}
        for each in measurements:
            for what in each.wrong:
                if what.startswith(prefix):
                    nodes.setdefault(what, []).append(each.node)
        if nodes:
            return [f"{name_nodes(found)}: {what}: wrong data" for what, found in nodes.items()]
    return []


def find_slow(measurements: Sequence[Measurement], limits: Limits) -> list[str]:
    """Return what is far slower than the fastest of its kind, and a world below its minimum."""
    faults = []
    best = max(each.gemm_tflops for each in measurements)
    for rank, each in enumerate(measurements):
        if each.gemm_tflops < limits.share * best:
            faults.append(
                f"node {each.node}: rank {rank} computes at {each.gemm_tflops:.3g} TFLOP/s, the "
                f"fastest at {best:.3g} (--min-share {limits.share:g})"
            )
    within = node_bandwidths(measurements)
    for node, bandwidth in within.items():
        if bandwidth < limits.share * max(within.values()):
            faults.append(
                f"node {node}: all-reduce within the node at {bandwidth:.2f} GB/s, the fastest "
                f"node at {max(within.values()):.2f} (--min-share {limits.share:g})"
            )
    between = pair_bandwidths(measurements)
    faults += find_slow_pairs(between, limits.share)
    world = min(each.world_bandwidth for each in measurements)
    if len(measurements) > 1 and world < limits.bandwidth:
        faults.append(
            f"all-reduce of all ranks at {world:.2f} GB/s, needs {limits.bandwidth:g} "
            f"(--min-bandwidth){describe_slowest(within, between)}"
        )
    return faults


def node_bandwidths(measurements: Sequence[Measurement]) -> dict[str, float]:
    """Return the bandwidth within each node that has several ranks, as its slowest rank sees it."""
    found: dict[str, float] = {}
    for each in measurements:
        if each.node_bandwidth:
            found[each.node] = min(found.get(each.node, each.node_bandwidth), each.node_bandwidth)
    return found


def pair_bandwidths(measurements: Sequence[Measurement]) -> dict[Pair, float]:
    """Return the bandwidth of each pair of nodes: all ranks together, the slower direction."""
    directions: dict[Pair, float] = {}
    for each in measurements:
        for other, bandwidth in each.received.items():
            directions[other, each.node] = directions.get((other, each.node), 0.0) + bandwidth
    pairs: dict[Pair, float] = {}
    for (sender, receiver), bandwidth in directions.items():
        pair = (min(sender, receiver), max(sender, receiver))
        pairs[pair] = min(pairs.get(pair, bandwidth), bandwidth)
    return pairs


def find_slow_pairs(bandwidths: Mapping[Pair, float], share: float) -> list[str]:
    """Return the faults of pairs below `share` of the fastest pair.

    A node is named alone where it is slow with two others or more, and with more than half of those
    that it met; each other slow pair is named with both nodes.
    """
    best = max(bandwidths.values(), default=0.0)
    slow = {pair: each for pair, each in bandwidths.items() if each < share * best}
    faults = []
    hint = f"the fastest pair at {best:.2f} (--min-share {share:g})"
    # The node with the most slow pairs first: its partners are not to blame for them.
    while slow:
        counts = {node: sum(node in pair for pair in slow) for pair in slow for node in pair}
        worst = max(counts, key=lambda node: (counts[node], node))
        num_met = sum(worst in pair for pair in bandwidths)
        if counts[worst] < 2 or 2 * counts[worst] <= num_met:
            break
        of_worst = {pair: each for pair, each in slow.items() if worst in pair}
        faults.append(
            f"node {worst}: {counts[worst]} of {num_met} connections to other nodes at "
            f"{max(of_worst.values()):.2f} GB/s or less, {hint}"
        )
        slow = {pair: each for pair, each in slow.items() if worst not in pair}
    return faults + [
        f"between node {left} and node {right}: {each:.2f} GB/s, {hint}"
        for (left, right), each in slow.items()
    ]


def describe_slowest(within: Mapping[str, float], between: Mapping[Pair, float]) -> str:
    """Return the slowest node and the slowest pair, as an end of a sentence."""
    text = ""
    if within:
        node = min(within, key=lambda each: within[each])
        text += f"; slowest within a node: {node} {within[node]:.2f}"
    if between:
        pair = min(between, key=lambda each: between[each])
        text += f"; slowest between nodes: {pair[0]} and {pair[1]} {between[pair]:.2f}"
    return text


def name_nodes(nodes: Sequence[str]) -> str:
    """Return a few names of nodes and the number of the others."""
    unique = list(dict.fromkeys(nodes))
    rest = f" and {len(unique) - MAX_NAMED} more" if len(unique) > MAX_NAMED else ""
    return f"node{'s' * (len(unique) > 1)} {', '.join(unique[:MAX_NAMED])}{rest}"
