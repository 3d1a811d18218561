"""Imported tokens as documents: each closed by the end-of-text token, each given to its split."""

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
    """Checks ids, and has every document end with the end-of-text token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.eos_token_id is not None
        self._eos = tokenizer.eos_token_id
        self._vocab_size = tokenizer.vocab_size
        self._mask = tokenizer.mask_token_id
        self._last = self._eos
        self.num_added = 0

    def close(self, block: TokenBlock) -> npt.NDArray[np.uint32]:
        """The tokens of a block and those that were missing.

        Raises:
            DataError: an id is not in the vocabulary, or is the mask token.
        """
        ids = block.tokens
        wrong = (ids < 0) | (ids >= self._vocab_size) | (ids == self._mask)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise DataError(
                f"{block.source.path}: byte {block.offset + place * ids.itemsize}: the id "
                f"{ids[place]} is not in the vocabulary of {self._vocab_size}, or is its mask "
                f"token {self._mask}; give the --tokenizer that the tokens were made with"
            )
        before = np.concatenate([[self._last], ids])
        is_missing = before[block.ends] != self._eos
        self.num_added += int(is_missing.sum())
        closed = np.insert(ids.astype(np.uint32), block.ends[is_missing], self._eos)
        self._last = int(closed[-1])
        return closed


class DocumentSplitter:
    """Gives each document to the writer of its split, by the hash of its tokens."""

    def __init__(self, share: float, eos: int, writers: dict[Split, DatasetWriter]) -> None:
        self._share = share
        self._threshold = int(share * 2**64)
        self._eos = eos
        self._writers = writers
        self._counts: dict[Split, Counter[TokenSource]] = {split: Counter() for split in writers}
        # The document that has not ended: the file in which it begins, and its tokens.
        self._source: TokenSource | None = None
        self._open: list[npt.NDArray[np.uint32]] = []

    def add(self, source: TokenSource, tokens: npt.NDArray[np.uint32]) -> None:
        """Append tokens of a file, documents that end with the end-of-text token."""
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
        """Write the documents that have ended, at places counted from the end, to their splits."""
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
        """Documents of a split so far."""
        return self._counts[split].total()

    def finish(self, sources: list[TokenSource]) -> dict[Split, str]:
        """Publish the datasets.

        Returns:
            The id of each by split.

        Raises:
            DataError: a split is empty.
        """
        total = sum(map(self.num_documents, self._writers))
        if not total:
            raise DataError("the input holds no document; check --input")
        for split in self._writers:
            if not self.num_documents(split):
                raise DataError(
                    f"none of the {total} documents went to the {split} split at --validation "
                    f"{self._share}; change the share or give more documents"
                )
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
                # Not known without decoding.
                num_text_bytes=0,
                split=split,
                validation_share=self._share,
            )
            for split, writer in self._writers.items()
        }
