"""Special tokens: ids that do not stand for text."""

import json
from collections.abc import Callable
from dataclasses import dataclass

CONFIG_FILE = "tokenizer_config.json"
"""The file that names special tokens: here of a `tokenizer.json`, in transformers of any model."""

MASK_NAME = "<mask>"
"""Name of an added mask token, if no other token has it."""
MASK_NAMES = (MASK_NAME, "[MASK]", "<|mask|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Ids of a model's special tokens; None for a token that it lacks."""

    unk: int | None
    bos: int | None
    eos: int | None
    pad: int | None
    mask: int | None
    """The mask token has no other role, because some losses ignore padding."""

    @property
    def marks(self) -> frozenset[int]:
        """The special tokens that text must never encode to: all except the unknown token."""
        marks = (self.bos, self.eos, self.pad, self.mask)
        return frozenset(token for token in marks if token is not None)

    def encode_config(self, class_name: str, mask_name: str, piece: Callable[[int], str]) -> bytes:
        """Return the content of a `CONFIG_FILE`.

        Args:
            class_name: The class of transformers for the tokenizer.
            mask_name: Name of the mask token. If the model has no token of this name, transformers
                gives it the id after the last one, as this package does.
            piece: Returns the name of an id.
        """
        names = {"unk": self.unk, "bos": self.bos, "eos": self.eos, "pad": self.pad}
        config: dict[str, object] = {
            f"{role}_token": piece(token) for role, token in names.items() if token is not None
        }
        config["mask_token"] = mask_name
        config["tokenizer_class"] = class_name
        config["clean_up_tokenization_spaces"] = False
        return f"{json.dumps(config, sort_keys=True, indent=1)}\n".encode("ascii")
