"""Builds a training job on this rank, runs it, and records how it ended."""

import dataclasses
import faulthandler
import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.config.loading import config_to_dict, config_to_toml
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.errors import UserError
from megatron_eso.estimates.flops import training_flops_per_token
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.objective import Objective
from megatron_eso.ranks import is_first_rank, own_rank
from megatron_eso.runs.restarts import write_failure
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.status import JobFacts, State
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.restore import restore
from megatron_eso.training.checkpointing.rollbacks import Rollbacks
from megatron_eso.training.checkpointing.saves import Saves
from megatron_eso.training.distributed.failure import describe_error, end_process, report_failure
from megatron_eso.training.distributed.parallel import (
    find_timeout,
    model_parallel_groups,
    process_group,
)
from megatron_eso.training.guards.batch_check import check_data
from megatron_eso.training.guards.dry_batch import try_largest_batch
from megatron_eso.training.guards.stop import StopRequests
from megatron_eso.training.guards.stragglers import WorkTimer
from megatron_eso.training.guards.watchdog import Watchdog, build_watchdog
from megatron_eso.training.loop import Trainer, Validations
from megatron_eso.training.records.log import log_to_file
from megatron_eso.training.records.metrics import MetricsLog
from megatron_eso.training.records.run_records import RunRecords
from megatron_eso.training.records.wandb_log import WandbLog
from megatron_eso.training.steps.batches import TrainingBatches, ValidationBatches
from megatron_eso.training.steps.prefetch import StepPrefetcher
from megatron_eso.training.steps.train_state import TrainState, build_empty_state

logger = logging.getLogger(__name__)


def run_job(
    config: Config,
    train_data: TrainingData,
    validation_data: ValidationData | None,
    prepare_weights: Callable[[str | None, RunDirectory], None],
) -> None:
    """Build everything on this rank and train; collective over the world.

    `status.json` records how it ends. A rank that fails ends its process here. `prepare_device`
    comes first, and without a GPU `install_cpu_backend`.

    Args:
        config: The resolved configuration.
        train_data: The training shards.
        validation_data: The validation shards, if there are any.
        prepare_weights: Converts initial weights that are not a checkpoint. Rank 0 calls it with
            `checkpoint.init_from` and the run directory, while it holds the directory.
    """
    run = locate_run(config)
    with ExitStack() as stack:
        if is_first_rank():
            stack.enter_context(run.locked())
        stop = StopRequests(run, 60 * config.checkpoint.end_margin_minutes)
        stack.enter_context(stop)
        try:
            if is_first_rank():
                prepare_weights(config.checkpoint.init_from, run)
            trainer = build_trainer(config, train_data, validation_data, run, stop, stack)
        except BaseException as error:
            before = run.read_status()
            step = 0 if before is None else before.step
            if dist.is_initialized():
                record_failure(run, step, error)
                end_process(error)
            if is_first_rank():
                run.write_status("failed", step, reason=describe_error(error))
            raise
        try:
            train_to_the_end(trainer)
        except BaseException as error:
            # What the stack holds waits for other ranks when it is closed.
            end_process(error)


def locate_run(config: Config) -> RunDirectory:
    """Return the run directory with the facts of this job, which every status states."""
    run = RunDirectory(Path(config.run.directory))
    before = run.read_status()
    restarts = 0 if before is None or before.restarts is None else before.restarts + 1
    return RunDirectory(run.path, JobFacts(restarts=restarts, num_steps=config.train.num_steps))


def build_trainer(
    config: Config,
    train_data: TrainingData,
    validation_data: ValidationData | None,
    run: RunDirectory,
    stop: StopRequests,
    stack: ExitStack,
) -> Trainer:
    """Build everything that the loop works with; collective over the world.

    Args:
        config: The resolved configuration.
        train_data: The training shards.
        validation_data: The validation shards, if there are any.
        run: The run's directory.
        stop: Requests to stop the run.
        stack: Closes what is built here.
    """
    # Process groups first: everything else needs them.
    groups, watchdog = join_world(config, run, stack)
    with watchdog.deadline("start"):
        batches = build_batches(config, train_data, groups.dp.size())
        check_data(batches.state)
        hosts = gather_hosts()
        dropout_seed = config.run.seed if config.model.hidden_dropout > 0 else None
        state, checkpoints = restore_state(config, batches, run, groups)
        try_largest_batch(
            state, batches, config.train, config.parallel, groups, dropout_seed=dropout_seed
        )
    # What the loop uses: records, validation, batches that are planned ahead.
    logger.info("samples: %s", train_data.describe())
    records = open_records(config, run, batches, state, hosts, watchdog, stack)
    validation = build_validation(config, batches.objective, validation_data)
    prefetcher = StepPrefetcher(batches, groups.dp.rank(), config.data.prefetch_steps)
    train = config.train
    return Trainer(
        train_config=train,
        batch_check_interval=config.data.batch_check_interval,
        dropout_seed=dropout_seed,
        state=state,
        groups=groups,
        batches=batches,
        prefetcher=stack.enter_context(prefetcher),
        records=records,
        validations=Validations(train, config.validation, validation, groups, records, watchdog),
        saves=Saves(checkpoints, config, groups, records, watchdog),
        rollbacks=Rollbacks(checkpoints, train, config.optimizer, watchdog),
        stop=stop,
        watchdog=watchdog,
    )


