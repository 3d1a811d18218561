"""Layout of token shards on disk; the offset of every record, block and data row is computed.

A dataset is a directory:

    manifest.json        canonical JSON; its sha256 is the dataset id (manifest.py)
    shard-00000.tar ...  uncompressed ustar archives, valid WebDataset shards
    blocks.xxh3          little-endian uint64: xxh3_64 of every 32 KiB block of every record
    documents.u64        little-endian uint64 per record: the document of its first token
    tokenizer/           the tokenizer's files

A shard holds `__meta__/shard.json`, which WebDataset readers ignore, and then one member for each
record, `NNNNNNNN.tokens.u16` or `.u32`, little endian. Every record holds `record_tokens` tokens;
only the last one of the dataset may be shorter. A block never crosses a record. Documents are
concatenated, each followed by the end-of-text token, which shows their boundaries.

All sizes are computed from (dtype, record_tokens, shard_records, num_tokens), so records are not
listed. The same input gives the same bytes: times, owners and modes in the archives are fixed.
"""

import json
import tarfile
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FORMAT = "megatron_eso.tokens"
FORMAT_VERSION = 1

RECORD_TOKENS = 2**20
"""Tokens of a record by default."""
SHARD_RECORDS = 256
"""Records of a shard by default: 512 MiB of 16-bit tokens."""
MAX_RECORD_TOKENS = 2**30
"""The header of an archive's member can state 8 GiB, and a token has up to 4 bytes."""
MAX_SHARD_RECORDS = 10**8
"""The name of a record has 8 digits."""
BLOCK_BYTES = 32 * 1024
"""Bytes that share one hash: the unit in which a read is checked."""

MANIFEST_FILE = "manifest.json"
BLOCKS_FILE = "blocks.xxh3"
DOCUMENTS_FILE = "documents.u64"
TOKENIZER_FOLDER = "tokenizer"

TokenDtype = Literal["u16", "u32"]

_SECTOR = 512
_META_BYTES = 512
_FIRST_RECORD_OFFSET = _SECTOR + _META_BYTES
_END_OF_ARCHIVE = bytes(2 * _SECTOR)


def choose_dtype(vocab_size: int) -> TokenDtype:
    """Return the narrowest type for all ids of the vocabulary, the mask token included."""
    return "u16" if vocab_size <= 2**16 else "u32"


