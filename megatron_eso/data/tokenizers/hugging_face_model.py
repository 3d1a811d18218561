"""A Hugging Face `tokenizer.json`, run by the `tokenizers` library: text segments to ids and back.

The library receives a copy of the file without the parts that make ids depend on more than the
text: post-processor, padding, truncation, dropout. In this copy, special tokens have names that
occur in no text. `</s>` in a text is therefore four ordinary characters, both for the library and
for models that would find special tokens themselves (Unigram, WordLevel).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import tokenizers

from megatron_eso.data.tokenizers.hugging_face_cuts import may_cut_before_spaces
from megatron_eso.data.tokenizers.special_tokens import CONFIG_FILE, MASK_NAMES, SpecialTokens
from megatron_eso.errors import DataError

JSON_FILE = "tokenizer.json"
NAME_FILES = (CONFIG_FILE, "special_tokens_map.json")
"""The files that name special tokens; for each token the first file that names it counts."""

# For each role: the keys of these files, then the usual names for a token that no file names.
# BERT's tokenizers end a text with a separator and begin it with a class token.
_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eos": (
        ("eos_token", "sep_token"),
        ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]"),
    ),
    "bos": (("bos_token", "cls_token"), ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]")),
    "pad": (("pad_token",), ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
    "mask": (("mask_token",), MASK_NAMES),
}
_MAX_ID = 2**31 - 2

# The processes of `build` use all cores, and threads of the library would slow them down. It reads
# the variable at each call.
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class HuggingFaceModel:
    """A loaded `tokenizer.json`.

    Args:
        files: Content by name: `tokenizer.json`, and the existing files of `NAME_FILES`.

    Raises:
        ValueError: A file is damaged, or the files contradict each other.
    """

    kind: ClassVar = "hugging_face"
    splits_at_newlines = False

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._file = files[JSON_FILE]
        fields = _parse(self._file, "it")
        names = [_parse(files[name], name) for name in NAME_FILES if name in files]
        try:
            self._pieces = _list_pieces(fields)
            self._added = {token["id"]: token for token in fields["added_tokens"]}
            self.special_tokens = self._find_special_tokens(fields, names)
            self._aliases = self._name_aliases()
            aliases = {self._pieces[token]: alias for token, alias in self._aliases.items()}
            self._fields = _rewrite(fields, aliases)
            self.num_pieces = max(self._pieces) + 1
            self._mask_name = self._choose_mask_name(names)
            self._backend = _load(self._fields)
            self._check_added_tokens()
            self.splits_before_spaces = may_cut_before_spaces(self._fields) and self._check_cut()
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"it is not a tokenizer.json, or damaged ({error!r})") from error

    def encode(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        """Encode texts in UTF-8; return the ids of each.

        Raises:
            DataError: The model encodes unknown characters as a special token.
        """
        parts = self._encode(texts)
        ids = np.concatenate(parts)
        for token in self.special_tokens.marks:
            if (ids == token).any():
                raise DataError(
                    f"the tokenizer encodes unknown characters as the special token "
                    f"{self.piece(token)}; give a tokenizer with an unk_token of its own, or one "
                    "of bytes"
                )
        return parts

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens except the unknown token."""
        unk = self.special_tokens.unk
        kept = [token for token in ids if token == unk or token not in self._aliases]
        text: str = self._backend.decode(kept, skip_special_tokens=False)
        return text if unk is None else text.replace(self._aliases[unk], self._pieces[unk])

    def piece(self, token: int) -> str:
        """Return the piece of an id; an added mask token has one too."""
        if token == self.num_pieces:
            return self._mask_name
        return self._pieces.get(token, f"<{token}>")

    def hash_model(self) -> str:
        """Return the sha256 of the file."""
        return hashlib.sha256(self._file).hexdigest()

    def hash_pieces(self) -> str:
        """Return the sha256 of all fields that decide ids and text, in a canonical form."""
        return hashlib.sha256(_dump(self._fields)).hexdigest()

    def files(self) -> dict[str, bytes]:
        """Return the unchanged file, and a file that names its special tokens."""
        config = self.special_tokens.encode_config(
            "PreTrainedTokenizerFast", self._mask_name, self.piece
        )
        return {JSON_FILE: self._file, CONFIG_FILE: config}

    def _encode(self, texts: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        encodings = self._backend.encode_batch_fast(
            [text.decode("utf-8") for text in texts], add_special_tokens=False
        )
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _find_special_tokens(
        self, fields: dict[str, Any], names: Sequence[dict[str, Any]]
    ) -> SpecialTokens:
        ids = {piece: token for token, piece in self._pieces.items()}
        specials = {token["content"] for token in self._added.values() if token["special"]}
        found: dict[str, int | None] = {}
        for role, (keys, usual) in _ROLES.items():
            named = _find_name(keys, names)
            if named is not None and named not in ids and role != "mask":
                raise ValueError(f"{keys[0]} is {named!r}, which the tokenizer does not have")
            candidates = [named] if named is not None else [x for x in usual if x in specials]
            found[role] = next((ids[name] for name in candidates if name in ids), None)
        unk = _find_unknown(fields["model"], ids)
        found["unk"] = found["unk"] if unk is None else unk
        if found["mask"] in (found["unk"], found["bos"], found["eos"], found["pad"]):
            found["mask"] = None
        return SpecialTokens(**found)

    def _name_aliases(self) -> dict[int, str]:
        """Return names that occur in no text, by id: noncharacters around a digest."""
        tokens = set(self.special_tokens.marks)
        if self.special_tokens.unk is not None:
            tokens.add(self.special_tokens.unk)
        tokens |= {token for token, added in self._added.items() if added["special"]}
        return {
            token: f"\ufdd0{hashlib.sha256(self._pieces[token].encode()).hexdigest()}\ufdd1"
            for token in sorted(tokens)
        }

    def _choose_mask_name(self, names: Sequence[dict[str, Any]]) -> str:
        if self.special_tokens.mask is not None:
            return self._pieces[self.special_tokens.mask]
        taken = set(self._pieces.values())
        candidates = (_find_name(("mask_token",), names), *MASK_NAMES, f"<mask:{self.num_pieces}>")
        return next(name for name in candidates if name is not None and name not in taken)

    def _check_added_tokens(self) -> None:
        """Compare the ids of added tokens with the library's.

        Raises:
            ValueError: The library gives an added token another id.
        """
        for token, added in self._added.items():
            name = self._aliases.get(token, added["content"])
            if self._backend.token_to_id(name) != token:
                raise ValueError(f"its added token {added['content']!r} cannot have the id {token}")

    def _check_cut(self) -> bool:
        """Return whether a text that is cut before spaces keeps its ids."""
        left, right = b"Two words,\n 3 more.", b"  And a last\tone.\n"
        whole, *parts = self._encode([left + right, left, right])
        return np.array_equal(whole, np.concatenate(parts))


def _parse(content: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{name} is not a JSON object")
    return fields


def _dump(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def _list_pieces(fields: dict[str, Any]) -> dict[int, str]:
    """Return the pieces by id.

    Raises:
        ValueError: The vocabulary is empty, or an id is out of range.
    """
    vocabulary = fields["model"]["vocab"]
    pieces = (
        {token: piece for piece, token in vocabulary.items()}
        if isinstance(vocabulary, dict)
        else {token: piece for token, (piece, _) in enumerate(vocabulary)}
    )
    pieces |= {token["id"]: token["content"] for token in fields["added_tokens"]}
    if not pieces or not all(type(token) is int and 0 <= token <= _MAX_ID for token in pieces):
        raise ValueError(f"its vocabulary is empty, or an id is not in 0..{_MAX_ID}")
    return pieces


def _find_name(keys: Sequence[str], names: Sequence[dict[str, Any]]) -> str | None:
    """Return the name of a special token in the files of `NAME_FILES`; None without one."""
    for key in keys:
        for fields in names:
            value = fields.get(key)
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str) and name:
                return name
    return None


def _find_unknown(model: dict[str, Any], ids: Mapping[str, int]) -> int | None:
    """Return the id that the model itself gives to unknown characters."""
    token: int | None = model.get("unk_id")
    return ids.get(model.get("unk_token") or "") if token is None else token


def _rewrite(fields: dict[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that decide ids, with other names for special tokens."""
    # The model: vocabulary, merges, unknown token; without dropout.
    model = dict(fields["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {aliases.get(piece, piece): token for piece, token in vocabulary.items()}
    else:
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = _rewrite_merges(model, aliases)
    if model.get("unk_token") is not None:
        model["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    if "dropout" in model:
        model["dropout"] = None
    # The added tokens, and the parts before and after the model.
    added = [
        {**token, "content": aliases.get(token["content"], token["content"])}
        for token in fields["added_tokens"]
    ]
    parts = {name: fields.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    return {"version": "1.0", "added_tokens": added, "model": model, **parts}


def _rewrite_merges(model: dict[str, Any], aliases: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model, without those that contain or give a special token."""
    prefix = model.get("continuing_subword_prefix") or ""
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not right.startswith(prefix):
            # The library cuts the prefix off unchecked, and aborts if it cuts within a character.
            raise ValueError(
                f"the merge of {left!r} and {right!r} is without the prefix {prefix!r}"
            )
        if not aliases.keys() & {left, right, left + right[len(prefix) :]}:
            merges.append((left, right))
    return merges


def _load(fields: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(_dump(fields).decode("ascii"))
    except BaseException as error:
        # A panic of the library is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"the tokenizers library, version {tokenizers.__version__}, cannot read it ({error})"
        ) from error
