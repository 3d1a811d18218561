"""Ids that mean something else than text."""

import json
from collections.abc import Callable
from dataclasses import dataclass

CONFIG_FILE = "tokenizer_config.json"
"""Names the special tokens: here those of a `tokenizer.json`, in transformers those of all."""

MASK_NAME = "<mask>"
"""Given to a mask token that is added, where the name is free."""
MASK_NAMES = (MASK_NAME, "[MASK]", "<|mask|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Ids of a model; None where it has none."""

    unk: int | None
    bos: int | None
    eos: int | None
    pad: int | None
    mask: int | None
    """Nothing else at the same time: some losses skip the padding."""

    @property
    def marks(self) -> frozenset[int]:
        """Those that text must never give: all but the unknown."""
        marks = (self.bos, self.eos, self.pad, self.mask)
        return frozenset(token for token in marks if token is not None)

    def encode_config(self, class_name: str, mask_name: str, piece: Callable[[int], str]) -> bytes:
        """Content of a `CONFIG_FILE`.

        Args:
            class_name: transformers' class for the tokenizer.
            mask_name: of the mask token; where the model has none of this name, transformers gives
                it the id after the last, as we do.
            piece: gives the name of an id.
        """
        names = {"unk": self.unk, "bos": self.bos, "eos": self.eos, "pad": self.pad}
        config: dict[str, object] = {
            f"{role}_token": piece(token) for role, token in names.items() if token is not None
        }
        config["mask_token"] = mask_name
        config["tokenizer_class"] = class_name
        config["clean_up_tokenization_spaces"] = False
        return f"{json.dumps(config, sort_keys=True, indent=1)}\n".encode("ascii")
