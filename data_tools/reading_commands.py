"""The subcommands that read datasets: verify, inspect, blend, order, bench."""

import argparse
from typing import Any

from data_tools.locations import add_location, open_cache
from data_tools.reports.blend import report_blend
from data_tools.reports.inspection import inspect_datasets
from data_tools.reports.order import report_order
from data_tools.reports.reader_speed import bench_reader
from data_tools.reports.verification import verify_datasets
from megatron_eso.command_line import count


def add_reading_commands(commands: Any) -> None:
    """Add the subcommands to the parser; each sets `run`, which takes the parsed arguments."""
    # Commands on datasets.
    verify = commands.add_parser("verify", help="check every byte of datasets")
    add_location(verify, nargs="+")
    verify.set_defaults(
        run=lambda found: verify_datasets(
            *found.location, as_json=found.json, cache=open_cache(found)
        )
    )

    inspect = commands.add_parser(
        "inspect", help="print what a dataset holds and how long its documents are, or one row"
    )
    add_location(inspect)
    inspect.add_argument("--row", type=count(), help="print this row as text, and its location")
    inspect.add_argument("--sequence-length", type=count(1), default=1024, metavar="T")
    inspect.set_defaults(
        run=lambda found: inspect_datasets(
            found.location, found.row, found.sequence_length, found.json, open_cache(found)
        )
    )

    # Commands on runs.
    blend = commands.add_parser(
        "blend", help="print what a run draws from each corpus: shares, epochs, warnings"
    )
    _add_run(blend)
    blend.add_argument(
        "--tokens",
        type=count(),
        metavar="N",
        help="budget in tokens, such as 300e9 (default: the run's)",
    )
    blend.set_defaults(
        run=lambda found: report_blend(found.run_or_config, found.tokens, found.json)
    )

    order = commands.add_parser(
        "order", help="print what a sample of a run is: corpus, epoch, row, documents, text"
    )
    _add_run(order)
    order.add_argument(
        "--sample", type=count(), nargs="+", required=True, metavar="N", help="numbers from 0"
    )
    order.set_defaults(
        run=lambda found: report_order(found.run_or_config, found.sample, found.json)
    )

    bench = commands.add_parser("bench", help="measure how fast random rows are read")
    add_location(bench)
    bench.add_argument("--sequence-length", type=count(1), default=1024, metavar="T")
    bench.set_defaults(
        run=lambda found: bench_reader(
            found.location, found.sequence_length, found.json, open_cache(found)
        )
    )

    for command in (verify, inspect, blend, order, bench):
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "run_or_config",
        nargs="+",
        metavar="RUN_DIR | CONFIG.toml|section.key=value ...",
        help="a run directory, or configuration layers as for pretrain.train",
    )
