"""The validation set of a run: every row of one dataset, in its order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.sections import DataConfig
from megatron_eso.data.samples.corpora import check_tokenizer, open_corpus, read_vocabulary
from megatron_eso.data.samples.framing import Framing
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.shards.sources import ShardSource


class ValidationData:
    """The rows of the dataset `data.validation`. Reading is safe from several threads.

    Attributes:
        dataset: The dataset.
        vocabulary: The ids that may occur, and the mask token, which never does.
        num_samples: Samples of the set.
        sequence_length: Tokens of a sample with its framing.
    """

    def __init__(self, data: DataConfig, dataset: TokenDataset) -> None:
        """Use an open dataset.

        Args:
            data: The section of the configuration.
            dataset: Of `data.validation`.

        Raises:
            ConfigError: The tokenizer lacks the tokens of the framing.
            DataError: The dataset has no row.
        """
        self.dataset = dataset
        self.vocabulary = read_vocabulary(dataset)
        self._location = str(data.validation)
        self.sequence_length = data.sequence_length
        self._row_tokens = data.row_tokens
        self._framing = Framing.resolve(data, dataset.manifest.tokenizer)
        self.num_samples = dataset.num_rows(data.row_tokens)

    @classmethod
    def open(cls, data: DataConfig) -> "ValidationData | None":
        """Open the dataset of `data.validation`; None where the key is left out.

        Raises:
            ConfigError: The tokenizer lacks the tokens of the framing.
            DataError: The dataset is missing or damaged, or has no row.
        """
        if data.validation is None:
            return None
        return cls(data, open_corpus(data.validation, data))

    @property
    def sources(self) -> list[ShardSource]:
        """Where the shards come from, for `stage_shards`."""
        return [self.dataset.shards]

    def samples(self, indices_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read samples, framed as `data.framing` says.

        Args:
            indices_B: Sample numbers, int64 `[B]`, from 0 to num_samples - 1.

        Returns:
            Token ids, int64 `[B, T]`, T = `data.sequence_length`.

        Raises:
            DataError: A shard is damaged; the message names shard, record, offset, and row.
        """
        return self._framing.frame(self.dataset.rows(indices_B, self._row_tokens))

    def lengths(self, indices_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many tokens of each sample are real, int64 `[B]`: T, for none is cut."""
        return np.full(len(indices_B), self.sequence_length)

    def check_tokenizer(self, expected: Mapping[str, Any]) -> None:
        """Refuse the set if its token ids mean something else than those of a run.

        Args:
            expected: `identity` of the run's tokenizer.

        Raises:
            ConfigError: The tokenizer is another one.
        """
        check_tokenizer("data.validation", self._location, self.dataset, expected)
