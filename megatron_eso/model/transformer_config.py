"""Megatron-Core's TransformerConfig for the resolved configuration."""

from functools import partial

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from megatron_eso.config.model import ModelConfig
from megatron_eso.config.sections import ParallelConfig, TrainConfig

PARAMS_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_transformer_config(
    model: ModelConfig, parallel: ParallelConfig, train: TrainConfig
) -> TransformerConfig:
    """Translate the sections for Megatron-Core; training sets the hooks of its step.

    Weights are allocated on the GPU without values. `initialization.py` draws them by name, so
    that every layout starts from the same values.
    """
    gated = model.activation == "swiglu"
    dtype = PARAMS_DTYPE[train.precision]
    recompute = train.recompute_granularity == "full"
    return TransformerConfig(
        # The network.
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=gated,
        activation_func=functional.silu if gated else partial(functional.gelu, approximate="tanh"),
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        fp32_residual_connection=model.fp32_residual_connection,
        # The layout.
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        sequence_parallel=parallel.sequence_parallel,
        overlap_p2p_comm=parallel.overlap_p2p_comm,
        batch_p2p_comm=parallel.batch_p2p_comm,
        batch_p2p_sync=torch.cuda.is_available(),
        # The number of rows differs between micro-batches. Megatron-Core then requires this
        # dispatcher, even for a model without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Precision and recomputation.
        params_dtype=dtype,
        pipeline_dtype=torch.float32 if model.fp32_residual_connection else dtype,
        bf16=train.precision == "bf16",
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        perform_initialization=False,
        # Fused kernels that are not used here.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
    )
