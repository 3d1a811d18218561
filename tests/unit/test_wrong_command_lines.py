"""Wrong command lines of data tools, conversion, sampler and evaluation: one line, exit code 2."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from checkpoints_conversion.__main__ import main as convert
from checkpoints_conversion.sampler_directory import write_sampler_directory
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.sampler.network.network_eso_lm import EsoNetwork
from tests.support.networks import make_network_config
from tests.support.wrong_command_lines import Places, answer, draw_wrong, list_commands

SEEDS = [9, 12]
NUMBER = 300


def write_network(directory: Path, tokenizer: Path) -> None:
    """Write a sampler directory with random weights for a tokenizer."""
    loaded = Tokenizer.load(tokenizer)
    sizes = {"vocab_size": loaded.vocab_size, "mask_token_id": loaded.mask_token_id}
    config = make_network_config(**sizes)
    description = {**dataclasses.asdict(config), "alpha_0": 0.25, "variant": "b", "source": {}}
    tensors = EsoNetwork(config).state_dict()
    write_sampler_directory(
        directory, description, tensors, dtype=torch.float32, tokenizer=tokenizer
    )


@pytest.fixture(scope="module")
def places(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("places")
    tokenizer = tiny_data.parent / "tokenizer"
    write_network(folder / "sampler", tokenizer)
    convert(["to-megatron", str(folder / "sampler"), str(folder / "run")])
    text = folder / "text.txt"
    text.write_text("one two three")
    return Places(
        folder=folder,
        text=text,
        tokenizer=tokenizer,
        shards=tiny_data,
        sampler=folder / "sampler",
        run=folder / "run",
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(places: Places, seed: int) -> None:
    commands = list_commands(places)
    before = sorted(places.folder.rglob("*"))
    answers = [answer(*drawn) for drawn in draw_wrong(commands, seed, NUMBER)]
    wrong = [each for each in answers if each.kind != "right"]
    counts = Counter(each.kind for each in answers)
    assert not wrong, f"{counts}, first {wrong[0]}"
    assert sorted(places.folder.rglob("*")) == before
