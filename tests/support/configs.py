"""A configuration with the least that is required, and one with another value of a key."""

import dataclasses
from typing import Any

from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import Config, DataConfig, OptimizerConfig, RunConfig, TrainConfig


def make_config(**changes: object) -> Config:
    """Make a small configuration; `changes` are sections by name."""
    sections: dict[str, object] = {
        "run": RunConfig(directory="runs/test"),
        "model": ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4),
        "data": DataConfig(train="shards", sequence_length=16),
        "train": TrainConfig(num_steps=10, global_batch_size=16, micro_batch_size=4),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
    }
    return Config(**(sections | changes))  # type: ignore[arg-type]


def replace_value(config: Config, path: str, value: Any) -> Config:
    """Return the configuration with another value of `section.name`, legal or not."""
    section, _, name = path.partition(".")
    changed = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: changed})
