"""The training corpora of a run: opening, reading by sample number, and resume.

Shapes: N samples, S tokens of text in each.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_eso.config.origins import Origins, prefix_origin
from megatron_eso.config.sections import DataConfig
from megatron_eso.data.samples.blend import (
    BLOCK_SAMPLES,
    Blend,
    BlendPhase,
    Corpus,
    DataRows,
    resolve_quotas,
)
from megatron_eso.data.samples.corpora import (
    check_tokenizer,
    open_corpus,
    read_quarantine,
    read_vocabulary,
    warn_of_unknown,
)
from megatron_eso.data.samples.documents import Documents
from megatron_eso.data.samples.framing import Framing
from megatron_eso.data.samples.lengths import draw_lengths
from megatron_eso.data.samples.order import ORDER_VERSION
from megatron_eso.data.samples.validation_data import ValidationData
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.shards.sources import ShardSource
from megatron_eso.data.tokenizers.fingerprint import name_differences
from megatron_eso.errors import ConfigError

logger = logging.getLogger(__name__)


class TrainingData:
    """The training samples of a run. Several threads may read them at once.

    Attributes:
        datasets: The datasets of the present blend, by dataset id.
        blend: The order of the run.
        row_tokens: S, tokens of text in a sample.
        sequence_length: T, tokens of a sample with its framing.
        tokenizer: The tokenizer of all corpora.
        vocabulary: The token ids, and the mask token, which never occurs in the text.
        tokenizer_directory: The folder of the tokenizer's files.
    """

    def __init__(self, data: DataConfig, seed: int, datasets: tuple[TokenDataset, ...]) -> None:
        """Start at the first sample of a run.

        Args:
            data: The section `data`.
            seed: `run.seed`.
            datasets: The datasets of `data.train`, in its order.

        Raises:
            ConfigError: The datasets do not fit together, or lack the tokens of the framing.
            DataError: A dataset has no data row.
        """
        # Refuse datasets of different tokenizers, and the same dataset twice.
        self.tokenizer = datasets[0].manifest.tokenizer
        self.vocabulary = read_vocabulary(datasets[0])
        for corpus, dataset in zip(data.train_corpora, datasets, strict=True):
            check_tokenizer("data.train", corpus, dataset, self.tokenizer.identity)
        self.datasets = {dataset.dataset_id: dataset for dataset in datasets}
        if len(self.datasets) < len(datasets):
            raise ConfigError(
                f"data.train = {json.dumps(data.train)}: two of these are the same dataset; name "
                f"it once, and raise its weight in data.train_weights"
            )
        # Begin the order of the samples.
        self.row_tokens = data.row_tokens
        self.sequence_length = data.sequence_length
        self._seed, self._ssl_ratio = seed, data.ssl_ratio
        self._framing = Framing.resolve(data, self.tokenizer)
        self._documents = Documents.resolve(data, self.tokenizer)
        self._phase = data.phase
        self.tokenizer_directory = datasets[0].tokenizer_directory
        self._names = dict(zip(self.datasets, data.train_corpora, strict=True))
        self._quarantine_sha256 = read_quarantine(data).sha256
        self._corpora = tuple(
            Corpus(dataset_id=dataset.dataset_id, num_rows=dataset.num_rows(self.row_tokens))
            for dataset in datasets
        )
        self._quotas = _resolve(data, [corpus.num_rows for corpus in self._corpora])
        self.blend = Blend.begin(seed, self._corpora, self._quotas, data.phase)

    @classmethod
    def open(cls, data: DataConfig, seed: int, *, check_files: bool = True) -> "TrainingData":
        """Open the corpora of `data.train` for the start of a run.

        Args:
            data: The section `data`.
            seed: `run.seed`.
            check_files: As of `TokenDataset.open`.

        Raises:
            ConfigError: The corpora do not fit together.
            DataError: A corpus is missing or damaged, or has no data row.
        """
        names = data.train_corpora
        return cls(
            data, seed, tuple(open_corpus(name, data, check_files=check_files) for name in names)
        )

    @property
    def sources(self) -> list[ShardSource]:
        """The sources of the shards, for `copy_shards`."""
        return [dataset.shards for dataset in self.datasets.values()]

    def locate(self, sample_indices: npt.NDArray[np.int64]) -> DataRows:
        """Return the corpus, epoch and data row of samples, with the substitutes of quarantine.

        Raises:
            ConfigError: A corpus of an earlier data phase is not open.
        """
        located = self.blend.locate(sample_indices)
        row_N = located.row_N.copy()
        for number in np.unique(located.corpus_N).tolist():
            of_corpus_N = located.corpus_N == number
            rows = self._dataset(number).substitute(row_N[of_corpus_N], self.row_tokens)
            row_N[of_corpus_N] = rows
        return dataclasses.replace(located, row_N=row_N)

    def samples(self, indices_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Read samples, with the tokens of `data.framing`.

        Args:
            indices_B: Sample numbers, int64 `[B]`, from 0 on, without an upper limit.

        Returns:
            Token ids, int64 `[B, T]`, T = `data.sequence_length`.

        Raises:
            DataError: A shard is damaged; the error names shard, record, offset, data row and
                sample.
        """
        return self._framing.frame(self.rows(indices_B))

    def lengths(self, indices_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many tokens of each sample are real, int64 `[B]`: T, or fewer if it is cut."""
        return draw_lengths(self._seed, indices_B, self._ssl_ratio, self.sequence_length)

    def documents(self, tokens_BT: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Return the number of each token's document; None without `data.document_attention`.

        Args:
            tokens_BT: Samples that `samples` returned.
        """
        return self._documents.number(tokens_BT)

    def rows(self, sample_indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Read the text of samples, without framing.

        Args:
            sample_indices: Sample numbers, int64 [N], from 0 on, without an upper limit.

        Returns:
            Token ids, int64 [N, S].

        Raises:
            DataError: A shard is damaged; the error names shard, record, offset, data row and
                sample.
        """
        located = self.blend.locate(sample_indices)
        tokens_NS = np.empty((len(sample_indices), self.row_tokens), dtype=np.int64)
        for number in np.unique(located.corpus_N).tolist():
            of_corpus_N = located.corpus_N == number
            tokens_NS[of_corpus_N] = self._dataset(number).rows(
                located.row_N[of_corpus_N],
                self.row_tokens,
                sample_indices=sample_indices[of_corpus_N],
            )
        return tokens_NS

    def count_shares(self, start: int, stop: int) -> dict[str, float]:
        """Return the share of each corpus in the samples `start .. stop - 1`, by its name."""
        corpus_N = self.blend.locate(np.arange(start, stop)).corpus_N
        counts = np.bincount(corpus_N, minlength=len(self.blend.corpora)) / max(stop - start, 1)
        ids = [corpus.dataset_id for corpus in self.blend.corpora]
        return {
            self._names.get(dataset_id, dataset_id[:12]): float(share)
            for dataset_id, share in zip(ids, counts, strict=True)
        }

    def _dataset(self, number: int) -> TokenDataset:
        dataset_id = self.blend.corpora[number].dataset_id
        if dataset_id not in self.datasets:
            raise ConfigError(
                f"corpus {number} of the run, dataset {dataset_id}, is not in data.train; add it "
                f"to read samples of earlier phases"
            )
        return self.datasets[dataset_id]

    def describe(self, blend: Blend | None = None) -> str:
        """Describe the exact shares in the last phase of a blend; by default of the run's blend."""
        return ", ".join(
            f"{self._names.get(dataset_id, dataset_id[:12])} {quota / BLOCK_SAMPLES:.2%} "
            f"({quota}/{BLOCK_SAMPLES})"
            for dataset_id, quota in (blend or self.blend).quotas.items()
        )

    @property
    def state(self) -> dict[str, Any]:
        """The order of the samples, for a checkpoint; equal on all ranks."""
        return {
            "order_version": ORDER_VERSION,
            "row_tokens": self.row_tokens,
            **dataclasses.asdict(self.blend),
            "tokenizer": self.tokenizer.identity,
            "quarantine_sha256": self._quarantine_sha256,
        }

    def resume(
        self,
        state: Mapping[str, Any],
        *,
        consumed_samples: int,
        source: str,
        origins: Origins | None = None,
    ) -> None:
        """Continue the order of a checkpoint, in a new data phase if `data.phase` is higher.

        Args:
            state: The `state` of the run that wrote the checkpoint.
            consumed_samples: Samples that this run has consumed.
            source: Path of the checkpoint, for errors.
            origins: Where the configuration's keys were set, for errors.

        Raises:
            ConfigError: The data differ from those of the checkpoint, but `data.phase` is the same.
        """
        # Refuse another tokenizer, and another order of the same data.
        elsewhere = f"another run.directory with checkpoint.init_from = {source}"
        if state["tokenizer"] != self.tokenizer.identity:
            names = ", ".join(self._names.values())
            found = name_differences(state["tokenizer"], self.tokenizer.identity)
            raise ConfigError(
                f"{prefix_origin(origins, 'data.train')}data.train = {names}: its tokenizer is not "
                f"that of {source} ({found}): name shards of the run's tokenizer, or start "
                f"{elsewhere} and checkpoint.init_other_tokenizer = true"
            )
        fixed = {key: self.state[key] for key in ("order_version", "row_tokens", "seed")}
        for key, value in fixed.items():
            if state[key] != value:
                raise ConfigError(
                    f"{source}: data.{key} = {state[key]}, but this run has {value}: a run keeps "
                    f"its order; start {elsewhere}"
                )
        # Continue the blend, or begin a new data phase.
        blend = _decode_blend(state)
        if blend.quotas == self.blend.quotas and self._phase <= blend.phases[-1].number:
            self.blend = blend
        else:
            self.blend = self._change(blend, consumed_samples, source, origins)
        self._check_open(consumed_samples, origins)
        if state["quarantine_sha256"] != self._quarantine_sha256:
            logger.warning(
                "data.quarantine: the list differs from that of %s; data rows of other records "
                "replace those of the listed records", source,
            )  # fmt: skip

    def _change(
        self, blend: Blend, consumed_samples: int, source: str, origins: Origins | None
    ) -> Blend:
        """Return the run's order with the configured blend as a new data phase.

        Raises:
            ConfigError: `data.phase` is not one above the last phase.
        """
        old, new = self.describe(blend), self.describe()
        phase, last = self._phase, blend.phases[-1].number
        if phase != last + 1:
            what = "another blend" if blend.quotas != self.blend.quotas else "the same blend"
            raise ConfigError(
                f"{prefix_origin(origins, 'data.phase')}data.phase = {phase}: {source} is in phase "
                f"{last} of {old}, and data.train with its weights is {what}, {new}: to change the "
                f"blend from here on, set data.phase = {last + 1}; else restore data.train and "
                f"data.train_weights, or start another run.directory with checkpoint.init_from = "
                f"{source}"
            )
        changed = blend.change(self._corpora, self._quotas, phase, consumed_samples)
        logger.info(
            "data.phase %d -> %d from sample %d on: %s -> %s",
            last, phase, changed.phases[-1].start, old, new,
        )  # fmt: skip
        return changed

    def _check_open(self, consumed_samples: int, origins: Origins | None) -> None:
        """Refuse to continue without a corpus that an earlier phase still draws.

        Raises:
            ConfigError: Such a corpus is not in `data.train`.
        """
        stops = [phase.start for phase in self.blend.phases[1:]]
        for phase, stop in zip(self.blend.phases, stops, strict=False):
            for corpus, quota in zip(self.blend.corpora, phase.quotas, strict=False):
                if stop > consumed_samples and quota and corpus.dataset_id not in self.datasets:
                    names = ", ".join(self._names.values())
                    raise ConfigError(
                        f"{prefix_origin(origins, 'data.train')}data.train = {names}: dataset "
                        f"{corpus.dataset_id} is missing, which the run draws up to sample {stop}: "
                        f"name it too, with weight 0 in data.train_weights"
                    )


def open_run_data(
    data: DataConfig, seed: int, *, check_files: bool = True
) -> tuple[TrainingData, ValidationData | None]:
    """Open the shards of a run for training, and those for validation if it has any.

    Args:
        data: The section `data`.
        seed: `run.seed`.
        check_files: As of `TokenDataset.open`.

    Raises:
        ConfigError: The datasets do not fit together.
        DataError: Shards are missing or damaged, or have no data row.
    """
    train = TrainingData.open(data, seed, check_files=check_files)
    validation = ValidationData.open(data, check_files=check_files)
    dataset_ids = list(train.datasets)
    if validation is not None:
        validation.check_tokenizer(train.tokenizer.identity)
        dataset_ids.append(validation.dataset.dataset_id)
    warn_of_unknown(data, dataset_ids)
    return train, validation


def _decode_blend(state: Mapping[str, Any]) -> Blend:
    phases = [
        BlendPhase(
            number=phase["number"],
            start=phase["start"],
            quotas=tuple(phase["quotas"]),
            first_draws=tuple(phase["first_draws"]),
        )
        for phase in state["phases"]
    ]
    corpora = tuple(Corpus(**corpus) for corpus in state["corpora"])
    return Blend(seed=state["seed"], corpora=corpora, phases=tuple(phases))


def _resolve(data: DataConfig, num_rows: list[int]) -> tuple[int, ...]:
    """Return the quotas of the configured blend.

    Raises:
        ConfigError: A corpus with a weight above 0 would never be drawn.
    """
    weights = data.train_weights or num_rows
    quotas = resolve_quotas(weights)
    for corpus, quota, weight in zip(data.train_corpora, quotas, weights, strict=True):
        if quota == 0 < weight:
            raise ConfigError(
                f"data.train = {corpus}: its share {weight / sum(weights):.2g} of the samples is "
                f"less than the smallest, 1/{BLOCK_SAMPLES}: leave it out, join it with another "
                f"corpus, or give it at least that in data.train_weights"
            )
    return quotas
