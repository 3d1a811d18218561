"""What the start of a run refuses, its dry run refuses too: in one line with a remedy."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_eso.config.loading import config_to_dict, load_config
from megatron_eso.errors import ConfigError, DataError, UserError
from megatron_eso.runs.checkpoint_state import CheckpointState
from megatron_eso.runs.counters import Counters
from megatron_eso.runs.run_directory import RunDirectory
from pretrain.start import open_inputs
from pretrain.train import main
from tests.support.training import TINY, tiny_arguments, tiny_config


def remove_tokenizer(data: Path) -> None:
    shutil.rmtree(data / "train" / "tokenizer")


def keep(data: Path) -> None:
    """Nothing is wrong with the data."""


EDGES: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("data.train={data}/trian", keep, "data.train", "build the shards with"),
    ("data.train={data}", keep, "data.train", "name {data}/train"),
    ("data.validation={data}", keep, "data.validation", "name {data}/validation"),
    ("data.train={data}/train/tokenizer", keep, "data.train", "that data_tools build has made"),
    ("data.quarantine={data}/none.json", keep, "data.quarantine", "there is no such file"),
    ("data.validation={data}/train", keep, "data.validation", "is training data too"),
    ('data.train=["{data}/train", "{data}/validation"]', keep, "data.validation", "is training"),
    ("validation.num_samples=100000", keep, "validation.num_samples", "use at most that, or 0"),
    ("checkpoint.init_from={data}/nowhere", keep, "checkpoint.init_from", "name a run directory"),
    ("data.sequence_length=1000000", keep, "data.sequence_length", "use at most 4096"),
    ("run.seed=1", remove_tokenizer, "data.train", "tokenizer is missing; copy the tokenizer"),
    ("run.directory={data}/train/manifest.json", keep, "run.directory", "is a file; name another"),
    ("run.directory={data}/train/manifest.json/x", keep, "run.directory", "is a file; name"),
]


@pytest.mark.parametrize("is_dry", [True, False], ids=["dry run", "start"])
@pytest.mark.parametrize(("override", "damage", "key", "remedy"), EDGES)
def test_a_dry_run_refuses_what_the_start_refuses(
    tiny_data: Path,
    tmp_path: Path,
    override: str,
    damage: Callable[[Path], None],
    key: str,
    remedy: str,
    is_dry: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "shards"
    shutil.copytree(tiny_data, data)
    damage(data)
    run = tmp_path / "run"
    with pytest.raises(ConfigError) as refused:
        main(
            [
                *tiny_arguments(run, data, {}),
                override.format(data=data),
                *(["--dry-run"] if is_dry else []),
            ]
        )
    line = str(refused.value)
    assert f"{key} = " in line
    assert remedy.format(data=data) in line
    # The estimates are there all the same: the data may be built later.
    assert ("# layout: 1 rank = " in capsys.readouterr().out) == is_dry
    assert not run.exists()


def test_a_dry_run_of_a_sound_configuration_passes(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny_arguments(tmp_path / "run", tiny_data, {}), "--dry-run"]) == 0
    assert re.search(r"# samples: .*/train 100.00%", capsys.readouterr().out)


def test_remote_data_that_cannot_be_reached_are_a_warning(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_eso.data.remote.folder.FIRST_WAIT_SECONDS", 0.001)
    url = "http://127.0.0.1:9/shards"
    arguments = [*tiny_arguments(tmp_path / "run", tiny_data, {}), f"data.train={url}"]
    assert main([*arguments, "--dry-run"]) == 0
    (warning,) = re.findall(r"^# warning: .*", capsys.readouterr().out, re.MULTILINE)
    assert warning.startswith(f"# warning: cannot read {url}/manifest.json")
    assert "(2 attempts)" in warning


@pytest.fixture
def finished_run(tiny_data: Path, tmp_path: Path) -> RunDirectory:
    """Make a run of 5 steps that has ended, without its tensors."""
    run = RunDirectory(tmp_path / "run")
    checkpoint = run.checkpoints / "step_00000005"
    checkpoint.mkdir(parents=True)
    config = tiny_config(run.path, tiny_data, {})
    state = CheckpointState(kind="training", counters=Counters(step=5, consumed_samples=40))
    (checkpoint / "config.json").write_text(json.dumps(config_to_dict(config)))
    (checkpoint / "state.json").write_text(json.dumps(state.to_json()))
    run.write_status("finished", 5, reason="train.num_steps reached")
    return run


@pytest.mark.parametrize("is_dry", [True, False], ids=["dry run", "start"])
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.seed=7", "run.seed = 7, but {checkpoint} was written with 1: a resumed run keeps"),
        ("model.hidden_size=64", "model.hidden_size = 64, but {checkpoint} was written with 32"),
        ("model.qk_layernorm=true", "model.qk_layernorm = true, but {checkpoint} was written with"),
        ("model.kv_channels=12", "model.kv_channels = 12, but {checkpoint} was written with 8"),
        ("model.rope_scaling=true", "model.rope_scaling = true, but {checkpoint} was written with"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_is(
    finished_run: RunDirectory, tiny_data: Path, override: str, line: str, is_dry: bool
) -> None:
    before = finished_run.status.read_bytes()
    arguments = [*tiny_arguments(finished_run.path, tiny_data, {}), override]
    with pytest.raises(UserError) as refused:
        main([*arguments, *(["--dry-run"] if is_dry else [])])
    checkpoint = finished_run.checkpoints / "step_00000005"
    assert str(refused.value).startswith(f"command line: {line.format(checkpoint=checkpoint)}")
    assert finished_run.status.read_bytes() == before
    assert sorted(path.name for path in finished_run.path.iterdir()) == [
        "checkpoints",
        "status.json",
    ]


def test_another_sequence_length_of_a_resumed_run_is_refused_by_the_dry_run(
    finished_run: RunDirectory, tiny_data: Path
) -> None:
    length = TINY["data.sequence_length"] // 2
    arguments = tiny_arguments(finished_run.path, tiny_data, {"data.sequence_length": length})
    with pytest.raises(
        ConfigError, match=r"^command line: data.sequence_length = 12, but .* written with 24"
    ):
        main([*arguments, "--dry-run"])


def test_a_url_of_another_kind_names_its_key_and_no_password(
    tiny_data: Path, tmp_path: Path
) -> None:
    arguments = tiny_arguments(tmp_path / "run", tiny_data, {})
    for url in ("ftp://host/x", "s3://me:secret@host/x"):
        with pytest.raises(ConfigError, match="^command line: data.train: ") as refused:
            main([*arguments, f"data.train={url}", "--dry-run"])
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("local_rank", "is_refused"), [("0", True), ("1", False)])
def test_one_rank_of_a_node_checks_the_files_of_the_data(
    split: str,
    local_rank: str,
    is_refused: bool,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "shards"
    shutil.copytree(tiny_data, data)
    index = data / split / "blocks.xxh3"
    index.write_bytes(bytes(index.stat().st_size))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    loaded = load_config(tiny_arguments(tmp_path / "run", data, {}))
    if not is_refused:
        opened = open_inputs(loaded)
        # What it reads is checked.
        with pytest.raises(DataError, match="block.s hash differs"):
            (opened.train if split == "train" else opened.validation).samples(np.arange(1))
        return
    with pytest.raises(DataError, match=f"{split}/blocks.xxh3 is damaged: its sha256 differs"):
        open_inputs(loaded)
