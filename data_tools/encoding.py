"""Units of text to tokens, in one process or several, in the order of the input."""

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from data_tools.documents import Unit, hash_document, parse_unit
from megatron_eso.data.shard_format import choose_dtype, numpy_dtype
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import DataError

_WORD_BOUNDARY_UTF8 = "\u2581".encode()
_ROUND_TRIP_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPart:
    """The tokens of a unit that go to one split."""

    tokens: npt.NDArray[np.unsignedinteger]
    num_documents: int
    num_text_bytes: int


@dataclass(kw_only=True, slots=True)
class EncodingNotes:
    """What is worth telling about a unit, or about all of them together."""

    empty_documents: int = 0
    """Left out: they have no tokens."""
    word_boundary_characters: int = 0
    """U+2581 in the text, which SentencePiece gives back as a space."""
    round_trips: int = 0
    """Documents that were encoded and decoded to see whether they come back."""
    exact_round_trips: int = 0

    def add(self, other: "EncodingNotes") -> None:
        """Add another's counts."""
        self.empty_documents += other.empty_documents
        self.word_boundary_characters += other.word_boundary_characters
        self.round_trips += other.round_trips
        self.exact_round_trips += other.exact_round_trips


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedUnit:
    """Result of a unit: its tokens for the training and the validation split, or its error."""

    file: int
    num_bytes: int
    train: EncodedPart
    validation: EncodedPart
    notes: EncodingNotes
    error: str | None = None


@dataclass(slots=True)
class _Collector:
    """Tokens for one split, gathered."""

    parts: list[npt.NDArray[np.integer]] = field(default_factory=list)
    num_documents: int = 0
    num_text_bytes: int = 0

    def finish(self, dtype: np.dtype[np.unsignedinteger]) -> EncodedPart:
        empty = np.empty(0, dtype=dtype)
        return EncodedPart(
            tokens=np.concatenate([empty, *self.parts], dtype=dtype, casting="unsafe"),
            num_documents=self.num_documents,
            num_text_bytes=self.num_text_bytes,
        )


class UnitEncoder:
    """Turns units into tokens.

    Args:
        tokenizer: with an end-of-text token.
        text_key: of JSONL documents.
        validation_share: share of the documents, by the hash of their text, for validation.
    """

    def __init__(self, tokenizer: Tokenizer, text_key: str, validation_share: float) -> None:
        assert tokenizer.eos_token_id is not None
        self._tokenizer = tokenizer
        self._text_key = text_key
        self._threshold = int(validation_share * 2**64)
        self._eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
        self._dtype = numpy_dtype(choose_dtype(tokenizer.vocab_size))

    def encode(self, unit: Unit) -> EncodedUnit:
        """Encode a unit; an error in its text becomes part of the result, to be raised in order."""
        train, validation, notes = _Collector(), _Collector(), EncodingNotes()
        error = None
        try:
            for text in parse_unit(unit, self._text_key):
                if not text:
                    notes.empty_documents += 1
                    continue
                value = unit.document_hash if unit.kind == "txt" else hash_document(text)
                self._add(validation if value < self._threshold else train, unit, text, notes)
        except DataError as found:
            error = str(found)
        encoded = EncodedUnit(
            file=unit.file,
            num_bytes=len(unit.data),
            train=train.finish(self._dtype),
            validation=validation.finish(self._dtype),
            notes=notes,
            error=error,
        )
        assert self._is_clean(encoded.train), "text gave an end-of-text or mask token"
        assert self._is_clean(encoded.validation), "text gave an end-of-text or mask token"
        return encoded

    def _add(self, split: "_Collector", unit: Unit, text: bytes, notes: EncodingNotes) -> None:
        ids = self._tokenizer.encode_utf8(text)
        split.parts.append(ids)
        split.num_text_bytes += len(text)
        if unit.ends_document:
            split.parts.append(self._eos)
            split.num_documents += 1
        notes.word_boundary_characters += text.count(_WORD_BOUNDARY_UTF8)
        if notes.round_trips == 0 and len(text) <= _ROUND_TRIP_BYTES:
            notes.round_trips = 1
            decoded = self._tokenizer.decode(ids.tolist())
            notes.exact_round_trips = int(decoded == text.decode("utf-8"))

    def _is_clean(self, part: EncodedPart) -> bool:
        """Whether the end-of-text token stands at the ends of documents only, and no mask token."""
        ends = int(np.count_nonzero(part.tokens == self._tokenizer.eos_token_id))
        has_mask = bool((part.tokens == self._tokenizer.mask_token_id).any())
        return ends == part.num_documents and not has_mask


def encode_units(
    units: Iterable[Unit], encoder: UnitEncoder, num_workers: int
) -> Generator[EncodedUnit]:
    """Encode units in order, holding a few of them per worker at a time.

    Args:
        units: to encode.
        encoder: does it.
        num_workers: processes; 1 works in this one.

    Raises:
        DataError: a worker died.
    """
    if num_workers == 1:
        yield from map(encoder.encode, units)
        return
    # Started afresh, not forked: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(encoder,)
    )
    pending: deque[Future[EncodedUnit]] = deque()
    remaining = iter(units)
    try:
        for unit in itertools.islice(remaining, 3 * num_workers):
            pending.append(pool.submit(_encode_in_worker, unit))
        while pending:
            encoded = pending.popleft().result()
            for unit in itertools.islice(remaining, 1):
                pending.append(pool.submit(_encode_in_worker, unit))
            yield encoded
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, perhaps for want of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: UnitEncoder


def _start_worker(encoder: UnitEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def _encode_in_worker(unit: Unit) -> EncodedUnit:
    return _worker_encoder.encode(unit)
