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
<<<<<<< HEAD
    return Conversion(
        directory=out_dir, step=None, weights="raw", num_parameters=count_parameters(tensors)
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
    if vocabulary.num_kept > num_rows:
        raise ConfigError(
            f"{path}: vocab_size is {num_rows}, but the tokenizer {tokenizer} has "
            f"{vocabulary.num_kept} tokens; give the model's own by --tokenizer"
        )
    return vocabulary, loaded.bos_token_id
=======
    num_parameters = count_parameters(model.tensors)
    return Conversion(directory=out_dir, step=None, weights="raw", num_parameters=num_parameters)
>>>>>>> hf_fix
