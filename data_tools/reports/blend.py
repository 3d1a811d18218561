"""`blend`: reports what a run draws from each of its corpora, before it starts."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data_tools.reports.run_order import open_run_order
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.blend import BLOCK_SAMPLES, Blend
from megatron_eso.data.samples.training_data import TrainingData

MAX_EPOCHS = 4
"""More epochs cause a warning: repeated text helps less (Muennighoff et al., arXiv 2305.16264)."""
MAX_ROUNDING = 0.01
"""A larger relative change of a share by rounding causes a warning."""
MAX_UNUSED = 0.01
"""A larger share of a corpus in tails of records, which are never read, causes a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusPlan:
    """Draws of a run from one corpus."""

    location: str
    dataset_id: str
    num_tokens: int
    num_documents: int
    num_rows: int
    """Data rows of the run's length; an epoch reads each of them once."""
    unused_tokens: int
    """Tokens in tails of records, which are shorter than a row and never read."""
    weight: float
    """Configured share; by default that of the corpus in the rows of all corpora."""
    quota: int
    """Samples in each blend block of BLOCK_SAMPLES samples: the exact share."""
    num_samples: int
    """Exact number of samples of the budget that come from the corpus."""
    sample_tokens: int
    """Tokens of text in these samples."""
    epochs: float

    def find_warnings(self) -> Iterator[str]:
        """Yield one line for each value that may be a mistake."""
        if self.epochs > MAX_EPOCHS:
            yield (
                f"{self.location}: {self.epochs:.2f} epochs, more than {MAX_EPOCHS}: lower its "
                f"weight in data.train_weights, add text, or train on fewer tokens"
            )
        share = self.quota / BLOCK_SAMPLES
        if abs(share - self.weight) > MAX_ROUNDING * self.weight:
            yield (
                f"{self.location}: its share {self.weight:.4%} is rounded to {self.quota} of "
                f"{BLOCK_SAMPLES} samples, {share:.4%}: raise its weight in data.train_weights if "
                f"that matters"
            )
        if self.unused_tokens > MAX_UNUSED * self.num_tokens:
            yield (
                f"{self.location}: {self.unused_tokens / self.num_tokens:.1%} of its tokens lie in "
                f"tails of records shorter than a row and are never read: build it with longer "
                f"records (--record-tokens), or choose a data.sequence_length that divides them"
            )


def report_blend(arguments: Sequence[str], num_tokens: int | None, as_json: bool = False) -> None:
    """Print what a configuration draws from its corpora.

    Args:
        arguments: A run directory, or configuration layers and overrides as for training.
        num_tokens: Budget in tokens of samples (`data.sequence_length` each, with framing); None
            takes the run's.
        as_json: Whether to print one JSON object instead of a table.

    Raises:
        ConfigError: The configuration is wrong, or a share is too small.
        DataError: A corpus is missing or damaged, or has no row.
    """
    config, data = open_run_order(arguments)
    length = config.data.sequence_length
    num_samples = config.train.num_steps * config.train.global_batch_size
    if num_tokens is not None:
        num_samples = -(-num_tokens // length)
    plans = plan_corpora(config, data, num_samples)
    warnings = [warning for plan in plans for warning in plan.find_warnings()]
    if as_json:
        report = {
            "sequence_length": length,
            "num_samples": num_samples,
            "num_tokens": num_samples * length,
            "corpora": [asdict(plan) for plan in plans],
            "warnings": warnings,
        }
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return
    sys.stdout.write(f"{num_samples * length:,} tokens, {num_samples:,} samples of {length}\n")
    sys.stdout.writelines(f"{line}\n" for line in _draw_table(plans))
    sys.stdout.writelines(f"warning: {warning}\n" for warning in warnings)


def plan_corpora(config: Config, data: TrainingData, num_samples: int) -> list[CorpusPlan]:
    """List what the first `num_samples` of a run draw from each corpus of its last blend."""
    row_tokens = config.data.row_tokens
    drawn = count_draws(data.blend, num_samples)
    numbers = {corpus.dataset_id: n for n, corpus in enumerate(data.blend.corpora)}
    datasets = list(data.datasets.values())
    weights = config.data.train_weights or [dataset.num_rows(row_tokens) for dataset in datasets]
    plans = []
    for location, dataset, weight in zip(config.data.train_corpora, datasets, weights, strict=True):
        number = numbers[dataset.dataset_id]
        num_rows = dataset.num_rows(row_tokens)
        plans.append(
            CorpusPlan(
                location=location,
                dataset_id=dataset.dataset_id,
                num_tokens=dataset.num_tokens,
                num_documents=dataset.manifest.num_documents,
                num_rows=num_rows,
                unused_tokens=dataset.num_tokens - num_rows * row_tokens,
                weight=weight / sum(weights),
                quota=data.blend.phases[-1].quotas[number],
                num_samples=drawn[number],
                sample_tokens=drawn[number] * row_tokens,
                epochs=drawn[number] / num_rows,
            )
        )
    return plans


def count_draws(blend: Blend, num_samples: int) -> list[int]:
    """Count the samples of each corpus among the first `num_samples` of a run."""
    drawn = np.zeros(len(blend.corpora), dtype=np.int64)
    stops = [*(phase.start for phase in blend.phases[1:]), num_samples]
    for phase, stop in zip(blend.phases, stops, strict=True):
        num_blocks, rest = divmod(max(0, min(stop, num_samples) - phase.start), BLOCK_SAMPLES)
        quotas = np.array(phase.quotas)
        drawn[: len(quotas)] += num_blocks * quotas
        rest_N = phase.start + num_blocks * BLOCK_SAMPLES + np.arange(rest)
        drawn += np.bincount(blend.locate(rest_N).corpus_N, minlength=len(drawn))
    return drawn.tolist()


def _draw_table(plans: Sequence[CorpusPlan]) -> Iterator[str]:
    head = ("corpus", "share", "of 4096", "rows", "tokens", "unused", "samples", "read", "epochs")
    rows = [
        (
            plan.location,
            f"{plan.quota / BLOCK_SAMPLES:.3%}",
            f"{plan.quota}",
            f"{plan.num_rows:,}",
            f"{plan.num_tokens:,}",
            f"{plan.unused_tokens:,}",
            f"{plan.num_samples:,}",
            f"{plan.sample_tokens:,}",
            f"{plan.epochs:.3f}",
        )
        for plan in plans
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for name, *cells in (head, *rows):
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join((f"{name:<{widths[0]}}", *numbers))
