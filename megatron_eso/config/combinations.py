"""The rules for combinations of keys; nothing is started before these checks pass.

Each check refuses with a ConfigError that names where the value was set, the key, the value and
what to write instead. The type and the range of a single key are in its section.
"""

import dataclasses
import json
import re
from pathlib import Path

from megatron_eso.config.divisibility import check_dealing, even_layout, nearest_divisors, round_up
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.objective_rules import check_objective_keys, list_objective_warnings
from megatron_eso.config.origins import Origins, TracedConfig
from megatron_eso.config.sections import KEYS, MAX_TOKENS, Config
from megatron_eso.config.values import check_ranges
from megatron_eso.errors import ConfigError

VOCABULARY_KEYS = ("data.vocab_size", "data.mask_token_id", "data.bos_token_id")
"""The keys whose values come from the data where nobody sets them."""
PIPELINE_LAYOUT = re.compile(r"E[t|]*L")


def check_config(config: Config, origins: Origins | None = None) -> list[str]:
    """Refuse combinations that are impossible for any number of ranks.

    Args:
        config: The configuration to check.
        origins: Where its keys were set.

    Returns:
        Warnings, a line each.

    Raises:
        ConfigError: Names origin, key, value and remedy.
    """
    traced = TracedConfig(config=config, origins=origins or {})
    check_ranges(traced)
    check_objective_keys(traced)
    check_model(traced)
    check_corpora(traced)
    check_optimizer(traced)
    check_parallel(traced)
    check_interleaving(traced)
    check_pipeline(traced)
    check_periods(traced)
    check_micro_batches(traced)
    check_batch_sizes(traced, data_parallel_size=1)
    return list_objective_warnings(traced)


def check_layout(config: Config, world_size: int, origins: Origins | None = None) -> int:
    """Refuse a number of ranks that the layout or the batch sizes do not divide into.

    Args:
        config: A configuration that passed `check_config`.
        world_size: Number of ranks.
        origins: Where its keys were set.

    Returns:
        The data-parallel size.

    Raises:
        ConfigError: Names origin, key, value and remedy.
    """
    parallel = config.parallel
    if world_size < 1 or world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"world size {world_size} is not a multiple of "
            f"parallel.tensor_model_parallel_size = {parallel.tensor_model_parallel_size} times "
            f"parallel.pipeline_model_parallel_size = {parallel.pipeline_model_parallel_size}: "
            f"start {round_up(max(world_size, 1), parallel.model_parallel_size)} ranks"
        )
    data_parallel_size = world_size // parallel.model_parallel_size
    check_batch_sizes(TracedConfig(config=config, origins=origins or {}), data_parallel_size)
    return data_parallel_size


def with_vocabulary(
    config: Config,
    *,
    vocab_size: int,
    mask_token_id: int,
    bos_token_id: int | None = None,
    source: str,
    origins: Origins | None = None,
) -> Config:
    """Fill in the vocabulary of the data.

    Args:
        config: The configuration; where it states a vocabulary, this must be the data's.
        vocab_size: Tokens of the data's tokenizer, the mask token included.
        mask_token_id: The mask token of that tokenizer.
        bos_token_id: Its BOS token; None: it has none.
        source: Name of the data in errors.
        origins: Where the configuration's keys were set.

    Returns:
        The configuration with `data.vocab_size`, `data.mask_token_id` and `data.bos_token_id`.

    Raises:
        ConfigError: The configuration states another vocabulary.
    """
    traced = TracedConfig(config=config, origins=origins or {})
    found = (vocab_size, mask_token_id, bos_token_id)
    for key, value in zip(VOCABULARY_KEYS, found, strict=True):
        traced.require(
            value is None or config.get(key) in (None, value),
            key,
            f"{source} has {value}; leave the key out, or name other data",
        )
    if not 0 <= mask_token_id < vocab_size:
        raise ConfigError(
            f"{source}: mask token {mask_token_id} is outside the vocabulary of {vocab_size}: "
            f"build the shards with a tokenizer that has a mask token"
        )
    data = dataclasses.replace(
        config.data,
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        bos_token_id=bos_token_id if bos_token_id is not None else config.data.bos_token_id,
    )
    return dataclasses.replace(config, data=data)


