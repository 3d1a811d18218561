"""A SentencePiece model: text segments to ids and back."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import sentencepiece

from megatron_eso.data.tokenizers.special_tokens import (
    CONFIG_FILE,
    MASK_NAME,
    MASK_NAMES,
    SpecialTokens,
)

MODEL_FILE = "tokenizer.model"


class SentencePieceModel:
    """A loaded SentencePiece model.

    Text never encodes to a control symbol, so only a control symbol can be the mask token.

    Args:
        files: Content of `tokenizer.model` by its name.

    Raises:
        ValueError: It is not a SentencePiece model.
    """

    kind: ClassVar = "sentencepiece"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._model = files[MODEL_FILE]
        if not self._model:
            raise ValueError("it is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise ValueError("it is not a SentencePiece model, or damaged") from error
        self.num_pieces: int = self._processor.get_piece_size()
        self.special_tokens = self._find_special_tokens()
        self.splits_at_newlines = self._check_newline_splits()
        self.splits_before_spaces = False

    def encode(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Encode texts in UTF-8; return the ids of each."""
        # One call for all texts is an eighth faster than a call for each.
        ids: list[npt.NDArray[np.int32]] = self._processor.encode_as_numpy(
            list(texts), num_threads=1
        )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without control symbols."""
        text: str = self._processor.decode(list(ids))
        return text

    def piece(self, token: int) -> str:
        """Return the piece of an id; an added mask token has one too."""
        if token == self.num_pieces:
            return MASK_NAME
        piece: str = self._processor.id_to_piece(token)
        return piece

    def hash_model(self) -> str:
        """Return the sha256 of the file."""
        return hashlib.sha256(self._model).hexdigest()

    def hash_pieces(self) -> str:
        """Return the sha256 of pieces, scores and types in id order, and of other settings for ids.

        Other fields of the file may differ between two trainings on the same text.
        """
        digest = hashlib.sha256()
        for token in range(self.num_pieces):
            score = np.float32(self._processor.get_score(token))
            kind = [
                self._processor.is_unknown(token),
                self._processor.is_control(token),
                self._processor.is_unused(token),
                self._processor.is_byte(token),
            ]
            digest.update(self.piece(token).encode("utf-8") + b"\0" + score.tobytes() + bytes(kind))
        for field, value in _list_settings(self._model):
            digest.update(f"{field} {len(value)} ".encode() + value)
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """Return the file, and a configuration with which transformers gives the same ids."""
        mask = self.num_pieces if self.special_tokens.mask is None else self.special_tokens.mask
        config = self.special_tokens.encode_config(
            "SentencePieceBackend", self.piece(mask), self.piece
        )
        return {MODEL_FILE: self._model, CONFIG_FILE: config}

    def _find_special_tokens(self) -> SpecialTokens:
        unk, bos, eos, pad = (
            token if token >= 0 else None
            for token in (
                self._processor.unk_id(),
                self._processor.bos_id(),
                self._processor.eos_id(),
                self._processor.pad_id(),
            )
        )
        masks = [self._processor.piece_to_id(name) for name in MASK_NAMES]
        mask = next(
            (
                token
                for token in masks
                if token not in (unk, bos, eos, pad) and self._processor.is_control(token)
            ),
            None,
        )
        return SpecialTokens(unk=unk, bos=bos, eos=eos, pad=pad, mask=mask)

    def _check_newline_splits(self) -> bool:
        """Return whether a newline is a separate token and lines are encoded independently."""
        if any("\n" in self.piece(token) != "\n" for token in range(self.num_pieces)):
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


# Fields of sentencepiece_model.proto.
_TRAINER, _NORMALIZER, _DENORMALIZER = 2, 3, 5
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35


def _list_settings(model: bytes) -> list[tuple[str, bytes]]:
    """Return the fields besides the pieces that decide ids, by their numbers in the file."""
    found = []
    for field, value in _iterate_fields(model):
        if field in (_NORMALIZER, _DENORMALIZER):
            found.append((f"{field}", value))
        elif field == _TRAINER:
            found += [
                (f"{field}.{inner}", content)
                for inner, content in _iterate_fields(value)
                if inner in (_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK)
            ]
    return sorted(found)


def _iterate_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the field numbers and encoded values of a valid protobuf message."""
    offset = 0
    while offset < len(message):
        tag, offset = _read_varint(message, offset)
        start = offset
        match tag & 7:
            case 0:
                _, offset = _read_varint(message, offset)
            case 1:
                offset += 8
            case 2:
                size, start = _read_varint(message, offset)
                offset = start + size
            case _:
                offset += 4
        yield tag >> 3, message[start:offset]


def _read_varint(message: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while message[offset] >= 128:
        value |= (message[offset] & 127) << shift
        shift += 7
        offset += 1
    return value | message[offset] << shift, offset + 1
