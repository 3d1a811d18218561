"""The documents within samples of running text."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.sections import DataConfig
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Documents:
    """The rule that finds the documents of a sample.

    Attributes:
        eos_token_id: The token that ends a document; None without `data.document_attention`.
    """

    eos_token_id: int | None

    @classmethod
    def resolve(cls, data: DataConfig, tokenizer: TokenizerFingerprint) -> Self:
        """Return the rule of the configuration.

        Raises:
            ConfigError: The tokenizer has no EOS token.
        """
        if not data.document_attention:
            return cls(None)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "data.document_attention = true: the tokenizer of the shards has no EOS token; "
                "leave the key out"
            )
        return cls(tokenizer.eos_token_id)

    def number(self, tokens_BT: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the number of each token's document in its sample, int64 `[B, T]`, from 0 on.

        The EOS token belongs to the document that it ends.

        Args:
            tokens_BT: Tokens of samples, int64.
        """
        if self.eos_token_id is None:
            return None
        is_end_BT = tokens_BT == self.eos_token_id
        number_BT: NDArray[np.int64] = np.cumsum(is_end_BT, axis=1) - is_end_BT
        return number_BT
