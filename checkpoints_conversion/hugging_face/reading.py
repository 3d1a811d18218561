"""Reads a Llama, Qwen2 or Qwen3 directory as a network with a mask token."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.hugging_face.families import describe_hugging_face
from checkpoints_conversion.hugging_face.tensors import REMEDY, common_dtype, read_tensors
from checkpoints_conversion.hugging_face.vocabulary import (
    EMBEDDING,
    HEAD,
    MaskedVocabulary,
    add_mask_rows,
)
from megatron_eso.data.tokenizers.tokenizer import Tokenizer, has_tokenizer
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.sampler.network.directory import WEIGHTS_FILE, build_network
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HuggingFaceModel:
    """A model of transformers as a network with a mask token."""

    config: NetworkConfig
    found: dict[str, Tensor]
    """The tensors of the directory, by the sampler's names."""
    tensors: dict[str, Tensor]
    """Those of the network."""
    cut_rows: dict[str, Tensor]
    """Rows of embedding and head that belong to no token."""
    dtype: torch.dtype
    tokenizer: Path | None
    bos_token_id: int | None


def read_hugging_face(
    source: Path, *, tokenizer: Path | None = None, seed: int = 0
) -> HuggingFaceModel:
    """Read a directory; the weights keep their dtype, and no code of it is executed.

    Args:
        source: A directory with `config.json` and `model.safetensors` or its shards.
        tokenizer: A tokenizer's file or directory; by default that in `source`, if it has one.
        seed: Seed of the mask token's row.

    Raises:
        ConfigError: The model has another architecture or a part that the network lacks, its
            weights are pickled, or its tokenizer has more tokens than it has rows.
        CheckpointError: A file is missing or damaged.
        DataError: The tokenizer is damaged.
    """
    # What config.json and the tokenizer state.
    path = source / "config.json"
    fields = describe_hugging_face(_read_config(path), path)
    num_rows = fields["vocab_size"]
    if tokenizer is None and has_tokenizer(source):
        tokenizer = source
    vocabulary, bos_token_id = _choose_vocabulary(tokenizer, num_rows, path)
    fields |= {"vocab_size": vocabulary.size, "mask_token_id": vocabulary.mask_token_id}
    try:
        config = NetworkConfig.from_dict(fields)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; give another model") from None
    # The tensors, of which those of the vocabulary change.
    found = read_tensors(source, is_tied=config.tie_word_embeddings)
    dtype = common_dtype(found, source)
    for name in (EMBEDDING, HEAD):
        if name in found and tuple(found[name].shape) != (num_rows, config.hidden_size):
            raise CheckpointError(
                f"{source}: tensor {name} has the shape {tuple(found[name].shape)}, but "
                f"config.json states {(num_rows, config.hidden_size)}; {REMEDY}"
            )
    tensors, cut_rows = add_mask_rows(found, vocabulary, seed)
    build_network(config, tensors, dtype, "cpu", source=source)
    return HuggingFaceModel(
        config=config,
        found=found,
        tensors=tensors,
        cut_rows=cut_rows,
        dtype=dtype,
        tokenizer=tokenizer,
        bos_token_id=bos_token_id,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a directory of transformers with "
            f"config.json and {WEIGHTS_FILE}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); {REMEDY}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object; {REMEDY}")
    return config


def _choose_vocabulary(
    tokenizer: Path | None, num_rows: int, path: Path
) -> tuple[MaskedVocabulary, int | None]:
    """Return the tokens of the network, and the token that begins a text."""
    if tokenizer is None:
        logger.warning(
            "%s: has no tokenizer that this package reads; the mask token is %d, after the last "
            "row; see --tokenizer",
            *(path.parent, num_rows),
        )
        return MaskedVocabulary(size=num_rows + 1, mask_token_id=num_rows), None
    loaded = Tokenizer.load(tokenizer)
    vocabulary = MaskedVocabulary(size=loaded.vocab_size, mask_token_id=loaded.mask_token_id)
    num_beyond = num_rows - vocabulary.num_kept
    if num_beyond < 0:
        raise ConfigError(
            f"{path}: vocab_size is {num_rows}, but the tokenizer {tokenizer} has "
            f"{vocabulary.num_kept} tokens; give the model's own by --tokenizer"
        )
    if num_beyond > 0:
        logger.warning(
            "%s: %d of the %d rows are beyond the tokenizer; the network leaves them out",
            *(path.parent, num_beyond, num_rows),
        )
    return vocabulary, loaded.bos_token_id
