"""Packs encoded spans into shards; a shard depends on the spans alone, so any process can write it.

For each finished shard, a note keeps what the dataset's index files need of it. After an
interruption, packing continues with the shards that have no note.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.builds.document_order import SPAN_SHIFT, DocumentOrder
from data_tools.builds.journal import SpanFiles, TokenReader
from data_tools.builds.workers import map_in_order
from megatron_eso.data.shards.format import numpy_dtype
from megatron_eso.data.shards.manifest import HashedFile, Split
from megatron_eso.data.shards.writer import RecordFormat, ShardWriter, WrittenShard
from megatron_eso.files import new_file
from megatron_eso.progress import Progress

_READ_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSplit:
    """A dataset to write."""

    directory: Path
    notes: Path
    """Folder for the notes on finished shards."""
    order: DocumentOrder

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the dataset."""
        return int(self.order.group_ends_G[-1]) if len(self.order.group_ends_G) else 0

    def num_shards(self, format: RecordFormat) -> int:
        """Return the number of shards in the dataset."""
        return -(-self.num_tokens // format.shard_tokens)

    def note(self, shard: int) -> Path:
        """Return the path of the note on a shard."""
        return self.notes / f"{shard:05d}.npz"

    def read_notes(self, format: RecordFormat) -> Iterator[WrittenShard]:
        """Yield the notes on all shards, which must be finished."""
        for shard in range(self.num_shards(format)):
            yield _load(self.note(shard))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPacker:
    """A picklable function that writes one shard per task."""

    splits: Mapping[Split, PackedSplit]
    spans: tuple[SpanFiles, ...]
    format: RecordFormat

    def __call__(self, task: tuple[Split, int]) -> int:
        """Write the shard of a task (split, number), then its note; return its number of tokens."""
        split, shard = task
        packed = self.splits[split]
        writer = ShardWriter(packed.directory, self.format, shard)
        reader = TokenReader(self.spans, numpy_dtype(self.format.dtype))
        first = shard * self.format.shard_tokens
        last = min(first + self.format.shard_tokens, packed.num_tokens)
        try:
            for address, count in find_stretches(packed.order, first, last):
                span, start = address >> SPAN_SHIFT, address & ((1 << SPAN_SHIFT) - 1)
                for skipped in range(0, count, _READ_TOKENS):
                    size = min(_READ_TOKENS, count - skipped)
                    writer.append(reader.read(span, start + skipped, size))
        finally:
            reader.close()
        written = writer.close()
        # Last: a note says that the shard is on the disk under its name.
        _save(written, packed.note(shard))
        return last - first


def pack_shards(
    splits: Mapping[Split, PackedSplit],
    spans: Iterable[SpanFiles],
    format: RecordFormat,
    num_workers: int,
) -> None:
    """Write the shards whose note is missing; a note marks a shard that was written.

    Args:
        splits: The datasets to write.
        spans: All spans, by number.
        format: Record format of the datasets.
        num_workers: Number of processes; each writes one shard at a time.
    """
    for packed in splits.values():
        packed.directory.mkdir(parents=True, exist_ok=True)
        packed.notes.mkdir(parents=True, exist_ok=True)
    missing = [
        (split, shard)
        for split, packed in splits.items()
        for shard in range(packed.num_shards(format))
        if not packed.note(shard).exists()
    ]
    itemsize = numpy_dtype(format.dtype).itemsize
    total = sum(packed.num_tokens for packed in splits.values())
    left = sum(
        min(format.shard_tokens, splits[split].num_tokens - shard * format.shard_tokens)
        for split, shard in missing
    )
    progress = Progress("build: packing", total * itemsize, (total - left) * itemsize)
    packer = ShardPacker(splits=splits, spans=tuple(spans), format=format)
    for _, num_tokens in map_in_order(packer, missing, max(1, min(num_workers, len(missing)))):
        progress.advance(num_tokens * itemsize)
    progress.finish()


def find_stretches(order: DocumentOrder, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the addresses and lengths of the stretches that hold the tokens [first, last).

    Adjacent documents are one stretch.
    """
    group = int(np.searchsorted(order.group_ends_G, first, side="right"))
    position = int(order.group_ends_G[group - 1]) if group else 0
    while position < last:
        address_D, num_tokens_D = order.read_group(group)
        for address, count in _join(address_D, num_tokens_D):
            skipped = max(0, first - position)
            taken = min(count, last - position) - skipped
            if taken > 0:
                yield address + skipped, taken
            position += count
        group += 1


def _join(
    address_D: npt.NDArray[np.int64], num_tokens_D: npt.NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    if not len(address_D):
        return
    is_new_D = np.ones(len(address_D), dtype=np.bool_)
    is_new_D[1:] = address_D[1:] != address_D[:-1] + num_tokens_D[:-1]
    begins = np.flatnonzero(is_new_D)
    counts = np.add.reduceat(num_tokens_D, begins)
    yield from zip(address_D[begins].tolist(), counts.tolist(), strict=True)


def _save(shard: WrittenShard, path: Path) -> None:
    with new_file(path) as file:
        np.savez(
            file,
            name=shard.file.name,
            bytes=shard.file.bytes,
            sha256=shard.file.sha256,
            num_tokens=shard.num_tokens,
            blocks=shard.blocks,
            document_ends=shard.document_ends,
        )


def _load(path: Path) -> WrittenShard:
    with np.load(path) as note:
        return WrittenShard(
            file=HashedFile(
                name=str(note["name"]), bytes=int(note["bytes"]), sha256=str(note["sha256"])
            ),
            num_tokens=int(note["num_tokens"]),
            blocks=note["blocks"],
            document_ends=note["document_ends"],
        )
