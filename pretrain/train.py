"""Pretrains an Eso-LM, under torchrun or alone.

Resumes by itself from the newest complete checkpoint of the run directory. `--dry-run` prints what
would be trained, on what layout and in how much memory, and exits.
"""

import argparse
import dataclasses
import logging
import os
import socket
import sys
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eso.config import Config, WatchdogConfig
from megatron_eso.config_checks import check_layout, with_vocabulary
from megatron_eso.config_io import LoadedConfig, load_config
from megatron_eso.data.reader import TokenDataset
from megatron_eso.data.remote_folder import is_remote
from megatron_eso.data.staging import stage_shards
from megatron_eso.data.training_data import TrainingData, open_run_data
from megatron_eso.dry_run import format_dry_run
from megatron_eso.errors import ConfigError, UserError, run_command
from megatron_eso.estimates import training_flops_per_token

LOG_FORMAT = "%(asctime)s %(message)s"
CONFIGS = Path(__file__).parent / "configs"

HEARTBEAT_SECONDS = 5.0

if TYPE_CHECKING:
    from megatron_eso.training.loop import Trainer
    from megatron_eso.training.run_directory import RunDirectory
    from megatron_eso.training.watchdog import Watchdog

logger = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    """Train, or tell what would be trained; returns the exit code."""
    arguments = parse_arguments(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        loaded = load_config(arguments.layers, folder=CONFIGS)
        if arguments.dry_run:
            samples = ""
            if all(Path(corpus).is_dir() for corpus in loaded.config.data.train_corpora):
                train_data, _, config = open_data(loaded)
                loaded = dataclasses.replace(loaded, config=config)
                samples = f"# samples: {train_data.describe()}\n"
            sys.stdout.write(format_dry_run(loaded, arguments.world_size) + "\n" + samples)
            return 0
        check_layout(loaded.config, int(os.environ.get("WORLD_SIZE", "1")), loaded.origins)
        train_data, validation_data, config = open_data(loaded)
        start_logging(rank)
        for warning in loaded.warnings:
            logger.warning("%s", warning)
        opened = [*train_data.datasets.values(), *filter(None, [validation_data])]
        stage_shards([dataset.shards for dataset in opened])
        run_training(config, train_data, validation_data)
    except UserError as error:
        if rank == 0:
            raise
        return error.exit_code
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.train", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "layers",
        nargs="+",
        metavar="CONFIG.toml|section.key=value",
        help="configuration layers in order; the later value of a key wins",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    parser.add_argument(
        "--world-size", type=int, default=None, help="ranks to plan for (with --dry-run)"
    )
    return parser.parse_intermixed_args(argv)


def open_data(loaded: LoadedConfig) -> tuple[TrainingData, TokenDataset | None, Config]:
    """Open the shards, and complete the configuration by their vocabulary."""
    data, config = loaded.config.data, loaded.config
    named = [("data.train", corpus) for corpus in data.train_corpora]
    named += [("data.validation", data.validation)] if data.validation else []
    for key, folder in named:
        if not is_remote(folder) and not Path(folder).is_dir():
            origin = loaded.origins.get(key, "default")
            raise ConfigError(
                f"{origin}: {key} = {folder}: there is no such folder; build the shards with "
                f"python -m data_tools build"
            )
    train, validation = open_run_data(config)
    config = with_vocabulary(
        config,
        vocab_size=train.vocab_size,
        mask_token_id=train.mask_token_id,
        source=data.train_corpora[0],
        origins=loaded.origins,
    )
    return train, validation, config


def start_logging(rank: int) -> None:
    """Log to stderr: progress on rank 0, warnings with their rank elsewhere."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%H:%M:%S")
    if rank > 0:
        (handler,) = logging.getLogger().handlers
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter(f"[rank {rank}] {LOG_FORMAT}", "%H:%M:%S"))
    # Megatron-Core warns of every optional package; the log says what is in use.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="megatron")
    # It calls collectives by names that newer torch would rather not have.
    warnings.filterwarnings("ignore", module="torch.distributed", category=FutureWarning)


def run_training(
    config: Config, train_data: TrainingData, validation_data: TokenDataset | None
) -> None:
    """Build everything on this rank and train; collective over the world."""
    # Imported once the configuration is known to be sound: importing takes seconds.
    from megatron_eso.training.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.data.batches import TrainingBatches
    from megatron_eso.training.batch_check import check_data
    from megatron_eso.training.checkpoint import Checkpoints, restore
    from megatron_eso.training.loop import Trainer
    from megatron_eso.training.metrics import MetricsLog
    from megatron_eso.training.parallel import model_parallel_groups, process_group
    from megatron_eso.training.prefetch import StepPrefetcher
    from megatron_eso.training.run_directory import RunDirectory
    from megatron_eso.training.stop import StopRequests
    from megatron_eso.training.train_state import build_train_state

    run = RunDirectory(Path(config.run.directory))
    is_first = int(os.environ.get("RANK", "0")) == 0
    with ExitStack() as stack:
        if is_first:
            stack.enter_context(run.locked())
        stop = StopRequests(run.path, 60 * config.checkpoint.end_margin_minutes)
        stack.enter_context(stop)
        log = log_to_file(run.path / "logs")
        stack.enter_context(process_group())
        groups = stack.enter_context(model_parallel_groups(config.parallel))
        watchdog = stack.enter_context(start_watchdog(config.watchdog, log))
        batches = TrainingBatches(config, train_data, groups.dp.size())
        check_data(batches.state)
        with watchdog.phase("start"):
            state = build_train_state(config, groups)
            checkpoints = Checkpoints(run.checkpoints, config.checkpoint, batches)
            logger.info("%s", describe_parts(config, state.parameters[0].inner))
            restore(state, config, checkpoints)
            run = dataclasses.replace(run, facts=gather_facts(run))
        logger.info("samples: %s", train_data.describe())
        if is_first:
            run.write_config(config, train_data.tokenizer_directory)
        metrics = stack.enter_context(
            MetricsLog(run, state.counters) if is_first else nullcontext()
        )
        if metrics is not None:
            metrics.log_config(config)
        assert config.data.vocab_size is not None
        trainer = Trainer(
            config=config,
            run=run,
            groups=groups,
            state=state,
            prefetcher=stack.enter_context(
                StepPrefetcher(batches, groups.dp.rank(), config.data.prefetch_steps)
            ),
            validation=validation_data,
            checkpoints=checkpoints,
            metrics=metrics,
            watchdog=watchdog,
            stop=stop,
            flops_per_token=training_flops_per_token(config, config.data.vocab_size),
        )
        train_to_the_end(trainer, is_first)


def train_to_the_end(trainer: "Trainer", is_first: bool) -> None:
    """Train, and say in `status.json` how it ended; collective over the world."""
    run = trainer.run
    try:
        stopped = trainer.train()
    except BaseException as error:
        if is_first:
            run.write_status("failed", trainer.state.counters.step, reason=repr(error))
        elif isinstance(error, UserError):
            # Rank 0 cannot tell what this rank alone has met, such as a damaged shard.
            logger.error("%s", error)
        raise
    if is_first:
        outcome, counters = "interrupted" if stopped else "finished", trainer.state.counters
        reason = stopped or "train.num_steps reached"
        logger.info("%s at step %d: %s", outcome, counters.step, reason)
        run.write_status(outcome, counters.step, reason=reason)


def log_to_file(folder: Path) -> Path:
    """Keep this rank's log in a file of its own, those of earlier jobs before it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{int(os.environ.get('RANK', '0')):05d}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(LOG_FORMAT, "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)
    return path


def start_watchdog(config: WatchdogConfig, log: Path) -> "Watchdog":
    """This rank's watchdog; the process group is there."""
    from torch.distributed import distributed_c10d

    from megatron_eso.training.watchdog import Watchdog

    return Watchdog(
        log,
        {
            "start": config.start_seconds,
            "train step": config.step_seconds,
            "validation": config.validation_seconds,
            "checkpoint": config.checkpoint_seconds,
        },
        interval_seconds=HEARTBEAT_SECONDS,
        store=distributed_c10d._get_default_store(),
        rank=distributed_c10d.get_rank(),
        num_ranks=distributed_c10d.get_world_size(),
    )


def gather_facts(run: "RunDirectory") -> dict[str, Any]:
    """What every status says of this job; collective over the world."""
    from torch import distributed as dist

    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return {
        "restarts": run.read_status().get("restarts", -1) + 1,
        "num_ranks": len(hosts),
        "hosts": sorted(set(hosts)),
    }


def describe_parts(config: Config, adam: object) -> str:
    """What is in use, in a line: layout, precision, and whose implementations."""
    parallel = config.parallel
    return (
        f"TP={parallel.tensor_model_parallel_size} PP={parallel.pipeline_model_parallel_size} "
        f"world size {os.environ.get('WORLD_SIZE', '1')} | {config.train.precision} | "
        f"attention and norms of torch | {type(adam).__name__} of "
        f"{type(adam).__module__.split('.')[0]}"
    )


if __name__ == "__main__":
    run_command(main)
