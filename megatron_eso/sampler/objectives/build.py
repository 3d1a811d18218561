"""The table of objectives; a new objective is a file in this folder and a line here."""

from pathlib import Path

import torch

from ..network.directory import read_description
from .any_order_ar import AnyOrderAR
from .ar import AR
from .bd3_lm import BD3LM
from .eso_lm import EsoLM
from .mdlm import MDLM
from .model import SamplerModel
from .set_dlm import SetDLM

MODELS: dict[str, type[SamplerModel]] = {
    model.objective: model for model in (EsoLM, MDLM, AR, BD3LM, SetDLM, AnyOrderAR)
}


def load(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> SamplerModel:
    """Load a sampler directory of any objective.

    Args:
        directory: A directory that `checkpoints_conversion` wrote.
        dtype: Dtype of the weights; norms, residual stream and logits have at least float32.
        device: Device on which the model runs.

    Returns:
        The model of the objective that `config.json` names; without a name, an `EsoLM`.

    Raises:
        CheckpointError: A file is missing or damaged, or its version or objective is unknown.
    """
    model = MODELS[read_description(directory)["objective"]]
    return model.from_pretrained(directory, dtype, device)
