"""`train-tokenizer`: trains a lossless SentencePiece tokenizer with a mask token, reproducibly."""

import heapq
import io
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece
import xxhash

from data_tools.builds.output import new_output
from data_tools.text.inputs import find_inputs
from data_tools.text.interface import InputFile, TextOptions, Unit
from data_tools.text.problems import Problem
from data_tools.text.spans import plan_spans
from data_tools.text.units import parse_unit, read_units
from megatron_eso.data.tokenizers.sentencepiece_model import MODEL_FILE
from megatron_eso.data.tokenizers.special_tokens import MASK_NAME
from megatron_eso.data.tokenizers.tokenizer import Tokenizer, split_segments
from megatron_eso.errors import ConfigError, DataError
from megatron_eso.progress import Progress
from megatron_eso.quantities import format_mb

TRAINING_FILE = "tokenizer_training.json"

_SAMPLE_BYTES = 256 * 2**20
_NUM_ROUND_TRIPS = 1000
# Fixed: the order in which SentencePiece sums scores depends on it, and so do the pieces.
_NUM_THREADS = 8
# The trainer leaves out longer lines, so they are cut.
_LINE_CHARACTERS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerOptions:
    """Options of `train-tokenizer`."""

    inputs: Sequence[str]
    """Files, folders, globs, or standard input."""
    vocab_size: int
    """Number of ids, including the mask token."""
    out: Path
    text: TextOptions = TextOptions()
    model_type: Literal["unigram", "bpe"] = "unigram"


def train_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Train a tokenizer and write it to a new directory.

    Large inputs are sampled by the hash of their text, so that memory stays bounded.

    Raises:
        ConfigError: The vocabulary size does not fit the text, or a path is wrong.
        DataError: The text is damaged.
    """
    start = time.monotonic()
    with new_output(options.out) as building:
        sample = _sample_text(options)
        sys.stderr.write(
            f"train-tokenizer: {options.vocab_size} pieces from "
            f"{format_mb(sum(map(len, sample)))} of text\n"
        )
        tokenizer = Tokenizer({MODEL_FILE: _train_model(sample, options)})
        tokenizer.save(building)
        training = {
            "normalization": "identity",
            "model_type": options.model_type,
            "num_threads": _NUM_THREADS,
            "sample_bytes": sum(map(len, sample)),
            "sentencepiece": sentencepiece.__version__,
            "vocab_size": options.vocab_size,
        }
        text = json.dumps(training, sort_keys=True, indent=1) + "\n"
        (building / TRAINING_FILE).write_text(text, encoding="ascii")
    _report(options.out, tokenizer, sample, time.monotonic() - start)
    return tokenizer


class _Sample:
    """The segments with the lowest hashes, up to a number of bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._room = num_bytes
        self._seen = 0
        # The smallest entry is the segment with the highest hash; of equal hashes, the last one.
        self._heap: list[tuple[int, int, bytes]] = []
        # The hash of a removed segment bounds all later ones, so that the result depends on the
        # segments alone and not on when one was removed.
        self._bound = 2**64

    def add(self, segment: bytes) -> None:
        """Keep a segment if its hash is low enough."""
        value = xxhash.xxh3_64_intdigest(segment)
        self._seen += 1
        if value >= self._bound:
            return
        heapq.heappush(self._heap, (-value, -self._seen, segment))
        self._room -= len(segment)
        while self._room < 0 and len(self._heap) > 1:
            value, _, segment = heapq.heappop(self._heap)
            self._bound = -value
            self._room += len(segment)

    def segments(self) -> list[bytes]:
        """Return the segments in the order in which they were added."""
        return [segment for _, _, segment in sorted(self._heap, key=lambda entry: -entry[1])]


def _sample_text(options: TokenizerOptions) -> list[bytes]:
    files = find_inputs(options.inputs, options.text.standard_input)
    progress = Progress("train-tokenizer: reading", sum(file.num_bytes for file in files))
    sample = _Sample(_SAMPLE_BYTES)
    problems: list[Problem] = []
    num_problems = 0
    for unit in _read_all(files, options.text):
        found: list[Problem] = []
        for document in parse_unit(unit, options.text, found):
            for segment in split_segments(document.text):
                sample.add(segment)
        num_problems += len(found)
        problems = problems or found[:1]
        progress.advance(unit.raw_bytes)
    progress.finish()
    for problem in problems:
        sys.stderr.write(
            f"train-tokenizer: {num_problems} broken lines, rows or files left out, first: "
            f"{problem.describe()}\n"
        )
    segments = sample.segments()
    if not segments:
        raise DataError("the input holds no text to train on; check --input and --text-key")
    return segments


def _read_all(files: Sequence[InputFile], options: TextOptions) -> Iterator[Unit]:
    for span in plan_spans(files):
        yield from read_units(files, span, options)


def _train_model(sample: Sequence[bytes], options: TokenizerOptions) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_iterate_lines(sample),
            model_writer=model,
            model_type=options.model_type,
            vocab_size=options.vocab_size,
            # Lossless: no normalization, all white space is kept, every byte has a piece.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            # The trainer receives lines, so it cannot learn the newline.
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=[MASK_NAME],
            max_sentence_length=8 * _LINE_CHARACTERS,
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        # SentencePiece puts its source line before the message: "Internal: file(line) [check] ...".
        message = str(error).rpartition("] ")[2]
        if "ocabulary size" in message or "vocab_size" in message:
            raise ConfigError(
                f"--vocab-size {options.vocab_size} does not fit the text: {_explain_size(message)}"
            ) from error
        if "insert_id" in str(error):
            raise ConfigError(
                f"--vocab-size {options.vocab_size} has no room for the special ids; give more"
            ) from error
        raise DataError(f"SentencePiece cannot train on this text: {message}") from error
    return model.getvalue()


def _explain_size(message: str) -> str:
    """Put SentencePiece's message about a size into the words of this command."""
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"its characters and the special ids are {found[1]}; give that or more"
    if found := re.search(r"value <= (\d+)", message):
        return f"it yields {found[1]} pieces; give that or less, or more text"
    return message


def _iterate_lines(sample: Sequence[bytes]) -> Iterator[str]:
    for segment in sample:
        for line in segment.decode("utf-8").split("\n"):
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]


def _report(out: Path, tokenizer: Tokenizer, sample: Sequence[bytes], seconds: float) -> None:
    step = max(1, len(sample) // _NUM_ROUND_TRIPS)
    tried = [segment.decode("utf-8") for segment in sample[::step]]
    exact = sum(tokenizer.decode(tokenizer.encode(text)) == text for text in tried)
    special = sum(text.count("\u2581") for text in tried)
    fingerprint = tokenizer.fingerprint()
    sys.stdout.write(
        f"{out}: {tokenizer.vocab_size} pieces, mask token {tokenizer.mask_token_id}, "
        f"in {seconds:.1f} s\n"
        f"fingerprint: model {fingerprint.model_sha256}, pieces {fingerprint.pieces_sha256}\n"
        f"round trip: {exact} of {len(tried)} texts exact; "
        f"U+2581 in them (decoded as a space): {special}\n"
    )