def check_model(traced: TracedConfig) -> None:
    """Refuse a transformer whose sizes do not divide, or that cannot be trained."""
    model = traced.config.model
    hidden, heads = model.hidden_size, model.num_attention_heads
    # The heads.
    traced.require(
        model.kv_channels is not None,
        "model.num_attention_heads",
        f"must divide model.hidden_size = {hidden}; use {nearest_divisors(hidden, heads)}, "
        "or set model.kv_channels",
    )
    traced.require(
        model.kv_channels % 2 == 0,
        "model.num_attention_heads" if model.query_size == hidden else "model.kv_channels",
        f"gives heads of {model.kv_channels} channels; rotary embedding needs an even number",
    )
    traced.require(
        heads % model.num_query_groups == 0,
        "model.num_query_groups",
        f"must divide model.num_attention_heads = {heads}; "
        f"use {nearest_divisors(heads, model.num_query_groups)}",
    )
    # The head and the biases.
    traced.require(
        not (model.zero_init_head and model.share_embeddings_and_output_weights),
        "model.zero_init_head",
        "a tied head is the embedding, which must not start at zero; "
        "set model.share_embeddings_and_output_weights = false",
    )
    traced.require(
        not (model.add_qkv_bias and model.add_bias_linear),
        "model.add_qkv_bias",
        "model.add_bias_linear = true has these biases and more; set one of the two to false",
    )
    check_rope_scaling(traced)


def check_rope_scaling(traced: TracedConfig) -> None:
    """Refuse factors that leave no frequencies between them, or that nothing reads."""
    model = traced.config.model
    traced.require(
        model.rope_low_freq_factor < model.rope_high_freq_factor,
        "model.rope_low_freq_factor",
        f"must be below model.rope_high_freq_factor = {model.rope_high_freq_factor}",
    )
    for path, key in KEYS.items():
        is_read = model.rope_scaling or not path.startswith("model.rope_")
        traced.require(
            is_read or traced.config.get(path) == key.default,
            path,
            "needs model.rope_scaling = true; set it, or leave this key out",
        )


def check_corpora(traced: TracedConfig) -> None:
    """Refuse lists of corpora and weights that do not fit, and samples without text."""
    # The corpora: at least one, each of them once.
    data, key = traced.config.data, "data.train"
    corpora, weights = data.train_corpora, data.train_weights
    traced.require(len(corpora) > 0, key, "name at least one directory of shards")
    for corpus in corpora:
        traced.require(
            not corpus.startswith("["),
            key,
            'is not a list in TOML; quote it for the shell, such as \'data.train=["a", "b"]\'',
        )
    traced.require(len(set(corpora)) == len(corpora), key, "names a corpus twice; name it once")
    # The weights: one for each corpus, and one above 0.
    if weights is not None:
        key = "data.train_weights"
        traced.require(
            not isinstance(data.train, str), key, "is for a list of corpora in data.train"
        )
        traced.require(
            len(weights) == len(corpora),
            key,
            f"needs a weight for each of the {len(corpora)} corpora of data.train",
        )
        traced.require(
            min(weights) >= 0 and max(weights) > 0,
            key,
            "weights must be 0 or greater, and one of them greater; 0 draws no sample",
        )
    traced.require(
        data.framing == "none" or data.sequence_length > 2,
        "data.framing",
        f"leaves no text in data.sequence_length = {data.sequence_length}; use at least 3",
    )


def check_optimizer(traced: TracedConfig) -> None:
    """Refuse a schedule that is longer than the run or contradicts itself."""
    optimizer, num_steps = traced.config.optimizer, traced.config.train.num_steps
    traced.require(
        optimizer.min_learning_rate <= optimizer.learning_rate,
        "optimizer.min_learning_rate",
        f"must not exceed optimizer.learning_rate = {json.dumps(optimizer.learning_rate)}",
    )
    warmup, decay = optimizer.lr_warmup_steps, optimizer.lr_wsd_decay_steps
    if optimizer.lr_decay_style == "WSD":
        traced.require(
            decay > 0,
            "optimizer.lr_wsd_decay_steps",
            'optimizer.lr_decay_style = "WSD" needs the number of steps of its decay',
        )
    else:
        style = json.dumps(optimizer.lr_decay_style)
        remedy = f'optimizer.lr_decay_style = {style} has no such decay; use "WSD" or 0'
        traced.require(decay == 0, "optimizer.lr_wsd_decay_steps", remedy)
    steps = warmup + max(decay, 1)
    traced.require(
        steps <= num_steps,
        "train.num_steps",
        f"leaves no step after optimizer.lr_warmup_steps = {warmup} and "
        f"optimizer.lr_wsd_decay_steps = {decay}; use at least {steps} steps or fewer of those",
    )


