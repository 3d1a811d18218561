"""Reads packed `.bin` files of TinyLlama (lit-gpt).

A file is a header (`LITPKDS`, version, code of the dtype, number of tokens) and that many tokens.
TinyLlama writes one stream of documents to `PREFIX_0000000000.bin`, `PREFIX_0000000001.bin` and so
on. One token comes before each document (BOS, as for SlimPajama) or after it, and also fills the
rest of the last file. Source: lit_gpt/packed_dataset.py and scripts/prepare_slimpajama.py.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.imports.interface import (
    BLOCK_TOKENS,
    DTYPES,
    TokenBlock,
    TokenFormat,
    TokenSource,
    list_files,
)
from megatron_eso.data.tokenizers.tokenizer import Tokenizer

_MAGIC = b"LITPKDS"
_HEADER = struct.Struct("<7sQBQ")
_NUMBERED = re.compile(r"(.*)_(\d{10})\.bin")


class PackedFiles:
    """TinyLlama's files.

    Args:
        inputs: Files, or folders that are searched.
        eos: The end-of-text token.
        bos: The token that may come before each document, or None.

    Raises:
        ConfigError: A file is missing.
        DataError: A file is damaged or of another kind.
    """

    def __init__(self, inputs: list[str], *, eos: int, bos: int | None) -> None:
        self._files = [_PackedFile(path, name) for path, name in list_files(inputs, "*.bin")]
        self._eos = eos
        self._bos = eos if bos is None else bos

    @property
    def sources(self) -> list[TokenSource]:
        """The files, sorted by their paths."""
        return [file.source for file in self._files]

    def read_blocks(self) -> Iterator[TokenBlock]:
        """Yield all tokens except those that fill the rest of a stream's last file."""
        start = 0
        for number, file in enumerate(self._files, start=1):
            if number == len(self._files) or not file.is_followed_by(self._files[number]):
                yield from self._read_stream(self._files[start:number])
                start = number

    def _read_stream(self, files: list["_PackedFile"]) -> Iterator[TokenBlock]:
        num_tokens = self._count_tokens(files)
        left = sum(num_tokens)
        last = self._eos
        for file, num_kept in zip(files, num_tokens, strict=True):
            with file.source.opened():
                file.source.read(_HEADER.size)
                for offset, tokens in file.read(num_kept):
                    left -= len(tokens)
                    ends = self._find_ends(tokens, last)
                    last = int(tokens[-1])
                    if not left and (not len(ends) or ends[-1] < len(tokens)):
                        ends = np.append(ends, len(tokens))
                    yield TokenBlock(source=file.source, offset=offset, tokens=tokens, ends=ends)
                for _ in file.read(file.num_tokens - num_kept):
                    pass

    def _find_ends(self, tokens: npt.NDArray[np.integer], last: int) -> npt.NDArray[np.int64]:
        """Return the indices after each EOS, and before each BOS that does not follow an EOS."""
        is_end = np.zeros(len(tokens) + 1, dtype=np.bool_)
        is_end[1:] = tokens == self._eos
        if self._bos != self._eos:
            is_end[1:-1] |= tokens[1:] == self._bos
            is_end[0] = tokens[0] == self._bos and last != self._eos
        return np.flatnonzero(is_end)

    def _count_tokens(self, files: list["_PackedFile"]) -> list[int]:
        """Return the tokens of each file of a stream without those that fill the rest."""
        kept = [file.num_tokens for file in files]
        tail = next((f.read_tail(f.num_tokens, 1) for f in reversed(files) if f.num_tokens), None)
        if tail is None or tail[0] not in (self._eos, self._bos):
            return kept
        fill = int(tail[0])
        for number in reversed(range(len(files))):
            while kept[number]:
                tail = files[number].read_tail(kept[number], BLOCK_TOKENS)
                others = np.flatnonzero(tail != fill)
                kept[number] -= len(tail) - 1 - int(others[-1]) if len(others) else len(tail)
                if len(others):
                    if fill == self._eos:
                        # The first of them ends the last document.
                        number += kept[number] == files[number].num_tokens
                        if number < len(files):
                            kept[number] += 1
                    return kept
        return kept


class _PackedFile:
    """A file whose header was read."""

    def __init__(self, path: Path, name: str) -> None:
        self.source = TokenSource(path, name)
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC):
            self.source.fail(f"begins with {header[:7]!r}, not with {_MAGIC!r} as a packed file")
        if len(header) < _HEADER.size:
            self.source.fail("the file is shorter than its header")
        _, version, code, self.num_tokens = _HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            self.source.fail(f"version {version} or dtype code {code} is not known for tokens")
        self._dtype: np.dtype[np.integer] = np.dtype(DTYPES[code])
        expected = _HEADER.size + self.num_tokens * self._dtype.itemsize
        if self.source.num_bytes != expected:
            self.source.offset = min(self.source.num_bytes, expected)
            self.source.fail(
                f"the file has {self.source.num_bytes} bytes, not {expected} as for the "
                f"{self.num_tokens} tokens of its header"
            )

    def is_followed_by(self, other: "_PackedFile") -> bool:
        """Return whether the other file, by its name, continues this one."""
        this = _NUMBERED.fullmatch(self.source.path.name)
        that = _NUMBERED.fullmatch(other.source.path.name)
        return (
            this is not None
            and that is not None
            and self.source.path.parent == other.source.path.parent
            and (this[1], int(this[2]) + 1) == (that[1], int(that[2]))
        )

    def read(self, num_tokens: int) -> Iterator[tuple[int, npt.NDArray[np.integer]]]:
        """Yield the next tokens in blocks, each with its offset in bytes."""
        for start in range(0, num_tokens, BLOCK_TOKENS):
            offset = self.source.offset
            size = min(BLOCK_TOKENS, num_tokens - start) * self._dtype.itemsize
            yield offset, np.frombuffer(self.source.read(size), dtype=self._dtype)

    def read_tail(self, stop: int, num_tokens: int) -> npt.NDArray[np.integer]:
        """Read up to `num_tokens` tokens that end before number `stop`."""
        start = max(0, stop - num_tokens)
        tokens: npt.NDArray[np.integer] = np.fromfile(
            self.source.path,
            dtype=self._dtype,
            count=stop - start,
            offset=_HEADER.size + start * self._dtype.itemsize,
        )
        return tokens


def _open(inputs: list[str], tokenizer: Tokenizer) -> PackedFiles:
    assert tokenizer.eos_token_id is not None
    return PackedFiles(inputs, eos=tokenizer.eos_token_id, bos=tokenizer.bos_token_id)


PACKED = TokenFormat(
    option="packed",
    label="packed files",
    help=".bin of TinyLlama",
    recognizes=lambda text: True,
    open=_open,
)
