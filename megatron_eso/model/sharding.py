"""Global names and offsets of a model's parameters in its distributed checkpoint."""

from typing import Any, TypeAlias

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import Parameter

from megatron_eso.model.eso_model import EsoModel

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


def sharding_metadata(pg_collection: ProcessGroupCollection) -> dict[str, Any]:
    """Return Megatron-Core's options for the checkpoint: each layer has its own keys."""
    return {"non_homogeneous_layers": True, "dp_cp_group": pg_collection.dp_cp}


def shard_parameters(model: EsoModel) -> list[tuple[Parameter, Sharded]]:
    """Return each parameter with its part of the global tensor, in the order of the model.

    A tied embedding comes once on each stage that holds it.
    """
    sharded = model.sharded_state_dict(metadata=sharding_metadata(model.pg_collection))
    by_identity = {id(value.data): value for value in nested_values(sharded)}
    return [(parameter, by_identity[id(parameter)]) for parameter in model.parameters()]
