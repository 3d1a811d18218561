"""`order`: what sample n of a run is, down to the bytes on disk and the documents."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data_tools.reports.inspection import decode_row
from data_tools.reports.row_places import RowPlace, locate_row
from data_tools.reports.run_order import open_run_order
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError

_MAX_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlace:
    """What a sample is."""

    sample: int
    phase: int
    """`data.phase` that it belongs to."""
    corpus: int
    """Number of the corpus within the run."""
    dataset_id: str
    location: str
    epoch: int
    """Epoch of the corpus, from 0."""
    row: int
    num_rows: int
    place: RowPlace
    text: str
    """The beginning of the text."""

    def describe(self) -> Iterator[str]:
        """The sample as lines of text."""
        yield f"sample {self.sample}"
        yield f"  phase          {self.phase}"
        yield f"  corpus         {self.corpus}: {self.location}, dataset id {self.dataset_id}"
        yield f"  epoch          {self.epoch}"
        yield f"  row            {self.row} of {self.num_rows}"
        yield from (f"  {line}" for line in self.place.describe())
        yield f"  text           {json.dumps(self.text, ensure_ascii=False)}"


def report_order(arguments: Sequence[str], samples: Sequence[int], as_json: bool = False) -> None:
    """Print what samples of a run are.

    Args:
        arguments: a run directory, or what training is given: TOML files and `section.key=value`.
        samples: global indices, from 0.
        as_json: print one JSON object instead.

    Raises:
        ConfigError: the configuration does not hold together, a sample's corpus is not open, or
            there is no such sample.
        DataError: a corpus is missing or damaged.
    """
    config, data = open_run_order(arguments)
    locations = dict(zip(data.datasets, config.data.train_corpora, strict=True))
    found = [locate_sample(data, locations, sample) for sample in samples]
    if as_json:
        sys.stdout.write(json.dumps({"samples": [asdict(f) for f in found]}, indent=1) + "\n")
        return
    for sample in found:
        sys.stdout.writelines(f"{line}\n" for line in sample.describe())


def locate_sample(data: TrainingData, locations: Mapping[str, str], sample: int) -> SamplePlace:
    """Find a sample and read its row's record.

    Args:
        data: the run's.
        locations: directory or URL by dataset id.
        sample: global index.
    """
    if sample < 0:
        raise ConfigError(f"--sample {sample}: samples are numbered from 0")
    index_N = np.array([sample])
    places = data.locate(index_N)
    number, row = int(places.corpus_N[0]), int(places.row_N[0])
    corpus = data.blend.corpora[number]
    dataset = data.datasets[corpus.dataset_id]
    tokens = data.rows(index_N)[0].tolist()
    text = decode_row(Tokenizer.load(dataset.tokenizer_directory), tokens)
    return SamplePlace(
        sample=sample,
        phase=[phase.number for phase in data.blend.phases if phase.start <= sample][-1],
        corpus=number,
        dataset_id=corpus.dataset_id,
        location=locations[corpus.dataset_id],
        epoch=int(places.epoch_N[0]),
        row=row,
        num_rows=corpus.num_rows,
        place=locate_row(dataset, row, data.row_tokens),
        text=text[:_MAX_CHARACTERS],
    )
