"""Small training runs: their configurations, layouts and models, and what they leave on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_eso.config.combinations import with_vocabulary
from megatron_eso.config.loading import load_config
from megatron_eso.config.sections import Config
from megatron_eso.data.shards.reader import TokenDataset

PARALLEL = "parallel."
TP2 = {"parallel.tensor_model_parallel_size": 2}
PP2 = {"parallel.pipeline_model_parallel_size": 2}
INTERLEAVED = PP2 | {
    "parallel.virtual_pipeline_model_parallel_size": 2,
    "parallel.overlap_p2p_comm": "true",
    "parallel.batch_p2p_comm": "false",
}
DISTRIBUTED = {"parallel.use_distributed_optimizer": "true"}
OVERLAPPED = DISTRIBUTED | {
    "parallel.overlap_grad_reduce": "true",
    "parallel.overlap_param_gather": "true",
}

Overrides = dict[str, Any]

# The objectives besides Eso-LM of variant B with mask queries.
FAMILY: dict[str, Overrides] = {
    "eso_lm next": {"objective.sequential_prediction": '"next"', "objective.alpha_0": 0.4},
    "mdlm": {"objective.name": '"mdlm"'},
    "ar": {"objective.name": '"ar"'},
    "bd3_lm": {"objective.name": '"bd3_lm"', "objective.block_size": 4},
    "set_dlm": {"objective.name": '"set_dlm"', "objective.set_size": 4},
    "any_order_ar": {"objective.name": '"any_order_ar"'},
}
ESO_LM_A: Overrides = {"objective.variant": '"a"'}

LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "1 rank": (1, {}),
    "TP=2": (2, TP2),
    "TP=2 SP": (2, TP2 | {"parallel.sequence_parallel": "true"}),
    "PP=2": (2, PP2),
    "PP=2 interleaved": (2, INTERLEAVED),
    "DP=2": (2, {}),
    "DP=2 distributed optimizer": (2, DISTRIBUTED),
    "TP=2 SP PP=2": (4, TP2 | PP2 | {"parallel.sequence_parallel": "true"}),
}

LLAMA: Overrides = {
    "model.normalization": '"RMSNorm"',
    "model.activation": '"swiglu"',
    "model.num_query_groups": 2,
    "model.qk_layernorm": "true",
    "model.add_bias_linear": "false",
    "model.share_embeddings_and_output_weights": "true",
    "model.rotary_base": 500,
}
# Heads of another width, biases of queries, keys and values alone, and scaled frequencies: some
# kept, some divided, some between.
SCALED: Overrides = {
    "model.kv_channels": 12,
    "model.add_bias_linear": "false",
    "model.add_qkv_bias": "true",
    "model.rope_scaling": "true",
    "model.rope_scaling_factor": 4.0,
    "model.rope_low_freq_factor": 0.2,
    "model.rope_original_length": 40,
}
GATED: Overrides = {
    "model.residual_gates": "true",
    "model.zero_init_head": "true",
    "model.head_bias": "true",
}

TINY: Overrides = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "data.sequence_length": 24,
    "train.num_steps": 5,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.log_interval": 1,
    "checkpoint.keep_last": 100,
    "objective.alpha_0": 0.25,
    "optimizer.learning_rate": 1e-2,
    "optimizer.adam_eps": 1e-6,
    "optimizer.ema_decay": 0.99,
}


def tiny_arguments(run: Path, data: Path, overrides: Overrides) -> list[str]:
    """Return the command line of a small run."""
    paths = {
        "run.directory": f'"{run}"',
        "data.train": f'"{data / "train"}"',
        "data.validation": f'"{data / "validation"}"',
    }
    values = paths | TINY | overrides
    if "objective.name" in overrides:
        del values["objective.alpha_0"]
    return [f"{key}={value}" for key, value in values.items()]


def tiny_config(run: Path, data: Path, overrides: Overrides) -> Config:
    """Load the configuration of a small run, with the vocabulary of its data."""
    config = load_config(tiny_arguments(run, data, overrides)).config
    dataset = TokenDataset.open(data / "train")
    return with_vocabulary(
        config,
        vocab_size=dataset.vocab_size,
        mask_token_id=dataset.mask_token_id,
        source=str(data),
    )


def read_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """Read every tensor of a distributed checkpoint, whole, by its global name."""
    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors
