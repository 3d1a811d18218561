"""Fingerprints of tokenizers, which differ where two tokenizers may give different ids."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFingerprint:
    """The properties of a tokenizer that decide the meaning of its ids."""

    kind: str
    """Family of the tokenizer: `sentencepiece` or `hugging_face`."""
    model_sha256: str
    """sha256 of the model file."""
    pieces_sha256: str
    """sha256 of pieces, scores and types in id order, and of everything else that decides ids."""
    vocab_size: int
    """Ids of the tokenizer, the mask token included."""
    mask_token_id: int
    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None

    @property
    def identity(self) -> dict[str, str | int | None]:
        """All fields that decide the meaning of ids; the hash of the file is not one of them."""
        fields = dataclasses.asdict(self)
        del fields["model_sha256"]
        return fields


def name_differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Describe how two identities differ, as `FIELD new, not old`; empty where they agree."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{name} {new.get(name)}, not {old.get(name)}" for name in names)
