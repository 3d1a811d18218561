"""Exports an `ar` sampler directory to a directory of Llama, Qwen2 or Qwen3."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_conversion.conversions import Conversion, count_parameters
from checkpoints_conversion.hugging_face.families import describe_network
from checkpoints_conversion.hugging_face.tensors import common_dtype, rename_tensors
from checkpoints_conversion.hugging_face.vocabulary import (
    EMBEDDING,
    MaskedVocabulary,
    remove_mask_rows,
)
from checkpoints_conversion.sampler_directory import (
    CUT_ROWS_FILE,
    MAX_SHARD_BYTES,
    new_directory,
    write_sorted_json,
    write_weights,
)
from checkpoints_conversion.verify import recorded_weights
from megatron_eso.data.tokenizers.special_tokens import CONFIG_FILE as TOKENIZER_CONFIG
from megatron_eso.data.tokenizers.tokenizer import Tokenizer, has_tokenizer
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.sampler.network.directory import (
    build_network,
    read_description,
    read_network_config,
    read_weights,
)

logger = logging.getLogger(__name__)


def convert_to_hugging_face(sampler_dir: Path, out_dir: Path) -> Conversion:
    """Export a sampler directory; transformers loads the result without code of this package.

    The row of a mask token with the last id is left out, unless it predicts the first token.

    Args:
        sampler_dir: The sampler directory.
        out_dir: The directory to write: a new or an empty one.

    Raises:
        ConfigError: The objective is not `ar`, no Llama, Qwen2 or Qwen3 has this shape, or
            `out_dir` is not empty.
        CheckpointError: `sampler_dir` is not a sampler directory, or is damaged.
        DataError: The tokenizer is damaged.
    """
    # The network, which must have the shape of one of these models.
    description = read_description(sampler_dir)
    network = read_network_config(sampler_dir)
    if description["objective"] != "ar":
        raise ConfigError(
            f"{sampler_dir}: objective is {description['objective']!r}; Llama, Qwen2 and Qwen3 are "
            "autoregressive, give a directory of objective 'ar'"
        )
    config = describe_network(network, sampler_dir)
    tensors = read_weights(sampler_dir)
    dtype = common_dtype(tensors, sampler_dir)
    build_network(network, tensors, dtype, "cpu", source=sampler_dir)
    # The rows of the vocabulary.
    keeps_mask = description["prepend_token"] == "mask"
    if keeps_mask:
        logger.warning(
            "%s: prepend_token is mask, so the mask token's row is kept: put token %d before a "
            "text, as bos_token_id states",
            *(sampler_dir, network.mask_token_id),
        )
    else:
        vocabulary = MaskedVocabulary(size=network.vocab_size, mask_token_id=network.mask_token_id)
        tensors = remove_mask_rows(tensors, _read_cut_rows(sampler_dir), vocabulary.num_kept)
    # The files.
    stored = {"vocab_size": len(tensors[EMBEDDING]), "torch_dtype": str(dtype).rpartition(".")[2]}
    special = _describe_special_tokens(sampler_dir, description)
    suppressed = {"suppress_tokens": [network.mask_token_id]} if keeps_mask else {}
    with new_directory(out_dir) as partial:
        write_weights(partial, rename_tensors(tensors), MAX_SHARD_BYTES)
        write_sorted_json(partial / "config.json", {**config, **stored, **special})
        write_sorted_json(partial / "generation_config.json", {**special, **suppressed})
        _copy_tokenizer(sampler_dir, partial, keeps_mask=keeps_mask)
    return Conversion(
        directory=out_dir,
        step=None,
        weights=recorded_weights(sampler_dir) or "raw",
        num_parameters=count_parameters(tensors),
    )


def _read_cut_rows(sampler_dir: Path) -> dict[str, Tensor]:
    path = sampler_dir / CUT_ROWS_FILE
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); convert again") from None


def _describe_special_tokens(
    sampler_dir: Path, description: Mapping[str, Any]
) -> dict[str, int | None]:
    """Return the special tokens by the names of `config.json`; None for a missing one."""
    roles = ("bos", "eos", "pad")
    loaded = Tokenizer.load(sampler_dir) if has_tokenizer(sampler_dir) else None
    tokens = {f"{role}_token_id": getattr(loaded, f"{role}_token_id", None) for role in roles}
    if description["prepend_token"] == "mask":
        tokens["bos_token_id"] = description["mask_token_id"]
    elif description.get("bos_token_id") is not None:
        tokens["bos_token_id"] = description["bos_token_id"]
    return tokens


def _copy_tokenizer(sampler_dir: Path, directory: Path, *, keeps_mask: bool) -> None:
    """Write the tokenizer; without a mask token where the model has no row for it."""
    if not has_tokenizer(sampler_dir):
        return
    Tokenizer.load(sampler_dir).save(directory)
    path = directory / TOKENIZER_CONFIG
    names = json.loads(path.read_text(encoding="utf-8"))
    if not keeps_mask:
        del names["mask_token"]
    write_sorted_json(path, names)
