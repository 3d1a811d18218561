"""Pretrains an Eso-LM, under torchrun or alone.

Resumes by itself from the newest complete checkpoint of the run directory. `--dry-run` prints what
would be trained, on what layout and in how much memory, and exits.
"""

import argparse
import dataclasses
import faulthandler
import logging
import math
import os
import shutil
import socket
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eso.config.combinations import check_layout, with_vocabulary
from megatron_eso.config.loading import LoadedConfig, config_to_dict, config_to_toml, load_config
from megatron_eso.config.sections import Config, WatchdogConfig
from megatron_eso.data.remote.folder import is_remote
from megatron_eso.data.remote.staging import stage_shards
from megatron_eso.data.samples.training_data import TrainingData, open_run_data
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import ConfigError, DataError, UserError, run_command
from megatron_eso.estimates.dry_run import format_dry_run
from megatron_eso.estimates.flops import training_flops_per_token
from megatron_eso.objectives.build import build_objective
from megatron_eso.training.records.wandb_log import check_wandb

LOG_FORMAT = "%(asctime)s %(message)s"
CONFIGS = Path(__file__).parent / "configs"

HEARTBEAT_SECONDS = 5.0

if TYPE_CHECKING:
    from megatron_eso.runs.checkpoint_state import Counters
    from megatron_eso.runs.run_directory import RunDirectory
    from megatron_eso.runs.status import State
    from megatron_eso.training.guards.stop import StopRequests
    from megatron_eso.training.guards.watchdog import Watchdog
    from megatron_eso.training.loop import Trainer
    from megatron_eso.training.records.metrics import MetricsLog

logger = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    """Train, or tell what would be trained; returns the exit code."""
    arguments = parse_arguments(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        loaded = load_config(arguments.layers, folder=CONFIGS)
        check_wandb(loaded.config.run.wandb_project)
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
        stage_shards(train_data.sources + (validation_data.sources if validation_data else []))
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


def open_data(loaded: LoadedConfig) -> tuple[TrainingData, ValidationData | None, Config]:
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
    train, validation = open_run_data(config.data, config.run.seed)
    config = with_vocabulary(
        config,
        vocab_size=train.vocabulary.size,
        mask_token_id=train.vocabulary.mask_token_id,
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
    config: Config, train_data: TrainingData, validation_data: ValidationData | None
) -> None:
    """Build everything on this rank and train; collective over the world.

    How it ends stands in `status.json`.
    """
    # Imported once the configuration is known to be sound: importing takes seconds.
    from megatron_eso.training.cpu_backend import install_cpu_backend

    install_cpu_backend()
    from megatron_eso.training.guards.stop import StopRequests

    run = open_run(config)
    with ExitStack() as stack:
        if is_first_rank():
            stack.enter_context(run.locked())
        stop = StopRequests(run, 60 * config.checkpoint.end_margin_minutes)
        stack.enter_context(stop)
        try:
            if is_first_rank():
                convert_initial_weights(config.checkpoint.init_from, run)
            trainer = build_trainer(config, train_data, validation_data, run, stop, stack)
        except BaseException as error:
            before = run.read_status()
            record_failure(run, 0 if before is None else before.step, error)
            raise
        train_to_the_end(trainer)


def open_run(config: Config) -> "RunDirectory":
    """The run directory, which knows what every status says of this job."""
    from megatron_eso.runs.run_directory import RunDirectory
    from megatron_eso.runs.status import JobFacts

    run = RunDirectory(Path(config.run.directory))
    before = run.read_status()
    restarts = 0 if before is None or before.restarts is None else before.restarts + 1
    return RunDirectory(run.path, JobFacts(restarts=restarts, num_steps=config.train.num_steps))


def build_trainer(
    config: Config,
    train_data: TrainingData,
    validation_data: ValidationData | None,
    run: "RunDirectory",
    stop: "StopRequests",
    stack: ExitStack,
) -> "Trainer":
    """Everything that the loop works with, to be taken down with `stack`; collective."""
    from megatron_eso.training.batches import TrainingBatches, ValidationBatches
    from megatron_eso.training.checkpointing.checkpoints import Checkpoints
    from megatron_eso.training.checkpointing.restore import restore
    from megatron_eso.training.guards.batch_check import check_data
    from megatron_eso.training.guards.dry_batch import try_largest_batch
    from megatron_eso.training.guards.stragglers import WorkTimer
    from megatron_eso.training.loop import Trainer
    from megatron_eso.training.parallel import model_parallel_groups, process_group
    from megatron_eso.training.prefetch import StepPrefetcher
    from megatron_eso.training.train_state import build_train_state

    log = log_to_file(run.logs)
    if config.watchdog.start_seconds > 0:
        # Ranks may wait for one that is gone; the watchdog takes this timer over.
        faulthandler.dump_traceback_later(config.watchdog.start_seconds, exit=True)
    stack.enter_context(process_group())
    groups = stack.enter_context(model_parallel_groups(config.parallel))
    watchdog = stack.enter_context(start_watchdog(config.watchdog, log))
    vocabulary = config.data.vocabulary
    objective = build_objective(
        config.objective, seed=config.run.seed, mask_token_id=vocabulary.mask_token_id
    )
    with watchdog.phase("start"):
        batches = TrainingBatches(config, objective, train_data, groups.dp.size())
        check_data(batches.state)
        hosts = gather_hosts()
        state = build_train_state(config, groups)
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint, batches)
        parts = describe_parts(config, state.parameters[0].inner)
        logger.info("%s", parts)
        initial = run.initial if run.initial.exists() else None
        restore(state, config, checkpoints, init_from=initial)
        try_largest_batch(config, state, batches, groups)
    logger.info("samples: %s", train_data.describe())
    facts = dataclasses.replace(run.facts, num_ranks=len(hosts), hosts=sorted(set(hosts)))
    run = dataclasses.replace(run, facts=facts)
    metrics = None
    if is_first_rank():
        run.write_config(config, train_data.tokenizer_directory)
        metrics = stack.enter_context(open_metrics(config, run, state.counters))
        layout = f"{parts}\n{format_ranks(hosts)}"
        metrics.log_texts(state.counters, {"config": config_to_toml(config), "layout": layout})
    prefetcher = StepPrefetcher(batches, groups.dp.rank(), config.data.prefetch_steps)
    validation = None
    if validation_data is not None:
        validation = ValidationBatches(config, objective, validation_data)
    return Trainer(
        config=config,
        run=run,
        groups=groups,
        state=state,
        objective=objective,
        batches=batches,
        prefetcher=stack.enter_context(prefetcher),
        validation=validation,
        checkpoints=checkpoints,
        metrics=metrics,
        watchdog=watchdog,
        stop=stop,
        timer=WorkTimer(state.chunks),
        hosts=hosts,
        flops_per_token=training_flops_per_token(
            config.model, vocabulary.size, objective, config.data.sequence_length
        ),
        dropout_seed=config.run.seed if config.model.hidden_dropout > 0 else None,
    )


