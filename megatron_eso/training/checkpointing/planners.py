"""Plans which parts of a checkpoint's tensors a rank writes and reads, in torch's terms."""

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_eso.errors import CheckpointError
from megatron_eso.training.optimization.tensor_parts import TensorPart


class PartWriter(DefaultSavePlanner):
    """torch's plan of a save whose items are the parts of every rank."""

    def __init__(self, parts: list[TensorPart]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = {(part.key, part.offsets): part for part in parts}

    def create_local_plan(self) -> SavePlan:
        """List this rank's parts."""
        items = [
            WriteItem(
                index=MetadataIndex(part.key, torch.Size(part.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=part.chunk,
                    properties=TensorProperties(dtype=part.values.dtype),
                    size=torch.Size(part.global_shape),
                ),
            )
            for part in self._parts.values()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values of a listed part."""
        assert write_item.index.offset is not None
        return self._parts[write_item.index.fqn, tuple(write_item.index.offset)].values


class PartReader(DefaultLoadPlanner):
    """torch's plan of a load that fills the parts of this rank."""

    def __init__(self, parts: list[TensorPart]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = {(part.key, part.offsets): part for part in parts}

    def create_local_plan(self) -> LoadPlan:
        """List which of the checkpoint's chunks fill this rank's parts.

        Raises:
            CheckpointError: A tensor is missing, or has another shape.
        """
        assert self.metadata is not None
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for part in self._parts.values():
            chunks.setdefault(part.key, []).append(part.chunk)
            _check_shape(self.metadata, part)
        return LoadPlan(
            [
                item
                for key, wanted in chunks.items()
                for item in create_read_items_for_chunk_list(
                    key, _entry(self.metadata, key), wanted
                )
            ]
        )

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the view of a part that an item fills."""
        assert read_item.dest_index.offset is not None
        values = self._parts[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)].values
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            values = values.narrow(dim, start, length)
        return values

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the tensor is a view of the part."""


def _entry(metadata: Metadata, key: str) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata.get(key)
    if not isinstance(entry, TensorStorageMetadata):
        raise CheckpointError(f"the checkpoint has no tensor {key}: it has another model")
    return entry


def _check_shape(metadata: Metadata, part: TensorPart) -> None:
    found = tuple(_entry(metadata, part.key).size)
    if found != part.global_shape:
        raise CheckpointError(
            f"the checkpoint's tensor {part.key} has shape {found}, the model's "
            f"{part.global_shape}: it has another model"
        )
