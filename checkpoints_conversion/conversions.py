"""The commands as functions: they take paths and return what was written or found."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from checkpoints_conversion.network_fields import build_run_config
from checkpoints_conversion.official import (
    EMBEDDING,
    OfficialOptions,
    fold_official,
    infer_config,
    read_official,
)
from checkpoints_conversion.official_objective import describe_official
from checkpoints_conversion.run_network import read_network, write_run_directory
from checkpoints_conversion.sampler_directory import write_sampler_directory
from checkpoints_conversion.verify import Comparison, compare, load_any, recorded_weights
from megatron_eso.config.sections import Config
from megatron_eso.data.tokenizers.tokenizer import Tokenizer, has_tokenizer
from megatron_eso.errors import CheckpointError
from megatron_eso.runs.checkpoint import open_checkpoint
from megatron_eso.sampler.network.directory import (
    build_network,
    check_shapes,
    read_description,
    read_network_config,
    read_shapes,
    read_weights,
)

Weights = Literal["ema", "raw"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """Result of a conversion."""

    directory: Path
    step: int | None
    """Step of the source; None where it states none."""
    weights: str
    """`ema` or `raw`."""
    num_parameters: int


def convert_to_sampler(
    run_dir: Path,
    out_dir: Path,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
) -> Conversion:
    """Convert a distributed checkpoint of any layout to a sampler directory.

    Args:
        run_dir: A run directory, or one of its `step_XXXXXXXX` folders.
        out_dir: The directory to write: a new one, an empty one or a sampler directory.
        step: The step of the checkpoint; by default the newest.
        weights: The weights to take; by default EMA where the checkpoint has it.
        dtype: Dtype in which the weights are stored.

    Raises:
        ConfigError: The run has no checkpoint of this step, or `out_dir` holds something else.
        CheckpointError: The run has no checkpoint, the checkpoint is damaged, or the sampler does
            not know its objective.
        DataError: The run's tokenizer is damaged.
    """
    checkpoint = open_checkpoint(run_dir, step)
    config, tensors, description = read_network(checkpoint, weights)
    # Shapes that do not fit are refused.
    build_network(config, tensors, torch.float32, "cpu", source=checkpoint.directory)
    write_sampler_directory(
        out_dir, description, tensors, dtype=dtype, tokenizer=checkpoint.tokenizer
    )
    return Conversion(
        directory=out_dir,
        step=checkpoint.step,
        weights=description["source"]["weights"],
        num_parameters=count_parameters(tensors),
    )


def convert_from_official(
    ckpt: Path,
    out_dir: Path,
    *,
    weights: Weights = "ema",
    tokenizer: Path | None = None,
    mask_token_id: int | None = None,
    options: OfficialOptions | None = None,
) -> Conversion:
    """Convert an official checkpoint to a sampler directory.

    Args:
        ckpt: The file: a Lightning checkpoint, or a bare backbone in `.safetensors`.
        out_dir: The directory to write: a new one, an empty one or a sampler directory.
        weights: The weights to take.
        tokenizer: A tokenizer's file or directory, to be copied.
        mask_token_id: By default that of the tokenizer, or else the last row of the embedding.
        options: What the user states about the checkpoint; this overrides what it states.

    Raises:
        CheckpointError: The file is not a checkpoint of the reference, is damaged, or is of another
            model.
        ConfigError: An option is missing, or does not fit.
        DataError: The tokenizer is damaged.
    """
    options = options or OfficialOptions()
    official = read_official(ckpt, weights, options)
    vocab_size = len(official.tensors[EMBEDDING])
    mask_token_id = choose_mask_token(mask_token_id, tokenizer, vocab_size)
    config = infer_config(official, mask_token_id, options.length)
    if tokenizer is not None and has_tokenizer(tokenizer):
        bos_token_id = Tokenizer.load(tokenizer).bos_token_id
        options = replace(options, bos_token_id=bos_token_id)
    description = describe_official(official, config, options)
    tensors = fold_official(official)
    # Shapes that do not fit are refused.
    build_network(config, tensors, torch.float32, "cpu", source=ckpt)
    write_sampler_directory(out_dir, description, tensors, dtype=torch.float32, tokenizer=tokenizer)
    return Conversion(
        directory=out_dir,
        step=official.step,
        weights=official.weights,
        num_parameters=count_parameters(tensors),
    )


def choose_mask_token(chosen: int | None, tokenizer: Path | None, vocab_size: int) -> int | None:
    """Return the chosen mask token, or else that of the tokenizer if it has `vocab_size` ids."""
    if chosen is None and tokenizer is not None and has_tokenizer(tokenizer):
        loaded = Tokenizer.load(tokenizer)
        return loaded.mask_token_id if loaded.vocab_size == vocab_size else None
    return chosen


def convert_to_megatron(sampler_dir: Path, run_dir: Path) -> Conversion:
    """Convert a sampler directory to a run directory that training starts from.

    Args:
        sampler_dir: A sampler directory.
        run_dir: The directory to write: a new or an empty one.

    Raises:
        ConfigError: `run_dir` is not empty.
        CheckpointError: `sampler_dir` is not a sampler directory, or is damaged.
        DataError: The tokenizer is damaged.
    """
    read_run_config(sampler_dir)  # refuses what a run cannot take
    description = read_description(sampler_dir)
    tensors = {name: tensor.float() for name, tensor in read_weights(sampler_dir).items()}
    write_run_directory(run_dir, description, tensors, sampler_dir)
    return Conversion(
        directory=run_dir,
        step=0,
        weights=recorded_weights(sampler_dir) or "raw",
        num_parameters=count_parameters(tensors),
    )


def read_run_config(sampler_dir: Path) -> Config:
    """Return the configuration of the run that `convert_to_megatron` writes.

    All files are checked, but only the shapes of the weights are read.

    Raises:
        CheckpointError: `sampler_dir` is not a sampler directory, is damaged, or Megatron-Core has
            no such network.
        DataError: The tokenizer is damaged.
    """
    network = read_network_config(sampler_dir)
    check_shapes(network, read_shapes(sampler_dir), source=sampler_dir)
    if has_tokenizer(sampler_dir):
        Tokenizer.load(sampler_dir)
    try:
        return build_run_config(network, read_description(sampler_dir), str(sampler_dir))
    except CheckpointError as error:
        raise CheckpointError(f"{sampler_dir}: {error}") from None


def verify_checkpoints(
    a: Path,
    b: Path,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    mask_token_id: int | None = None,
) -> Comparison:
    """Compare two checkpoints of any kind that `load_any` reads.

    Args:
        a: One side.
        b: The other side.
        step: The step to take from run directories; by default the newest.
        weights: The weights to take; by default raw where one side is a sampler directory of raw
            weights, else EMA where the checkpoint has it.
        mask_token_id: Mask token of official checkpoints; by default the last row of the embedding.

    Raises:
        CheckpointError: A side is not a checkpoint, or is damaged.
    """
    if weights is None and "raw" in (recorded_weights(a), recorded_weights(b)):
        weights = "raw"
    first, second = (
        load_any(path, step=step, weights=weights, mask_token_id=mask_token_id) for path in (a, b)
    )
    return compare(first, second)


def count_parameters(tensors: dict[str, torch.Tensor]) -> int:
    """Return the number of values of all tensors."""
    return sum(tensor.numel() for tensor in tensors.values())
