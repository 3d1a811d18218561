"""Process groups; the only module that uses Megatron-Core's global parallel state.

All other code receives the ProcessGroupCollection.
"""

import dataclasses
import os
import resource
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

from megatron_eso.config.sections import MAX_SECONDS, ParallelConfig, WatchdogConfig
from megatron_eso.errors import ConfigError
from megatron_eso.ranks import (
    choose_gpu,
    launched_world_size,
    local_rank,
    num_local_ranks,
    own_rank,
)
from megatron_eso.training.distributed.affinity import bind_to_cpus, find_address
from megatron_eso.training.distributed.device import compare_devices
from megatron_eso.training.distributed.failure import end_process, report_failure

TIMEOUT_MARGIN_SECONDS = 300.0


def find_timeout(watchdog: WatchdogConfig) -> timedelta:
    """Return the timeout of collectives: the watchdog, which reports more, ends a job before it."""
    deadlines = [getattr(watchdog, field.name) for field in dataclasses.fields(watchdog)]
    longest = MAX_SECONDS if 0.0 in deadlines else max(deadlines)
    return timedelta(seconds=longest + TIMEOUT_MARGIN_SECONDS)


@contextmanager
def process_group(timeout: timedelta) -> Iterator[None]:
    """Join the ranks of the launcher, or make a world of one without a launcher.

    The backend is NCCL with CUDA, gloo without it. Collective over the world. If the enclosed code
    fails, its error is reported and the process ends.

    Args:
        timeout: The timeout of collectives.

    Raises:
        ConfigError: The devices of the ranks differ, or the launcher may start ranks again whose
            store keeps what earlier ranks wrote.
    """
    refuse_restarts()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        use_gpu(local_rank(), torch.cuda.device_count())
    _raise_file_limit()
    rank, num_ranks = own_rank(), launched_world_size()
    store = _open_store(timeout)
    compare_devices(store, rank, num_ranks, has_gpu=has_gpu)
    # Without device_id: with it, torch splits a NCCL communicator for every one of Megatron-Core's
    # groups on all ranks, also on those outside the group: thousands of groups in a large world.
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=timeout,
    )
    try:
        yield
    except Exception as error:
        report_failure(error)
        end_process(error)
    dist.destroy_process_group()


def _open_store(timeout: timedelta) -> Store:
    """Open the store through which the ranks meet."""
    if "MASTER_ADDR" not in os.environ:
        return HashStore()
    store: Store
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if os.environ.get("GROUP_WORLD_SIZE") != "1":  # torchrun's count is of one node only
        return store
    # After a restart, torchrun's store still has the addresses of the earlier ranks:
    # https://github.com/pytorch/pytorch/issues/135712
    return PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)


def refuse_restarts() -> None:
    """Refuse torchrun's `--max-restarts` on several nodes that keep one store.

    The ranks of a later start would read the addresses of earlier ones. On one node `_open_store`
    separates the starts; torchrun counts them for each node alone.

    Raises:
        ConfigError: Torchrun may start the ranks of several nodes again with the same store.
    """
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if num_nodes > 1 and max_restarts > 0 and keeps_store:
        raise ConfigError(
            f"torchrun --max-restarts {max_restarts} on {num_nodes} nodes: ranks that are started "
            "again would find the addresses of earlier ones in torchrun's store: leave "
            "--max-restarts out (slurm/train.sbatch requeues the job), or use --rdzv-backend c10d "
            "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )


def use_gpu(number: int, num_visible: int) -> None:
    """Make this rank use a GPU of its own, and the CPUs next to it.

    Args:
        number: The local rank.
        num_visible: GPUs that torch finds.

    Raises:
        ConfigError: The node has fewer GPUs than ranks.
    """
    index = choose_gpu(number, num_visible)
    if index is None:
        raise ConfigError(
            f"rank {number} of this node has no GPU, as torch finds {num_visible}: start as many "
            "ranks on each node as it has GPUs"
        )
    torch.cuda.set_device(index)
    address = find_address(torch.cuda.get_device_properties(index))
    if address is not None:
        bind_to_cpus(address, num_local_ranks())


def _raise_file_limit() -> None:
    """Raise the limit of open files, sockets among them, as far as this process may."""
    _, largest = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (largest, largest))


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
