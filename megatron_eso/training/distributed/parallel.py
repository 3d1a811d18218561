"""Process groups; the only module that uses Megatron-Core's global parallel state.

All other code receives the ProcessGroupCollection.
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
    """Join the ranks of the launcher, or make a world of one without a launcher.

    The backend is NCCL with CUDA, gloo without it. Collective over the world.
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
    """Open the store of the process group; None: torch opens its default store."""
    if "MASTER_ADDR" not in os.environ:
        return HashStore()
    if os.environ.get("GROUP_WORLD_SIZE") != "1":  # torchrun's count is of one node only
        return None
    # After a restart, torchrun's store still has the addresses of the earlier ranks:
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
    # Megatron-Core reads its random streams by name even without dropout.
    seed_dropout(0)
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()


def seed_dropout(seed: int) -> None:
    """Restart Megatron-Core's random streams; one of them differs between the ranks of a layer."""
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def max_over_world(*values: int) -> list[int]:
    """Return the maximum of each value over all ranks; collective over the world."""
    largest = torch.tensor(values, device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]
