"""Reads the tensors of a directory of transformers by the sampler's names, and names them back."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.hugging_face.vocabulary import EMBEDDING, HEAD
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.sampler.network.directory import INDEX_FILE, WEIGHTS_FILE, read_weights

PREFIX = "model."
"""Transformers have this before the sampler's name of each tensor but the head's."""
ROTARY = ".rotary_emb.inv_freq"
"""End of names in old directories: frequencies, which are not parameters."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REMEDY = "save it again by save_pretrained of transformers"


def read_tensors(source: Path, *, is_tied: bool) -> dict[str, Tensor]:
    """Read the tensors; a tied head is checked and left out.

    Raises:
        ConfigError: The weights are missing or pickled, or a tied head is not the embedding.
        CheckpointError: A file is missing or damaged, or has no embedding.
    """
    # A pickle is never read.
    if not any((source / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        pickled = sorted(path.name for path in source.glob("*.bin"))
        problem = f"has only {pickled[0]}, a pickle, which is not read" if pickled else "is missing"
        name = source if pickled else source / WEIGHTS_FILE
        raise ConfigError(f"{name}: {problem}; {REMEDY}, which writes {WEIGHTS_FILE} (safetensors)")
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in read_weights(source, remedy=REMEDY).items()
        if not name.endswith(ROTARY)
    }
    # The embedding, which a tied head equals.
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{source}: has no tensor {PREFIX}{EMBEDDING}; {REMEDY}")
    head = tensors.get(HEAD)
    if is_tied and head is not None:
        if not torch.equal(head, tensors[EMBEDDING]):
            raise ConfigError(
                f"{source}: tie_word_embeddings is true, but {HEAD} is not the embedding; set "
                "tie_word_embeddings = false in config.json, or leave this tensor out"
            )
        del tensors[HEAD]
    return tensors


def rename_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors the names of transformers."""
    return {
        name if name == HEAD else PREFIX + name: tensor.contiguous()
        for name, tensor in sorted(tensors.items())
    }


def common_dtype(tensors: Mapping[str, Tensor], source: Path) -> torch.dtype:
    """Return the dtype of all tensors.

    Raises:
        ConfigError: They have several dtypes, or one that the sampler does not read.
    """
    dtypes = sorted({tensor.dtype for tensor in tensors.values()}, key=str)
    if len(dtypes) != 1 or dtypes[0] not in DTYPES:
        raise ConfigError(
            f"{source}: its tensors have the dtypes {', '.join(map(str, dtypes))}; store all in "
            f"one of {', '.join(map(str, DTYPES))}"
        )
    return dtypes[0]
