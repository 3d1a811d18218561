"""Wrong command lines of `pretrain.bench`: one line, exit code 2."""

from pathlib import Path

import pytest

from megatron_eso.errors import ConfigError
from pretrain.bench import main
from tests.support.training import TINY

VALUES = {"run.directory": '"x"', "data.train": '"nowhere"', "data.vocab_size": 97} | TINY
CONFIG = [f"{key}={value}" for key, value in VALUES.items()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world-size=2"], "--world-size needs --simulate or --plan"),
        (["--simulate=h100", "--steps=3"], "--steps measures real steps"),
        (["--plan=h100", "--steps=3"], "--steps measures real steps"),
        (["--simulate=h100", "--real-data"], "--real-data measures real steps"),
        (["--simulate=h100", "--profile=traces"], "--profile measures real steps"),
        (["--steps=0"], "--steps: 0 is not a whole number from 1"),
        (["--simulate=h1"], "--simulate: invalid choice"),
    ],
)
def test_arguments_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*CONFIG, *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tensor_model_parallel_size=2"], "tensor_model_parallel_size"),
        (["--real-data"], "there is no folder nowhere"),
    ],
)
def test_runs_that_cannot_be_measured(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        main([*CONFIG, *overrides])


def test_a_vocabulary_is_needed_to_draw_tokens() -> None:
    config = [each for each in CONFIG if not each.startswith("data.vocab_size")]
    with pytest.raises(ConfigError, match=r"data\.vocab_size is missing"):
        main(config)


def test_a_folder_of_traces_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConfigError, match=f"--profile {path}: File exists; name another folder"):
        main([*CONFIG, f"--profile={path}"])