def numpy_dtype(dtype: TokenDtype) -> np.dtype[np.unsignedinteger]:
    """Return the little-endian numpy type of a token."""
    return np.dtype("<u2") if dtype == "u16" else np.dtype("<u4")


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{shard:05d}.tar"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """The arithmetic of a dataset's layout. Records are numbered over all shards, from 0."""

    dtype: TokenDtype
    record_tokens: int
    """Tokens of each record except the last, at least 1."""
    shard_records: int
    """Records of each shard except the last, at least 1."""
    num_tokens: int
    """Tokens of the whole dataset, at least 1."""

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return 2 if self.dtype == "u16" else 4

    @property
    def num_records(self) -> int:
        """Records of the dataset."""
        return -(-self.num_tokens // self.record_tokens)

    @property
    def num_shards(self) -> int:
        """Shards of the dataset."""
        return -(-self.num_records // self.shard_records)

    @property
    def blocks_per_record(self) -> int:
        """Blocks of every record except the last, which may have fewer."""
        return -(-self.record_tokens * self.itemsize // BLOCK_BYTES)

    @property
    def num_blocks(self) -> int:
        """Blocks of the dataset."""
        last = self.num_records - 1
        return last * self.blocks_per_record + -(-self.record_bytes(last) // BLOCK_BYTES)

    @property
    def record_stride(self) -> int:
        """Bytes from one record of a shard to the next: header, data, padding."""
        return _SECTOR + _padded(self.record_tokens * self.itemsize)

    def record_num_tokens(self, record: int) -> int:
        """Return the tokens of a record."""
        return min(self.record_tokens, self.num_tokens - record * self.record_tokens)

    def record_bytes(self, record: int) -> int:
        """Return the bytes of a record's tokens."""
        return self.record_num_tokens(record) * self.itemsize

    def shard_num_records(self, shard: int) -> int:
        """Return the records of a shard."""
        return min(self.shard_records, self.num_records - shard * self.shard_records)

    def shard_bytes(self, shard: int) -> int:
        """Return the bytes of a shard's file."""
        records = self.shard_num_records(shard)
        last = shard * self.shard_records + records - 1
        return (
            _FIRST_RECORD_OFFSET
            + (records - 1) * self.record_stride
            + _SECTOR
            + _padded(self.record_bytes(last))
            + len(_END_OF_ARCHIVE)
        )

    def record_offset(self, record: int) -> int:
        """Return the offset of a record's first token in its shard's file."""
        return _FIRST_RECORD_OFFSET + record % self.shard_records * self.record_stride + _SECTOR

    def num_rows(self, sequence_length: int) -> int:
        """Return the number of data rows; the rest of a record below a data row is not used."""
        last = self.num_records - 1
        return (
            last * (self.record_tokens // sequence_length)
            + self.record_num_tokens(last) // sequence_length
        )

    def locate_rows(
        self, indices_R: npt.NDArray[np.int64], sequence_length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the record of each data row, and the number of its first token in the record."""
        rows_per_record = max(1, self.record_tokens // sequence_length)
        record_R, number_R = np.divmod(indices_R, rows_per_record)
        return record_R, number_R * sequence_length

    def locate_blocks(
        self,
        record_R: npt.NDArray[np.int64],
        first_token_R: npt.NDArray[np.int64],
        num_tokens_R: npt.NDArray[np.int64],
    ) -> "BlockRanges":
        """Return the whole blocks that hold stretches of tokens; no stretch crosses a record."""
        first_byte_R = first_token_R * self.itemsize
        last_byte_R = first_byte_R + num_tokens_R * self.itemsize - 1
        block_R = first_byte_R // BLOCK_BYTES
        start_R = block_R * BLOCK_BYTES
        record_tokens_R = np.minimum(
            self.record_tokens, self.num_tokens - record_R * self.record_tokens
        )
        stop_R = (last_byte_R // BLOCK_BYTES + 1) * BLOCK_BYTES
        shard_R, record_in_shard_R = np.divmod(record_R, self.shard_records)
        first_offset = self.record_offset(0)
        return BlockRanges(
            shard=shard_R,
            offset=first_offset + record_in_shard_R * self.record_stride + start_R,
            first_block=record_R * self.blocks_per_record + block_R,
            num_bytes=np.minimum(stop_R, record_tokens_R * self.itemsize) - start_R,
            offset_in_block=first_byte_R - start_R,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockRanges:
    """Ranges of whole blocks, each int64 [R]."""

    shard: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    """Offset of the first block in its shard's file."""
    first_block: npt.NDArray[np.int64]
    """Number of the first block among the blocks of all records."""
    num_bytes: npt.NDArray[np.int64]
    """Bytes of the whole blocks; the last block of a record may be shorter than the others."""
    offset_in_block: npt.NDArray[np.int64]
    """Offset of the range in its first block."""


def record_name(record: int, dtype: TokenDtype) -> str:
    """Return the name of a record's member in the archive."""
    return f"{record:08d}.tokens.{dtype}"


def encode_shard_head(
    dtype: TokenDtype, record_tokens: int, shard_records: int, shard: int
) -> bytes:
    """Return the bytes before a shard's first record: the member `__meta__/shard.json`."""
    meta = {
        "dtype": dtype,
        "first_record": shard * shard_records,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "record_tokens": record_tokens,
        "shard": shard,
    }
    text = json.dumps(meta, sort_keys=True).encode("ascii")
    data = text.ljust(_META_BYTES - 1) + b"\n"
    return _member_header("__meta__/shard.json", len(data)) + data


def encode_record_header(record: int, dtype: TokenDtype, num_bytes: int) -> bytes:
    """Return the archive header before a record's tokens."""
    return _member_header(record_name(record, dtype), num_bytes)


def encode_record_padding(num_bytes: int) -> bytes:
    """Return the zeros after a record's tokens."""
    return bytes(_padded(num_bytes) - num_bytes)


def encode_shard_tail() -> bytes:
    """Return the end-of-archive mark."""
    return _END_OF_ARCHIVE


def _member_header(name: str, num_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    return member.tobuf(tarfile.USTAR_FORMAT)  # TarInfo's defaults: mtime 0, root, mode 0644


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _SECTOR) * _SECTOR
