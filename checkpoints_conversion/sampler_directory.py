"""Writing a sampler directory: weights, configuration, tokenizer, code for transformers."""

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
from megatron_eso.files import is_wrong_place, new_folder, write_json
from megatron_eso.sampler import network_eso_lm
from megatron_eso.sampler.directory import FORMAT_VERSION, INDEX_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000
CODE_FILES = (
    "modeling_eso_lm.py",
    "configuration_eso_lm.py",
    "network_eso_lm.py",
    "layers_eso_lm.py",
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
) -> None:
    """Write a sampler directory; it appears complete or not at all. An older one is replaced.

    Args:
        directory: must not exist, be empty, or be a sampler directory.
        description: the network's fields, `alpha_0`, `variant` and `source`.
        tensors: by the sampler's names.
        dtype: in which the weights are stored.
        tokenizer: a file or directory, or None.
        max_shard_bytes: above it the weights are split, with an index.

    Raises:
        ConfigError: the directory holds something else.
        CheckpointError: the tokenizer is not there.
        DataError: the tokenizer is damaged.
    """
    config = {
        "architectures": [MODEL_CLASS.partition(".")[2]],
        "auto_map": {
            "AutoConfig": "configuration_eso_lm.EsoLMConfig",
            "AutoModel": MODEL_CLASS,
            "AutoModelForMaskedLM": MODEL_CLASS,
        },
        "model_type": "eso_lm",
        "format_version": FORMAT_VERSION,
        **description,
        "dtype": str(dtype).removeprefix("torch."),
    }
    generation = {
        "alpha_0": description["alpha_0"],
        "steps": description["max_length"],
        "temperature": 1.0,
        "top_p": 1.0,
    }
    if is_sampler_directory(directory):
        logger.warning("%s: is a sampler directory already, and is replaced", directory)
    with new_directory(directory, replaces=is_sampler_directory) as partial:
        copy_tokenizer(tokenizer, partial, description)
        stored = {name: tensors[name].to(dtype).contiguous() for name in sorted(tensors)}
        write_weights(partial, stored, max_shard_bytes)
        write_sorted_json(partial / "config.json", config)
        write_sorted_json(partial / "generation_config.json", generation)
        code = Path(network_eso_lm.__file__).parent
        for name in CODE_FILES:
            shutil.copyfile(code / name, partial / name)


def is_sampler_directory(directory: Path) -> bool:
    """Whether its `config.json` is that of an Eso-LM sampler."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "eso_lm"


def write_sorted_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as every conversion does, so that equal weights give equal bytes."""
    write_json(path, content, indent=2, sort_keys=True)


def write_weights(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards and their index where it would be too large."""
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
    """SHA-256 over names, dtypes, shapes and values in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def list_unknown_files(directory: Path) -> list[Path]:
    """The files of a directory that are not those of a sampler directory itself."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not found; give a tokenizer's file or directory")
    names = OWN_FILES if is_sampler_directory(directory) else set()
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.name not in names and path.suffix != ".safetensors"
    )


def copy_tokenizer(tokenizer: Path | None, directory: Path, description: Mapping[str, Any]) -> None:
    """Write the files of a tokenizer that transformers opens too; of an unknown kind, copy all.

    Args:
        tokenizer: a file, or a directory that may hold other things of ours as well.
        directory: to write to.
        description: has the `vocab_size` and `mask_token_id` of the network.

    Raises:
        CheckpointError: there is no such tokenizer, or a file of an unknown one has a name of ours.
        DataError: it is damaged.
    """
    if tokenizer is None:
        return
    if has_tokenizer(tokenizer):
        loaded = Tokenizer.load(tokenizer)
        ours = loaded.vocab_size, loaded.mask_token_id
        network = description["vocab_size"], description["mask_token_id"]
        if ours != network:
            logger.warning(
                "%s: has %d tokens and the mask token %d, the network %d and %d; is it the "
                "network's tokenizer?",
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
    """Yield a directory that takes the name `directory` at the end, or never.

    Args:
        directory: Must not exist, be empty, or satisfy `replaces`.
        replaces: Whether an existing directory may be replaced; by default none.

    Raises:
        ConfigError: The directory exists and must not be replaced, or is a wrong place to write.
        CheckpointError: The disk refuses.
    """
    try:
        with new_folder(directory.absolute(), replaces=replaces) as partial:
            yield partial
    except FileExistsError:
        raise ConfigError(
            f"{directory}: exists and holds something else; name a new directory"
        ) from None
    except OSError as error:
        kind = ConfigError if is_wrong_place(error) else CheckpointError
        raise kind(f"{directory}: cannot be written ({error.strerror or error})") from None
