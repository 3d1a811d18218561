"""The text of `--dry-run`: the resolved configuration and the resources of its run.

The text is a TOML file, the estimates its comments.
"""

from megatron_eso.config.combinations import check_layout
from megatron_eso.config.loading import LoadedConfig, config_to_toml
from megatron_eso.config.sections import Config, Vocabulary
from megatron_eso.errors import ConfigError
from megatron_eso.estimates.fit import find_cure, measure_fit
from megatron_eso.estimates.flops import (
    BACKWARD_AND_FORWARD,
    forward_flops,
    training_flops_per_token,
)
from megatron_eso.estimates.gpus import DEFAULT_MFU, Gpu
from megatron_eso.estimates.memory import estimate_checkpoint, estimate_memory
from megatron_eso.estimates.parameters import count_parameters
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.objective import Objective
from megatron_eso.quantities import GIB


def format_dry_run(
    loaded: LoadedConfig,
    world_size: int | None = None,
    gpu: Gpu | None = None,
    mfu: float = DEFAULT_MFU,
) -> str:
    """Return the resolved configuration, layout, parameters, FLOPs, memory and checkpoint size.

    Args:
        loaded: The configuration. Without `data.vocab_size` the estimates have no embedding and no
            head, and a line says so.
        world_size: Number of ranks; None: the fewest that the layout needs.
        gpu: The GPU of every rank; None: it is not known, so nothing says whether the run fits.
        mfu: Model FLOPs utilization that the hours are counted with.

    Returns:
        A TOML file with the estimates as comments.

    Raises:
        ConfigError: The number of ranks does not fit the layout or the batch sizes.
    """
    config = loaded.config
    if world_size is None:
        world_size = config.parallel.model_parallel_size
    data_parallel_size = check_layout(config, world_size, loaded.origins)
    vocab_size = config.data.vocab_size or 0
    objective = build_planned_objective(config)
    # The estimates, a comment each, under the configuration.
    lines = [f"warning: {warning}" for warning in loaded.warnings]
    lines += describe_layout(config, objective, world_size, data_parallel_size)
    if not vocab_size:
        lines.append(
            "vocabulary: not known without the shards, so embedding and head are left out below; "
            "build the shards or pass data.vocab_size=N"
        )
    lines += describe_model(config, objective, vocab_size)
    lines += describe_memory(config, objective, vocab_size, data_parallel_size)
    if gpu is not None and vocab_size:
        lines += describe_fit(config, objective, world_size, gpu)
        lines += describe_time(config, objective, world_size, gpu, mfu)
    return config_to_toml(config) + "\n" + "".join(f"# {line}\n" for line in lines)


def describe_layout(
    config: Config, objective: Objective, world_size: int, data_parallel_size: int
) -> list[str]:
    """Ranks, stages, batches and the length of the run."""
    parallel, train = config.parallel, config.train
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    counts = [parallel.count_stage_layers(config.model.num_layers, each) for each in range(stages)]
    is_even = len(set(counts)) == 1
    layers = str(counts[0]) if is_even else ", ".join(map(str, counts))
    in_chunks = f" in {chunks} chunks" if chunks else ""
    if chunks and parallel.pipeline_model_parallel_layout is None:
        in_chunks += f" of {counts[0] // chunks}"
    tokens = train.global_batch_size * config.data.sequence_length
    mix = describe_mix(objective, train.micro_batch_size)
    num_micro_batches = train.global_batch_size // train.micro_batch_size // data_parallel_size
    ranks = "rank" if world_size == 1 else "ranks"
    batches = "micro-batch" if num_micro_batches == 1 else "micro-batches"
    return [
        f"layout: {world_size} {ranks} = tensor {parallel.tensor_model_parallel_size} x "
        f"pipeline {stages} x data {data_parallel_size}; {layers} layers per stage{in_chunks}",
        f"step: {train.global_batch_size} samples, {tokens:,} tokens; each rank "
        f"{num_micro_batches} {batches} of {train.micro_batch_size}, {mix}",
        f"run: {train.num_steps:,} steps, {float(tokens * train.num_steps):.4g} tokens",
    ]


def build_planned_objective(config: Config) -> Objective:
    """Build the objective; tokens that are not known without the shards have the number 0."""
    data = config.data
    vocabulary = Vocabulary(
        size=data.vocab_size or 0,
        mask_token_id=data.mask_token_id or 0,
        bos_token_id=data.bos_token_id or 0,
    )
    return build_objective(config.objective, vocabulary, seed=config.run.seed)


