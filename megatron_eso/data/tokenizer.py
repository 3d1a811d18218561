"""Text to token ids and back, with the mask token that masked diffusion needs.

A tokenizer is a SentencePiece model. Its mask token is the control symbol `<mask>` (or `[MASK]`,
`<|mask|>`); a model without one gets it as the id after its last piece. A control symbol never
comes out of text. The mask token is never the padding token, which some losses skip.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from megatron_eso.data.manifest import TokenizerFingerprint
from megatron_eso.errors import DataError

MODEL_FILE = "tokenizer.model"
MASK_PIECE = "<mask>"

_MASK_PIECES = (MASK_PIECE, "[MASK]", "<|mask|>")
# Long texts are encoded in segments cut after a newline: the scores that SentencePiece sums up in
# single precision stay exact enough to compare, and memory stays small.
_SEGMENT_BYTES = 16 * 1024


class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        vocab_size: ids, the mask token among them.
        mask_token_id: id of the mask token.
        unk_token_id, bos_token_id, eos_token_id, pad_token_id: ids, or None where there is none.
        splits_at_newlines: text may be cut after any newline and encoded in parts, ids unchanged.
    """

    def __init__(self, model: bytes) -> None:
        """Load a serialized SentencePiece model; RuntimeError if it is none."""
        if not model:
            raise RuntimeError("the model is empty")
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._num_pieces: int = self._processor.get_piece_size()
        self.unk_token_id = _optional(self._processor.unk_id())
        self.bos_token_id = _optional(self._processor.bos_id())
        self.eos_token_id = _optional(self._processor.eos_id())
        self.pad_token_id = _optional(self._processor.pad_id())
        self.mask_token_id = self._find_mask_token()
        self.vocab_size = max(self._num_pieces, self.mask_token_id + 1)
        self.splits_at_newlines = self._check_newline_splits()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        """Cross to another process as the model."""
        return Tokenizer, (self._model,)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a directory that holds `tokenizer.model`, or a SentencePiece model file.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = Path(path)
        file = path / MODEL_FILE if path.is_dir() else path
        try:
            model = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {file}: {error.strerror}; give a directory written by "
                "data_tools train-tokenizer, or a SentencePiece model"
            ) from error
        try:
            return cls(model)
        except RuntimeError as error:
            raise DataError(
                f"{file} is no SentencePiece model, or damaged; copy it again or give another"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end-of-text token.

        Raises:
            UnicodeEncodeError: the text holds a lone surrogate, which is no character.
        """
        ids: list[int] = self.encode_utf8(text.encode("utf-8")).tolist()
        return ids

    def encode_utf8(self, text: bytes) -> npt.NDArray[np.int32]:
        """Ids of a text in UTF-8, int32 [N]; as `encode`, for bulk work."""
        if not self.splits_at_newlines or len(text) <= _SEGMENT_BYTES:
            return self._encode_segment(text)
        return np.concatenate([self._encode_segment(part) for part in split_segments(text)])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control symbols and the mask token are left out.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        kept = [int(token) for token in ids]
        if kept and not 0 <= min(kept) <= max(kept) < self.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.vocab_size})")
        text: str = self._processor.decode([i for i in kept if i != self.mask_token_id])
        return text

    def piece(self, token: int) -> str:
        """The piece of an id, for display."""
        if token == self._num_pieces:
            return MASK_PIECE
        piece: str = self._processor.id_to_piece(token)
        return piece

    def fingerprint(self) -> TokenizerFingerprint:
        """What must be equal for ids to mean the same."""
        pieces = hashlib.sha256()
        for token in range(self._num_pieces):
            piece = self._processor.id_to_piece(token)
            score = np.float32(self._processor.get_score(token))
            kind = [
                self._processor.is_unknown(token),
                self._processor.is_control(token),
                self._processor.is_unused(token),
                self._processor.is_byte(token),
            ]
            pieces.update(piece.encode("utf-8") + b"\0" + score.tobytes() + bytes(kind))
        return TokenizerFingerprint(
            kind="sentencepiece",
            model_sha256=hashlib.sha256(self._model).hexdigest(),
            pieces_sha256=pieces.hexdigest(),
            vocab_size=self.vocab_size,
            mask_token_id=self.mask_token_id,
            eos_token_id=self.eos_token_id,
            bos_token_id=self.bos_token_id,
            pad_token_id=self.pad_token_id,
            unk_token_id=self.unk_token_id,
        )

    def files(self) -> dict[str, bytes]:
        """The files, by name, that a directory needs for `load` to give this tokenizer."""
        return {MODEL_FILE: self._model}

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into a directory, which is made if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def _encode_segment(self, text: bytes) -> npt.NDArray[np.int32]:
        ids: npt.NDArray[np.int32] = self._processor.encode_as_numpy(text)
        return ids

    def _find_mask_token(self) -> int:
        taken = (self.unk_token_id, self.bos_token_id, self.eos_token_id, self.pad_token_id)
        for piece in _MASK_PIECES:
            token: int = self._processor.piece_to_id(piece)
            if token not in taken and self._processor.is_control(token):
                return token
        return self._num_pieces

    def _check_newline_splits(self) -> bool:
        """True where a newline is a token of its own and texts keep their ends as they are."""
        if any("\n" in self.piece(token) != "\n" for token in range(self._num_pieces)):
            return False
        newline = self._processor.encode("\n")
        letter = self._processor.encode("a")
        return len(newline) == 1 and self._processor.encode("a\n a\n\n") == [
            *letter,
            *newline,
            *self._processor.encode(" a"),
            *newline,
            *newline,
        ]


def split_segments(text: bytes) -> Iterator[bytes]:
    """Cut UTF-8 text after the first newline at or behind every 16 KiB since the last cut."""
    start = 0
    while start < len(text):
        newline = text.find(b"\n", start + _SEGMENT_BYTES - 1)
        stop = len(text) if newline < 0 else newline + 1
        yield text[start:stop]
        start = stop


def _optional(token: int) -> int | None:
    return token if token >= 0 else None
