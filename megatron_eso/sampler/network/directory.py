"""Reads a sampler directory: `config.json`, and `model.safetensors` or shards with an index."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from megatron_eso.errors import CheckpointError

from .layers_eso_lm import NetworkConfig
from .network_eso_lm import EsoNetwork
from .objective_fields import read_objective

FORMAT_VERSION = 2
"""Version of directories with a value that readers of version 1 would ignore."""
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_T = TypeVar("_T")


def choose_version(description: Mapping[str, Any]) -> int:
    """Return the lowest format version whose readers understand a directory.

    Args:
        description: The fields of network and objective.
    """
    is_misread = description.get("sequential_prediction", "own") != "own" or description.get(
        "use_rope_scaling", False
    )
    return FORMAT_VERSION if is_misread else 1


def read_description(directory: str | Path) -> dict[str, Any]:
    """Read `config.json`, check it, and complete the fields of its objective.

    Raises:
        CheckpointError: The file is missing or no JSON, or has another kind or version, an unknown
            objective, or a field with a value that is not legal.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found; give a directory that `checkpoints_conversion` wrote"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); convert again") from None
    if not isinstance(config, dict) or config.get("model_type") != "eso_lm":
        raise CheckpointError(f"{path}: model_type is not eso_lm; give a sampler directory")
    if config.get("format_version") not in (1, FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: format_version {config.get('format_version')!r} is unknown, this version "
            f"reads 1 and {FORMAT_VERSION}; use the release that wrote it"
        )
    try:
        return {**config, **read_objective(config)}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; convert again") from None


def read_weights(directory: str | Path, *, remedy: str = "convert again") -> dict[str, Tensor]:
    """Read all tensors to the CPU, in their stored dtype.

    Args:
        directory: A directory with `model.safetensors`, or with shards and their index.
        remedy: What a user can do about a missing or damaged file, for errors.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    return _read_files(Path(directory), load_file, remedy)


def read_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all tensors, not their values.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    return _read_files(Path(directory), _read_header)


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def _read_files(
    directory: Path, read: Callable[[Path], dict[str, _T]], remedy: str = "convert again"
) -> dict[str, _T]:
    """Read all tensors, or their shapes, from the one file of weights or from its shards."""
    index = directory / INDEX_FILE
    files = [WEIGHTS_FILE]
    try:
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        tensors: dict[str, _T] = {}
        for name in files:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: {name} is not a plain file name; {remedy}")
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory}: {name} is missing; {remedy}")
            tensors.update(read(directory / name))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: its weights are damaged ({error}); {remedy}") from None
    return tensors


def read_network_config(directory: str | Path) -> NetworkConfig:
    """Read the network's fields of `config.json`.

    Raises:
        CheckpointError: As `read_description`, or a field is missing or wrong.
    """
    description = read_description(directory)
    try:
        return NetworkConfig.from_dict(description)
    except ValueError as error:
        raise CheckpointError(
            f"{Path(directory) / 'config.json'}: {error}; convert again"
        ) from None


def load_network(directory: str | Path, dtype: torch.dtype, device: str) -> EsoNetwork:
    """Build the network of a sampler directory.

    Raises:
        CheckpointError: A file is missing or damaged, or tensors and configuration do not fit.
    """
    config = read_network_config(directory)
    return build_network(config, read_weights(directory), dtype, device, source=directory)


def build_network(
    config: NetworkConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    device: str,
    *,
    source: object,
) -> EsoNetwork:
    """Build a network in evaluation mode, its parameters without gradients.

    Args:
        config: Describes the network.
        tensors: The parameters by name.
        dtype: Dtype of the parameters.
        device: Where the network runs.
        source: Where the tensors come from, for errors.

    Raises:
        CheckpointError: Tensors are missing, left over, or of another shape.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(config, found, source=source)
    with torch.device("meta"):
        network = EsoNetwork(config)
    placed = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    network.load_state_dict(placed, assign=True)
    return network.eval().requires_grad_(False)


def check_shapes(
    config: NetworkConfig, found: Mapping[str, tuple[int, ...]], *, source: object
) -> None:
    """Refuse tensors that are not those of a network.

    Args:
        config: Describes the network.
        found: The shapes by name.
        source: Where the tensors come from, for errors.

    Raises:
        CheckpointError: Tensors are missing, left over, or of another shape.
    """
    with torch.device("meta"):
        network = EsoNetwork(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{source}: tensor {name}: {found.get(name, 'missing')} in the weights, "
                f"{expected.get(name, 'missing')} in the configuration; convert a whole checkpoint"
            )
