"""What values of a configuration may stand together; nothing is started before these checks pass.

Each check refuses with a ConfigError that names where the value was set, the key, the value and
what to write instead.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NoReturn

from megatron_eso.config.sections import Config, round_up
from megatron_eso.errors import ConfigError

Origins = Mapping[str, str]
"""Where a key was set: a file or the command line; a key that is missing has its default."""

DEFAULT_ORIGIN = "default"

MAX_DIVISOR = 100_000
"""Larger divisors are not looked for."""

AVAILABLE = {"objective.name": ("eso_lm",), "objective.variant": ("b",)}
PLANNED = {"objective.name": ("mdlm", "ar", "bd3_lm"), "objective.variant": ("a",)}

POSITIVE = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "model.norm_epsilon",
    "model.rotary_base",
    "model.init_method_std",
    "model.make_vocab_size_divisible_by",
    "data.sequence_length",
    "data.vocab_size",
    "data.phase",
    "data.cache_gib",
    "train.num_steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.log_interval",
    "validation.micro_batch_size",
    "optimizer.learning_rate",
    "optimizer.adam_eps",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "checkpoint.keep_last",
)
NOT_NEGATIVE = (
    "run.seed",
    "data.mask_token_id",
    "data.prefetch_steps",
    "data.batch_check_interval",
    "validation.interval",
    "validation.num_samples",
    "optimizer.min_learning_rate",
    "optimizer.lr_warmup_steps",
    "optimizer.lr_wsd_decay_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "train.spike_deviations",
    "train.skip_deviations",
    "train.max_skipped_in_row",
    "train.max_rollbacks",
    "watchdog.start_seconds",
    "watchdog.step_seconds",
    "watchdog.validation_seconds",
    "watchdog.checkpoint_seconds",
    "checkpoint.end_margin_minutes",
    "checkpoint.interval",
    "checkpoint.interval_minutes",
    "checkpoint.keep_every",
)
FROM_0_BELOW_1 = (
    "data.ssl_ratio",
    "objective.sampling_eps",
    "model.hidden_dropout",
    "optimizer.adam_beta1",
    "optimizer.adam_beta2",
    "optimizer.ema_decay",
)
MAX_DENOMINATOR = 1_000_000
NUM_SUGGESTIONS = 4
PIPELINE_LAYOUT = re.compile(r"E[t|]*L")
FROM_0_TO_1 = ("objective.alpha_0", "objective.batch_split")


def check_config(config: Config, origins: Origins | None = None) -> list[str]:
    """Refuse impossible combinations, whatever the number of ranks.

    Args:
        config: to be checked.
        origins: where its keys were set.

    Returns:
        Warnings, a line each.

    Raises:
        ConfigError: names origin, key, value and remedy.
    """
    checker = _Checker(config=config, origins=origins or {})
    checker.check_ranges()
    checker.check_objective()
    checker.check_model()
    checker.check_data()
    checker.check_optimizer()
    checker.check_parallel()
    checker.check_pipeline()
    checker.check_periods()
    checker.check_batches(data_parallel_size=1)
    return checker.warn()


def check_layout(config: Config, world_size: int, origins: Origins | None = None) -> int:
    """Refuse a number of ranks that the layout or the batch sizes do not divide into.

    Args:
        config: one that passed `check_config`.
        world_size: number of ranks.
        origins: where its keys were set.

    Returns:
        The data-parallel size.

    Raises:
        ConfigError: names origin, key, value and remedy.
    """
    checker = _Checker(config=config, origins=origins or {})
    parallel = config.parallel
    if world_size < 1 or world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"world size {world_size} is no multiple of "
            f"parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size} times "
            f"parallel.pipeline_model_parallel_size = {parallel.pipeline_model_parallel_size}: "
            f"start {round_up(max(world_size, 1), parallel.model_parallel_size)} ranks"
        )
    data_parallel_size = world_size // parallel.model_parallel_size
    checker.check_batches(data_parallel_size)
    return data_parallel_size


def check_dealing(
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    batch_split: float,
    origin: str = "",
) -> None:
    """Refuse batch sizes that cannot deal both phases evenly to the data-parallel ranks.

    With the split p/q in lowest terms, either q divides the micro-batch, which then always holds
    the same mix, or micro-batches hold one phase each and q divides their number on a rank.

    Raises:
        ConfigError: names sizes that can be dealt.
    """
    for name, value in (
        ("train.global_batch_size", global_batch_size),
        ("train.micro_batch_size", micro_batch_size),
        ("data-parallel size", data_parallel_size),
    ):
        if value < 1:
            raise ConfigError(f"{origin and origin + ': '}{name} = {value}: must be at least 1")
    if not 0 <= batch_split <= 1:
        raise ConfigError(f"objective.batch_split = {batch_split}: must be between 0 and 1")
    denominator = as_share(batch_split).denominator

    def unit_of(size: int) -> int:
        return size * data_parallel_size * (1 if size % denominator == 0 else denominator)

    unit = unit_of(micro_batch_size)
    if global_batch_size % unit == 0:
        return
    below, above = global_batch_size // unit * unit, round_up(global_batch_size, unit)
    sizes = f"{below} or {above}" if below else f"{above}"
    valid = [n for n in range(1, global_batch_size + 1) if global_batch_size % unit_of(n) == 0]
    names = " or ".join(map(str, valid[-NUM_SUGGESTIONS:]))
    raise ConfigError(
        f"{origin and origin + ': '}train.global_batch_size = {global_batch_size} cannot be dealt "
        f"evenly with train.micro_batch_size = {micro_batch_size}, "
        f"data-parallel size {data_parallel_size} and objective.batch_split = {batch_split}: "
        f"take a multiple of {unit} ({sizes})"
        + (f", or train.micro_batch_size = {names}" if valid else "")
    )


def as_share(batch_split: float) -> Fraction:
    """The share that a decimal stands for: 0.3333333 is one third."""
    return Fraction(batch_split).limit_denominator(MAX_DENOMINATOR)


def with_vocabulary(
    config: Config,
    *,
    vocab_size: int,
    mask_token_id: int,
    source: str,
    origins: Origins | None = None,
) -> Config:
    """Fill in the vocabulary of the data.

    Args:
        config: may state the vocabulary, which must then be the data's.
        vocab_size: tokens of the data's tokenizer, the mask token among them.
        mask_token_id: its mask token.
        source: the data, for errors.
        origins: where the configuration's keys were set.

    Returns:
        The configuration with `data.vocab_size` and `data.mask_token_id`.

    Raises:
        ConfigError: the configuration states another vocabulary.
    """
    checker = _Checker(config=config, origins=origins or {})
    found = {"data.vocab_size": vocab_size, "data.mask_token_id": mask_token_id}
    for key, value in found.items():
        checker.require(
            checker.value(key) in (None, value),
            key,
            f"{source} has {value}; leave the key out, or name other data",
        )
    if not 0 <= mask_token_id < vocab_size:
        raise ConfigError(
            f"{source}: mask token {mask_token_id} is outside the vocabulary of {vocab_size}: "
            f"build the shards with a tokenizer that has a mask token"
        )
    data = dataclasses.replace(config.data, vocab_size=vocab_size, mask_token_id=mask_token_id)
    return dataclasses.replace(config, data=data)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Checker:
    """A configuration with the origins of its values."""

    config: Config
    origins: Origins

    def value(self, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(self.config, section), name)

    def refuse(self, key: str, remedy: str) -> NoReturn:
        origin = self.origins.get(key, DEFAULT_ORIGIN)
        raise ConfigError(f"{origin}: {key} = {json.dumps(self.value(key))}: {remedy}")

    def require(self, holds: bool, key: str, remedy: str) -> None:
        if not holds:
            self.refuse(key, remedy)

    def check_ranges(self) -> None:
        for key in POSITIVE:
            value = self.value(key)
            self.require(value is None or value > 0, key, "must be greater than 0")
        for key in NOT_NEGATIVE:
            value = self.value(key)
            self.require(value is None or value >= 0, key, "must be 0 or greater")
        for key in FROM_0_BELOW_1:
            self.require(0 <= self.value(key) < 1, key, "must be at least 0 and below 1")
        for key in FROM_0_TO_1:
            self.require(0 <= self.value(key) <= 1, key, "must be between 0 and 1")

    def check_objective(self) -> None:
        for key, available in AVAILABLE.items():
            value = self.value(key)
            names = ", ".join(available)
            planned = value in PLANNED[key]
            problem = "is not available yet" if planned else "is unknown"
            self.require(value in available, key, f"{problem}; available: {names}")
        alpha_0, split = self.config.objective.alpha_0, self.config.objective.batch_split
        key = "objective.batch_split"
        if alpha_0 in (0, 1):
            phase = "diffusion" if alpha_0 == 1 else "sequential"
            remedy = f"objective.alpha_0 = {json.dumps(alpha_0)} has the {phase} phase only"
            self.require(
                split == alpha_0, key, f"{remedy}; use {json.dumps(alpha_0)} or leave it out"
            )
        else:
            remedy = f"objective.alpha_0 = {json.dumps(alpha_0)} needs both phases; use 0.5"
            self.require(0 < split < 1, key, remedy)

    def check_model(self) -> None:
        model = self.config.model
        hidden, heads = model.hidden_size, model.num_attention_heads
        self.require(
            hidden % heads == 0,
            "model.num_attention_heads",
            f"must divide model.hidden_size = {hidden}; use {nearest_divisors(hidden, heads)}",
        )
        self.require(
            model.head_dim % 2 == 0,
            "model.num_attention_heads",
            f"gives heads of {model.head_dim} channels; rotary embedding needs an even number",
        )
        self.require(
            heads % model.num_query_groups == 0,
            "model.num_query_groups",
            f"must divide model.num_attention_heads = {heads}; "
            f"use {nearest_divisors(heads, model.num_query_groups)}",
        )
        self.require(
            not (model.zero_init_head and model.share_embeddings_and_output_weights),
            "model.zero_init_head",
            "a tied head is the embedding, which must not start at zero; "
            "set model.share_embeddings_and_output_weights = false",
        )

    def check_data(self) -> None:
        data, key = self.config.data, "data.train"
        corpora, weights = data.train_corpora, data.train_weights
        self.require(len(corpora) > 0, key, "name at least one directory of shards")
        for corpus in corpora:
            self.require(
                not corpus.startswith("["),
                key,
                'is no list in TOML; quote it for the shell, such as \'data.train=["a", "b"]\'',
            )
        self.require(len(set(corpora)) == len(corpora), key, "names a corpus twice; name it once")
        if weights is not None:
            key = "data.train_weights"
            self.require(
                not isinstance(data.train, str), key, "is for a list of corpora in data.train"
            )
            self.require(
                len(weights) == len(corpora),
                key,
                f"needs a weight for each of the {len(corpora)} corpora of data.train",
            )
            self.require(
                min(weights) >= 0 and max(weights) > 0,
                key,
                "weights must be 0 or greater, and one of them greater; 0 draws no sample",
            )
        self.require(
            data.framing == "none" or data.sequence_length > 2,
            "data.framing",
            f"leaves no text in data.sequence_length = {data.sequence_length}; use at least 3",
        )

    def check_optimizer(self) -> None:
        optimizer, num_steps = self.config.optimizer, self.config.train.num_steps
        self.require(
            optimizer.min_learning_rate <= optimizer.learning_rate,
            "optimizer.min_learning_rate",
            f"must not exceed optimizer.learning_rate = {json.dumps(optimizer.learning_rate)}",
        )
        warmup, decay = optimizer.lr_warmup_steps, optimizer.lr_wsd_decay_steps
        if optimizer.lr_decay_style == "WSD":
            self.require(
                decay > 0,
                "optimizer.lr_wsd_decay_steps",
                'optimizer.lr_decay_style = "WSD" needs the number of steps of its decay',
            )
        else:
            style = json.dumps(optimizer.lr_decay_style)
            remedy = f'optimizer.lr_decay_style = {style} has no such decay; use "WSD" or 0'
            self.require(decay == 0, "optimizer.lr_wsd_decay_steps", remedy)
        steps = warmup + max(decay, 1)
        self.require(
            steps <= num_steps,
            "train.num_steps",
            f"leaves no step after optimizer.lr_warmup_steps = {warmup} and "
            f"optimizer.lr_wsd_decay_steps = {decay}; use at least {steps} steps or fewer of those",
        )

    def check_parallel(self) -> None:
        model, parallel = self.config.model, self.config.parallel
        size = parallel.tensor_model_parallel_size
        for name in (
            "num_attention_heads",
            "num_query_groups",
            "ffn_hidden_size",
            "make_vocab_size_divisible_by",
        ):
            value = getattr(model, name)
            self.require(
                value % size == 0,
                "parallel.tensor_model_parallel_size",
                f"must divide model.{name} = {value}; use {nearest_divisors(value, size)}",
            )
        self.require(
            size > 1 or not parallel.sequence_parallel,
            "parallel.sequence_parallel",
            "needs parallel.tensor_model_parallel_size of 2 or more",
        )
        self.require(
            not parallel.overlap_param_gather
            or (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce),
            "parallel.overlap_param_gather",
            "needs parallel.use_distributed_optimizer = true and "
            "parallel.overlap_grad_reduce = true",
        )

    def check_pipeline(self) -> None:
        parallel, num_layers = self.config.parallel, self.config.model.num_layers
        stages, chunks = (
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
        )
        if chunks is None:
            self.require(
                not parallel.overlap_p2p_comm,
                "parallel.overlap_p2p_comm",
                "is for an interleaved pipeline; set it to false, or set "
                "parallel.virtual_pipeline_model_parallel_size",
            )
        else:
            key = "parallel.virtual_pipeline_model_parallel_size"
            self.require(chunks > 1, key, "must be 2 or more; leave it out for one chunk per stage")
            remedy = "needs parallel.pipeline_model_parallel_size of 2 or more"
            self.require(stages > 1, key, remedy)
            self.require(
                parallel.overlap_p2p_comm and not parallel.batch_p2p_comm,
                key,
                "an interleaved pipeline needs parallel.overlap_p2p_comm = true and "
                "parallel.batch_p2p_comm = false",
            )
        parts = parallel.num_pipeline_parts
        layout = parallel.pipeline_model_parallel_layout
        if layout is not None:
            self.require(
                PIPELINE_LAYOUT.fullmatch(layout) is not None
                and layout.count("|") == parts - 1
                and layout.count("t") == num_layers,
                "parallel.pipeline_model_parallel_layout",
                f"must describe {parts} parts and {num_layers} layers, such as "
                f"{json.dumps(even_layout(num_layers, parts))}",
            )
            return
        self.require(
            num_layers % parts == 0,
            "model.num_layers",
            f"must be a multiple of {parts}, the pipeline's stages times chunks; "
            f"use {round_up(num_layers, parts)}, or "
            f"parallel.pipeline_model_parallel_layout = "
            f"{json.dumps(even_layout(num_layers, parts))}",
        )

    def check_periods(self) -> None:
        if self.config.data.validation is None:
            for key in ("validation.interval", "validation.num_samples"):
                self.require(self.value(key) == 0, key, "needs data.validation")

    def check_batches(self, data_parallel_size: int) -> None:
        train, parallel = self.config.train, self.config.parallel
        check_dealing(
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_parallel_size=data_parallel_size,
            batch_split=self.config.objective.batch_split,
            origin=self.origins.get("train.global_batch_size", DEFAULT_ORIGIN),
        )
        if parallel.virtual_pipeline_model_parallel_size is None:
            return
        stages = parallel.pipeline_model_parallel_size
        unit = train.micro_batch_size * data_parallel_size
        self.require(
            train.global_batch_size // unit % stages == 0,
            "train.global_batch_size",
            f"gives {train.global_batch_size // unit} micro-batches; an interleaved pipeline needs "
            f"a multiple of its {stages} stages; use a multiple of {unit * stages}",
        )

    def warn(self) -> list[str]:
        objective = self.config.objective
        warnings = []
        if 0 < objective.batch_split < 0.5:
            origin = self.origins.get("objective.batch_split", DEFAULT_ORIGIN)
            warnings.append(
                f"{origin}: objective.batch_split = {objective.batch_split}: training diverged "
                f"below 0.5 in the paper (arXiv 2506.01928, table 4)"
            )
        return warnings


def even_layout(num_layers: int, num_parts: int) -> str:
    """A pipeline layout whose parts differ by one layer at most, the first ones larger."""
    sizes = [num_layers // num_parts + (part < num_layers % num_parts) for part in range(num_parts)]
    return "E" + "|".join("t" * size for size in sizes) + "L"


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` on either side of `wanted`, in words."""
    limit = min(number, MAX_DIVISOR)
    divisors = [divisor for divisor in range(1, limit + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < wanted][-1:]
    above = [divisor for divisor in divisors if divisor > wanted][:1]
    return " or ".join(str(divisor) for divisor in below + above)