def describe_mix(objective: Objective, size: int) -> str:
    """Describe how micro-batches of `size` samples hold the phases."""
    counts = {phase.name: phase.share * size for phase in objective.phases if phase.share}
    if len(counts) == 1:
        return f"all {next(iter(counts))}"
    if not all(count.is_integer() for count in counts.values()):
        return "of one phase each"
    return " and ".join(f"{count:.0f} {name}" for name, count in counts.items()) + " samples each"


def describe_model(config: Config, objective: Objective, vocab_size: int) -> list[str]:
    """Describe parameters and FLOPs."""
    counts = count_parameters(config.model, vocab_size)
    num_tokens = config.data.sequence_length
    by_phase = ", ".join(
        f"{BACKWARD_AND_FORWARD * forward_flops(config.model, vocab_size, rows) / num_tokens:.4g} "
        f"{phase.name}"
        for phase, rows in zip(objective.phases, objective.expect_rows(num_tokens), strict=True)
    )
    per_token = training_flops_per_token(config.model, vocab_size, objective, num_tokens)
    tokens = config.train.num_steps * config.train.global_batch_size * num_tokens
    return [
        f"parameters: {counts.total:,} = embedding {counts.embedding:,} + layers "
        f"{counts.layers:,} + final norm {counts.final_norm:,} + head {counts.head:,}",
        f"FLOPs per token, forward and backward: {per_token:.4g} ({by_phase})",
        f"FLOPs of the run: {per_token * tokens:.4g}",
    ]


def describe_memory(
    config: Config, objective: Objective, vocab_size: int, data_parallel_size: int
) -> list[str]:
    """Describe the memory of the fullest rank, and checkpoints."""
    memory = estimate_memory(config, vocab_size, objective, data_parallel_size)
    checkpoint = estimate_checkpoint(config, vocab_size)
    keep_last = config.checkpoint.keep_last
    return [
        f"memory of the fullest rank, GiB: {memory.total / GIB:.3g} = weights "
        f"{memory.weights / GIB:.3g} + gradients {memory.gradients / GIB:.3g} + optimizer "
        f"{memory.optimizer / GIB:.3g} + EMA {memory.ema / GIB:.3g} + activations "
        f"{memory.activations / GIB:.3g} + head {memory.head / GIB:.3g}, with the largest "
        f"micro-batch",
        f"checkpoint: {checkpoint / GIB:.3g} GiB; {keep_last} are kept, so up to "
        f"{(keep_last + 1) * checkpoint / GIB:.3g} GiB while one is saved",
    ]


def describe_fit(config: Config, objective: Objective, world_size: int, gpu: Gpu) -> list[str]:
    """Describe whether the run fits a GPU."""
    fit = measure_fit(config, objective, world_size, gpu)
    return [f"{'fits' if fit.is_enough else 'does not fit'}: {fit}"]


def check_fit(config: Config, world_size: int | None, gpu: Gpu) -> None:
    """Refuse a run that does not fit a GPU.

    Args:
        config: The configuration.
        world_size: Number of ranks; None: the fewest that the layout needs.
        gpu: The GPU of every rank.

    Raises:
        ConfigError: Names the first cure that makes it fit.
    """
    world_size = world_size or config.parallel.model_parallel_size
    objective = build_planned_objective(config)
    fit = measure_fit(config, objective, world_size, gpu)
    if fit.is_enough or config.data.vocab_size is None:
        return
    cure = find_cure(config, objective, world_size, gpu)
    remedy = f"set {cure}" if cure else "use more pipeline stages, or a GPU with more memory"
    raise ConfigError(f"the run does not fit {gpu.name}: it needs {fit}; {remedy}")


def describe_time(
    config: Config, objective: Objective, world_size: int, gpu: Gpu, mfu: float
) -> list[str]:
    """Describe how long the run takes at a given utilization, validation and saves left out."""
    num_tokens = config.data.sequence_length
    vocab_size = config.data.vocab_size or 0
    per_token = training_flops_per_token(config.model, vocab_size, objective, num_tokens)
    tokens = config.train.num_steps * config.train.global_batch_size * num_tokens
    gpu_hours = per_token * tokens / (mfu * gpu.bf16_flops) / 3600
    return [
        f"time at {mfu:.0%} MFU: {gpu_hours / world_size:,.1f} hours on {world_size} {gpu.name}, "
        f"{gpu_hours:,.0f} GPU hours; pretrain.bench --simulate {gpu.name} estimates the MFU"
    ]