def convert_initial_weights(init_from: str | None, run: "RunDirectory") -> None:
    """Have a run directory with the weights of `init_from`, if that is a sampler directory.

    Made anew until the run has a checkpoint of its own, then removed. On rank 0.
    """
    from checkpoints_conversion.conversions import convert_to_megatron
    from checkpoints_conversion.sampler_directory import is_sampler_directory
    from megatron_eso.runs.steps import newest

    shutil.rmtree(run.initial, ignore_errors=True)
    is_new = newest(run.checkpoints) is None
    if is_new and init_from is not None and is_sampler_directory(Path(init_from)):
        convert_to_megatron(Path(init_from), run.initial)


def train_to_the_end(trainer: "Trainer") -> None:
    """Train, and say in `status.json` how it ended; collective over the world."""
    run = trainer.run
    try:
        stopped = trainer.train()
    except BaseException as error:
        record_failure(run, trainer.state.counters.step, error)
        # What was saved before is whole, and the other ranks' threads wait for this one's.
        with trainer.watchdog.phase("checkpoint", "of before"):
            trainer.checkpoints.wait()
        raise
    if is_first_rank():
        outcome: State = "interrupted" if stopped else "finished"
        counters = trainer.state.counters
        reason = stopped or "train.num_steps reached"
        logger.info("%s at step %d: %s", outcome, counters.step, reason)
        run.write_status(outcome, counters.step, reason=reason)


def record_failure(run: "RunDirectory", step: int, error: BaseException) -> None:
    """Say in `status.json` why the run fails, on rank 0; in the log what another rank has met."""
    if is_first_rank():
        run.write_status("failed", step, reason=repr(error))
    elif isinstance(error, DataError):
        # Rank 0 cannot tell what this rank alone has met, such as a damaged shard.
        logger.error("%s", error)


def is_first_rank() -> bool:
    """Whether this is rank 0, before there is a process group as well."""
    return os.environ.get("RANK", "0") == "0"


def open_metrics(config: Config, run: "RunDirectory", counters: "Counters") -> "MetricsLog":
    """The records of the run, on rank 0."""
    from megatron_eso.training.records.metrics import MetricsLog
    from megatron_eso.training.records.wandb_log import WandbLog

    wandb = None
    if config.run.wandb_project is not None:
        wandb = WandbLog(run.path, config.run.wandb_project, config_to_dict(config))
    return MetricsLog(run, counters, wandb)


def log_to_file(folder: Path) -> Path:
    """Keep this rank's log in a file of its own, those of earlier jobs before it."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", "0"))
    path = folder / f"rank_{rank:05d}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(f"[rank {rank}] {LOG_FORMAT}", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)
    return path


def start_watchdog(config: WatchdogConfig, log: Path) -> "Watchdog":
    """This rank's watchdog; the process group is there."""
    from torch.distributed import distributed_c10d

    from megatron_eso.training.guards.watchdog import Watchdog

    deadlines = {
        "start": config.start_seconds,
        # It takes memory, compiles kernels and reads what no thread has read ahead.
        "first step": longer(config.start_seconds, config.step_seconds),
        "train step": config.step_seconds,
        "validation": config.validation_seconds,
        "checkpoint": config.checkpoint_seconds,
    }
    # Silence must be noticed within the shortest deadline.
    shortest = min(filter(None, deadlines.values()), default=math.inf)
    return Watchdog(
        log,
        deadlines,
        interval_seconds=min(HEARTBEAT_SECONDS, shortest / 4),
        store=distributed_c10d._get_default_store(),
        rank=distributed_c10d.get_rank(),
        num_ranks=distributed_c10d.get_world_size(),
    )


def longer(*deadlines: float) -> float:
    """The longest of the deadlines, of which 0 is none."""
    return 0.0 if 0.0 in deadlines else max(deadlines)


def gather_hosts() -> list[str]:
    """The host of every rank; collective over the world."""
    from torch import distributed as dist

    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


def format_ranks(hosts: list[str]) -> str:
    """The ranks of each host, a line each."""
    return "\n".join(
        f"{host}: ranks {', '.join(str(rank) for rank, at in enumerate(hosts) if at == host)}"
        for host in dict.fromkeys(hosts)
    )


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
