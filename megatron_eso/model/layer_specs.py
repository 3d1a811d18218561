"""The modules of the transformer, as Megatron-Core's ModuleSpecs."""

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_eso.config.model import ModelConfig
from megatron_eso.model.attention import (
    LossRowCoreAttention,
    LossRowSelfAttention,
    LossRowTransformerLayer,
    RowCoreAttention,
    RowSelfAttention,
)
from megatron_eso.model.layers import (
    GatedRowParallelLinear,
    LayerNorm,
    RMSNorm,
    get_bias_dropout_add,
)

# Transformer Engine fuses norms into linear layers and names them so in checkpoints. With the same
# names here, a checkpoint does not depend on whether Transformer Engine was installed.
CHECKPOINT_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def build_layer_spec(model: ModelConfig, *, last: bool) -> ModuleSpec:
    """Return the spec of one transformer layer; the last one continues with the loss rows only.

    Args:
        model: The section `model`.
        last: Whether it is the last layer of the network.
    """
    # Choose the modules for the section `model`.
    norm = RMSNorm if model.normalization == "RMSNorm" else LayerNorm
    row_parallel = GatedRowParallelLinear if model.residual_gates else RowParallelLinear
    # Attention, then MLP, then the layer around both.
    attention = ModuleSpec(
        module=LossRowSelfAttention if last else RowSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=LossRowCoreAttention if last else RowCoreAttention,
            linear_proj=row_parallel,
            q_layernorm=norm if model.qk_layernorm else IdentityOp,
            k_layernorm=norm if model.qk_layernorm else IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row_parallel),
    )
    return ModuleSpec(
        module=LossRowTransformerLayer if last else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CHECKPOINT_KEYS,
        ),
    )


def build_block_submodules(
    model: ModelConfig, transformer_config: TransformerConfig, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the layers of one pipeline stage (and model chunk), and the final norm.

    Args:
        model: The section `model`.
        transformer_config: The configuration for Megatron-Core.
        pp_rank: Number of the pipeline stage.
        vp_stage: Number of the model chunk in an interleaved pipeline; None without one.
    """
    count = get_num_layers_to_build(transformer_config, vp_stage, pp_rank)
    first = get_transformer_layer_offset(transformer_config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[
            build_layer_spec(model, last=number == model.num_layers - 1)
            for number in range(first, first + count)
        ],
        layer_norm=RMSNorm if model.normalization == "RMSNorm" else LayerNorm,
    )
