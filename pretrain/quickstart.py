"""Trains a small Eso-LM from text to samples, by the commands that a user would run.

It prints each command. Results of an earlier run are kept, and interrupted training continues.
`make quickstart` runs this.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_eso.command_line import CommandLine
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config
from megatron_eso.config.sections import Config
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.errors import UserError, run_command
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.runs.status import read_status
from megatron_eso.training.records.tags import VAL_PERPLEXITY

CONFIG = SHIPPED_CONFIGS / "quickstart.toml"
VOCAB_SIZE = 2048
VALIDATION_SHARE = 0.05
NUM_PROCESSES = 2
NUM_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Stage:
    """A command of the quickstart, and the path that exists when it has finished."""

    title: str
    product: Path
    command: list[str]
    is_finished: Callable[[Path], bool] = Path.exists


class StageError(UserError):
    """Error of a quickstart whose command failed; the output of the command has the reason."""


def main(argv: list[str] | None = None) -> None:
    """Run the stages that are not finished, and print the results.

    Raises:
        ConfigError: An override is wrong.
        StageError: A command failed.
    """
    parser = CommandLine(prog="python -m pretrain.quickstart", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values over quickstart.toml"
    )
    overrides = parser.parse_args(argv).overrides
    config = load_config([str(CONFIG), *overrides]).config
    run, data = Path(config.run.directory), Path(config.data.train_corpora[0]).parent.parent
    sampler = run / "sampler"
    began = time.monotonic()
    for number, stage in enumerate(stages := plan_stages(config, overrides, data, sampler), 1):
        run_stage(f"{number}/{len(stages)} {stage.title}", stage)
    show_results(config, run, sampler, time.monotonic() - began)


def plan_stages(config: Config, overrides: list[str], data: Path, sampler: Path) -> list[Stage]:
    """List the stages in order.

    Args:
        config: Configuration of the run.
        overrides: Values over the configuration file, as `section.key=value`.
        data: Folder for text, tokenizer and shards.
        sampler: Sampler directory to make.
    """
    # Paths, and the beginnings of commands.
    run = Path(config.run.directory)
    corpus, tokenizer, shards = data / "corpus.jsonl", data / "tokenizer", data / "shards"
    module = [sys.executable, "-m"]
    tools = [*module, "data_tools"]
    launch = [*module, "torch.distributed.run", "--standalone"]
    # From text to a sampler directory.
    return [
        Stage(
            "collect English text from this Python installation",
            corpus,
            [*tools, "corpus", "--out", str(corpus)],
        ),
        Stage(
            "train a tokenizer",
            tokenizer,
            [*tools, "train-tokenizer", "--input", str(corpus)]
            + ["--vocab-size", str(VOCAB_SIZE), "--out", str(tokenizer)],
        ),
        Stage(
            "build token shards",
            shards,
            [*tools, "build", "--input", str(corpus), "--tokenizer", str(tokenizer)]
            + ["--out", str(shards), "--validation", str(VALIDATION_SHARE)],
        ),
        Stage(
            f"pretrain on {NUM_PROCESSES} processes",
            RunDirectory(run).status,
            [*launch, f"--nproc-per-node={NUM_PROCESSES}"]
            + ["-m", "pretrain.train", str(CONFIG), *overrides],
            is_training_finished,
        ),
        Stage(
            "convert for single-device inference",
            sampler,
            [*module, "checkpoints_conversion", "to-sampler", str(run), str(sampler)],
        ),
    ]


def is_training_finished(status: Path) -> bool:
    """Return whether the status of a run states that it has finished."""
    found = read_status(status)
    return found is not None and found.state == "finished"


def run_stage(title: str, stage: Stage) -> None:
    """Run the command of a stage unless it is finished.

    Raises:
        StageError: The command failed.
    """
    if stage.is_finished(stage.product):
        show(f"\n[{title}] kept: {stage.product}")
        return
    show(f"\n[{title}]\n$ {shlex.join([relative_python(), *stage.command[1:]])}")
    stage.product.parent.mkdir(parents=True, exist_ok=True)
    # One thread per process, since the processes share the cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    code = subprocess.run(stage.command, env=environment, check=False).returncode
    if code != 0:
        raise StageError(
            f"{stage.title}: the command above failed with exit code {code}; correct what it "
            "reports and run the quickstart again"
        )


def show_results(config: Config, run: Path, sampler: Path, seconds: float) -> None:
    """Print perplexities, samples, and the paths of the results."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [line[VAL_PERPLEXITY] for line in lines if VAL_PERPLEXITY in line]
    validation = TokenDataset.open(str(config.data.validation))
    unigram = unigram_perplexity(validation, config.data.sequence_length)
    show("\nvalidation perplexity (of the NELBO, EMA weights)")
    show(f"  before training  {validations[0]:9.1f}   (vocabulary {validation.vocab_size})")
    show(f"  unigram model    {unigram:9.1f}   (by the token counts of the validation text)")
    show(f"  after training   {validations[-1]:9.1f}")
    sample = [sys.executable, "-m", "megatron_eso.sampler", "sample", str(sampler)]
    sample += ["--num-samples", str(NUM_SAMPLES), "--seed", "1"]
    show(f"\n{NUM_SAMPLES} samples\n$ {shlex.join([relative_python(), *sample[1:]])}")
    subprocess.run(sample, check=True)
    show(f"\nthis took {seconds / 60:.1f} minutes")
    show(f"TensorBoard logs   {run / 'tensorboard'}   (tensorboard --logdir {run})")
    show(f"sampler directory  {sampler}")
    show("next, plan the paper's 125M run on 8 GPUs:")
    plan = ["-m", "pretrain.train", "owt_small.toml", f"data.train={config.data.train}"]
    plan += [f"data.validation={config.data.validation}", "validation.num_samples=0"]
    show(shlex.join([relative_python(), *plan, "--dry-run", "--world-size", "8"]))


def unigram_perplexity(dataset: TokenDataset, sequence_length: int) -> float:
    """Compute the perplexity of the validation rows under their own token frequencies."""
    rows = dataset.rows(np.arange(dataset.num_rows(sequence_length)), sequence_length)
    counts = np.bincount(rows.ravel())
    shares = counts[counts > 0] / rows.size
    return float(np.exp(-(shares * np.log(shares)).sum()))


def relative_python() -> str:
    """Return the path of this interpreter, relative to the current folder if it is below."""
    python = Path(sys.executable)
    return str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python)


def show(text: str) -> None:
    """Print text and flush it, so that it comes before the output of the next command."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
