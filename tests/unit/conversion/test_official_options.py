"""`from-official` finds the objective of a checkpoint, or takes it from the command line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conversion.__main__ import main
from checkpoints_conversion.official import read_official
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.sampler import load
from megatron_eso.sampler.network.directory import read_description

ROOT = Path(__file__).parents[3]
BARE = ROOT / "tests/golden/tiny_set_weights.safetensors"
SHAPE = ("--num-heads", "4", "--length", "48")


def write_checkpoint(source: Path, path: Path, **algorithm: object) -> Path:
    """Write a copy of a Lightning checkpoint with changed settings of `algo`."""
    official = read_official(source)
    config = official.hyper_parameters
    tensors = {f"backbone.{name}": tensor for name, tensor in official.tensors.items()}
    inv_freq = {"backbone.rotary_emb.inv_freq": torch.zeros(official.head_dim // 2)}
    torch.save(
        {
            "state_dict": tensors | inv_freq,
            "ema": {"shadow_params": list(official.tensors.values())},
            "hyper_parameters": {"config": config | {"algo": config["algo"] | algorithm}},
        },
        path,
    )
    return path


MODES_A = {"diffusion_attn_mode": "mixed2", "sequential_attn_mode": "mixed"}


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({}, {"objective": "eso_lm", "variant": "b", "alpha_0": 0.25}),
        (MODES_A, {"objective": "eso_lm", "variant": "a"}),
        # The settings of a phase without samples do not count.
        (
            {"diffusion_attn_mode": "mixed2", "sequential_attn_mode": "causal", "alpha_0": 1.0},
            {"objective": "eso_lm", "variant": "a"},
        ),
        (
            {"diffusion_attn_mode": "bidirectional", "alpha_0": 0.0},
            {"objective": "eso_lm", "variant": "b"},
        ),
        ({"name": "mdlm", "diffusion_attn_mode": "bidirectional"}, {"objective": "mdlm"}),
    ],
)
def test_the_objective_is_that_of_the_checkpoint(
    tmp_path: Path, tiny_ckpt: Path, algorithm: dict[str, Any], expected: dict[str, Any]
) -> None:
    path = write_checkpoint(tiny_ckpt, tmp_path / "some.ckpt", **algorithm)
    main(["from-official", str(path), str(tmp_path / "out")])
    assert expected.items() <= read_description(tmp_path / "out").items()
    assert load(tmp_path / "out").objective == expected["objective"]


@pytest.mark.parametrize("kind", ["none", "mask"])
def test_an_ar_checkpoint_states_what_predicts_the_first_token(
    tmp_path: Path, tiny_ar_ckpt: Path, kind: str
) -> None:
    for name in ("esolm", "ar"):
        settings = {"name": name, "prepend_token": kind}
        path = write_checkpoint(tiny_ar_ckpt, tmp_path / "ar.ckpt", **settings)
        main(["from-official", str(path), str(tmp_path / "out")])
        found = read_description(tmp_path / "out")
        assert (found["objective"], found["prepend_token"]) == ("ar", kind)


def test_the_command_line_overrides_the_checkpoint(tmp_path: Path, tiny_ckpt: Path) -> None:
    path = write_checkpoint(tiny_ckpt, tmp_path / "some.ckpt", name="duo", alpha_0=None)
    for options, expected in (
        (["--objective", "mdlm"], {"objective": "mdlm"}),
        (["--objective", "eso_lm", "--variant", "a"], {"variant": "a", "alpha_0": 1.0}),
        (["--objective", "bd3_lm", "--block-size", "4"], {"block_size": 4}),
        (["--objective", "bd3_lm"], {"block_size": 48}),
        (["--objective", "bd3_lm", "--length", "96"], {"block_size": 96, "max_length": 96}),
        (["--objective", "set_dlm"], {"order": "left_to_right"}),
        (["--objective", "any_order_ar"], {"order": "uniform"}),
        (
            ["--objective", "set_dlm", "--set-size", "8", "--max-set-size", "16"],
            {"order": "staggered", "set_size": 8, "max_set_size": 16},
        ),
    ):
        main(["from-official", str(path), str(tmp_path / "out"), *options])
        assert expected.items() <= read_description(tmp_path / "out").items()


def test_a_bare_backbone_has_the_prefix_or_none_and_needs_no_rotary_frequencies(
    tmp_path: Path,
) -> None:
    tensors = load_file(BARE)
    del tensors["rotary_emb.inv_freq"]
    prefixed = tmp_path / "model.safetensors"
    save_file({f"backbone.{name}": tensor for name, tensor in tensors.items()}, prefixed)
    for path in (BARE, prefixed):
        out = tmp_path / path.stem
        main(["from-official", str(path), str(out), "--objective", "any_order_ar", *SHAPE])
    for name in ("config.json", "model.safetensors"):
        (a, b) = (tmp_path / path.stem / name for path in (BARE, prefixed))
        if name == "config.json":
            ours, others = read_description(a.parent), read_description(b.parent)
            assert {**ours, "source": 0} == {**others, "source": 0}
        else:
            assert a.read_bytes() == b.read_bytes()


def test_options_that_are_missing_or_do_not_fit_are_one_line_errors(
    tmp_path: Path, tiny_ckpt: Path, tiny_ar_ckpt: Path
) -> None:
    mixed = {"diffusion_attn_mode": "mixed2"}
    mixed_path = write_checkpoint(tiny_ckpt, tmp_path / "mixed.ckpt", **mixed)
    bos_path = write_checkpoint(tiny_ar_ckpt, tmp_path / "bos.ckpt", prepend_token="bos")
    timed_path = write_checkpoint(tiny_ckpt, tmp_path / "timed.ckpt", time_conditioning=True)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(BARE.read_bytes()[:-100])
    bare = ["--objective", "set_dlm", *SHAPE]
    for path, options, kind, message in (
        (BARE, [], ConfigError, "bare backbone, which needs --objective"),
        (BARE, bare[:2], ConfigError, "which needs --num-heads"),
        (BARE, bare[:4], ConfigError, "which needs --length"),
        (BARE, [*bare, "--num-heads", "5"], ConfigError, "--num-heads 5 does not divide its wid"),
        (BARE, [*bare, "--variant", "a"], ConfigError, "--variant: objective set_dlm has no var"),
        (broken, bare, CheckpointError, "cannot be read"),
        (mixed_path, [], CheckpointError, "are of no variant of Eso-LM; name it by --variant"),
        (bos_path, [], ConfigError, "prepend_token is bos; give --tokenizer"),
        (timed_path, ["--objective", "mdlm"], CheckpointError, "time_conditioning is True"),
        (tiny_ar_ckpt, ["--variant", "b"], ConfigError, "objective ar has no variants"),
    ):
        with pytest.raises(kind, match=message):
            main(["from-official", str(path), str(tmp_path / "out"), *options])
        assert not (tmp_path / "out").exists()


def test_verify_names_what_to_do_with_a_bare_backbone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bare backbone; convert it by from-official"):
        main(["verify", str(BARE), str(tmp_path)])


def test_a_missing_option_exits_with_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "checkpoints_conversion", "from-official", str(BARE)]
    for options in ([], ["--objective", "gpt"]):
        done = subprocess.run(
            [*command, str(tmp_path / "out"), *options],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
