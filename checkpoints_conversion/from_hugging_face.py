"""Converts a Llama, Qwen2 or Qwen3 directory to an `ar` sampler directory with a mask token."""

from dataclasses import asdict
from pathlib import Path

from checkpoints_conversion.conversions import Conversion, count_parameters
from checkpoints_conversion.hugging_face.reading import read_hugging_face
from checkpoints_conversion.sampler_directory import hash_tensors, write_sampler_directory


def convert_from_hugging_face(
    source: Path, out_dir: Path, *, tokenizer: Path | None = None, seed: int = 0
) -> Conversion:
    """Convert a directory; the weights keep their dtype, and no code of it is executed.

    Args:
        source: A directory with `config.json` and `model.safetensors` or its shards.
        out_dir: The directory to write: a new one, an empty one or a sampler directory.
        tokenizer: A tokenizer's file or directory; by default that in `source`, if it has one.
        seed: Seed of the mask token's row.

    Raises:
        ConfigError: The model has another architecture or a part that the network lacks, its
            weights are pickled, or its tokenizer has more tokens than it has rows.
        CheckpointError: A file is missing or damaged.
        DataError: The tokenizer is damaged.
    """
    model = read_hugging_face(source, tokenizer=tokenizer, seed=seed)
    description = {
        **asdict(model.config),
        "objective": "ar",
        "prepend_token": "none",
        "bos_token_id": model.bos_token_id,
        "source": {
            "kind": "hugging_face",
            "step": None,
            "weights": "raw",
            "sha256": hash_tensors(model.found),
        },
    }
    write_sampler_directory(
        out_dir,
        description,
        model.tensors,
        dtype=model.dtype,
        tokenizer=model.tokenizer,
        cut_rows=model.cut_rows,
    )
    num_parameters = count_parameters(model.tensors)
    return Conversion(directory=out_dir, step=None, weights="raw", num_parameters=num_parameters)
