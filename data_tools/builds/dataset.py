"""`build`: makes datasets of token shards from text files; `merge` completes a build in parts.

A build has two halves. Each continues after an interruption:

    encode   the input, span by span, to tokens in OUT.building/spans (span_encoder.py)
    merge    the spans to shards, which appear as OUT when they are complete (merging.py)

The jobs of an array share the first half: part i of n encodes the spans with number % n == i. The
bytes of OUT depend on the input and the options in `plan.BuildPlan` alone.
"""

import contextlib
import errno
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.builds.journal import COMMIT_BYTES, SpanFiles, read_state
from data_tools.builds.merging import (
    SKIPPED_FILE,
    SPANS_FOLDER,
    MergeReport,
    is_published,
    merge_spans,
    publish_datasets,
    split_directories,
)
from data_tools.builds.output import building_path, check_absent, explain_path
from data_tools.builds.plan import (
    BuildPlan,
    StoredPlan,
    check_plan,
    list_inputs,
    read_plan,
    store_plan,
)
from data_tools.builds.span_encoder import SpanEncoder, read_states
from data_tools.builds.unit_encoder import UnitEncoder
from data_tools.text.inputs import find_inputs
from data_tools.text.interface import InputFile, TextOptions
from data_tools.text.spans import SPAN_BYTES, Span, plan_spans
from megatron_eso.data.shards.format import (
    RECORD_TOKENS,
    SHARD_RECORDS,
    choose_dtype,
    numpy_dtype,
)
from megatron_eso.data.shards.manifest import Split, read_manifest
from megatron_eso.data.shards.writer import choose_format
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError, DataError
from megatron_eso.files import LOCK_FILE, empty_folder
from megatron_eso.locks import hold_lock
from megatron_eso.quantities import format_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The share of one process in a build."""

    number: int = 0
    count: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """Options of `build`."""

    inputs: Sequence[str]
    """Files, folders, globs, or `-` for standard input."""
    tokenizer: str
    out: Path
    text: TextOptions = TextOptions()
    num_workers: int = 1
    validation_share: float = 0.0
    """Share of the documents for `out/validation`; 0 makes one dataset, `out`."""
    deduplicate: bool = False
    """Whether documents are left out whose text equals an earlier one."""
    shuffle_seed: int | None = None
    """Key of a random order of the documents; None: the order of the input."""
    part: Part | None = None
    """The part to encode, to be merged later; None builds the whole."""
    record_tokens: int = RECORD_TOKENS
    shard_records: int = SHARD_RECORDS
    span_bytes: int = SPAN_BYTES
    commit_bytes: int = COMMIT_BYTES


def build_dataset(options: BuildOptions) -> dict[Split, str]:
    """Build one dataset, or two with a validation share; equal input gives equal bytes.

    Returns:
        The id of each dataset by split; empty for a part.

    Raises:
        ConfigError: An input or the output path is wrong, or an interrupted build has other
            options.
        DataError: Text or tokenizer are damaged or do not fit.
    """
    building = building_path(options.out)
    with explain_path(options.out):
        if not is_published(building, options.out):
            check_absent(options.out)
    files = find_inputs(options.inputs, options.text.standard_input)
    spans = plan_spans(files, options.span_bytes)
    tokenizer = Tokenizer.load(options.tokenizer)
    wanted = _make_plan(options, files, tokenizer)
    is_part = options.part is not None
    with _hold_lock(options.out, shared=is_part), _explain_disk_errors(building):
        try:
            stored = _resume(building, wanted, tokenizer, options)
            if (building / SPANS_FOLDER).exists():
                _encode(building, files, spans, tokenizer, options)
            if is_part:
                _report_part(options, spans, building)
                return {}
            report = merge_spans(building, stored, spans, options.num_workers)
        except Exception:
            if not is_part and _is_little(building, options.commit_bytes):
                shutil.rmtree(building)
            raise
        publish_datasets(building, options.out)
    return _report(options.out, stored.plan, report)


def merge_parts(out: Path, num_workers: int = 1) -> dict[Split, str]:
    """Merge the spans that the parts of a build have encoded.

    Returns:
        The id of each dataset by split.

    Raises:
        ConfigError: No part was encoded, or the output path is wrong.
        DataError: Parts are missing, or another process is writing.
    """
    building = building_path(out)
    with explain_path(out):
        if not is_published(building, out):
            check_absent(out)
    stored = read_plan(building)
    if stored is None:
        raise ConfigError(f"there is no {building} to merge; run build with --part first")
    with _hold_lock(out), _explain_disk_errors(building):
        report = merge_spans(building, stored, stored.plan.plan_spans(), num_workers)
        publish_datasets(building, out)
    return _report(out, stored.plan, report)


def _resume(
    building: Path, wanted: BuildPlan, tokenizer: Tokenizer, options: BuildOptions
) -> StoredPlan:
    """Return the stored plan; store the wanted one if there is none or little work was done."""
    stored = read_plan(building)
    if options.part is None and (
        stored is None or (stored.plan != wanted and _is_little(building, options.commit_bytes))
    ):
        empty_folder(building)
        stored = None
    if stored is None:
        # Made before the plan: a plan without this folder means that all spans are merged.
        (building / SPANS_FOLDER).mkdir(exist_ok=True)
        part = options.part or Part()
        offered = StoredPlan(plan=wanted, num_parts=part.count, tokenizer_files=tokenizer.files())
        stored = store_plan(building, offered)
    check_plan(building, stored.plan, wanted)
    return stored


def _is_little(building: Path, num_bytes: int) -> bool:
    """Return whether fewer than `num_bytes` of text have been encoded."""
    folder = building / SPANS_FOLDER
    begun = [
        SpanFiles(directory=folder, number=int(path.stem)) for path in folder.glob("*.journal")
    ]
    done = sum(read_state(files).num_text_bytes for files in begun)
    return folder.exists() and done < num_bytes


def _encode(
    building: Path,
    files: Sequence[InputFile],
    spans: Sequence[Span],
    tokenizer: Tokenizer,
    options: BuildOptions,
) -> None:
    text_options = replace(options.text, cuts_documents=tokenizer.splits_at_newlines)
    span_encoder = SpanEncoder(
        files,
        _choose_spans(spans, options),
        text_options,
        building / SPANS_FOLDER,
        dtype=numpy_dtype(choose_dtype(tokenizer.vocab_size)),
        commit_bytes=options.commit_bytes,
    )
    span_encoder.run(UnitEncoder(tokenizer, text_options), options.num_workers)


def _choose_spans(spans: Sequence[Span], options: BuildOptions) -> list[Span]:
    part = options.part or Part()
    return [span for span in spans if span.number % part.count == part.number]


@contextlib.contextmanager
def _hold_lock(out: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock an unfinished build against other processes; parts share their lock."""
    building = building_path(out)
    with contextlib.ExitStack() as stack:
        with explain_path(out):
            building.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(hold_lock(building / LOCK_FILE, shared=shared))
        if not lock.is_held:
            raise DataError(f"another process is writing {building}; wait for it")
        yield


