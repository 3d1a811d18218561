"""The section `data`: shards, samples cut from them, and the vocabulary of both."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from megatron_eso.config.keys import Frozen, Logged


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The token ids of a run."""

    size: int
    """Ids of the tokenizer, the mask token among them; a model pads its embedding beyond."""
    mask_token_id: int
    """The mask token; it never occurs in a text and is never predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Token shards."""

    train: str | tuple[str, ...]
    """Directory or URL of the training shards, or a list of them: a blend of corpora."""
    train_weights: tuple[float, ...] | None = None
    """Shares of the corpora in the samples, in any unit; left out: by their numbers of rows."""
    phase: Annotated[int, Gt(0)] = 1
    """Number of the blend within the run: raise it by one to change the blend on resume."""
    validation: str | None = None
    """Directory or URL of the validation shards."""
    sequence_length: Annotated[int, Gt(0), Frozen("run"), Logged()]
    """Tokens of a sample."""
    framing: Annotated[Literal["none", "bos_eos"], Frozen("run"), Logged()] = "none"
    """`bos_eos`: BOS first and EOS last in every sample, in place of two tokens of text."""
    ssl_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the training samples that are cut to a random length."""
    vocab_size: Annotated[int | None, Gt(0), Frozen("weights")] = None
    """Tokens of the vocabulary, the mask token among them; left out: that of the shards."""
    mask_token_id: Annotated[int | None, Ge(0), Frozen("weights")] = None
    """The mask token; left out: that of the shards."""
    quarantine: str | None = None
    """JSON file that lists damaged records; rows of other records stand in for theirs."""
    cache_directory: str | None = None
    """Folder on a local disk for copies of shards that have a URL; left out: a temporary one."""
    cache_gib: Annotated[float, Gt(0)] = 100.0
    """Largest size of these copies together, in GiB."""
    prefetch_steps: Annotated[int, Ge(0)] = 2
    """Steps that a thread reads ahead; 0: none."""
    batch_check_interval: Annotated[int, Ge(0)] = 100
    """Steps between checks that all ranks of a copy of the model hold the same batch; 0: never."""

    @property
    def train_corpora(self) -> tuple[str, ...]:
        """The training shards as a list, of one where there is no blend."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the shards, once they are open."""
        assert self.vocab_size is not None, "the shards are not open yet"
        assert self.mask_token_id is not None, "the shards are not open yet"
        return Vocabulary(size=self.vocab_size, mask_token_id=self.mask_token_id)

    @property
    def row_tokens(self) -> int:
        """Tokens of text in a sample: what its framing leaves."""
        return self.sequence_length - (2 if self.framing == "bos_eos" else 0)
