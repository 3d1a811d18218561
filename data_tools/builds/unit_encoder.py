"""Encodes units of text to tokens."""

from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from data_tools.text.interface import Document, TextOptions, Unit
from data_tools.text.problems import Problem
from data_tools.text.units import parse_unit
from megatron_eso.data.shards.format import choose_dtype, numpy_dtype
from megatron_eso.data.tokenizers.tokenizer import Tokenizer

DOCUMENT_DTYPE = np.dtype(
    [("num_tokens", "<u8"), ("num_text_bytes", "<u8"), ("hash_low", "<u8"), ("hash_high", "<u8")]
)
"""Record of a document: tokens with the end-of-text token, bytes, and the hash of its text."""

_WORD_BOUNDARY_UTF8 = "\u2581".encode()
_ROUND_TRIP_BYTES = 16 * 1024


@dataclass(kw_only=True, slots=True)
class EncodingNotes:
    """Facts about one or more units that the user should know."""

    empty_documents: int = 0
    """Documents that were left out, since they have no tokens."""
    word_boundary_characters: int = 0
    """Number of U+2581 in the text, which SentencePiece decodes as a space."""
    round_trips: int = 0
    """Documents that were encoded and decoded again, as a check."""
    exact_round_trips: int = 0
    problems: int = 0
    """Lines, rows and files that were left out, since they are not text."""

    def add(self, other: "EncodingNotes") -> None:
        """Add the counts of another unit."""
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedUnit:
    """Tokens and documents of a unit; a document that continues in the next unit is open."""

    tokens: npt.NDArray[np.unsignedinteger]
    documents: npt.NDArray[np.void]
    """DOCUMENT_DTYPE: the documents that end in the unit, with their sizes in it."""
    open_tokens: int
    """Tokens after the end of the last complete document."""
    open_text_bytes: int
    notes: EncodingNotes
    problems: list[Problem] = field(default_factory=list)


class UnitEncoder:
    """A picklable function that encodes one unit per task.

    Args:
        tokenizer: A tokenizer with an end-of-text token.
        options: How documents lie in the units.
    """

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        assert tokenizer.eos_token_id is not None
        self._tokenizer = tokenizer
        self._options = options
        self._dtype = numpy_dtype(choose_dtype(tokenizer.vocab_size))
        self._eos = np.array([tokenizer.eos_token_id], dtype=np.int32)

    def __call__(self, task: tuple[int, Unit]) -> EncodedUnit:
        """Encode the unit of a task (number of the span, unit).

        Raises:
            DataError: The text is damaged, and `options.on_error` is "stop".
        """
        _, unit = task
        problems: list[Problem] = []
        parsed = list(parse_unit(unit, self._options, problems))
        # The last part of a document that began in an earlier unit may be empty.
        documents = [
            document
            for number, document in enumerate(parsed)
            if document.text or (number == 0 and unit.continues)
        ]
        notes = EncodingNotes(empty_documents=len(parsed) - len(documents), problems=len(problems))
        ids = self._tokenizer.encode_batch([document.text for document in documents])
        self._check_round_trip(documents, ids, notes)
        return self._gather(documents, ids, notes, problems)

    def _gather(
        self,
        documents: list[Document],
        ids: list[npt.NDArray[np.int32]],
        notes: EncodingNotes,
        problems: list[Problem],
    ) -> EncodedUnit:
        parts = [np.empty(0, dtype=np.int32)]
        for document, tokens in zip(documents, ids, strict=True):
            parts.append(tokens)
            if document.ends:
                parts.append(self._eos)
            if not document.text.isascii():  # a much faster check than counting
                notes.word_boundary_characters += document.text.count(_WORD_BOUNDARY_UTF8)
        joined = np.concatenate(parts, dtype=self._dtype, casting="unsafe")
        ended = [document for document in documents if document.ends]
        # A document that does not end is the last one of the unit.
        assert ended == documents[: len(ended)]
        table = np.empty(len(ended), dtype=DOCUMENT_DTYPE)
        table["num_tokens"] = [len(tokens) + 1 for tokens in ids[: len(ended)]]
        table["num_text_bytes"] = [len(document.text) for document in ended]
        table["hash_low"] = [document.hash & (2**64 - 1) for document in ended]
        table["hash_high"] = [document.hash >> 64 for document in ended]
        assert np.count_nonzero(joined == self._eos) == len(ended), "text gave an end-of-text token"
        assert not (joined == self._tokenizer.mask_token_id).any(), "text gave a mask token"
        return EncodedUnit(
            tokens=joined,
            documents=table,
            open_tokens=sum(map(len, ids[len(ended) :])),
            open_text_bytes=sum(len(document.text) for document in documents[len(ended) :]),
            notes=notes,
            problems=problems,
        )

    def _check_round_trip(
        self, documents: list[Document], ids: list[npt.NDArray[np.int32]], notes: EncodingNotes
    ) -> None:
        """Decode one document of the unit that is short enough for a cheap check."""
        for document, tokens in zip(documents, ids, strict=True):
            if document.text and len(document.text) <= _ROUND_TRIP_BYTES:
                decoded = self._tokenizer.decode(tokens.tolist())
                notes.round_trips = 1
                notes.exact_round_trips = int(decoded == document.text.decode("utf-8"))
                return
