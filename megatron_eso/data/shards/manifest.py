"""The manifest of a dataset: its sizes, tokenizer, sources and files, with their hashes.

`manifest.json` is canonical (sorted keys, fixed indentation, ASCII), so equal content has equal
bytes. The sha256 of the file is the dataset id that runs record. The field `checksum` is the sha256
of the canonical text without that field, and a damaged manifest is refused.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_eso.data.shards.format import (
    BLOCK_BYTES,
    BLOCKS_FILE,
    DOCUMENTS_FILE,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    ShardLayout,
    TokenDtype,
    shard_name,
)
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import DataError

Split = Literal["all", "train", "validation"]

RESTORE = "restore the dataset from its source or build it again"
"""The remedy for every damage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file that the text came from, or a slice of one."""

    path: str
    """Relative to the input that named it, so that the dataset id does not depend on folders."""
    offset: int = 0
    """Offset of the slice in the file; above 0 for the later slices of a large file."""
    bytes: int
    """Size of the file, or of the slice."""
    sha256: str
    """Hash of these bytes."""
    num_documents: int
    """Documents that begin in these bytes and are in this dataset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HashedFile:
    """A file of the dataset with its size and hash."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    members: tuple[str, ...] = ("tokens",)
    """Members of a record in the shards: the tokens alone in this version."""
    block_bytes: int = BLOCK_BYTES
    dtype: TokenDtype
    record_tokens: int
    shard_records: int
    num_tokens: int
    num_documents: int
    num_text_bytes: int
    """UTF-8 bytes of the documents, for bits per byte."""
    num_duplicates: int | None
    """Documents left out because an earlier one has the same text; None: it was not checked."""
    split: Split
    validation_share: float
    """Share of the documents that went to the validation split, by the hash of their text."""
    shuffle_seed: int | None
    """Key of the random order of the documents; None: they have the order of the sources."""
    tokenizer: TokenizerFingerprint
    tokenizer_files: tuple[HashedFile, ...]
    sources: tuple[Source, ...]
    shards: tuple[HashedFile, ...]
    blocks: HashedFile
    documents: HashedFile

    @property
    def layout(self) -> ShardLayout:
        """The layout of the tokens in the shards."""
        return ShardLayout(
            dtype=self.dtype,
            record_tokens=self.record_tokens,
            shard_records=self.shard_records,
            num_tokens=self.num_tokens,
        )

    def encode(self) -> bytes:
        """Return the canonical bytes of the manifest's file."""
        fields = dataclasses.asdict(self)
        return _canonical_json(fields | {"checksum": _checksum(fields)})


def dataset_id(encoded: bytes) -> str:
    """Return the id of the dataset whose manifest file holds `encoded`."""
    return hashlib.sha256(encoded).hexdigest()


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """Read and check a dataset's manifest.

    Returns:
        The manifest and the dataset id.

    Raises:
        DataError: The manifest is missing or damaged, or has another format or version.
    """
    path = directory / MANIFEST_FILE
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise DataError(_explain_missing(directory, error)) from error
    return decode_manifest(encoded, path), dataset_id(encoded)


def decode_manifest(encoded: bytes, path: Path | str) -> Manifest:
    """Parse and check the content of a manifest file; `path` is named in errors.

    Raises:
        DataError: The manifest is damaged, or has another format or version.
    """
    try:
        fields = json.loads(encoded)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); {RESTORE}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DataError(
            f"{path} is not a manifest of {FORMAT}; give a directory of data_tools build"
        )
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {version}, this program reads {FORMAT_VERSION}; "
            "use the program's version that wrote it, or build the dataset again"
        )
    is_canonical = encoded == _canonical_json(fields)
    checksum = fields.pop("checksum", None)
    if checksum != _checksum(fields) or not is_canonical:
        raise DataError(f"{path} does not match its checksum; {RESTORE}")
    try:
        manifest: Manifest = _decode_dataclass(Manifest, fields)
        _check_consistency(manifest)
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"{path} is inconsistent ({error}); {RESTORE}") from error
    return manifest


def _explain_missing(directory: Path, error: OSError) -> str:
    if not directory.is_dir():
        return f"no dataset at {directory}: there is no such directory"
    parts = [
        name for name in ("train", "validation") if (directory / name / MANIFEST_FILE).is_file()
    ]
    if parts:
        choice = " or ".join(str(directory / name) for name in parts)
        return f"{directory} holds several datasets; give {choice}"
    if isinstance(error, FileNotFoundError):
        return f"{directory} holds no {MANIFEST_FILE}; make it with python -m data_tools build"
    return f"cannot read {directory / MANIFEST_FILE}: {error.strerror}"


def _check_consistency(manifest: Manifest) -> None:
    """Raise ValueError where numbers contradict each other."""
    for name in ("record_tokens", "shard_records", "num_tokens", "num_documents"):
        if getattr(manifest, name) < 1:
            raise ValueError(f"{name} is {getattr(manifest, name)}")
    if manifest.members != ("tokens",) or manifest.block_bytes != BLOCK_BYTES:
        raise ValueError("members or block_bytes are not of this version")
    if manifest.tokenizer.mask_token_id >= manifest.tokenizer.vocab_size:
        raise ValueError("the mask token lies outside the vocabulary")
    if manifest.dtype == "u16" and manifest.tokenizer.vocab_size > 2**16:
        raise ValueError("the vocabulary does not fit into 16 bits")
    layout = manifest.layout
    if len(manifest.shards) != layout.num_shards:
        raise ValueError(f"{len(manifest.shards)} shards are listed, not {layout.num_shards}")
    files = (*manifest.shards, manifest.blocks, manifest.documents)
    expected = [(shard_name(n), layout.shard_bytes(n)) for n in range(layout.num_shards)]
    expected.append((BLOCKS_FILE, 8 * layout.num_blocks))
    expected.append((DOCUMENTS_FILE, 8 * layout.num_records))
    for file, (name, size) in zip(files, expected, strict=True):
        if file.name != name or file.bytes != size:
            raise ValueError(f"{file.name} of {file.bytes} bytes is not {name} of {size} bytes")


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical_json(fields)).hexdigest()


def _canonical_json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=True).encode("ascii") + b"\n"


def _decode_dataclass(kind: Any, fields: Any) -> Any:
    """Build a dataclass from JSON values; TypeError where keys or types differ."""
    if not isinstance(fields, dict):
        raise TypeError(f"{kind.__name__} is not an object")
    hints = _get_hints(kind)
    if fields.keys() != hints.keys():
        names = ", ".join(sorted(fields.keys() ^ hints.keys()))
        raise TypeError(f"{kind.__name__} differs in {names}")
    return kind(**{name: _decode_value(hints[name], value, name) for name, value in fields.items()})


_get_hints = functools.cache(get_type_hints)


def _decode_value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, value)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode_value(arguments[0], item, name) for item in value)
    if origin is Literal:
        accepted = value in arguments
    elif isinstance(hint, UnionType):
        accepted = type(value) in arguments
    else:
        accepted = type(value) is hint
    if not accepted:
        raise TypeError(f"{name} is {value!r}")
    return value
