"""What decides whether two tokenizers give the same ids."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFingerprint:
    """What two tokenizers must share for their ids to mean the same."""

    kind: str
    """Family of the tokenizer: `sentencepiece` or `hugging_face`."""
    model_sha256: str
    """sha256 of the model file."""
    pieces_sha256: str
    """sha256 of the pieces, scores and types in id order, and of all else that decides on ids."""
    vocab_size: int
    """Ids, the mask token among them."""
    mask_token_id: int
    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What makes ids mean the same: all but the file, in which training leaves its traces."""
        fields = dataclasses.asdict(self)
        del fields["model_sha256"]
        return fields


def name_differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """The fields in which two identities differ, as `FIELD new, not old`; empty if they agree."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{name} {new.get(name)}, not {old.get(name)}" for name in names)
