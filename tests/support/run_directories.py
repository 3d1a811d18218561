"""Run directories with one checkpoint, read, rewritten and converted."""

from pathlib import Path

from torch import Tensor

from checkpoints_conversion.__main__ import main
from megatron_eso.runs.file_index import FILE_INDEX
from megatron_eso.runs.torch_dist import read_metadata, read_tensors, write_tensors
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig

STEP_0 = Path("checkpoints/step_00000000")


def describe(config: NetworkConfig) -> dict:
    """Return the content of a sampler's `config.json`."""
    return {
        **{name: getattr(config, name) for name in NetworkConfig.__dataclass_fields__},
        "alpha_0": 0.5,
        "variant": "b",
        "source": {"kind": "test", "step": 3, "weights": "raw"},
    }


def read_run(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    index = read_metadata(directory)
    return read_tensors(directory, index, index.state_dict_metadata)


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the tensors of a checkpoint, and remove the list of its hashes."""
    for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp"):
        (directory / name).unlink()
    (directory / FILE_INDEX).unlink(missing_ok=True)
    write_tensors(directory, tensors)


def convert(run: Path, out: Path, *options: str) -> None:
    """Run `to-sampler`."""
    main(["to-sampler", str(run), str(out), *options])
