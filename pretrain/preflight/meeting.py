"""Where the ranks meet before process groups are known to work: the launcher's key-value store."""

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from megatron_eso.errors import UserError
from megatron_eso.ranks import launched_world_size, own_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The ranks, and the launcher's key-value store: it works where process groups may not.

    Every message goes to rank 0 or comes from it, so requests grow with the ranks, not with their
    square.
    """

    store: Store
    rank: int
    size: int
    timeout: timedelta

    def gather(self, name: str, mine: Any, nodes: Sequence[str] = ()) -> list[Any]:
        """Return what each rank writes, by rank, on rank 0 and nothing elsewhere; collective.

        Args:
            name: Name of the message; it is used once.
            mine: What this rank writes; JSON.
            nodes: The node of each rank, for the error.

        Raises:
            UserError: On rank 0: some ranks write nothing in time; the message names them.
        """
        keys = [f"preflight/{name}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], json.dumps(mine))
        if self.rank > 0:
            return []
        try:
            self.store.wait(keys, self.timeout)
        except RuntimeError:
            silent = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            named = [f"{rank} ({nodes[rank]})" if nodes else str(rank) for rank in silent]
            raise UserError(
                f"no answer ({name}) from ranks {', '.join(named)} of {self.size} within "
                f"{self.timeout.total_seconds():g} s: look at the log and the network of their "
                "nodes"
            ) from None
        return [json.loads(each) for each in self.store.multi_get(keys)]

    def share(self, name: str, value: Any) -> Any:
        """Return what rank 0 writes, on every rank; collective.

        Args:
            name: Name of the message; it is used once.
            value: JSON; that of rank 0 counts.

        Raises:
            UserError: Rank 0 writes nothing in time.
        """
        key = f"preflight/{name}"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        # Rank 0 itself waits for the slowest rank, then the others for rank 0.
        try:
            self.store.wait([key], 2 * self.timeout)
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise UserError(f"{find_node()}: no answer ({name}) from rank 0: {error}") from error

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
    """Return the node's name as Slurm has it, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
