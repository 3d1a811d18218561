"""Decompression of gzip and zstd streams with one or several members or frames.

The readers of the libraries accept a truncated zstd stream without an error; here the end is
checked. A file that was cut exactly between two members looks like a whole file.
"""

import zlib
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

import zstandard

Compression = Literal["gzip", "zstd"]

SUFFIXES: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}

# The part of a stream that is decompressed at once. zstd returns all text of the part: for 1 KiB at
# most a few megabytes, even of repetitive text.
_SLICE_BYTES: dict[Compression, int] = {"gzip": 2**16, "zstd": 2**10}
_OUTPUT_BYTES = 2**20
# The window of `zstd --long=31`, with which large corpora are published.
_MAX_WINDOW_BYTES = 2**31
_MAGIC: dict[Compression, bytes] = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}

_GZIP_DECODER = type(zlib.decompressobj())
_Decoder: TypeAlias = "zlib._Decompress | zstandard.ZstdDecompressionObj"


class DamageError(Exception):
    """The rest of a stream cannot be read; the message is written for the user."""


def find_compression(first_bytes: bytes) -> Compression | None:
    """Return the compression of a stream with these first bytes; None where it has none."""
    for compression, magic in _MAGIC.items():
        if first_bytes.startswith(magic):
            return compression
    return None


def decompress(chunks: Iterable[bytes], compression: Compression) -> Iterator[bytes]:
    """Yield the content of a compressed stream.

    Args:
        chunks: The compressed bytes.
        compression: Their compression.

    Raises:
        DamageError: The stream is truncated or damaged, or has another format.
    """
    decoder = None
    begun = False
    for data in _slice(chunks, _SLICE_BYTES[compression]):
        while data:
            if decoder is None:
                # Tapes and block devices add zeros to the end of gzip files.
                data = data.lstrip(b"\0") if begun and compression == "gzip" else data
                if not data:
                    break
                decoder = _start_decoder(compression)
                begun = True
            yield from _decode(decoder, data)
            if not decoder.eof:
                break
            data = decoder.unused_data
            decoder = None
    if decoder is not None:
        raise DamageError(f"truncated {compression}; get the file again")


def _slice(chunks: Iterable[bytes], num_bytes: int) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), num_bytes):
            yield chunk[start : start + num_bytes]


def _start_decoder(compression: Compression) -> _Decoder:
    if compression == "gzip":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()


def _decode(decoder: _Decoder, data: bytes) -> Iterator[bytes]:
    try:
        if not isinstance(decoder, _GZIP_DECODER):
            yield decoder.decompress(data)
            return
        is_full = True
        while (data or is_full) and not decoder.eof:
            text = decoder.decompress(data, _OUTPUT_BYTES)
            is_full = len(text) == _OUTPUT_BYTES
            data = decoder.unconsumed_tail
            yield text
    except (zlib.error, zstandard.ZstdError) as error:
        raise DamageError(f"damaged compression ({error}); get the file again") from error
