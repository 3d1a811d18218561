"""Stores the encoded spans with a journal, by which a build continues after an interruption.

Each span of the input has three files, to which one process appends:

    NNNNN.tokens      the ids of the documents, each with its end-of-text token
    NNNNN.documents   DOCUMENT_DTYPE of each document
    NNNNN.journal     JSON lines, each a commit: how much of the other two is valid, and for which
                      units of the span

A line of the journal is written after the tokens and documents that it counts are on the disk. A
process that continues cuts the files back to the last whole line. The journal is locked while it is
written; the kernel releases the lock of a process that ends.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_tools.builds.unit_encoder import DOCUMENT_DTYPE, EncodedUnit, EncodingNotes
from data_tools.text.interface import SourceRead, Unit
from data_tools.text.problems import Problem
from megatron_eso.errors import DataError
from megatron_eso.locks import try_lock

COMMIT_BYTES = 16 * 2**20
"""Bytes of text between two commits: the most that an interruption loses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanFiles:
    """Paths of a span's files."""

    directory: Path
    number: int

    @property
    def tokens(self) -> Path:
        """File of the token ids."""
        return self.directory / f"{self.number:05d}.tokens"

    @property
    def documents(self) -> Path:
        """File of the documents' sizes and hashes."""
        return self.directory / f"{self.number:05d}.documents"

    @property
    def journal(self) -> Path:
        """File of the commits."""
        return self.directory / f"{self.number:05d}.journal"


@dataclass(kw_only=True, slots=True)
class SpanState:
    """Progress of a span's encoding."""

    num_units: int = 0
    num_tokens: int = 0
    num_documents: int = 0
    num_text_bytes: int = 0
    open_tokens: int = 0
    """Tokens after the end of the last complete document."""
    open_text_bytes: int = 0
    raw_bytes: int = 0
    """Bytes of the input that were read."""
    digest: int | None = None
    """`Unit.digest` of the last unit; None before the first unit."""
    is_complete: bool = False
    notes: EncodingNotes = field(default_factory=EncodingNotes)
    slice_documents: dict[int, int] = field(default_factory=dict)
    """Number of documents by slice, for slices that have any."""
    sources: dict[int, SourceRead] = field(default_factory=dict)
    """Size and hash of each finished slice."""


# Fields of which a commit holds the new entries only.
_GROWING = ("slice_documents", "sources")
_COUNTS = tuple(
    each.name for each in dataclasses.fields(SpanState) if each.name not in (*_GROWING, "notes")
)


def read_state(files: SpanFiles) -> SpanState:
    """Read the progress of a span from its journal; an empty state without a journal."""
    return _replay(files.journal)[0]


def read_problems(files: SpanFiles) -> Iterator[Problem]:
    """Yield the problems of a span, in order."""
    for commit, _ in _read_commits(files.journal):
        for problem in commit["problems"]:
            yield Problem(**problem)


def read_documents(files: SpanFiles, first: int, count: int) -> npt.NDArray[np.void]:
    """Read documents of a span from number `first` on, DOCUMENT_DTYPE [count]."""
    itemsize = DOCUMENT_DTYPE.itemsize
    documents = np.fromfile(
        files.documents, dtype=DOCUMENT_DTYPE, count=count, offset=first * itemsize
    )
    if len(documents) != count:
        raise _damaged(files.documents)
    return documents


class TokenReader:
    """A reader of the tokens of spans, which keeps few files open.

    Args:
        spans: All spans, by number.
        dtype: Dtype of the tokens.
    """

    _MAX_OPEN = 128

    def __init__(self, spans: Sequence[SpanFiles], dtype: np.dtype[np.unsignedinteger]) -> None:
        self._spans = spans
        self._dtype = dtype
        self._open: dict[int, int] = {}

    def read(self, span: int, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """Read the tokens [count] of a span from number `start` on."""
        descriptor = self._open.get(span)
        if descriptor is None:
            if len(self._open) == self._MAX_OPEN:
                self.close()
            descriptor = self._open[span] = os.open(self._spans[span].tokens, os.O_RDONLY)
        itemsize = self._dtype.itemsize
        data = os.pread(descriptor, count * itemsize, start * itemsize)
        if len(data) != count * itemsize:
            raise _damaged(self._spans[span].tokens)
        return np.frombuffer(data, dtype=self._dtype)

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])


