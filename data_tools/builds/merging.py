"""The second half of `build`: makes datasets from encoded spans, and publishes them at once.

All files are written to `OUT.building/dataset`, which is renamed to OUT at the end. Each step can
be repeated: after a kill, finished files are kept and the others are written again. When all files
are written, one rename marks the spans as finished.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_tools.builds.deduplication import CountedSpan, mark_duplicates
from data_tools.builds.document_order import (
    DocumentOrder,
    Selection,
    SplitCounts,
    shuffle,
    survey,
)
from data_tools.builds.journal import SpanFiles, SpanState, read_problems
from data_tools.builds.packing import PackedSplit, pack_shards
from data_tools.builds.plan import PLAN_FILE, BuildPlan, StoredPlan
from data_tools.builds.span_encoder import read_states
from data_tools.builds.unit_encoder import EncodingNotes
from data_tools.text.spans import Span
from megatron_eso.data.shards.manifest import Source, Split
from megatron_eso.data.shards.writer import (
    DatasetOrigin,
    DatasetPublisher,
    HashingFile,
    RecordFormat,
    choose_format,
)
from megatron_eso.errors import DataError
from megatron_eso.files import is_taken, rename, sync_path

SPANS_FOLDER = "spans"
SKIPPED_FILE = "skipped.jsonl"
"""Names the lines, rows and files that were left out: a JSON object per line."""

_DATASET_FOLDER = "dataset"
_PACKING_FOLDER = "packing"
_FINISHED_FOLDER = "finished"


@dataclass(kw_only=True, slots=True)
class MergeReport:
    """Facts about a merge that the user should know."""

    notes: EncodingNotes = field(default_factory=EncodingNotes)
    num_duplicates: int | None = None


def merge_spans(
    building: Path, stored: StoredPlan, spans: Sequence[Span], num_workers: int
) -> MergeReport | None:
    """Write the datasets to `building/dataset`, then mark the spans as finished.

    Returns:
        Facts about the merge; None where an earlier process has completed it.

    Raises:
        DataError: Spans are missing, or a split has no documents.
    """
    folder = building / SPANS_FOLDER
    if not folder.exists():
        return None
    states = read_states(folder, len(spans))
    _check_complete(building, states, stored.num_parts)
    report = _Merge(building, stored, spans, states).run(num_workers)
    rename(folder, building / _FINISHED_FOLDER)
    return report


def publish_datasets(building: Path, out: Path) -> None:
    """Rename the finished datasets to `out`, and remove the rest of the build."""
    dataset = building / _DATASET_FOLDER
    if dataset.exists():
        rename(dataset, out)
    # The plan is removed last: while it exists, the next start removes the rest.
    for folder in (_FINISHED_FOLDER, _PACKING_FOLDER):
        shutil.rmtree(building / folder, ignore_errors=True)
    shutil.rmtree(building)


def is_published(building: Path, out: Path) -> bool:
    """Return whether a killed process has published `out` without removing `building`."""
    is_left = any((building / name).exists() for name in (SPANS_FOLDER, _DATASET_FOLDER))
    return (building / PLAN_FILE).exists() and is_taken(out) and not is_left


def split_directories(directory: Path, validation_share: float) -> dict[Split, Path]:
    """Return the folder of each dataset by split."""
    if validation_share:
        return {"train": directory / "train", "validation": directory / "validation"}
    return {"all": directory}


class _Merge:
    def __init__(
        self,
        building: Path,
        stored: StoredPlan,
        spans: Sequence[Span],
        states: Sequence[SpanState],
    ) -> None:
        self._plan: BuildPlan = stored.plan
        self._tokenizer_files = stored.tokenizer_files
        self._spans = spans
        self._states = states
        self._dataset = building / _DATASET_FOLDER
        self._packing = building / _PACKING_FOLDER
        self._format: RecordFormat = choose_format(
            self._plan.tokenizer, self._plan.record_tokens, self._plan.shard_records
        )
        self._files = [
            SpanFiles(directory=building / SPANS_FOLDER, number=span.number) for span in spans
        ]
        self._counted = [
            CountedSpan(files=files, num_documents=state.num_documents)
            for files, state in zip(self._files, states, strict=True)
        ]

    def run(self, num_workers: int) -> MergeReport:
        # Which documents each split gets, and in which order.
        self._dataset.mkdir(exist_ok=True)
        self._packing.mkdir(exist_ok=True)
        marks = self._packing / "duplicates.u8" if self._plan.deduplicate else None
        if marks is not None:
            mark_duplicates(self._counted, marks, num_workers)
        directories = split_directories(self._dataset, self._plan.validation)
        found = {split: self._arrange(split, marks) for split in directories}
        counts = {split: count for split, (_, count) in found.items()}
        _check_not_empty(counts, self._plan.validation)
        # The shards, then the manifests.
        packed = {
            split: PackedSplit(
                directory=directories[split], notes=self._packing / split, order=order
            )
            for split, (order, _) in found.items()
        }
        pack_shards(packed, self._files, self._format, num_workers)
        self._list_problems()
        for split, one in packed.items():
            self._publish_split(split, one, counts[split])
        sync_path(self._dataset)
        # What the user should know.
        report = MergeReport()
        for state in self._states:
            report.notes.add(state.notes)
        if marks is not None:
            report.num_duplicates = sum(count.num_duplicates for count in counts.values())
        return report

    def _arrange(self, split: Split, marks: Path | None) -> tuple[DocumentOrder, SplitCounts]:
        selection = Selection(split=split, validation_share=self._plan.validation, marks=marks)
        slices = [
            np.array(
                [state.slice_documents.get(part, 0) for part in range(len(span.slices))],
                dtype=np.int64,
            )
            for span, state in zip(self._spans, self._states, strict=True)
        ]
        order, counts = survey(self._counted, slices, selection)
        if self._plan.shuffle is None:
            return order, counts
        addresses = self._packing / f"{split}.addresses"
        return shuffle(order, counts, self._plan.shuffle, addresses), counts

    def _publish_split(self, split: Split, packed: PackedSplit, counts: SplitCounts) -> None:
        publisher = DatasetPublisher(packed.directory, self._format)
        for shard in packed.read_notes(self._format):
            publisher.add(shard)
        publisher.publish(
            DatasetOrigin(
                tokenizer=self._plan.tokenizer,
                tokenizer_files=self._tokenizer_files,
                sources=self._list_sources(counts),
                num_text_bytes=counts.num_text_bytes,
                split=split,
                validation_share=self._plan.validation,
                shuffle_seed=self._plan.shuffle,
                num_duplicates=counts.num_duplicates if self._plan.deduplicate else None,
            )
        )

    def _list_sources(self, counts: SplitCounts) -> list[Source]:
        return [
            Source(
                path=self._plan.input[part.file].name,
                offset=part.start,
                bytes=state.sources[index].num_bytes,
                sha256=state.sources[index].sha256,
                num_documents=int(num_documents[index]),
            )
            for span, state, num_documents in zip(
                self._spans, self._states, counts.slice_documents, strict=True
            )
            for index, part in enumerate(span.slices)
        ]

    def _list_problems(self) -> None:
        if not any(state.notes.problems for state in self._states):
            return
        file = HashingFile(self._dataset / SKIPPED_FILE)
        for files in self._files:
            for problem in read_problems(files):
                file.write(json.dumps(asdict(problem)).encode("ascii") + b"\n")
        file.close()


def _check_complete(building: Path, states: Sequence[SpanState], num_parts: int) -> None:
    missing = [number for number, state in enumerate(states) if not state.is_complete]
    if missing:
        parts = sorted({number % num_parts for number in missing})
        raise DataError(
            f"{building} lacks {len(missing)} of {len(states)} spans; run again "
            f"--part {', '.join(f'{part}/{num_parts}' for part in parts)}"
        )
    if not any(state.num_documents for state in states):
        raise DataError("the input holds no document with text; check --input and --text-key")


def _check_not_empty(counts: Mapping[Split, SplitCounts], validation_share: float) -> None:
    total = sum(each.num_documents for each in counts.values())
    for split, each in counts.items():
        if not each.num_documents:
            raise DataError(
                f"none of the {total} documents went to the {split} split at --validation "
                f"{validation_share}; change the share or give more documents"
            )
