"""The section `parallel`: how model and batch are laid out over ranks."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Layout over ranks; data parallelism takes what tensor and pipeline parallelism leave."""

    tensor_model_parallel_size: Annotated[int, Gt(0)] = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: Annotated[int, Gt(0)] = 1
    """Stages of the pipeline."""
    virtual_pipeline_model_parallel_size: Annotated[int | None, Ge(2)] = None
    """Model chunks per stage of an interleaved pipeline; left out: not interleaved."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of each pipeline part in Megatron-Core's notation, where they do not divide evenly."""
    sequence_parallel: bool = False
    """Split norms and dropout over the tensor-parallel ranks by rows."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather the distributed optimizer's parameters during the forward pass."""
    overlap_p2p_comm: bool = False
    """Overlap the pipeline's sends with computation; an interleaved pipeline needs it."""
    batch_p2p_comm: bool = True
    """Batch the pipeline's sends and receives; an interleaved pipeline needs it off."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def num_pipeline_parts(self) -> int:
        """Parts that the pipeline cuts the model into: stages, times chunks where interleaved."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def count_stage_layers(self, num_layers: int, stage: int) -> int:
        """Layers on the ranks of a pipeline stage, all chunks together."""
        if self.pipeline_model_parallel_layout is None:
            return num_layers // self.pipeline_model_parallel_size
        parts = self.pipeline_model_parallel_layout.split("|")
        return sum(part.count("t") for part in parts[stage :: self.pipeline_model_parallel_size])
