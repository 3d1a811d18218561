"""`verify`: equal and different checkpoints of all kinds."""

from pathlib import Path

import pytest
from torch import Tensor

from checkpoints_conversion.__main__ import main
from checkpoints_conversion.run_network import write_run_directory
from megatron_eso.errors import CheckpointError
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig
from tests.support.run_directories import STEP_0, describe, read_run, rewrite


def test_verify_accepts_equal_weights_and_rejects_different_ones(
    tmp_path: Path,
    run_directory: Path,
    tiny_directory: Path,
    tiny_ckpt: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = run_directory / STEP_0
    places = [str(tiny_directory), str(run_directory), str(step), str(tiny_ckpt)]
    for other in places[1:]:
        assert main(["verify", places[0], other]) == 0
        assert "53 of 53 equal" in capsys.readouterr().out
    assert main(["verify", places[0], places[3], "--weights", "raw"]) == 1
    tensors = read_run(step)
    tensors["decoder.final_layernorm.weight"][5] += 1
    rewrite(step, tensors)
    assert main(["verify", places[0], places[1]]) == 1
    assert "1 in norm.weight" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="neither a sampler directory"):
        main(["verify", places[0], str(tmp_path)])


def test_verify_names_the_differences_of_two_networks(
    tmp_path: Path,
    config: NetworkConfig,
    tensors: dict[str, Tensor],
    tiny_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run_directory(tmp_path / "run", describe(config), tensors, tokenizer=None)
    assert main(["verify", str(tiny_directory), str(tmp_path / "run")]) == 1
    out = capsys.readouterr().out
    assert "configurations differ: hidden_size: 64 and 16" in out
    assert "tensors in A only: layers.2.input_layernorm.weight" in out
    assert "NOT the same network" in out
