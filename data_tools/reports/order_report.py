"""`order`: what sample n of a run is, down to the bytes on disk and the documents."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_tools.reports.inspect_shards import decode_row
from data_tools.reports.row_places import RowPlace, locate_row
from megatron_eso.config.loading import load_config, read_config
from megatron_eso.config.sections import Config
from megatron_eso.data.samples.training_data import TrainingData
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import ConfigError, DataError
from megatron_eso.runs.checkpoint_state import STATE_FILE, read_state
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.steps import newest

CONFIGS = Path(__file__).parents[2] / "pretrain" / "configs"

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
    """Of the corpus, from 0."""
    row: int
    num_rows: int
    place: RowPlace
    text: str
    """Its beginning."""

    def describe(self) -> Iterator[str]:
        """Lines of text."""
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
    config, data = open_run(arguments)
    locations = dict(zip(data.datasets, config.data.train_corpora, strict=True))
    found = [locate_sample(data, locations, sample) for sample in samples]
    if as_json:
        sys.stdout.write(json.dumps({"samples": [asdict(f) for f in found]}, indent=1) + "\n")
        return
    for sample in found:
        sys.stdout.writelines(f"{line}\n" for line in sample.describe())


def open_run(arguments: Sequence[str]) -> tuple[Config, TrainingData]:
    """A run's configuration and order, continued from the newest checkpoint where there is one.

    Args:
        arguments: a run directory, or what training is given.

    Raises:
        ConfigError: the configuration does not hold together, or does not continue the run.
        CheckpointError: the checkpoint is damaged.
        DataError: a corpus is missing or damaged, or the checkpoint states no order of samples.
    """
    is_run = len(arguments) == 1 and Path(arguments[0]).is_dir()
    if is_run:
        run = RunDirectory(Path(arguments[0]))
        config = read_config(run.config)
    else:
        config = load_config(arguments, folder=CONFIGS).config
        run = RunDirectory(Path(config.run.directory))
    data = TrainingData.open(config.data, config.run.seed)
    checkpoint = newest(run.checkpoints)
    if checkpoint is None:
        return config, data
    state = read_state(checkpoint)
    if state.data is None:
        raise DataError(
            f"{checkpoint / STATE_FILE}: states no order of samples; name another run.directory"
        )
    consumed_samples = state.counters.consumed_samples
    data.resume(state.data, consumed_samples=consumed_samples, source=str(checkpoint))
    return config, data


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
