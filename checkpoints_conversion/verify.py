"""Compares two checkpoints of any kind: tensors by name, and the logits of both phases.

Shape suffixes: B samples, T slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoints_conversion.hugging_face.families import FAMILIES
from checkpoints_conversion.hugging_face.reading import read_hugging_face
from checkpoints_conversion.official import (
    OfficialOptions,
    fold_official,
    infer_config,
    read_official,
)
from checkpoints_conversion.official_objective import describe_official
from checkpoints_conversion.run_network import read_network
from checkpoints_conversion.sampler_directory import find_model_type, is_sampler_directory
from megatron_eso.errors import CheckpointError
from megatron_eso.randomness.bits import random_bits
from megatron_eso.randomness.purposes import Purpose
from megatron_eso.runs.checkpoint import open_checkpoint
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.torch_dist import is_torch_dist
from megatron_eso.sampler.network.directory import (
    build_network,
    read_description,
    read_network_config,
    read_weights,
)
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig

MAX_TEST_LENGTH = 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loaded:
    """A network that was loaded for the comparison."""

    path: Path
    kind: str
    config: NetworkConfig
    tensors: dict[str, Tensor]
    """Tensors by the sampler's names; each tensor of the source was used exactly once."""
    weights: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Facts about one side of a comparison."""

    kind: str
    weights: str
    num_tensors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Differences of two networks."""

    sides: tuple[Side, Side]
    config_differences: list[str]
    only_in_a: list[str]
    only_in_b: list[str]
    shape_differences: list[str]
    tensor_errors: dict[str, float]
    """Largest absolute difference of each tensor that both have in one shape."""
    logits_errors: dict[str, float]
    """Largest absolute difference of the logits of each phase; empty unless the sides match."""

    @property
    def matches(self) -> bool:
        """Whether configurations, names and shapes are equal."""
        return not (
            self.config_differences or self.only_in_a or self.only_in_b or self.shape_differences
        )


def recorded_weights(path: str | Path) -> str | None:
    """Return which weights a sampler directory holds; None for another kind of checkpoint."""
    if not is_sampler_directory(Path(path)):
        return None
    source = read_description(path).get("source")
    return source.get("weights") if isinstance(source, dict) else None


def load_any(
    path: str | Path,
    *,
    step: int | None = None,
    weights: str | None = None,
    mask_token_id: int | None = None,
) -> Loaded:
    """Load a directory of a sampler, of a run or of transformers, or another checkpoint.

    Args:
        path: The directory or file.
        step: The step to take from a run directory; by default the newest.
        weights: `ema` or `raw`, where the checkpoint has both; by default EMA where it has it.
        mask_token_id: Mask token of an official checkpoint; by default the last row of the
            embedding.

    Raises:
        CheckpointError: The path is none of these, or damaged.
    """
    path = Path(path)
    # A file is an official checkpoint.
    if path.suffix == ".safetensors" and path.is_file():
        raise CheckpointError(
            f"{path}: is a bare backbone; convert it by from-official and name the result"
        )
    if path.is_file():
        return _load_official(path, weights or "ema", mask_token_id)
    # The kind of a directory follows from its files.
    if is_sampler_directory(path):
        config = read_network_config(path)
        return Loaded(
            path=path,
            kind="sampler directory",
            config=config,
            tensors=read_weights(path),
            weights=recorded_weights(path) or "raw",
        )
    if find_model_type(path) in FAMILIES:
        model = read_hugging_face(path)
        return Loaded(
            path=path,
            kind="directory of transformers",
            config=model.config,
            tensors=model.tensors,
            weights="raw",
        )
    if is_torch_dist(path) or RunDirectory(path).checkpoints.is_dir():
        checkpoint = open_checkpoint(path, step)
        config, tensors, description = read_network(checkpoint, weights)
        return Loaded(
            path=path,
            kind="distributed checkpoint",
            config=config,
            tensors=tensors,
            weights=description["source"]["weights"],
        )
    raise CheckpointError(
        f"{path}: is neither a sampler directory, a run directory, a directory of transformers, a "
        "distributed checkpoint nor a file; name one of these"
    )


def _load_official(path: Path, weights: str, mask_token_id: int | None) -> Loaded:
    official = read_official(path, weights)
    config = infer_config(official, mask_token_id)
    describe_official(official, config, OfficialOptions())  # refuses other models
    return Loaded(
        path=path,
        kind="official checkpoint",
        config=config,
        tensors=fold_official(official),
        weights=official.weights,
    )


def compare(a: Loaded, b: Loaded) -> Comparison:
    """Compare configurations, tensors and, where these match, logits in float32."""
    names = NetworkConfig.__dataclass_fields__
    pairs = {name: (getattr(a.config, name), getattr(b.config, name)) for name in names}
    shared = [name for name in sorted(a.tensors) if name in b.tensors]
    shapes = {name: (tuple(a.tensors[name].shape), tuple(b.tensors[name].shape)) for name in shared}
    comparison = Comparison(
        sides=(_describe(a), _describe(b)),
        config_differences=[f"{name}: {x} and {y}" for name, (x, y) in pairs.items() if x != y],
        only_in_a=sorted(a.tensors.keys() - b.tensors.keys()),
        only_in_b=sorted(b.tensors.keys() - a.tensors.keys()),
        shape_differences=[f"{name}: {x} and {y}" for name, (x, y) in shapes.items() if x != y],
        tensor_errors={
            name: float((a.tensors[name].double() - b.tensors[name].double()).abs().max())
            for name, (x, y) in shapes.items()
            if x == y
        },
        logits_errors={},
    )
    if comparison.matches:
        comparison.logits_errors.update(_compare_logits(a, b))
    return comparison


def _describe(loaded: Loaded) -> Side:
    return Side(kind=loaded.kind, weights=loaded.weights, num_tensors=len(loaded.tensors))


def _compare_logits(a: Loaded, b: Loaded) -> dict[str, float]:
    networks = [
        build_network(x.config, x.tensors, torch.float32, "cpu", source=x.path) for x in (a, b)
    ]
    errors = {"diffusion": 0.0, "sequential": 0.0}
    with torch.no_grad():
        for x_BT, z_BT, permutation_BT in _probe(a.config):
            for phase, pair in {
                "diffusion": [n.diffusion_logits(z_BT, permutation_BT) for n in networks],
                "sequential": [n.sequential_logits(z_BT, x_BT, permutation_BT) for n in networks],
            }.items():
                error = float((pair[0] - pair[1]).abs().max())
                # NaN is not a small error.
                errors[phase] = max(errors[phase], error if error == error else float("inf"))
    return errors


def _probe(config: NetworkConfig) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield fixed texts, masked texts and orders with 0, 1, half, and all but one clean slots.

    Each is int64 `[1, T]`: the text, the text with mask tokens, and the order of slots.
    """
    length = min(config.max_length, MAX_TEST_LENGTH)
    for case, num_clean in enumerate(sorted({0, min(1, length - 1), length // 2, length - 1})):
        bits = random_bits(0, Purpose.PROBE, case, 2 * length).reshape(2, length)
        x_T = torch.from_numpy((bits[0] >> np.uint64(11)).astype(np.int64)) % config.vocab_size
        # A clean text has no mask token.
        x_T = torch.where(x_T == config.mask_token_id, (x_T + 1) % config.vocab_size, x_T)
        permutation_T = torch.from_numpy(np.argsort(bits[1], kind="stable"))
        z_T = x_T.clone()
        z_T[permutation_T[num_clean:]] = config.mask_token_id
        yield x_T[None], z_T[None], permutation_T[None]
