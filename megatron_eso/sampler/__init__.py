"""The single-device model, with scoring and a KV-cached sampler; imports torch, never megatron."""

from .generation import Generation
from .model import EsoLM

__all__ = ["EsoLM", "Generation"]
