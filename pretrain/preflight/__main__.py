"""Checks every node before a run, under torchrun or srun: GPUs, versions, disk, clock, all-reduce.

Prints a line per node. Exit code 0 if all is well, else 1 with one line that names node and fault.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from megatron_eso.command_line import CommandLine, count, real_from_0
from megatron_eso.errors import UserError, run_command
from megatron_eso.quantities import MIB
from pretrain.preflight.measurement import Measurement, measure_together
from pretrain.preflight.meeting import World, meet
from pretrain.preflight.node_facts import Facts, find_facts
from pretrain.preflight.verdict import Limits, judge_facts, judge_measurements


def main(argv: list[str] | None = None) -> None:
    """Check; collective over the world.

    Raises:
        UserError: On rank 0: nodes and faults, in a line.
    """
    arguments = parse_options(argv)
    limits = Limits(
        clock_skew_seconds=arguments.max_clock_skew,
        free_gib=arguments.min_free_gib,
        bandwidth=arguments.min_bandwidth,
    )
    world = meet(timedelta(seconds=arguments.timeout))
    faults = check(world, Path(arguments.run_dir), limits, arguments.megabytes)
    # The others return 0: launchers end all ranks when one fails, and rank 0 has to print its line.
    if faults and world.rank == 0:
        raise UserError("; ".join(faults))


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(prog="python -m pretrain.preflight", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="is made if it is not there")
    parser.add_argument("--timeout", type=real_from_0, default=300.0, metavar="SECONDS")
    parser.add_argument("--max-clock-skew", type=real_from_0, default=2.0, metavar="SECONDS")
    parser.add_argument("--min-free-gib", type=real_from_0, default=1.0, metavar="GIB")
    parser.add_argument("--min-bandwidth", type=real_from_0, default=0.0, metavar="GB/S")
    parser.add_argument("--megabytes", type=count(1), metavar="MIB", help="size of the all-reduce")
    return parser.parse_args(argv)


def check(world: World, run: Path, limits: Limits, megabytes: int | None) -> list[str]:
    """Find out what is wrong with which node, and show the nodes on rank 0; collective."""
    mine = find_facts(run)
    facts = [Facts(**each) for each in world.exchange("facts", asdict(mine))]
    measurements: list[Measurement] = []
    faults = judge_facts(facts, limits)
    if not faults:
        size = (megabytes or (256 if mine.num_gpus else 4)) * MIB
        measured = measure_together(world, mine.node, run, size)
        measurements = [
            Measurement(**each) for each in world.exchange("measurements", asdict(measured))
        ]
        faults = judge_measurements(measurements, limits)
    if world.rank == 0:
        sys.stdout.writelines(f"{line}\n" for line in describe_nodes(facts, measurements))
        sys.stdout.flush()
    world.leave()
    return faults


def describe_nodes(facts: Sequence[Facts], measurements: Sequence[Measurement]) -> list[str]:
    """A line per node."""
    lines = []
    for node, fact in {each.node: each for each in facts}.items():
        parts = [
            f"{fact.num_ranks} ranks",
            f"{fact.num_gpus} x {fact.gpu}" if fact.num_gpus else "no GPU",
            ", ".join(f"{name} {version}" for name, version in fact.versions.items()),
            f"{fact.free_gib:.1f} GiB free",
        ]
        of_node = [each for each in measurements if each.node == node]
        if of_node:
            skew = max((each.clock_skew_seconds for each in of_node), key=abs)
            is_exact = all(each.is_sum_exact and not each.error for each in of_node)
            parts.append(f"clock {skew:+.3f} s")
            parts.append(
                f"all-reduce {'exact' if is_exact else 'WRONG'}, "
                f"{min(each.bandwidth for each in of_node):.2f} GB/s"
            )
        lines.append(f"node {node}: {' | '.join(parts)}")
    return lines


if __name__ == "__main__":
    run_command(main)
