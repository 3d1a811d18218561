"""Where the ranks meet before process groups are known to work: the launcher's key-value store."""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from megatron_eso.errors import UserError
from megatron_eso.ranks import launched_world_size, own_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The ranks, and the launcher's key-value store: it works where process groups may not."""

    store: Store
    rank: int
    size: int
    timeout: timedelta

    def exchange(self, name: str, mine: Any) -> list[Any]:
        """What each rank writes, by rank; JSON. Collective.

        Raises:
            UserError: Some ranks write nothing in time; the message names them.
        """
        self.store.set(f"preflight/{name}/{self.rank}", json.dumps(mine))
        deadline = time.monotonic() + self.timeout.total_seconds()
        found, silent = [], []
        for rank in range(self.size):
            left = max(deadline - time.monotonic(), 0.1)
            try:
                self.store.wait([f"preflight/{name}/{rank}"], timedelta(seconds=left))
                found.append(json.loads(self.store.get(f"preflight/{name}/{rank}")))
            except RuntimeError:
                silent.append(str(rank))
        if silent:
            raise UserError(
                f"no word ({name}) from ranks {', '.join(silent)} of {self.size} within "
                f"{self.timeout.total_seconds():g} s: look at their nodes' log and network"
            )
        return found

    def leave(self) -> None:
        """Leave the store; rank 0, which may hold it, leaves last."""
        names = [f"preflight/left/{rank}" for rank in range(self.size)]
        self.store.set(names[self.rank], "")
        if self.rank == 0:
            with suppress(RuntimeError):  # a rank that does not leave has failed by itself
                self.store.wait(names, self.timeout)


def meet(timeout: timedelta) -> World:
    """Find the store that the launcher's environment names; a world of one without a launcher.

    Raises:
        UserError: It cannot be reached.
    """
    if "MASTER_ADDR" not in os.environ:
        return World(store=HashStore(), rank=0, size=1, timeout=timeout)
    rank, size = own_rank(), launched_world_size()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        # Does not wait for all ranks: those that are missing are to be named.
        store = TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not has_agent,
            timeout=timeout,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise UserError(f"{find_node()}: cannot reach {address}:{port}: {error}") from error
    return World(store=store, rank=rank, size=size, timeout=timeout)


def find_node() -> str:
    """The node as Slurm calls it, else the host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
