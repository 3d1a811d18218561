"""`order`: reports which text a sample of a run is: corpus, row, bytes on disk, documents."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data_tools.reports.inspection import decode_row
from data_tools.reports.row_location import RowLocation, locate_row
from data_tools.reports.run_order import open_run_order
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError

_MAX_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleLocation:
    """The origin of a sample, and the beginning of its text."""

    sample: int
    phase: int
    """Number of its data phase (`data.phase`)."""
    corpus: int
    """Number of the corpus in the run."""
    dataset_id: str
    location: str
    epoch: int
    """Number of the epoch of the corpus, from 0."""
    row: int
    num_rows: int
    place: RowLocation
    text: str
    """The beginning of the text."""

    def describe(self) -> Iterator[str]:
        """Yield the sample as lines of text."""
        yield f"sample {self.sample}"
        yield f"  phase          {self.phase}"
        yield f"  corpus         {self.corpus}: {self.location}, dataset id {self.dataset_id}"
        yield f"  epoch          {self.epoch}"
        yield f"  row            {self.row} of {self.num_rows}"
        yield from (f"  {line}" for line in self.place.describe())
        yield f"  text           {json.dumps(self.text, ensure_ascii=False)}"


def report_order(arguments: Sequence[str], samples: Sequence[int], as_json: bool = False) -> None:
    """Print the origin of samples of a run.

    Args:
        arguments: A run directory, or configuration layers and overrides as for training.
        samples: Numbers of the samples, from 0.
        as_json: Whether to print one JSON object instead of text.

    Raises:
        ConfigError: The configuration is wrong, it lacks the corpus of a sample, or the run has no
            such sample.
        DataError: A corpus is missing or damaged.
    """
    config, data = open_run_order(arguments)
    locations = dict(zip(data.datasets, config.data.train_corpora, strict=True))
    found = [locate_sample(data, locations, sample) for sample in samples]
    if as_json:
        sys.stdout.write(json.dumps({"samples": [asdict(f) for f in found]}, indent=1) + "\n")
        return
    for sample in found:
        sys.stdout.writelines(f"{line}\n" for line in sample.describe())


def locate_sample(data: TrainingData, locations: Mapping[str, str], sample: int) -> SampleLocation:
    """Find a sample, and read the record of its row.

    Args:
        data: Training data of the run.
        locations: Directory or URL of each corpus by dataset id.
        sample: Number of the sample.

    Raises:
        ConfigError: The number is negative, or the run has no such sample.
        DataError: The record is damaged.
    """
    if sample < 0:
        raise ConfigError(f"--sample {sample}: samples are numbered from 0; give 0 or more")
    index_N = np.array([sample])
    found = data.locate(index_N)
    number, row = int(found.corpus_N[0]), int(found.row_N[0])
    corpus = data.blend.corpora[number]
    dataset = data.datasets[corpus.dataset_id]
    tokens = data.rows(index_N)[0].tolist()
    text = decode_row(Tokenizer.load(dataset.tokenizer_directory), tokens)
    return SampleLocation(
        sample=sample,
        phase=[phase.number for phase in data.blend.phases if phase.start <= sample][-1],
        corpus=number,
        dataset_id=corpus.dataset_id,
        location=locations[corpus.dataset_id],
        epoch=int(found.epoch_N[0]),
        row=row,
        num_rows=corpus.num_rows,
        place=locate_row(dataset, row, data.row_tokens),
        text=text[:_MAX_CHARACTERS],
    )
