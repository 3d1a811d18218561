"""The shipped configurations as whole runs: their files, and layers for numbers of GPUs."""

from megatron_eso.config.combinations import with_vocabulary
from megatron_eso.config.layers import SHIPPED_CONFIGS
from megatron_eso.config.loading import load_config
from megatron_eso.config.sections import Config

BASE = ("base_1p7b.toml",)
TENSOR_BASE = (*BASE, "base_1p7b_tp.toml")
PARALLEL = sorted(path.name for path in (SHIPPED_CONFIGS / "parallel").glob("*.toml"))
MODELS = {
    "owt_small": ("owt_small.toml",),
    "base_1p7b": BASE,
    "base_1p7b_tp": TENSOR_BASE,
    **{name: (*TENSOR_BASE, f"parallel/{name}") for name in PARALLEL},
}
VOCABULARY = 32001


def load_shipped(*layers: str) -> Config:
    """Load a configuration of these layers, with a vocabulary."""
    loaded = load_config(list(layers), folder=SHIPPED_CONFIGS)
    return with_vocabulary(
        loaded.config,
        vocab_size=VOCABULARY,
        mask_token_id=VOCABULARY - 1,
        source="test",
        origins=loaded.origins,
    )