@contextlib.contextmanager
def _explain_disk_errors(building: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        raise DataError(
            f"cannot write {building}: {error.strerror}; correct that and run again to continue"
        ) from error


def _make_plan(
    options: BuildOptions, files: Sequence[InputFile], tokenizer: Tokenizer
) -> BuildPlan:
    fingerprint = tokenizer.fingerprint()
    choose_format(fingerprint, options.record_tokens, options.shard_records)
    return BuildPlan(
        text_key=options.text.text_key,
        document_separator=options.text.document_separator,
        validation=options.validation_share,
        deduplicate=options.deduplicate,
        shuffle=options.shuffle_seed,
        record_tokens=options.record_tokens,
        shard_records=options.shard_records,
        span_bytes=options.span_bytes,
        tokenizer=fingerprint,
        input=list_inputs(files),
    )


def _report_part(options: BuildOptions, spans: Sequence[Span], building: Path) -> None:
    assert options.part is not None
    states = read_states(building / SPANS_FOLDER, len(spans))
    chosen = [states[span.number] for span in _choose_spans(spans, options)]
    sys.stdout.write(
        f"part {options.part.number}/{options.part.count}: {len(chosen)} of {len(spans)} spans, "
        f"{sum(state.num_documents for state in chosen)} documents, "
        f"{sum(state.num_tokens for state in chosen)} tokens; "
        f"when all parts are done: python -m data_tools merge {options.out}\n"
    )


def _report(out: Path, plan: BuildPlan, report: MergeReport | None) -> dict[Split, str]:
    ids: dict[Split, str] = {}
    for split, directory in split_directories(out, plan.validation).items():
        manifest, ids[split] = read_manifest(directory)
        sys.stdout.write(
            f"{directory}: {format_count(manifest.num_documents, 'document')}, "
            f"{manifest.num_tokens} tokens, dataset id {ids[split]}\n"
        )
    if report is None:
        return ids
    notes = report.notes
    sys.stdout.write(
        f"round trip: {notes.exact_round_trips} of {notes.round_trips} sampled documents exact; "
        f"U+2581 in the text (decoded as a space): {notes.word_boundary_characters}; "
        f"empty documents left out: {notes.empty_documents}\n"
    )
    if report.num_duplicates is not None:
        sys.stdout.write(f"duplicates left out: {report.num_duplicates}\n")
    if notes.problems:
        sys.stdout.write(
            f"broken lines, rows and files left out: {notes.problems}, listed in "
            f"{out / SKIPPED_FILE}\n"
        )
    return ids
