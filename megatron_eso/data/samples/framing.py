"""The tokens around the text of a sample: none, or BOS and EOS.

With `data.framing = "bos_eos"` a sample of T tokens is BOS, T - 2 tokens of running text and EOS,
as in the reference (Eso-LMs' dataloader.py, `_group_texts`). Here as there, both are ordinary
tokens of x_0: they are masked, permuted, predicted, and counted in the loss and the NELBO like any
other. `data.ssl_ratio` cuts a sample after framing, so few of the cut samples have an EOS.

Shapes: R data rows, S tokens of text, T tokens of a sample.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.sections import DataConfig
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint
from megatron_eso.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """Tokens before and after the text of every sample."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def resolve(cls, data: DataConfig, tokenizer: TokenizerFingerprint) -> "Framing":
        """Return the configured framing, with the ids of a tokenizer.

        Raises:
            ConfigError: The tokenizer has no BOS or no EOS token.
        """
        if data.framing == "none":
            return cls()
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None or eos is None:
            missing = "BOS" if bos is None else "EOS"
            raise ConfigError(
                f'data.framing = "bos_eos": the tokenizer of the shards has no {missing} token; '
                'set data.framing = "none", or build the shards with a tokenizer that has both'
            )
        return cls(before=(bos,), after=(eos,))

    def frame(self, text_RS: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add the tokens to data rows of text; int64 `[R, S]` to `[R, T]`."""
        if not self.before and not self.after:
            return text_RS
        widths = ((0, 0), (len(self.before), len(self.after)))
        tokens_RT = np.pad(text_RS, widths)
        tokens_RT[:, : len(self.before)] = self.before
        tokens_RT[:, tokens_RT.shape[1] - len(self.after) :] = self.after
        return tokens_RT
