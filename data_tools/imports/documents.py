"""Ends imported documents with the end-of-text token, and divides them among the splits."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import xxhash

from data_tools.imports.interface import TokenBlock, TokenSource
from megatron_eso.data.shards.manifest import Source, Split
from megatron_eso.data.shards.writer import DatasetWriter
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import DataError


class DocumentCloser:
    """A check of ids, which adds the missing end-of-text tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.eos_token_id is not None
        self._eos = tokenizer.eos_token_id
        self._vocab_size = tokenizer.vocab_size
        self._mask = tokenizer.mask_token_id
        self._last = self._eos
        self.num_added = 0

    def close(self, block: TokenBlock) -> npt.NDArray[np.uint32]:
        """Return the tokens of a block with the missing end-of-text tokens, uint32.

        Raises:
            DataError: An id is not in the vocabulary, or is the mask token.
        """
        ids = block.tokens
        wrong = (ids < 0) | (ids >= self._vocab_size) | (ids == self._mask)
        if wrong.any():
            index = int(np.argmax(wrong))
            raise DataError(
                f"{block.source.path}: byte {block.offset + index * ids.itemsize}: the id "
                f"{ids[index]} is not in the vocabulary of {self._vocab_size}, or is its mask "
                f"token {self._mask}; give the --tokenizer that the tokens were made with"
            )
        before = np.concatenate([[self._last], ids])
        is_missing = before[block.ends] != self._eos
        self.num_added += int(is_missing.sum())
        closed = np.insert(ids.astype(np.uint32), block.ends[is_missing], self._eos)
        self._last = int(closed[-1])
        return closed


class DocumentSplitter:
    """A writer of documents to their splits, by the hash of their tokens."""

    def __init__(self, share: float, eos: int, writers: dict[Split, DatasetWriter]) -> None:
        self._share = share
        self._threshold = int(share * 2**64)
        self._eos = eos
        self._writers = writers
        self._counts: dict[Split, Counter[TokenSource]] = {split: Counter() for split in writers}
        # The document that has not ended: the file in which it began, and its tokens.
        self._source: TokenSource | None = None
        self._open: list[npt.NDArray[np.uint32]] = []

    def add(self, source: TokenSource, tokens: npt.NDArray[np.uint32]) -> None:
        """Append tokens of a file, in which the end-of-text token ends each document."""
        ends = np.flatnonzero(tokens == self._eos) + 1
        first = self._source or source
        if not len(ends):
            self._source = first
        else:
            self._source = source if ends[-1] < len(tokens) else None
        if not self._share:
            self._writers["all"].append(tokens)
            self._counts["all"] += Counter({first: min(1, len(ends))})
            self._counts["all"] += Counter({source: max(0, len(ends) - 1)})
            return
        self._open.append(tokens)
        if len(ends):
            self._split(first, source, ends - len(tokens))

    def _split(self, first: TokenSource, source: TokenSource, ends: npt.NDArray[np.int64]) -> None:
        """Write the complete documents to their splits; `ends` count from the last token back."""
        tokens = np.concatenate(self._open)
        stops = ends + len(tokens)
        starts = np.concatenate([[0], stops[:-1]])
        is_validation = np.array(
            [
                xxhash.xxh3_64_intdigest(tokens[start:stop].data) < self._threshold
                for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
            ]
        )
        ended = tokens[: stops[-1]]
        is_validation_token = np.repeat(is_validation, stops - starts)
        splits: tuple[Split, ...] = ("train", "validation")
        for split, is_here, taken in zip(
            splits,
            (~is_validation, is_validation),
            (~is_validation_token, is_validation_token),
            strict=True,
        ):
            self._writers[split].append(ended[taken])
            self._counts[split][first] += int(is_here[0])
            self._counts[split][source] += int(is_here[1:].sum())
        self._open = [tokens[stops[-1] :]]

    def num_documents(self, split: Split) -> int:
        """Return the number of documents in a split so far."""
        return self._counts[split].total()

    def finish(self, sources: list[TokenSource]) -> dict[Split, str]:
        """Publish the datasets.

        Args:
            sources: All files that were read.

        Returns:
            The id of each dataset by split.

        Raises:
            DataError: A split is empty.
        """
        # An empty split is refused.
        total = sum(map(self.num_documents, self._writers))
        if not total:
            raise DataError("the input holds no document; check --input")
        for split in self._writers:
            if not self.num_documents(split):
                raise DataError(
                    f"none of the {total} documents went to the {split} split at --validation "
                    f"{self._share}; change the share or give more documents"
                )
        # Each dataset names its sources.
        return {
            split: writer.finish(
                sources=[
                    Source(
                        path=source.name,
                        bytes=source.num_bytes,
                        sha256=source.sha256,
                        num_documents=self._counts[split][source],
                    )
                    for source in sources
                ],
                # Unknown without decoding.
                num_text_bytes=0,
                split=split,
                validation_share=self._share,
            )
            for split, writer in self._writers.items()
        }
