"""Sampler directories: equal bytes, dtypes, sharded weights, atomicity, transformers."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_conversion import sampler_directory
from checkpoints_conversion.__main__ import main
from checkpoints_conversion.sampler_directory import write_sampler_directory
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.sampler import EsoLM
from megatron_eso.sampler.network.directory import read_description, read_weights
from tests.support.processes import WITHOUT_PACKAGE
from tests.support.run_directories import STEP_0, convert, read_run, rewrite

ROOT = Path(__file__).parents[3]


def test_equal_weights_give_equal_bytes(tmp_path: Path, run_directory: Path) -> None:
    """The checkpoint of the second conversion has another order and another layout."""
    step = run_directory / STEP_0
    convert(run_directory, tmp_path / "a")
    rewrite(step, dict(reversed(read_run(step).items())))
    config = json.loads((step / "config.json").read_text())
    config["parallel"]["tensor_model_parallel_size"] = 2
    config["run"]["directory"] = "elsewhere"
    (step / "config.json").write_text(json.dumps(config))
    convert(run_directory, tmp_path / "b")
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}
        for out in (tmp_path / "a", tmp_path / "b")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_stored_in_the_dtype_that_is_given(
    tmp_path: Path, run_directory: Path, tiny_directory: Path, dtype: str
) -> None:
    convert(run_directory, tmp_path / "out", "--dtype", dtype)
    found, expected = read_weights(tmp_path / "out"), read_weights(tiny_directory)
    wanted = getattr(torch, dtype)
    assert all(torch.equal(found[name], expected[name].to(wanted)) for name in expected)
    assert read_description(tmp_path / "out")["dtype"] == dtype


def test_large_weights_are_sharded_with_an_index(
    tmp_path: Path, tiny_directory: Path, tiny_model: EsoLM, golden: dict[str, Tensor]
) -> None:
    write_sampler_directory(
        tmp_path / "sharded",
        read_description(tiny_directory),
        read_weights(tiny_directory),
        dtype=torch.float32,
        tokenizer=None,
        max_shard_bytes=100_000,
    )
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    for name in files:
        held = load_file(tmp_path / "sharded" / name)
        assert {k for k, v in index["weight_map"].items() if v == name} == held.keys()
    probe = golden["b.diffusion.z_t"], golden["b.diffusion.permutation"]
    found = EsoLM.from_pretrained(tmp_path / "sharded").diffusion_logits(*probe)
    assert torch.equal(found, tiny_model.diffusion_logits(*probe))


def test_a_directory_appears_complete_or_not_at_all(
    tmp_path: Path, tiny_ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main(["from-official", str(tiny_ckpt), str(out)])
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampler_directory, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        main(["from-official", str(tiny_ckpt), str(out), "--weights", "raw"])
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    main(["from-official", str(tiny_ckpt), str(out), "--weights", "raw"])
    assert read_description(out)["source"]["weights"] == "raw"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_foreign_directory_is_not_replaced(
    tmp_path: Path, tiny_ckpt: Path, tiny_directory: Path, run_directory: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        main(["from-official", str(tiny_ckpt), str(tmp_path / "mine")])
    with pytest.raises(ConfigError, match="holds something else"):
        main(["to-megatron", str(tiny_directory), str(run_directory)])
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_a_sampler_directory_that_is_replaced_is_named(
    tmp_path: Path, run_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    convert(run_directory, out)
    assert not caplog.messages
    convert(run_directory, out)
    assert caplog.messages == [f"{out}: is a sampler directory already, and is replaced"]


HUGGING_FACE = (
    WITHOUT_PACKAGE
    + """
import torch, transformers
from safetensors.torch import load_file

golden = load_file(sys.argv[2])
for auto in (transformers.AutoModel, transformers.AutoModelForMaskedLM):
    model = auto.from_pretrained(sys.argv[1], trust_remote_code=True)
    z_t, permutation = golden["b.diffusion.z_t"], golden["b.diffusion.permutation"]
    logits = model(z_t, permutation).logits
    assert (logits - golden["b.diffusion.logits"]).abs().max() < 1e-4
    z_0, permutation = golden["b.sequential.z_0"], golden["b.sequential.permutation"]
    logits = model(z_0, permutation, golden["b.diffusion.x0"]).logits
    is_masked = z_0.gather(1, permutation) == 97
    assert (logits - golden["b.sequential.logits"])[is_masked].abs().max() < 1e-4
    assert not logits[~is_masked].any()
    assert model(z_t).logits.shape == logits.shape
model.save_pretrained(sys.argv[3])
"""
)


@pytest.mark.slow
def test_transformers_loads_the_directory_without_this_package(
    tmp_path: Path, tiny_directory: Path
) -> None:
    pytest.importorskip("transformers")
    golden = ROOT / "tests/golden/tiny.safetensors"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(tiny_directory), str(golden), str(tmp_path / "saved")]
    done = subprocess.run(
        [sys.executable, "-c", HUGGING_FACE, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert EsoLM.from_pretrained(tmp_path / "saved").config.max_length == 48
