"""`train-tokenizer`: a lossless SentencePiece tokenizer with a mask token, reproducibly."""

import heapq
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece
import xxhash

from data_tools.documents import ReadFile, find_inputs, parse_unit, read_units
from data_tools.progress import Progress
from data_tools.publication import publish_directory
from megatron_eso.data.tokenizer import MASK_PIECE, Tokenizer, split_segments
from megatron_eso.errors import ConfigError, DataError

TRAINING_FILE = "tokenizer_training.json"

_SAMPLE_BYTES = 256 * 2**20
_NUM_ROUND_TRIPS = 1000
# Their number decides how SentencePiece sums up scores, hence the pieces: the same on any machine.
_NUM_THREADS = 8
# Longer lines are cut: the trainer would leave them out.
_LINE_CHARACTERS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerOptions:
    """What to train."""

    inputs: Sequence[str]
    """JSONL files, text files, folders of them."""
    vocab_size: int
    """Ids, the mask token among them."""
    out: Path
    text_key: str = "text"
    model_type: Literal["unigram", "bpe"] = "unigram"


def train_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Train a tokenizer and write it to a new directory.

    Large inputs are sampled by the hash of their text, so that memory stays bounded.

    Raises:
        ConfigError: the vocabulary size does not fit the text, or a path is wrong.
        DataError: the text is damaged.
    """
    start = time.monotonic()
    with publish_directory(options.out) as building:
        sample = _sample_text(options)
        sys.stderr.write(
            f"train-tokenizer: {options.vocab_size} pieces from "
            f"{sum(map(len, sample)) / 1e6:.1f} MB of text\n"
        )
        tokenizer = Tokenizer(_train_model(sample, options))
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


def _sample_text(options: TokenizerOptions) -> list[bytes]:
    """Segments of the input in order: all, or those of the lowest hashes up to the limit."""
    files = find_inputs(options.inputs)
    progress = Progress("train-tokenizer: reading", sum(file.num_bytes for file in files))
    kept: list[tuple[int, int, bytes]] = []
    size = 0
    count = 0
    for number, file in enumerate(files):
        for unit in read_units(file, number, ReadFile(), cut_text=True, hash_text=False):
            for document in parse_unit(unit, options.text_key):
                for segment in split_segments(document):
                    # The smallest entry of the heap is the segment of the highest hash.
                    heapq.heappush(kept, (-xxhash.xxh3_64_intdigest(segment), count, segment))
                    count += 1
                    size += len(segment)
            while size > _SAMPLE_BYTES and len(kept) > 1:
                size -= len(heapq.heappop(kept)[2])
            progress.advance(len(unit.data))
    progress.finish()
    if not kept:
        raise DataError("the input holds no text to train on; check --input and --text-key")
    return [segment for _, _, segment in sorted(kept, key=lambda entry: entry[1])]


def _train_model(sample: Sequence[bytes], options: TokenizerOptions) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_iterate_lines(sample),
            model_writer=model,
            model_type=options.model_type,
            vocab_size=options.vocab_size,
            # Lossless: no normalization, all white space kept, any byte has a piece.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            # Training is fed by lines and would never meet a newline.
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=[MASK_PIECE],
            max_sentence_length=8 * _LINE_CHARACTERS,
            num_threads=_NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        # The message follows its place in the source: "Internal: file(line) [check] ...".
        message = str(error).rpartition("] ")[2]
        if "ocabulary size" in message or "vocab_size" in message:
            raise ConfigError(
                f"--vocab-size {options.vocab_size} does not fit the text: {message}"
            ) from error
        raise DataError(f"SentencePiece cannot train on this text: {message}") from error
    return model.getvalue()


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
        f"U+2581 in them (comes back as a space): {special}\n"
    )
