"""Samples and scores texts with the tokenizer of a sampler directory."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_eso.command_line import quote
from megatron_eso.compression import SUFFIXES, DamageError, decompress
from megatron_eso.data.tokenizers.tokenizer import Tokenizer, has_tokenizer
from megatron_eso.errors import CheckpointError, ConfigError, DataError

from .objectives.build import load
from .objectives.model import SamplerModel

JSONL_SUFFIXES = tuple(f".{kind}{each}" for kind in ("jsonl", "ndjson") for each in ("", *SUFFIXES))
GENERATION_FILE = "generation_config.json"
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSamples:
    """Generated texts, or without a tokenizer their token ids as numbers."""

    texts: list[str]
    nfe: int
    """Forward passes of the network for the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextScore:
    """The exact left-to-right log-likelihood of a text."""

    name: str
    num_tokens: int
    """Tokens that have a likelihood; without a prepended token AR has none of the first."""
    log_likelihood: float
    """Sum of natural logarithms over the tokens."""

    @property
    def nats_per_token(self) -> float | None:
        """Negative log-likelihood per token; None for an empty text."""
        return -self.log_likelihood / self.num_tokens if self.num_tokens else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity per token; None for an empty text, or if it is too large for a float."""
        nats = self.nats_per_token
        return None if nats is None or not nats < 700 else math.exp(nats)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextModel:
    """A model with its tokenizer, if it has one."""

    directory: str
    """The sampler directory of both."""
    model: SamplerModel
    tokenizer: Tokenizer | None

    @classmethod
    def load(cls, directory: str, dtype: torch.dtype, device: str) -> Self:
        """Load a sampler directory.

        Raises:
            ConfigError: The device does not exist.
            CheckpointError: A file is missing or damaged.
            DataError: The tokenizer is damaged, or not the model's.
        """
        check_device(device)
        model = load(directory, dtype=dtype, device=device)
        return cls(directory=directory, model=model, tokenizer=load_tokenizer(directory, model))

    def sample(
        self,
        num_samples: int,
        prompt: str | None,
        length: int | None,
        seed: int | None,
        options: dict[str, float | None],
    ) -> TextSamples:
        """Generate texts.

        Args:
            num_samples: Number of texts.
            prompt: Text with which each begins.
            length: Tokens of a text; by default the model's `max_length`.
            seed: Seed of all random numbers; None takes one from the operating system.
            options: `alpha_0`, `steps`, `temperature`, `top_p` of the model's `generate`; None
                takes the value of `generation_config.json`.

        Raises:
            ConfigError: A value is out of its range, or the prompt is too long or has no tokenizer.
        """
        defaults = read_defaults(self.directory)
        known = None if prompt is None else self._build_prompt(prompt, num_samples, length)
        chosen = {
            name: defaults.get(name) if value is None else value for name, value in options.items()
        }
        generate_options: dict[str, Any] = {k: v for k, v in chosen.items() if v is not None}
        try:
            out = self.model.generate(
                num_samples,
                prompt=known,
                length=None if known is not None else length,
                seed=seed,
                **generate_options,
            )
        except ValueError as error:
            raise ConfigError(f"sample: {error}") from None
        texts = [self._decode(sequence) for sequence in out.sequences.tolist()]
        return TextSamples(texts=texts, nfe=out.nfe)

    def score(self, path: str, text_key: str, batch_size: int) -> Iterator[TextScore]:
        """Score a whole text file, or each line of JSONL.

        Args:
            path: Path of the file, which may be compressed (`.gz`, `.zst`); `-` is standard input.
            text_key: Key of the text in a line of JSONL; a line may have ids under `tokens`
                instead.
            batch_size: Number of windows of `max_length` tokens in a forward pass.

        Raises:
            ConfigError: The model's objective has no exact likelihood.
            DataError: The file cannot be read, or a token is not in the vocabulary.
        """
        if not self.model.has_exact_likelihood:
            raise ConfigError(
                f"{self.directory}: is of objective {self.model.objective}, which has no exact "
                "likelihood; evaluate its run by python -m pretrain.evaluate"
            )
        vocab_size = self.model.config.vocab_size
        for name, ids in self._read_texts(path, text_key):
            if max(ids, default=0) >= vocab_size or min(ids, default=0) < 0:
                raise DataError(f"{name}: a token is not in 0..{vocab_size - 1}")
            log_likelihood, num_tokens = score_tokens(self.model, ids, batch_size)
            yield TextScore(name=name, num_tokens=num_tokens, log_likelihood=log_likelihood)

    def _build_prompt(self, text: str, num_samples: int, length: int | None) -> Tensor:
        """Return the prompt's tokens, then mask tokens up to `length`, int64 `[N, T]`."""
        if self.tokenizer is None:
            raise ConfigError(f"--prompt: {self.directory} has no tokenizer; leave the prompt out")
        ids = self.tokenizer.encode(text)
        length = self.model.config.max_length if length is None else length
        if len(ids) > length:
            raise ConfigError(
                f"--prompt: has {len(ids)} tokens, more than the {length} of a sample; shorten it"
            )
        row = ids + [self.model.config.mask_token_id] * (length - len(ids))
        return torch.tensor(row).expand(num_samples, len(row))

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise DataError(
                f"{self.directory}: has no tokenizer; give .jsonl with ids under 'tokens'"
            )
        return self.tokenizer.encode(text)

    def _read_texts(self, path: str, text_key: str) -> Iterator[tuple[str, list[int]]]:
        """Yield the name and the token ids of each text."""
        content = read_text(path)
        if not path.endswith(JSONL_SUFFIXES):
            yield path, self._encode(content)
            return
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            name = f"{path}:{number}"
            try:
                record = json.loads(line)
                tokens = record.get("tokens")
                ids = self._encode(record[text_key]) if tokens is None else list(tokens)
                if not all(type(token) is int for token in ids):
                    raise TypeError("tokens is not a list of integers")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{name}: is not a JSON object with a text under {text_key!r} or ids under "
                    f"'tokens' ({error}); correct the line or name the key by --text-key"
                ) from None
            yield name, ids


