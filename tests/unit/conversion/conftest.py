"""Golden vectors of the reference (tests/golden), and directories converted from them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_conversion.__main__ import main
from megatron_eso.sampler import EsoLM
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig
from megatron_eso.sampler.network.network_eso_lm import EsoNetwork
from tests.support.networks import make_network_config

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_ckpt() -> Path:
    return GOLDEN / "tiny.ckpt"


@pytest.fixture(scope="session")
def tiny_ar_ckpt() -> Path:
    return GOLDEN / "tiny_ar.ckpt"


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory, tiny_ckpt: Path) -> Path:
    """Return a sampler directory with the EMA weights of tiny.ckpt."""
    directory = tmp_path_factory.mktemp("official") / "tiny"
    main(["from-official", str(tiny_ckpt), str(directory)])
    return directory


@pytest.fixture
def run_directory(tmp_path: Path, tiny_directory: Path) -> Path:
    """Return a run directory with the weights of the sampler directory."""
    main(["to-megatron", str(tiny_directory), str(tmp_path / "run")])
    return tmp_path / "run"


@pytest.fixture(scope="session")
def tiny_model(tiny_directory: Path) -> EsoLM:
    return EsoLM.from_pretrained(tiny_directory)


def make_config(**changes: object) -> NetworkConfig:
    """Return a small network in which all sizes differ."""
    sizes = {"hidden_size": 16, "head_dim": 4, "intermediate_size": 24, "max_length": 9}
    return make_network_config(**{**sizes, **changes})


CONFIGS = {
    "gelu": {},
    "swiglu_gqa_rms": {
        "activation": "swiglu",
        "normalization": "RMSNorm",
        "num_key_value_heads": 2,
        "add_bias_linear": False,
        "head_bias": False,
    },
    "tied_qk_norm": {"tie_word_embeddings": True, "qk_layernorm": True, "num_key_value_heads": 1},
    "wide_heads_qkv_bias": {
        "head_dim": 6,
        "num_key_value_heads": 2,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "use_rope_scaling": True,
    },
    "swiglu_bias_qk_rms": {
        "activation": "swiglu",
        "normalization": "RMSNorm",
        "qk_layernorm": True,
    },
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> NetworkConfig:
    return make_config(**request.param)


@pytest.fixture
def tensors(config: NetworkConfig) -> dict[str, Tensor]:
    """Draw weights for that network, none of a special value."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in EsoNetwork(config).state_dict().items()
    }
