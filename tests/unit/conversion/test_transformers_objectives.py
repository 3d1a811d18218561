"""`transformers.AutoModel` gives the logits of each objective without this package."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_conversion.__main__ import main
from checkpoints_conversion.sampler_directory import write_sampler_directory
from megatron_eso.sampler import load
from megatron_eso.sampler.network.network_eso_lm import EsoNetwork
from tests.support.networks import make_network_config
from tests.support.processes import WITHOUT_PACKAGE

ROOT = Path(__file__).parents[3]
MASK = 97
SHAPE = ("--num-heads", "4", "--length", "48")
BARE = ROOT / "tests/golden/tiny_set_weights.safetensors"

PROGRAM = (
    WITHOUT_PACKAGE
    + """
import json
import torch, transformers
from safetensors.torch import load_file

cases = json.loads(sys.argv[1])
for directory, calls in cases.items():
    model = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True)
    for number, message in enumerate(calls):
        call = load_file(f"{directory}/call_{number}.safetensors")
        expected = call.pop("logits", None)
        try:
            logits = model(**call).logits
        except ValueError as error:
            assert message and message in str(error), (directory, number, error)
        else:
            assert message is None, (directory, number)
            assert logits.shape == expected.shape
            assert (logits - expected).abs().max() < 1e-5, (directory, number)
"""
)


def to_natural_order(logits: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(logits).scatter_(1, order[:, :, None].expand_as(logits), logits)


def list_calls(model: Any, z: Tensor, x_0: Tensor) -> list[tuple[dict[str, Tensor], str | None]]:
    """List calls of `forward` with the expected logits, or with a part of the error."""
    masked_last = torch.argsort((z == MASK).long(), dim=1, stable=True)
    order = {"permutation": masked_last}
    alone = f"objective {model.objective} takes"
    if model.objective in ("mdlm", "ar"):
        logits = model.diffusion_logits(z) if model.objective == "mdlm" else model.logits(z)
        return [
            ({"input_ids": z, "logits": logits}, None),
            ({"input_ids": z, "x_0": x_0}, f"{alone} input_ids alone"),
            ({"input_ids": z, **order}, f"{alone} input_ids alone"),
        ]
    if model.objective == "bd3_lm":
        logits = model.block_logits(z, x_0)
        return [
            ({"input_ids": z, "x_0": x_0, "logits": logits}, None),
            ({"input_ids": z}, f"{alone} input_ids and x_0"),
        ]
    step = model.diffusion_logits if model.objective == "eso_lm" else model.network.set_logits
    known = step(z, masked_last)
    earlier = model.sequential_logits(z, x_0, masked_last)
    return [
        ({"input_ids": z, **order, "logits": known}, None),
        ({"input_ids": z, "logits": to_natural_order(known, masked_last)}, None),
        ({"input_ids": z, "x_0": x_0, **order, "logits": earlier}, None),
        ({"input_ids": z, "x_0": x_0, "logits": to_natural_order(earlier, masked_last)}, None),
    ]


def write_scaled(directory: Path) -> None:
    """Write an AR model with wide heads, biases of queries, keys and values, and scaled rope."""
    sizes = {"vocab_size": 98, "mask_token_id": MASK, "max_length": 48, "head_dim": 8}
    biases = {"add_bias_linear": False, "add_qkv_bias": True}
    rope = {"use_rope_scaling": True, "rope_low_freq_factor": 0.2, "rope_original_length": 40}
    network = EsoNetwork(make_network_config(**sizes, **biases, **rope))
    torch.manual_seed(1)
    tensors = {
        name: 0.3 * torch.randn(tensor.shape) for name, tensor in network.state_dict().items()
    }
    description = {**dataclasses.asdict(network.network_config), "objective": "ar", "source": {}}
    write_sampler_directory(directory, description, tensors, dtype=torch.float32, tokenizer=None)


@pytest.mark.slow
def test_transformers_gives_the_logits_of_each_objective(
    tmp_path: Path, tiny_ckpt: Path, tiny_ar_ckpt: Path, golden: dict[str, Tensor]
) -> None:
    pytest.importorskip("transformers")
    sources: dict[str, tuple[Path, list[str]]] = {
        "b": (tiny_ckpt, []),
        "a": (tiny_ckpt, ["--variant", "a"]),
        "mdlm": (tiny_ckpt, ["--objective", "mdlm"]),
        "ar": (tiny_ar_ckpt, []),
        "bd3_lm": (BARE, ["--objective", "bd3_lm", *SHAPE, "--block-size", "4"]),
        "set_dlm": (BARE, ["--objective", "set_dlm", *SHAPE]),
    }
    for name, (source, options) in sources.items():
        main(["from-official", str(source), str(tmp_path / name), *options])
    write_scaled(tmp_path / "scaled")
    # The tensors of each call.
    calls: dict[str, list[str | None]] = {}
    z, x_0 = golden["b.sequential.z_0"], golden["b.diffusion.x0"]
    for name in (*sources, "scaled"):
        directory = tmp_path / name
        calls[str(directory)] = []
        for number, (tensors, message) in enumerate(list_calls(load(directory), z, x_0)):
            stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(stored, directory / f"call_{number}.safetensors")
            calls[str(directory)].append(message)
    # Another process makes the calls.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
