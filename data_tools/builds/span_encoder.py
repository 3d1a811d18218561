"""The first half of `build`: encodes the spans of the input to tokens on the disk."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_tools.builds.journal import (
    COMMIT_BYTES,
    SpanFiles,
    SpanState,
    SpanWriter,
    read_state,
)
from data_tools.builds.unit_encoder import UnitEncoder
from data_tools.builds.workers import map_in_order
from data_tools.text.interface import InputFile, TextOptions, Unit
from data_tools.text.spans import Span
from data_tools.text.units import read_units
from megatron_eso.progress import Progress


class SpanEncoder:
    """An encoder of the spans that are not complete, one after the other.

    Args:
        files: All files of the input.
        spans: The spans to encode.
        options: How documents lie in the files.
        directory: Folder of the encoded spans.
        dtype: Dtype of the tokens.
        commit_bytes: Bytes of text between two commits.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        spans: Sequence[Span],
        options: TextOptions,
        directory: Path,
        *,
        dtype: np.dtype[np.unsignedinteger],
        commit_bytes: int = COMMIT_BYTES,
    ) -> None:
        self._files = files
        self._spans = spans
        self._options = options
        self._directory = directory
        self._dtype = dtype
        self._commit_bytes = commit_bytes
        self._writers: dict[int, SpanWriter] = {}

    def run(self, encoder: UnitEncoder, num_workers: int) -> None:
        """Encode the units that are missing.

        Raises:
            DataError: The text is damaged, or another process is writing one of the spans.
        """
        states = [read_state(self._files_of(span)) for span in self._spans]
        progress = Progress(
            "build: encoding",
            sum(span.num_bytes for span in self._spans),
            sum(state.raw_bytes for state in states),
        )
        missing = [
            span for span, state in zip(self._spans, states, strict=True) if not state.is_complete
        ]
        with contextlib.closing(
            map_in_order(encoder, self._read(missing), num_workers)
        ) as encoded_units:
            try:
                for (number, unit), encoded in encoded_units:
                    self._finish_before(number)
                    self._writers[number].append(unit, encoded)
                    progress.advance(unit.raw_bytes)
                self._finish_before(None)
            finally:
                for writer in self._writers.values():
                    writer.close()
        progress.finish()

    def _read(self, spans: Sequence[Span]) -> Iterator[tuple[int, Unit]]:
        """Yield the missing units, each with its span's number; the writer of a span locks it."""
        for span in spans:
            writer = SpanWriter(self._files_of(span), self._dtype, self._commit_bytes)
            self._writers[span.number] = writer
            state = writer.state
            if state.is_complete:
                continue  # another process has completed it since
            for unit in read_units(
                self._files,
                span,
                self._options,
                skip_units=state.num_units,
                skipped_digest=state.digest,
            ):
                yield span.number, unit

    def _finish_before(self, number: int | None) -> None:
        """Finish the spans before number `number`, or all: every unit of them is encoded."""
        for earlier in list(self._writers):
            if earlier == number:
                return
            writer = self._writers.pop(earlier)
            if not writer.state.is_complete:
                writer.finish()
            writer.close()

    def _files_of(self, span: Span) -> SpanFiles:
        return SpanFiles(directory=self._directory, number=span.number)


def read_states(directory: Path, num_spans: int) -> list[SpanState]:
    """Read the progress of all spans of a directory."""
    return [
        read_state(SpanFiles(directory=directory, number=number)) for number in range(num_spans)
    ]
