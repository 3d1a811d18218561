"""The lines that rank 0 prints: one for each node, then what they measured together."""

import statistics
from collections.abc import Sequence

from pretrain.preflight.measurement import Measurement
from pretrain.preflight.node_facts import NodeFacts, RankFacts
from pretrain.preflight.verdict import node_bandwidths, pair_bandwidths, visible_gpus


def describe(
    nodes: Sequence[NodeFacts], ranks: Sequence[RankFacts], measurements: Sequence[Measurement]
) -> list[str]:
    """Return the lines; without `measurements`, or where one failed, those of the nodes alone."""
    lines = [describe_node(node, ranks, measurements) for node in nodes]
    if not measurements or any(each.error for each in measurements):
        return lines
    pairs = pair_bandwidths(measurements)
    if pairs:
        slowest = min(pairs, key=lambda each: pairs[each])
        lines.append(
            f"between nodes: {len(pairs)} pairs, median {statistics.median(pairs.values()):.2f} "
            f"GB/s | slowest {slowest[0]} and {slowest[1]}, {pairs[slowest]:.2f} GB/s"
        )
    if len(ranks) > 1:
        world = min(each.world_bandwidth for each in measurements)
        is_exact = not any(each.wrong for each in measurements)
        lines.append(
            f"all {len(ranks)} ranks: all-reduce {'exact' if is_exact else 'WRONG'}, "
            f"{world:.2f} GB/s"
        )
    return lines


def describe_node(
    node: NodeFacts, ranks: Sequence[RankFacts], measurements: Sequence[Measurement]
) -> str:
    """Return the line of a node."""
    num_gpus = len(visible_gpus(node.node, ranks))
    parts = [
        f"{sum(each.node == node.node for each in ranks)} ranks",
        f"{num_gpus} x {node.gpu}" if num_gpus else "no GPU",
        ", ".join(f"{name} {version}" for name, version in node.versions.items()),
        f"{node.free_gib:.1f} GiB free",
    ]
    measured = [each for each in measurements if each.node == node.node and not each.error]
    if measured:
        speeds = [each.gemm_tflops for each in measured]
        skew = max((each.clock_skew_seconds for each in measured), key=abs)
        parts += [
            f"clock {skew:+.3f} s",
            f"matrix products {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s",
        ]
        within = node_bandwidths(measured).get(node.node)
        if within is not None:
            parts.append(f"all-reduce within the node {within:.2f} GB/s")
    return f"node {node.node}: {' | '.join(parts)}"
