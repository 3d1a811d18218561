"""Checks that all ranks have the same corpora, and all ranks of one model copy the same batch.

Every rank plans its batch by itself. If two tensor-parallel or pipeline ranks had different tokens
(another file under the same name, faulty memory, a defect), training would continue with
meaningless gradients, and no curve would show it.
"""

import json
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.errors import DataError
from megatron_eso.ranks import own_rank


def check_batches(
    step: int, micro_batches: Iterable[MicroBatch], groups: ProcessGroupCollection
) -> None:
    """Compare the batches of all ranks of each data-parallel rank; collective over the world.

    Args:
        step: Named in the error.
        micro_batches: Those of this rank.
        groups: Groups of this rank.

    Raises:
        DataError: Ranks differ; every rank of the world raises the same error.
    """
    rank, world_size = own_rank(), dist.get_world_size()
    table = torch.zeros(world_size, 2, dtype=torch.int64, device=torch.cuda.current_device())
    own_hash = np.uint64(hash_batches(micro_batches)).view(np.int64)
    table[rank] = torch.tensor([groups.dp.rank(), int(own_hash)])
    dist.all_reduce(table)
    ranks_by_hash: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, (data_parallel_rank, value) in enumerate(table.tolist()):
        ranks_by_hash[data_parallel_rank][value % 2**64].append(number)
    different = [found for found in ranks_by_hash.values() if len(found) > 1]
    if different:
        parts = [
            f"ranks {', '.join(map(str, ranks))} hold {value:016x}"
            for found in different
            for value, ranks in found.items()
        ]
        raise DataError(
            f"step {step}: ranks of one copy of the model have different batches: "
            f"{'; '.join(parts)}; check their files with python -m data_tools verify, and "
            "the memory of their machines"
        )


def check_data(state: Mapping[str, Any]) -> None:
    """Refuse to start on nodes whose copies of the shards differ; collective over the world.

    Args:
        state: The state of this rank's batches that a checkpoint would record.

    Raises:
        DataError: Ranks differ; every rank raises the same error.
    """
    encoded = json.dumps(state, sort_keys=True).encode("utf-8")
    found: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), xxhash.xxh3_64_intdigest(encoded)))
    for rank, (host, value) in enumerate(found):
        if value != found[0][1]:
            raise DataError(
                f"rank {rank} on {host} has opened other shards than rank 0 on {found[0][0]}: "
                "give all nodes the same data.train and data.quarantine; compare the dataset ids "
                "with python -m data_tools inspect"
            )


def hash_batches(micro_batches: Iterable[MicroBatch]) -> int:
    """Hash samples, tokens (given and to predict) and positions in order, with xxh3_64."""
    hasher = xxhash.xxh3_64()
    for micro_batch in micro_batches:
        rows, loss = micro_batch.rows, micro_batch.loss
        hasher.update(micro_batch.indices_B.tobytes())
        for tensor in (rows.tokens_R, rows.positions_R, loss.targets_E):
            hasher.update(tensor.numpy().tobytes())
    return hasher.intdigest()
