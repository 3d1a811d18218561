"""Checks every node before a run, under torchrun or srun: GPUs, versions, disk, clock, network.

Prints a line per node. Exit code 0 if all is well, else 1 with one line that names node and fault.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from megatron_eso.command_line import CommandLine, count, real_from_0
from megatron_eso.errors import UserError, report_error, run_command
from megatron_eso.quantities import MIB
from pretrain.preflight.measurement import Measurement, measure_together, probe_of
from pretrain.preflight.meeting import World, meet
from pretrain.preflight.node_facts import NodeFacts, RankFacts, find_node_facts, find_rank_facts
from pretrain.preflight.places import Places
from pretrain.preflight.report import describe
from pretrain.preflight.verdict import Limits, judge_gpus, judge_measurements, judge_nodes

GPU_SHARE = 0.7


def main(argv: list[str] | None = None) -> None:
    """Run the checks on all ranks, and print the verdict on rank 0; collective over the world.

    Ranks other than 0 end with 0 even where there is a fault: launchers end all ranks when one
    fails, and rank 0 has to print its line.

    Raises:
        UserError: On rank 0, before anything is measured: nodes and faults, in a line.
    """
    arguments = parse_options(argv)
    run = Path(arguments.run_dir)
    world = meet(timedelta(seconds=arguments.timeout))
    # What each rank and each node finds alone
    ranks = [RankFacts(**each) for each in world.gather("ranks", asdict(find_rank_facts()))]
    places = Places(tuple(world.share("nodes of ranks", [each.node for each in ranks])))
    found = asdict(find_node_facts(run)) if places.is_first(world.rank) else None
    gathered = world.gather("node", found, places.nodes_by_rank)
    nodes = [NodeFacts(**each) for each in gathered if each]
    limits = make_limits(arguments, ranks)
    faults = judge_nodes(nodes, limits) + judge_gpus(nodes, ranks, limits) if nodes else []
    if world.rank == 0 and not faults:
        probe_of(run).touch()
    if world.share("is wrong", bool(faults)):
        end(world, faults, describe(nodes, ranks, []))
        return
    # What they measure together
    mine = measure_together(world, places, run, arguments.megabytes and arguments.megabytes * MIB)
    code = 0
    try:
        gathered = world.gather("measurement", asdict(mine), places.nodes_by_rank)
        measurements = [Measurement(**each) for each in gathered]
        faults = judge_measurements(measurements, limits) if measurements else []
        end(world, faults, describe(nodes, ranks, measurements))
    except UserError as error:
        report_error(error)
        code = error.exit_code
    finally:
        if world.rank == 0:
            probe_of(run).unlink(missing_ok=True)
    # A process group that failed waits for other ranks, and so would a usual end of this process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = CommandLine(prog="python -m pretrain.preflight", description=__doc__)
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", help="is made if it is not there")
    add("--timeout", type=real_from_0, default=300.0, metavar="SECONDS", help="of the measurements")
    add("--max-clock-skew", type=real_from_0, default=2.0, metavar="SECONDS")
    add("--min-free-gib", type=real_from_0, default=1.0, metavar="GIB")
    add(
        "--min-bandwidth",
        type=real_from_0,
        default=0.0,
        metavar="GB/S",
        help="of the all-reduce of all ranks",
    )
    add(
        "--min-share",
        type=real_from_0,
        metavar="SHARE",
        help="of the fastest GPU, node or pair of nodes; a slower one is a fault; 0: never "
        f"(default: {GPU_SHARE:g} on GPUs, 0 on CPUs)",
    )
    add("--allow-idle-gpus", action="store_true", help="fewer ranks than GPUs are not a fault")
    add("--megabytes", type=count(1), metavar="MIB", help="size of the messages")
    return parser.parse_args(argv)


def make_limits(arguments: argparse.Namespace, ranks: Sequence[RankFacts]) -> Limits:
    """Return the limits; shares of the fastest are for GPUs, since CPUs are shared with others."""
    share = arguments.min_share
    if share is None:
        share = GPU_SHARE if any(each.gpu for each in ranks) else 0.0
    return Limits(
        clock_skew_seconds=arguments.max_clock_skew,
        free_gib=arguments.min_free_gib,
        bandwidth=arguments.min_bandwidth,
        share=share,
        may_idle=arguments.allow_idle_gpus,
    )


def end(world: World, faults: Sequence[str], lines: Sequence[str]) -> None:
    """Print the lines on rank 0 and leave the store; collective.

    Raises:
        UserError: On rank 0: the faults.
    """
    if world.rank == 0:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()
    world.leave()
    if faults:
        raise UserError("; ".join(faults))


if __name__ == "__main__":
    run_command(main)
