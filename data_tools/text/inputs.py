"""What the user names by `--input`: the files, how text lies in them, and the spans of work.

A `.jsonl` file holds a document per line, under the text key; a `.parquet` file a document per row,
in the column of that name; a `.txt` file is one document, or several with a separator between them.
"""

import codecs
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_eso.errors import ConfigError, DataError

Kind = Literal["jsonl", "txt", "parquet"]
Compression = Literal["gzip", "zstd"]
OnError = Literal["stop", "skip"]

STANDARD_INPUT = "-"
SPAN_BYTES = 2**30

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = ".jsonl, .ndjson, .json, .txt (each also .gz, .zst) and .parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """A file to read documents from."""

    path: Path | None
    """None for standard input."""
    name: str
    """Path relative to the input that named it; goes into the manifest."""
    kind: Kind
    compression: Compression | None
    """None for standard input, which is looked at when it is read."""
    num_bytes: int
    """On the disk; 0 for standard input."""

    def check_size(self, num_bytes: int) -> None:
        """See that the file still has its size.

        Raises:
            DataError: it has another.
        """
        if num_bytes != self.num_bytes:
            raise DataError(
                f"{self.path} had {self.num_bytes} bytes at the start and has {num_bytes} now; "
                "start again when nothing writes to the input any more"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A file, or of a large JSONL file the lines whose first byte is in a range."""

    file: int
    """Number of the input file."""
    start: int
    stop: int
    """Bytes of the file as it lies on the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Pieces of the input that are worked on as one, in order."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How documents lie in the files, and what to do about those that are broken."""

    text_key: str = "text"
    document_separator: str | None = None
    """Between the documents of a `.txt` file; None: each file is a document."""
    on_error: OnError = "stop"
    cuts_documents: bool = True
    """Long documents of `.txt` files may be cut after newlines and handed out in parts."""


def find_inputs(paths: Sequence[str]) -> list[InputFile]:
    """The input files in order: as given; those of a folder or glob in the order of their paths.

    A path that exists is taken as it is; else it may be a glob, `**` for any depth. Folders are
    searched through, hidden files and unknown kinds left out. `-` is JSONL on standard input.

    Raises:
        ConfigError: a path is missing, of an unknown kind, without text, or named twice.
    """
    inputs: list[InputFile] = []
    for text in paths:
        path = Path(text)
        if text == STANDARD_INPUT:
            inputs.append(
                InputFile(path=None, name=text, kind="jsonl", compression=None, num_bytes=0)
            )
        elif path.is_dir():
            inputs.extend(_describe_all(text, path, _search_folder(path)))
        elif path.is_file():
            inputs.append(_describe(path, path.name, f"--input {text}"))
        elif path.exists():
            raise ConfigError(f"--input {text}: neither file nor folder; pipe it in by --input -")
        elif glob.has_magic(text):
            inputs.extend(_describe_all(text, *_match_glob(text)))
        else:
            raise ConfigError(f"--input {text}: there is no such file or folder")
    _check_distinct(inputs)
    return inputs


def plan_spans(files: Sequence[InputFile], span_bytes: int = SPAN_BYTES) -> list[Span]:
    """Cut the input into spans of about `span_bytes`, by the sizes of the files alone.

    Plain JSONL files are cut where they are larger; small files go together.
    """
    spans: list[Span] = []
    pending: list[Piece] = []
    size = 0
    for piece in _cut_files(files, span_bytes):
        num_bytes = piece.stop - piece.start
        if pending and size + num_bytes > span_bytes:
            spans.append(Span(number=len(spans), pieces=tuple(pending)))
            pending, size = [], 0
        pending.append(piece)
        size += num_bytes
    if pending:
        spans.append(Span(number=len(spans), pieces=tuple(pending)))
    return spans


def parse_separator(text: str) -> str:
    r"""The document separator that a command line means, where `\n`, `\t`, `\x1e` are escapes.

    Raises:
        ConfigError: it is empty or a broken escape.
    """
    try:
        # Characters beyond Latin-1 become escapes themselves; a broken escape at the end raises.
        raw = text.encode("latin-1", "backslashreplace")
        separator = codecs.decode(raw, "unicode_escape")
        separator.encode("utf-8")
    except UnicodeError as error:
        raise ConfigError(
            f"--document-separator {text}: broken escape; write a backslash as \\\\"
        ) from error
    if not separator:
        raise ConfigError("--document-separator is empty; leave it out for a document per file")
    return separator


def _search_folder(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and path.is_file():
            yield path


def _match_glob(pattern: str) -> tuple[Path, set[Path]]:
    """The folder that the pattern starts from, and the files that it matches or holds."""
    fixed: list[str] = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    found: set[Path] = set()
    for match in map(Path, glob.iglob(pattern, recursive=True)):
        found.update(_search_folder(match) if match.is_dir() else [match])
    return Path(*fixed), found


def _describe_all(text: str, root: Path, paths: Iterator[Path] | set[Path]) -> list[InputFile]:
    named = sorted(
        (path.relative_to(root).as_posix(), path) for path in paths if _find_kind(path) is not None
    )
    if not named:
        raise ConfigError(f"--input {text}: no text there; the kinds are {_KNOWN}")
    return [_describe(path, name, f"--input {text}") for name, path in named]


def _describe(path: Path, name: str, argument: str) -> InputFile:
    kind = _find_kind(path)
    if kind is None:
        raise ConfigError(f"{argument}: unknown kind of file; the kinds are {_KNOWN}")
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{argument}: cannot read {path}: {error.strerror}") from error
    compression = _COMPRESSIONS.get(path.suffix)
    return InputFile(path=path, name=name, kind=kind, compression=compression, num_bytes=num_bytes)


def _find_kind(path: Path) -> Kind | None:
    if path.suffix not in _COMPRESSIONS:
        return _KINDS.get(path.suffix)
    kind = _KINDS.get(path.with_suffix("").suffix)
    return None if kind == "parquet" else kind


def _check_distinct(inputs: Sequence[InputFile]) -> None:
    seen: set[Path | None] = set()
    for file in inputs:
        path = None if file.path is None else file.path.resolve()
        if path in seen:
            raise ConfigError(f"--input names {file.path or STANDARD_INPUT} twice; name it once")
        seen.add(path)


def _cut_files(files: Sequence[InputFile], span_bytes: int) -> Iterator[Piece]:
    for number, file in enumerate(files):
        is_cut = file.kind == "jsonl" and file.compression is None and file.num_bytes > span_bytes
        step = span_bytes if is_cut else max(1, file.num_bytes)
        for start in range(0, max(1, file.num_bytes), step):
            yield Piece(file=number, start=start, stop=min(start + step, file.num_bytes))