def check_parallel(traced: TracedConfig) -> None:
    """Refuse tensor parallelism that does not divide the model, and overlap that lacks a key."""
    # Tensor parallelism splits heads, groups, the MLP and the vocabulary evenly.
    model, parallel = traced.config.model, traced.config.parallel
    size = parallel.tensor_model_parallel_size
    for name in (
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "make_vocab_size_divisible_by",
    ):
        value = getattr(model, name)
        traced.require(
            value % size == 0,
            "parallel.tensor_model_parallel_size",
            f"must divide model.{name} = {value}; use {nearest_divisors(value, size)}"
            f"{name_variant(traced.find_origin(f'model.{name}'))}",
        )
    # Some keys need others.
    traced.require(
        size > 1 or not parallel.sequence_parallel,
        "parallel.sequence_parallel",
        "needs parallel.tensor_model_parallel_size of 2 or more",
    )
    traced.require(
        not parallel.overlap_param_gather
        or (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce),
        "parallel.overlap_param_gather",
        "needs parallel.use_distributed_optimizer = true and parallel.overlap_grad_reduce = true",
    )


def name_variant(origin: str) -> str:
    """Suggest the shipped layer whose sizes divide for this shipped model; empty without one."""
    variant = SHIPPED_CONFIGS / f"{Path(origin).stem}_tp.toml"
    return f", or add the layer {variant.name} after {origin}" if variant.is_file() else ""


def check_interleaving(traced: TracedConfig) -> None:
    """Refuse exchanges between stages with which an interleaved pipeline has wrong gradients."""
    parallel = traced.config.parallel
    if parallel.virtual_pipeline_model_parallel_size is None:
        traced.require(
            not parallel.overlap_p2p_comm,
            "parallel.overlap_p2p_comm",
            "is for an interleaved pipeline; set it to false, or set "
            "parallel.virtual_pipeline_model_parallel_size",
        )
    else:
        key = "parallel.virtual_pipeline_model_parallel_size"
        traced.require(
            parallel.pipeline_model_parallel_size > 1,
            key,
            "needs parallel.pipeline_model_parallel_size of 2 or more",
        )
        traced.require(
            parallel.overlap_p2p_comm and not parallel.batch_p2p_comm,
            key,
            "an interleaved pipeline needs parallel.overlap_p2p_comm = true and "
            "parallel.batch_p2p_comm = false",
        )


def check_pipeline(traced: TracedConfig) -> None:
    """Refuse a number of layers that the parts of the pipeline do not divide."""
    parallel, num_layers = traced.config.parallel, traced.config.model.num_layers
    parts = parallel.num_pipeline_parts
    layout = parallel.pipeline_model_parallel_layout
    even = even_layout(num_layers, parts)
    if layout is not None:
        traced.require(
            PIPELINE_LAYOUT.fullmatch(layout) is not None
            and layout.count("|") == parts - 1
            and layout.count("t") == num_layers,
            "parallel.pipeline_model_parallel_layout",
            f"must describe {parts} parts and {num_layers} layers"
            + (f", such as {json.dumps(even)}" if even else ""),
        )
        return
    traced.require(
        num_layers % parts == 0,
        "model.num_layers",
        f"must be a multiple of {parts}, the pipeline's stages times chunks; "
        f"use {round_up(num_layers, parts)}"
        + (f", or parallel.pipeline_model_parallel_layout = {json.dumps(even)}" if even else ""),
    )


def check_periods(traced: TracedConfig) -> None:
    """Refuse validation without data."""
    if traced.config.data.validation is None:
        for key in ("validation.interval", "validation.num_samples"):
            traced.require(traced.config.get(key) == 0, key, "needs data.validation")


def check_micro_batches(traced: TracedConfig) -> None:
    """Refuse micro-batches of more tokens than any GPU holds."""
    length = traced.config.data.sequence_length
    for key in ("train.micro_batch_size", "validation.micro_batch_size"):
        traced.require(
            traced.config.get(key) * length <= MAX_TOKENS,
            key,
            f"gives more than {MAX_TOKENS} tokens with data.sequence_length = {length}; use at "
            f"most {MAX_TOKENS // length}",
        )


def check_batch_sizes(traced: TracedConfig, data_parallel_size: int) -> None:
    """Refuse batch sizes that the layout does not divide."""
    train, parallel = traced.config.train, traced.config.parallel
    check_dealing(
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_parallel_size=data_parallel_size,
        batch_split=traced.config.objective.batch_split,
        origin=traced.find_origin("train.global_batch_size"),
    )
    if parallel.virtual_pipeline_model_parallel_size is None:
        return
    stages = parallel.pipeline_model_parallel_size
    unit = train.micro_batch_size * data_parallel_size
    traced.require(
        train.global_batch_size // unit % stages == 0,
        "train.global_batch_size",
        f"gives {train.global_batch_size // unit} micro-batches; an interleaved pipeline needs "
        f"a multiple of its {stages} stages; use a multiple of {unit * stages}",
    )
