"""The single-device model: scoring and the KV-cached sampler. Imports torch and never megatron."""

from .generation import Generation
from .model import EsoLM

__all__ = ["EsoLM", "Generation"]
