"""The single-device model: scoring and the KV-cached sampler. Imports torch and never megatron."""

from megatron_eso.sampler.generation import Generation
from megatron_eso.sampler.model import EsoLM

__all__ = ["EsoLM", "Generation"]
