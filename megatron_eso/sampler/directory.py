"""Reading a sampler directory: `config.json` and `model.safetensors`, or shards with an index."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_eso.errors import CheckpointError

from .layers_eso_lm import NetworkConfig
from .network_eso_lm import EsoNetwork

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_description(directory: str | Path) -> dict[str, Any]:
    """Read and check `config.json`.

    Raises:
        CheckpointError: it is missing or no JSON, or of another kind, version or variant.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found; give a directory that `checkpoints_conversion` wrote"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: no valid JSON ({error}); convert again") from None
    if not isinstance(config, dict) or config.get("model_type") != "eso_lm":
        raise CheckpointError(f"{path}: model_type is not eso_lm; give a sampler directory")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {config.get('format_version')!r} is unknown, this version "
            f"reads {FORMAT_VERSION}; use the release that wrote it"
        )
    if config.get("variant") != "b":
        raise CheckpointError(
            f"{path}: variant {config.get('variant')!r} is unknown, this version samples b"
        )
    return config


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """Read all tensors, on the CPU, in their stored dtype.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    directory = Path(directory)
    index = directory / INDEX_FILE
    files = [WEIGHTS_FILE]
    try:
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        tensors: dict[str, Tensor] = {}
        for name in files:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: {name} is no plain file name; convert again")
            tensors.update(load_file(directory / name))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: {error.filename or error} is missing; convert again"
        ) from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: damaged weights ({error}); convert again") from None
    return tensors


def load_network(directory: str | Path, dtype: torch.dtype, device: str) -> EsoNetwork:
    """Build the network of a sampler directory.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors and configuration do not fit.
    """
    try:
        config = NetworkConfig.from_dict(read_description(directory))
    except ValueError as error:
        raise CheckpointError(
            f"{Path(directory) / 'config.json'}: {error}; convert again"
        ) from None
    return build_network(config, read_weights(directory), dtype, device)


def build_network(
    config: NetworkConfig, tensors: dict[str, Tensor], dtype: torch.dtype, device: str
) -> EsoNetwork:
    """A network in evaluation mode, its parameters without gradients, from tensors by name.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape.
    """
    with torch.device("meta"):
        network = EsoNetwork(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"tensor {name}: the configuration asks for the shape {expected.get(name)}, the "
                f"weights have {found.get(name)}; convert again"
            )
    placed = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    network.load_state_dict(placed, assign=True)
    return network.eval().requires_grad_(False)