class SpanWriter:
    """A writer that appends to a span's files after their last commit.

    Args:
        files: Paths of the files.
        dtype: Dtype of the tokens.
        commit_bytes: Bytes of text between two commits.

    Raises:
        DataError: Another process is writing the span.

    Attributes:
        state: Progress of the span, committed or not.
    """

    def __init__(
        self,
        files: SpanFiles,
        dtype: np.dtype[np.unsignedinteger],
        commit_bytes: int = COMMIT_BYTES,
    ) -> None:
        self._commit_bytes = commit_bytes
        self._journal: BinaryIO = files.journal.open("ab")
        if not try_lock(self._journal):
            self._journal.close()
            raise DataError(
                f"another process is writing span {files.number} of {files.directory.parent}; "
                "wait for it, or give every process its own --part"
            )
        self.state, journal_bytes = _replay(files.journal)
        self._journal.truncate(journal_bytes)
        self._tokens = _open_at(files.tokens, self.state.num_tokens * dtype.itemsize)
        self._documents = _open_at(
            files.documents, self.state.num_documents * DOCUMENT_DTYPE.itemsize
        )
        self._forget_news()

    def append(self, unit: Unit, encoded: EncodedUnit) -> None:
        """Append a unit's tokens and documents."""
        assert unit.number == self.state.num_units, "units must come in order, each once"
        state, documents = self.state, encoded.documents
        # The first document may have begun in an earlier unit.
        if len(documents):
            documents["num_tokens"][0] += state.open_tokens
            documents["num_text_bytes"][0] += state.open_text_bytes
            state.open_tokens = state.open_text_bytes = 0
        state.open_tokens += encoded.open_tokens
        state.open_text_bytes += encoded.open_text_bytes
        self._tokens.write(encoded.tokens.data)
        self._documents.write(documents.data)
        # The state counts the unit; what is new goes into the next commit.
        state.num_units += 1
        state.num_tokens += len(encoded.tokens)
        state.num_documents += len(documents)
        state.num_text_bytes += int(documents["num_text_bytes"].sum())
        state.raw_bytes += unit.raw_bytes
        state.digest = unit.digest
        state.notes.add(encoded.notes)
        self._new_problems += encoded.problems
        if len(documents):
            self._new_slice_documents[unit.slice] = self._new_slice_documents.get(
                unit.slice, 0
            ) + len(documents)
        if unit.source is not None:
            self._new_sources[unit.slice] = unit.source
        self._new_bytes += len(unit.data)
        if self._new_bytes >= self._commit_bytes:
            self._commit()

    def finish(self) -> None:
        """Commit the rest, and mark the span as complete."""
        assert not self.state.open_tokens, "the span ends inside a document"
        self.state.is_complete = True
        self._commit()

    def close(self) -> None:
        """Close the files; what is not committed is encoded again by the next process."""
        self._tokens.close()
        self._documents.close()
        self._journal.close()

    def _commit(self) -> None:
        commit: dict[str, Any] = {name: getattr(self.state, name) for name in _COUNTS}
        commit["notes"] = dataclasses.asdict(self.state.notes)
        commit["piece_documents"] = list(self._new_slice_documents.items())
        commit["sources"] = [
            (part, dataclasses.asdict(source)) for part, source in self._new_sources.items()
        ]
        commit["problems"] = [dataclasses.asdict(problem) for problem in self._new_problems]
        _flush(self._tokens)
        _flush(self._documents)
        self._journal.write(json.dumps(commit).encode("ascii") + b"\n")
        _flush(self._journal)
        self._forget_news()

    def _forget_news(self) -> None:
        self._new_bytes = 0
        self._new_problems: list[Problem] = []
        self._new_slice_documents: dict[int, int] = {}
        self._new_sources: dict[int, SourceRead] = {}


def _replay(journal: Path) -> tuple[SpanState, int]:
    """Return the state after the last commit, and the bytes of the journal up to it."""
    state, num_bytes = SpanState(), 0
    for commit, stop in _read_commits(journal):
        num_bytes = stop
        for name in _COUNTS:
            setattr(state, name, commit[name])
        state.notes = EncodingNotes(**commit["notes"])
        for part, count in commit["piece_documents"]:
            state.slice_documents[part] = state.slice_documents.get(part, 0) + count
        for part, source in commit["sources"]:
            state.sources[part] = SourceRead(**source)
    return state, num_bytes


def _read_commits(journal: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each whole commit with the number of bytes up to its end."""
    if not journal.exists():
        return
    num_bytes = 0
    with journal.open("rb") as file:
        for line in file:
            try:
                commit = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            num_bytes += len(line)
            yield commit, num_bytes


def _open_at(path: Path, num_bytes: int) -> BinaryIO:
    """Open a file to append after `num_bytes`, and cut off the rest."""
    file = path.open("ab")
    if file.tell() < num_bytes:
        file.close()
        raise _damaged(path)
    file.truncate(num_bytes)
    return file


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path} is shorter than its journal states; remove {path.parent.parent} and build again"
    )
