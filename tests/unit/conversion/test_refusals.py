"""Checkpoints that are damaged, unfinished or of another model are refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints_conversion.__main__ import main
from checkpoints_conversion.parameter_map import map_to_megatron
from checkpoints_conversion.run_network import write_run_directory
from megatron_eso.errors import CheckpointError
from megatron_eso.runs.file_index import FILE_INDEX
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig
from tests.support.run_directories import STEP_0, convert, describe, rewrite

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", '{"format_version": 2, "step": 0}', "format_version"),
        ("state.json", "{", "state.json"),
        ("metadata.json", '{"sharded_backend": "zarr"}', "zarr"),
        ("__0_0.distcp", "", "damaged"),
        (".metadata", "", "checkpoint's index"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, run_directory: Path, name: str, content: str, message: str
) -> None:
    (run_directory / STEP_0 / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name}: has {len(content)} bytes"):
        convert(run_directory, tmp_path / "out")
    (run_directory / STEP_0 / FILE_INDEX).unlink()  # as other programs write them
    with pytest.raises(CheckpointError, match=message):
        convert(run_directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_field_of_a_sampler_directory_is_one_line(
    tmp_path: Path, tiny_directory: Path
) -> None:
    shutil.copytree(tiny_directory, tmp_path / "sampler")
    path = tmp_path / "sampler/config.json"
    fields = json.loads(path.read_text())
    for field, value in (("hidden_size", "wide"), ("alpha_0", None)):
        path.write_text(json.dumps(fields | {field: value}))
        for command in ("to-megatron", "verify"):
            arguments = [command, str(path.parent), str(tmp_path / "out")]
            if command == "verify":
                arguments[2] = str(tiny_directory)
            with pytest.raises(CheckpointError, match=f"^{path}: {field} is {value!r}, no "):
                main(arguments)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_checkpoint_is_not_taken(tmp_path: Path, run_directory: Path) -> None:
    (run_directory / STEP_0 / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        convert(run_directory, tmp_path / "out")
    shutil.rmtree(run_directory / STEP_0)
    with pytest.raises(CheckpointError, match="no complete checkpoint; there are none"):
        convert(run_directory, tmp_path / "out")


def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    write_run_directory(tmp_path / "run", describe(config), tensors, tokenizer=None)
    step = tmp_path / "run" / STEP_0
    rewrite(
        step,
        map_to_megatron(config, tensors, padded_vocab_size=128)
        | {"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(16, 25)},
    )
    with pytest.raises(CheckpointError, match="layers.0.mlp.down_proj.weight"):
        convert(tmp_path / "run", tmp_path / "out")


def test_exit_codes_and_one_line_errors(tmp_path: Path) -> None:
    for arguments, code in (
        (["from-official", str(tmp_path / "nowhere"), str(tmp_path / "out")], 2),
        (["from-official"], 2),
    ):
        command = [sys.executable, "-m", "checkpoints_conversion", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
    assert done.stdout == ""
