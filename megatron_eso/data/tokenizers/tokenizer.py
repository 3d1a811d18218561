"""Text to token ids and back, with the mask token that masked diffusion needs.

A tokenizer is a SentencePiece model or a Hugging Face `tokenizer.json`. Text never encodes to a
special token. If the model has no mask token, or only one that is also the padding, the id after
its last one becomes the mask token.
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

# Long texts are encoded in segments where that gives the same ids. Memory stays small, and the
# scores that SentencePiece adds in single precision stay exact enough to compare.
_SEGMENT_BYTES = 16 * 1024
# Size of the segments that are encoded in one call.
_BATCH_BYTES = 2**20
_EMPTY = np.empty(0, dtype=np.int32)


class Tokenizer:
    """A loaded tokenizer; pickle carries its files.

    Args:
        files: Content by name: `tokenizer.model`, or `tokenizer.json` and the files of its folder
            that name its special tokens.

    Attributes:
        vocab_size: Ids of the tokenizer, the mask token included.
        mask_token_id: Id of the mask token.
        unk_token_id, bos_token_id, eos_token_id, pad_token_id: Their ids; None for a missing token.
        splits_at_newlines: Whether a cut of a text after any newline leaves its ids unchanged.

    Raises:
        ValueError: The files are damaged, or contradict each other.
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
        """Load a tokenizer from a directory, a SentencePiece model or a `tokenizer.json`.

        In the folder of a `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`
        name its special tokens.

        Args:
            path: The directory or the file.

        Raises:
            DataError: The tokenizer is missing or damaged.
        """
        # Read the file, and those that name special tokens.
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
        """Encode a text; return its ids without an end-of-text token.

        Raises:
            UnicodeEncodeError: The text holds a lone surrogate, which is not a character.
        """
        ids: list[int] = self.encode_utf8(text.encode("utf-8")).tolist()
        return ids

    def encode_utf8(self, text: bytes) -> npt.NDArray[np.int32]:
        """Encode a text in UTF-8; return its ids, int32 [N]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Encode texts in UTF-8; return the ids of each, int32 [N].

        This is the fastest way to encode many texts. It uses only the calling thread.

        Raises:
            DataError: The model encodes unknown characters as a special token.
        """
        parts: list[list[npt.NDArray[np.int32]]] = [[] for _ in texts]
        for batch in self._group_segments(texts):
            encoded = self._model.encode([segment for _, segment in batch])
            for (number, _), ids in zip(batch, encoded, strict=True):
                parts[number].append(ids)
        return [part[0] if len(part) == 1 else np.concatenate([_EMPTY, *part]) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        kept = [int(token) for token in ids]
        if kept and not 0 <= min(kept) <= max(kept) < self.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.vocab_size})")
        return self._model.decode([token for token in kept if token != self.mask_token_id])

    def piece(self, token: int) -> str:
        """Return the piece of an id, for display."""
        return self._model.piece(token)

    def fingerprint(self) -> TokenizerFingerprint:
        """Return the properties that decide the meaning of ids."""
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
        """Return the files by name from which `load` reads this tokenizer."""
        return self._model.files()

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into a directory; make it if it does not exist."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def _group_segments(self, texts: Sequence[bytes]) -> Iterator[list[tuple[int, bytes]]]:
        """Yield batches of the texts' segments in order, each with the number of its text."""
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
    """Return whether the path is a file, or a directory with the file of a tokenizer."""
    path = Path(path)
    return path.is_file() or any((path / name).is_file() for name in (MODEL_FILE, JSON_FILE))


def split_segments(text: bytes) -> Iterator[bytes]:
    """Cut UTF-8 text after the first newline that is 16 KiB or more after the last cut."""
    start = 0
    while start < len(text):
        newline = text.find(b"\n", start + _SEGMENT_BYTES - 1)
        stop = len(text) if newline < 0 else newline + 1
        yield text[start:stop]
        start = stop


def _split_before_spaces(text: bytes) -> Iterator[bytes]:
    """Cut before the first space after a visible ASCII character, 16 KiB after the last cut."""
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
