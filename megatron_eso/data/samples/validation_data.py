"""The validation set of a run: every data row of one dataset, in its order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.sections import DataConfig
from megatron_eso.data.samples.corpora import check_tokenizer, open_corpus, read_vocabulary
from megatron_eso.data.samples.documents import Documents
from megatron_eso.data.samples.framing import Framing
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.shards.sources import ShardSource


class ValidationData:
    """The validation samples of a run. Several threads may read them at once.

    Attributes:
        dataset: The dataset of `data.validation`.
        vocabulary: The token ids, and the mask token, which never occurs in the text.
        num_samples: Samples of the set.
        sequence_length: Tokens of a sample with its framing.
    """

    def __init__(self, data: DataConfig, dataset: TokenDataset) -> None:
        """Use an open dataset.

        Args:
            data: The section `data`.
            dataset: The open dataset of `data.validation`.

        Raises:
            ConfigError: The tokenizer lacks the tokens of the framing.
            DataError: The dataset has no data row.
        """
        self.dataset = dataset
        self.vocabulary = read_vocabulary(dataset)
        self._location = str(data.validation)
        self.sequence_length = data.sequence_length
        self._row_tokens = data.row_tokens
        self._framing = Framing.resolve(data, dataset.manifest.tokenizer)
        self._documents = Documents.resolve(data, dataset.manifest.tokenizer)
        self.num_samples = dataset.num_rows(data.row_tokens)

    @classmethod
    def open(cls, data: DataConfig, *, check_files: bool = True) -> "ValidationData | None":
        """Open the dataset of `data.validation`; return None where the key is left out.

        Args:
            data: The section `data`.
            check_files: As of `TokenDataset.open`.

        Raises:
            ConfigError: The tokenizer lacks the tokens of the framing.
            DataError: The dataset is missing or damaged, or has no data row.
        """
        if data.validation is None:
            return None
        return cls(data, open_corpus(data.validation, data, check_files=check_files))

    @property
    def sources(self) -> list[ShardSource]:
        """The sources of the shards, for `copy_shards`."""
        return [self.dataset.shards]

    def samples(self, indices_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read samples, with the tokens of `data.framing`.

        Args:
            indices_B: Sample numbers, int64 `[B]`, from 0 to num_samples - 1.

        Returns:
            Token ids, int64 `[B, T]`, T = `data.sequence_length`.

        Raises:
            DataError: A shard is damaged; the error names shard, record, offset and data row.
        """
        return self._framing.frame(self.dataset.rows(indices_B, self._row_tokens))

    def documents(self, tokens_BT: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the number of each token's document; None without `data.document_attention`.

        Args:
            tokens_BT: Samples that `samples` returned.
        """
        return self._documents.number(tokens_BT)

    def lengths(self, indices_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the real tokens of each sample, int64 `[B]`: T, because none is cut."""
        return np.full(len(indices_B), self.sequence_length)

    def check_tokenizer(self, expected: Mapping[str, Any]) -> None:
        """Refuse the set if it has another tokenizer than the run.

        Args:
            expected: The `identity` of the run's tokenizer.

        Raises:
            ConfigError: The tokenizers differ.
        """
        check_tokenizer("data.validation", self._location, self.dataset, expected)
