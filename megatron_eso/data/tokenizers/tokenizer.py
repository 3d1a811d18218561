"""Text to token ids and back, with the mask token that masked diffusion needs.

A tokenizer is a SentencePiece model or a Hugging Face `tokenizer.json`. A special token never comes
out of text. Where the model has no mask token, or one that is the padding too, it gets one as the
id after its last.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.data.tokenizers.hugging_face_model import JSON_FILE, NAME_FILES, HuggingFaceModel
from megatron_eso.data.tokenizers.sentencepiece_model import MODEL_FILE, SentencePieceModel
from megatron_eso.errors import DataError

# Long texts are encoded in segments where that gives the same ids: memory stays small, and the
# scores that SentencePiece sums up in single precision stay exact enough to compare.
_SEGMENT_BYTES = 16 * 1024
# Segments that are encoded in one call.
_BATCH_BYTES = 2**20
_EMPTY = np.empty(0, dtype=np.int32)


class Tokenizer:
    """A loaded tokenizer; it crosses to another process as its files.

    Args:
        files: content by name: `tokenizer.model`, or `tokenizer.json` and the files of its folder
            that name its special tokens.

    Attributes:
        vocab_size: ids, the mask token among them.
        mask_token_id: id of the mask token.
        unk_token_id, bos_token_id, eos_token_id, pad_token_id: ids, or None where there is none.
        splits_at_newlines: text may be cut after any newline and encoded in parts, ids unchanged.

    Raises:
        ValueError: the files are damaged, or contradict each other.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._model = SentencePieceModel(files) if MODEL_FILE in files else HuggingFaceModel(files)
        special = self._model.special_tokens
        self.unk_token_id = special.unk
        self.bos_token_id = special.bos
        self.eos_token_id = special.eos
        self.pad_token_id = special.pad
        self.mask_token_id = self._model.num_pieces if special.mask is None else special.mask
        self.vocab_size = max(self._model.num_pieces, self.mask_token_id + 1)
        self.splits_at_newlines = self._model.splits_at_newlines

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[dict[str, bytes]]]:
        return Tokenizer, (self.files(),)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a directory that holds a tokenizer, or a SentencePiece model or `tokenizer.json`.

        In the folder of a `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`
        say which special token is which.

        Raises:
            DataError: there is none, or it is damaged.
        """
        file = _find_file(Path(path))
        try:
            content = file.read_bytes()
            files = {MODEL_FILE: content}
            if content.lstrip()[:1] == b"{":
                others = [file.with_name(name) for name in NAME_FILES]
                files = {extra.name: extra.read_bytes() for extra in others if extra.is_file()}
                files[JSON_FILE] = content
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {error.filename}: {error.strerror}; give a directory "
                f"with {MODEL_FILE} or {JSON_FILE}, or one of these files"
            ) from error
        try:
            return cls(files)
        except ValueError as error:
            raise DataError(f"tokenizer {file}: {error}; copy it again or give another") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end-of-text token.

        Raises:
            UnicodeEncodeError: the text holds a lone surrogate, which is no character.
        """
        ids: list[int] = self.encode_utf8(text.encode("utf-8")).tolist()
        return ids

    def encode_utf8(self, text: bytes) -> npt.NDArray[np.int32]:
        """Ids of a text in UTF-8, int32 [N]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Ids of each text in UTF-8, int32 [N]; the fastest way for many, in the calling thread.

        Raises:
            DataError: characters that the tokenizer does not know become a special token.
        """
        parts: list[list[npt.NDArray[np.int32]]] = [[] for _ in texts]
        for batch in self._group_segments(texts):
            encoded = self._model.encode([segment for _, segment in batch])
            for (number, _), ids in zip(batch, encoded, strict=True):
                parts[number].append(ids)
        return [part[0] if len(part) == 1 else np.concatenate([_EMPTY, *part]) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        kept = [int(token) for token in ids]
        if kept and not 0 <= min(kept) <= max(kept) < self.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.vocab_size})")
        return self._model.decode([token for token in kept if token != self.mask_token_id])

    def piece(self, token: int) -> str:
        """The piece of an id, for display."""
        return self._model.piece(token)

    def fingerprint(self) -> TokenizerFingerprint:
        """What must be equal for ids to mean the same."""
        return TokenizerFingerprint(
            kind=self._model.kind,
            model_sha256=self._model.hash_model(),
            pieces_sha256=self._model.hash_pieces(),
            vocab_size=self.vocab_size,
            mask_token_id=self.mask_token_id,
            eos_token_id=self.eos_token_id,
            bos_token_id=self.bos_token_id,
            pad_token_id=self.pad_token_id,
            unk_token_id=self.unk_token_id,
        )

    def files(self) -> dict[str, bytes]:
        """The files, by name, that a directory needs for `load` to give this tokenizer."""
        return self._model.files()

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into a directory, which is made if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def _group_segments(self, texts: Sequence[bytes]) -> Iterator[list[tuple[int, bytes]]]:
        """Segments of the texts in order, each with the number of its text, in batches."""
        batch: list[tuple[int, bytes]] = []
        size = 0
        for number, text in enumerate(texts):
            for segment in self._split(text):
                batch.append((number, segment))
                size += len(segment)
                if size >= _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _split(self, text: bytes) -> Iterator[bytes]:
        if self._model.splits_at_newlines:
            return split_segments(text)
        if self._model.splits_before_spaces:
            return _split_before_spaces(text)
        return iter([text] if text else [])


def has_tokenizer(path: str | Path) -> bool:
    """Whether `Tokenizer.load` has something to open there: a file, or a directory with one."""
    path = Path(path)
    return path.is_file() or any((path / name).is_file() for name in (MODEL_FILE, JSON_FILE))


def split_segments(text: bytes) -> Iterator[bytes]:
    """Cut UTF-8 text after the first newline at or behind every 16 KiB since the last cut."""
    start = 0
    while start < len(text):
        newline = text.find(b"\n", start + _SEGMENT_BYTES - 1)
        stop = len(text) if newline < 0 else newline + 1
        yield text[start:stop]
        start = stop


def _split_before_spaces(text: bytes) -> Iterator[bytes]:
    """Cut before the first space after a visible ASCII character behind every 16 KiB."""
    start = 0
    while start < len(text):
        space = _SPACE_AFTER_VISIBLE.search(text, start + _SEGMENT_BYTES)
        stop = len(text) if space is None else space.start()
        yield text[start:stop]
        start = stop


_SPACE_AFTER_VISIBLE = re.compile(rb"(?<=[!-~]) ")


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in (MODEL_FILE, JSON_FILE) if (path / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{path} holds both {MODEL_FILE} and {JSON_FILE}, which may differ; give one of the "
            "files"
        )
    if not found:
        raise DataError(
            f"cannot read the tokenizer {path}: it holds neither {MODEL_FILE} nor {JSON_FILE}; "
            "give a directory of data_tools train-tokenizer, or of a Hugging Face tokenizer"
        )
    return found[0]