def read_text(path: str) -> str:
    """Read a text file, which may be compressed (`.gz`, `.zst`); `-` is standard input.

    Raises:
        DataError: The file cannot be read, is damaged, or is not UTF-8.
    """
    try:
        if path == "-":
            return sys.stdin.read()
        content = Path(path).read_bytes()
        if compression := SUFFIXES.get(Path(path).suffix):
            content = b"".join(decompress([content], compression))
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError, DamageError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def check_device(device: str) -> None:
    """Refuse a device that does not exist.

    Raises:
        ConfigError: torch cannot compute on the device.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--device {quote(device)}: {reason[:200]}; use cpu or cuda") from None


def load_tokenizer(directory: str, model: SamplerModel) -> Tokenizer | None:
    """Load the tokenizer of a sampler directory; return None if it has none.

    Raises:
        DataError: The tokenizer is damaged, or not the model's.
    """
    if not has_tokenizer(directory):
        return None
    tokenizer = Tokenizer.load(directory)
    ours = tokenizer.vocab_size, tokenizer.mask_token_id
    network = model.config.vocab_size, model.config.mask_token_id
    if ours != network:
        raise DataError(
            f"{directory}: the tokenizer has {ours[0]} tokens and the mask token {ours[1]}, the "
            f"network {network[0]} and {network[1]}; replace it by the network's tokenizer"
        )
    return tokenizer


def read_defaults(directory: str) -> dict[str, Any]:
    """Read `generation_config.json`; without the file, return the model's defaults.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    path = Path(directory) / GENERATION_FILE
    if not path.is_file():
        return dict(DEFAULTS)
    try:
        return {**DEFAULTS, **json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is not a valid JSON object ({error}); convert again"
        ) from None


def score_tokens(model: SamplerModel, ids: list[int], batch_size: int) -> tuple[float, int]:
    """Score a text in windows of `max_length`; each is scored without the text before it.

    Returns:
        The log-likelihood in nats, and the number of tokens that have one.
    """
    length = model.config.max_length
    num_whole = len(ids) // length
    whole = torch.tensor(ids[: num_whole * length], dtype=torch.int64).reshape(num_whole, length)
    rest = torch.tensor([ids[num_whole * length :]], dtype=torch.int64)
    total, num_tokens = 0.0, 0
    for batch in (*torch.split(whole, batch_size), rest):
        if batch.numel():
            scores = model.score_left_to_right(batch.to(model.device))
            total += float(scores.sum())
            num_tokens += scores.numel()
    return total, num_tokens
