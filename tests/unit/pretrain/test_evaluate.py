"""What `pretrain.evaluate` refuses, and which checkpoint it takes."""

from pathlib import Path

import pytest

from checkpoints_conversion.__main__ import main as convert
from megatron_eso.errors import ConfigError
from pretrain.evaluate import choose_checkpoint, configure, main
from tests.support.wrong_command_lines import GOLDEN

STEP = "checkpoints/step_00000000"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    convert(["from-official", str(GOLDEN / "tiny.ckpt"), str(folder / "sampler")])
    convert(["to-megatron", str(folder / "sampler"), str(folder / "run")])
    return folder / "run"


def test_a_run_or_one_of_its_checkpoints_is_taken(run: Path) -> None:
    assert choose_checkpoint(run, None) == run / STEP
    assert choose_checkpoint(run / STEP, None) == run / STEP
    with pytest.raises(ConfigError, match="no checkpoint of step 7; complete checkpoints: step_0"):
        choose_checkpoint(run, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.num_layers=7",
            r"command line: model\.num_layers = 7: the model is that of .*STEP/",
        ),
        ("model.num_layers=x", r"command line: model\.num_layers = \"x\""),
        ("nowhere.toml", r"command line: nowhere\.toml: is not of the form section\.key=value"),
        ("a.b=1", "command line: .*a"),
        ("validation.num_samples=-1", r"command line: validation\.num_samples = -1"),
        ("parallel.tensor_model_parallel_size=2", "world size 1 .*any layout reads the checkpoint"),
    ],
)
def test_a_wrong_override_is_refused(run: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("STEP", STEP)) as error:
        configure(run / STEP, None, [override])
    assert "config.toml" not in str(error.value)


def test_zero_orders_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(run), "--any-order", "0"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: --any-order: 0 is not a whole number from 1")
