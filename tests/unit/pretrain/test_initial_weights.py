"""The dry run and the start refuse a sampler directory whose weights a run cannot take."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints_conversion.sampler_directory import write_sampler_directory
from megatron_eso.errors import UserError
from megatron_eso.sampler.network.network_eso_lm import EsoNetwork
from pretrain.train import main
from tests.support.networks import make_network_config
from tests.support.training import TINY, tiny_arguments

LAYER = "[model]\nqk_layernorm = true\n"


@pytest.fixture
def sampler(tiny_data: Path, tmp_path: Path) -> Path:
    """Write a sampler directory with random weights of the network of the tiny runs."""
    config = make_network_config(
        vocab_size=400,
        mask_token_id=4,
        max_length=TINY["data.sequence_length"],
        num_hidden_layers=TINY["model.num_layers"],
        hidden_size=TINY["model.hidden_size"],
        head_dim=8,
        intermediate_size=4 * TINY["model.hidden_size"],
        head_bias=False,
    )
    directory = tmp_path / "sampler"
    write_sampler_directory(
        directory,
        {**dataclasses.asdict(config), "objective": "eso_lm", "alpha_0": 0.25, "variant": "b"},
        EsoNetwork(config).state_dict(),
        dtype=torch.float32,
        tokenizer=tiny_data / "train" / "tokenizer",
    )
    return directory


def keep(_sampler: Path) -> None:
    """Nothing is wrong with the directory."""


def change_config(**values: object) -> Callable[[Path], None]:
    def change(sampler: Path) -> None:
        path = sampler / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def cut_weights(sampler: Path) -> None:
    with (sampler / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)


def damage_tokenizer(sampler: Path) -> None:
    (sampler / "tokenizer.model").write_bytes(b"?")


MISFIT = "set that, or start from other weights"
REFUSALS: list[tuple[str, Callable[[Path], None], str, int]] = [
    (
        "model.num_layers=2",
        keep,
        f"command line: model.num_layers = 2, but {{sampler}} was written with 4: {MISFIT}",
        2,
    ),
    (
        "{layer}",
        keep,
        f"{{layer}}: model.qk_layernorm = true, but {{sampler}} was written with false: {MISFIT}",
        2,
    ),
    (
        "run.seed=1",
        change_config(mask_token_id=5),
        "{data}/train: data.mask_token_id = 4, but {sampler} was written with 5: " + MISFIT,
        2,
    ),
    ("run.seed=1", change_config(vocab_size=500), "{sampler}: tensor embed_tokens.weight: ", 1),
    ("run.seed=1", change_config(objective="x"), "{sampler}/config.json: objective ", 1),
    ("run.seed=1", change_config(rotary_base=0.5), "{sampler}: rotary_base 0.5 is not a whole", 1),
    ("run.seed=1", cut_weights, "{sampler}: its weights are damaged", 1),
    (
        "run.seed=1",
        lambda sampler: (sampler / "model.safetensors").unlink(),
        "{sampler}: model.safetensors is missing; convert again",
        1,
    ),
    ("run.seed=1", damage_tokenizer, "tokenizer {sampler}/tokenizer.model: it is not", 1),
]


@pytest.mark.parametrize("is_dry", [True, False], ids=["dry run", "start"])
@pytest.mark.parametrize(("argument", "damage", "line", "code"), REFUSALS)
def test_weights_that_do_not_fit_are_refused(
    sampler: Path,
    tiny_data: Path,
    tmp_path: Path,
    argument: str,
    damage: Callable[[Path], None],
    line: str,
    code: int,
    is_dry: bool,
) -> None:
    names = {"sampler": sampler, "data": tiny_data, "layer": tmp_path / "layer.toml"}
    names["layer"].write_text(LAYER)
    damage(sampler)
    arguments = tiny_arguments(
        tmp_path / "run", tiny_data, {"checkpoint.init_from": f'"{sampler}"'}
    )
    with pytest.raises(UserError) as refused:
        main([*arguments, argument.format(**names), *(["--dry-run"] if is_dry else [])])
    assert str(refused.value).startswith(line.format(**names))
    assert refused.value.exit_code == code
    assert not (tmp_path / "run").exists()


def test_weights_that_fit_pass_the_dry_run(sampler: Path, tiny_data: Path, tmp_path: Path) -> None:
    overrides = {"checkpoint.init_from": f'"{sampler}"'}
    assert main([*tiny_arguments(tmp_path / "run", tiny_data, overrides), "--dry-run"]) == 0
