"""Process groups: the one place that touches Megatron-Core's global parallel state.

Everything else receives the ProcessGroupCollection.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from megatron_eso.config.sections import ParallelConfig
from megatron_eso.ranks import launched_world_size, own_rank

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group() -> Iterator[None]:
    """Join the launcher's processes (torchrun's environment), or be a world of one without it.

    NCCL where CUDA is there, gloo elsewhere. Collective over the world.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=_open_store(),
        rank=own_rank(),
        world_size=launched_world_size(),
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _open_store() -> Store | None:
    """Where the ranks meet; none where torch's own choice is right."""
    if "MASTER_ADDR" not in os.environ:
        return HashStore()
    if os.environ.get("GROUP_WORLD_SIZE") != "1":  # torchrun's count is of one node only
        return None
    # In the store that torchrun keeps, the addresses of the ranks before a restart still stand:
    # https://github.com/pytorch/pytorch/issues/135712
    store, _, _ = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    return PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)


@contextmanager
def model_parallel_groups(parallel: ParallelConfig) -> Iterator[ProcessGroupCollection]:
    """Build the layout's groups inside the world's process group; collective over the world."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    # Megatron-Core looks its random streams up by name even where nothing is dropped out.
    seed_dropout(0)
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()


def seed_dropout(seed: int) -> None:
    """Restart Megatron-Core's random streams; the tensor-parallel one differs between TP ranks."""
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def max_over_world(*values: int) -> list[int]:
    """The largest of each value over all ranks; collective over the world."""
    largest = torch.tensor(values, device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]
