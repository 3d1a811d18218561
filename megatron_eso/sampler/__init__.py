"""The single-device models, with scoring and KV-cached samplers; imports torch, never megatron."""

from .objectives.build import load
from .objectives.eso_lm import EsoLM
from .steps.inputs import Generation

__all__ = ["EsoLM", "Generation", "load"]