def join_world(
    config: Config, run: RunDirectory, stack: ExitStack
) -> tuple[ProcessGroupCollection, Watchdog]:
    """Join the other ranks, build the layout's groups and start this rank's watchdog.

    Collective over the world.
    """
    log = run.log_of_rank(own_rank())
    log_to_file(log)
    if config.watchdog.start_seconds > 0:
        # A rank may wait here for one that has died. The watchdog takes over this timer later.
        faulthandler.dump_traceback_later(config.watchdog.start_seconds, exit=True)
    stack.enter_context(process_group(find_timeout(config.watchdog)))
    groups = stack.enter_context(model_parallel_groups(config.parallel))
    return groups, stack.enter_context(build_watchdog(config.watchdog, log))


def build_batches(config: Config, data: TrainingData, data_parallel_size: int) -> TrainingBatches:
    """Build the objective and the planner of its batches; no communication."""
    return TrainingBatches(
        build_objective(config.objective, config.data.vocabulary, seed=config.run.seed),
        data,
        config.train,
        data_parallel_size=data_parallel_size,
        row_multiple=config.parallel.row_multiple,
    )


def build_validation(
    config: Config, objective: Objective, data: ValidationData | None
) -> ValidationBatches | None:
    """Build the planner of the validation batches, if the run has any; no communication."""
    if data is None:
        return None
    multiple = config.parallel.row_multiple
    return ValidationBatches(objective, data, config.validation, row_multiple=multiple)


def restore_state(
    config: Config, batches: TrainingBatches, run: RunDirectory, groups: ProcessGroupCollection
) -> tuple[TrainState, Checkpoints]:
    """Restore the state from which training continues; collective over the world.

    Returns:
        The state, and the checkpoints of the run.
    """
    state = build_empty_state(config, groups)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, batches)
    logger.info("%s", describe_parts(config, state))
    initial = run.initial if run.initial.exists() else None
    restore(state, config, checkpoints, init_from=initial)
    return state, checkpoints


def train_to_the_end(trainer: Trainer) -> None:
    """Train, and record in `status.json` how it ended; collective over the world.

    Raises:
        Exception: This rank has failed, and has reported it.
    """
    run, state = trainer.records.run, trainer.state
    try:
        stopped = trainer.train()
    except BaseException as error:
        trainer.records.status_writer.wait()
        record_failure(run, state.counters.step, error)
        # A save in the background is of an earlier step and sound; all ranks must finish it.
        with trainer.watchdog.deadline("checkpoint", "begun before the failure"):
            trainer.saves.checkpoints.wait()
            trainer.records.flush()
        raise
    trainer.records.status_writer.wait()
    if is_first_rank():
        outcome: State = "interrupted" if stopped else "finished"
        step = state.counters.step
        reason = stopped or "train.num_steps reached"
        logger.info("%s at step %d: %s", outcome, step, reason)
        run.write_status(outcome, step, reason=reason)


def record_failure(run: RunDirectory, step: int, error: BaseException) -> None:
    """Report why this rank fails: on stderr, in its log, in `status.json` and `failure.json`."""
    failure = report_failure(error)
    with suppress(OSError):  # the folder cannot be written to
        with run.log_of_rank(own_rank()).open("a") as log:
            log.write(failure.text)
        if failure.is_first and isinstance(error, UserError):
            write_failure(run.failure, error)
    # Rank 0 repeats the first failure, whose status it may have replaced since.
    if failure.is_first or is_first_rank():
        run.write_status("failed", step, reason=failure.first_line)


def open_records(
    config: Config,
    run: RunDirectory,
    batches: TrainingBatches,
    state: TrainState,
    hosts: list[str],
    watchdog: Watchdog,
    stack: ExitStack,
) -> RunRecords:
    """Open the records of the run, which continue from `state`; rank 0 writes the configuration."""
    facts = dataclasses.replace(run.facts, num_ranks=len(hosts), hosts=sorted(set(hosts)))
    run = dataclasses.replace(run, facts=facts)
    metrics = None
    if is_first_rank():
        run.write_config(config, batches.data.tokenizer_directory)
        metrics = stack.enter_context(open_metrics(config, run, state))
        layout = f"{describe_parts(config, state)}\n{format_ranks(hosts)}"
        metrics.log_texts(state.counters, {"config": config_to_toml(config), "layout": layout})
    return RunRecords(
        run=run,
        metrics=metrics,
        train=config.train,
        data=batches.data,
        timer=WorkTimer(state.chunks),
        hosts=hosts,
        flops_per_token=training_flops_per_token(
            config.model,
            config.data.vocabulary.size,
            batches.objective,
            config.data.sequence_length,
        ),
        watchdog=watchdog,
    )


def open_metrics(config: Config, run: RunDirectory, state: TrainState) -> MetricsLog:
    """Open the curves of the run; on rank 0."""
    wandb = None
    if config.run.wandb_project is not None:
        wandb = WandbLog(run.path, config.run.wandb_project, config_to_dict(config))
    return MetricsLog(run, state.counters, wandb)


def gather_hosts() -> list[str]:
    """Return the host of every rank; collective over the world."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


def format_ranks(hosts: list[str]) -> str:
    """Format the ranks of each host, a line per host."""
    return "\n".join(
        f"{host}: ranks {', '.join(str(rank) for rank, at in enumerate(hosts) if at == host)}"
        for host in dict.fromkeys(hosts)
    )


def describe_parts(config: Config, state: TrainState) -> str:
    """Describe layout, precision and implementations in a line."""
    parallel, adam = config.parallel, state.parameters[0].inner
    return (
        f"TP={parallel.tensor_model_parallel_size} PP={parallel.pipeline_model_parallel_size} "
        f"world size {dist.get_world_size()} | {config.train.precision} | "
        f"attention and norms of torch | {type(adam).__name__} of "
        f"{type(adam).__module__.split('.')[0]}"
    )
