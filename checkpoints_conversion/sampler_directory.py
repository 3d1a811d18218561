"""Writes a sampler directory: weights, configuration, tokenizer, code for transformers."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_eso.data.tokenizers.tokenizer import Tokenizer, has_tokenizer
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.files import is_wrong_path, new_folder, write_json
from megatron_eso.sampler.network import network_eso_lm
from megatron_eso.sampler.network.directory import INDEX_FILE, WEIGHTS_FILE, choose_version

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000
CUT_ROWS_FILE = "rows_of_no_token.safetensors"
"""Rows of embedding and head of a model from Hugging Face that belong to no token; for its export.
"""
CODE_FILES = (
    "modeling_eso_lm.py",
    "configuration_eso_lm.py",
    "network_eso_lm.py",
    "layers_eso_lm.py",
    "masks_eso_lm.py",
)
OWN_FILES = {"config.json", "generation_config.json", WEIGHTS_FILE, INDEX_FILE, *CODE_FILES}
MODEL_CLASS = "modeling_eso_lm.EsoLMModel"


def write_sampler_directory(
    directory: Path,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    tokenizer: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    cut_rows: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a sampler directory; it appears complete or not at all, and replaces an older one.

    Args:
        directory: The directory to write: a new one, an empty one or a sampler directory.
        description: The network's fields, `objective` with its fields, and `source`.
        tensors: The network's tensors by the sampler's names.
        dtype: Dtype in which the weights are stored.
        tokenizer: A tokenizer's file or directory, or None.
        max_shard_bytes: Size of weights above which they are split, with an index.
        cut_rows: Rows of a vocabulary that the network leaves out and an export appends.

    Raises:
        ConfigError: The directory holds something else, or cannot be written.
        CheckpointError: The tokenizer is missing, or the disk is full.
        DataError: The tokenizer is damaged.
    """
    # The contents of the two JSON files.
    config = {
        "architectures": [MODEL_CLASS.partition(".")[2]],
        "auto_map": {
            "AutoConfig": "configuration_eso_lm.EsoLMConfig",
            "AutoModel": MODEL_CLASS,
            "AutoModelForMaskedLM": MODEL_CLASS,
        },
        "model_type": "eso_lm",
        "format_version": choose_version(description),
        **description,
        "dtype": str(dtype).removeprefix("torch."),
    }
    generation = {**default_schedule(description), "temperature": 1.0, "top_p": 1.0}
    # All files, below another name until they are complete.
    if is_sampler_directory(directory):
        logger.warning("%s: is a sampler directory already, and is replaced", directory)
    with new_directory(directory, replaces=is_sampler_directory) as partial:
        copy_tokenizer(tokenizer, partial, description)
        stored = {name: tensors[name].to(dtype).contiguous() for name in sorted(tensors)}
        write_weights(partial, stored, max_shard_bytes)
        if cut_rows:
            rows = {name: tensor.contiguous() for name, tensor in cut_rows.items()}
            save_file(rows, partial / CUT_ROWS_FILE)
        write_sorted_json(partial / "config.json", config)
        write_sorted_json(partial / "generation_config.json", generation)
        code = Path(network_eso_lm.__file__).parent
        for name in CODE_FILES:
            shutil.copyfile(code / name, partial / name)


def default_schedule(description: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries of `generation_config.json` that state the objective's schedule."""
    objective = description.get("objective", "eso_lm")
    if objective == "eso_lm":
        return {"alpha_0": description["alpha_0"], "steps": description["max_length"]}
    if objective == "mdlm":
        return {"steps": description["max_length"]}
    return {"steps": description["block_size"]} if objective == "bd3_lm" else {}


def is_sampler_directory(directory: Path) -> bool:
    """Return whether the `config.json` of a directory is that of a sampler directory."""
    return find_model_type(directory) == "eso_lm"


def find_model_type(directory: Path) -> str | None:
    """Return `model_type` in the `config.json` of a directory; None where there is none."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def write_sorted_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes."""
    write_json(path, content, indent=2, sort_keys=True)


def write_weights(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / WEIGHTS_FILE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_sorted_json(directory / INDEX_FILE, index)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def list_unknown_files(directory: Path) -> list[Path]:
    """List the files of a directory that do not belong to a sampler directory.

    Raises:
        CheckpointError: The directory does not exist.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not found; give a tokenizer's file or directory")
    names = OWN_FILES if is_sampler_directory(directory) else set()
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.name not in names and path.suffix != ".safetensors"
    )


def copy_tokenizer(tokenizer: Path | None, directory: Path, description: Mapping[str, Any]) -> None:
    """Write a tokenizer's files as transformers reads them; copy those of an unknown kind.

    Args:
        tokenizer: A file, or a directory, which may be a sampler directory.
        directory: The directory to write to.
        description: Has the `vocab_size` and `mask_token_id` of the network.

    Raises:
        CheckpointError: The tokenizer is missing, or one of its files has the name of a file of
            sampler directories.
        DataError: The tokenizer is damaged.
    """
    if tokenizer is None:
        return
    if has_tokenizer(tokenizer):
        loaded = Tokenizer.load(tokenizer)
        ours = loaded.vocab_size, loaded.mask_token_id
        network = description["vocab_size"], description["mask_token_id"]
        if ours != network:
            logger.warning(
                "%s: has %d tokens and the mask token %d, the network %d and %d; check that it is "
                "the network's tokenizer",
                *(tokenizer, *ours, *network),
            )
        loaded.save(directory)
        return
    for path in list_unknown_files(tokenizer):
        if path.name in OWN_FILES:
            raise CheckpointError(
                f"{path}: a tokenizer's file cannot have this name; give a directory of the "
                "tokenizer's files alone"
            )
        shutil.copyfile(path, directory / path.name)


@contextmanager
def new_directory(
    directory: Path, replaces: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield a directory to fill, which takes the name `directory` at the end; an error removes it.

    Args:
        directory: The final path: a new one, an empty directory, or one that `replaces` accepts.
        replaces: Returns whether an existing directory may be replaced; None: none may be.

    Raises:
        ConfigError: The directory must not be replaced, or nothing can be written there.
        CheckpointError: The disk is full or fails.
    """
    try:
        with new_folder(directory.absolute(), replaces=replaces) as partial:
            yield partial
    except FileExistsError:
        raise ConfigError(
            f"{directory}: exists and holds something else; name a new directory"
        ) from None
    except OSError as error:
        kind = ConfigError if is_wrong_path(error) else CheckpointError
        raise kind(f"{directory}: cannot be written ({error.strerror or error})") from None
