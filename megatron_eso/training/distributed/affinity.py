"""Binds a rank to the CPUs next to its GPU, which reach it without the link between processors."""

import logging
import os
from pathlib import Path
from typing import Any

PCI_DEVICES = Path("/sys/bus/pci/devices")

logger = logging.getLogger(__name__)


def find_address(properties: Any) -> str | None:
    """Return the PCI address in torch's properties of a GPU; None with a torch that lacks it."""
    if not hasattr(properties, "pci_bus_id"):
        return None
    place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    return "{:04x}:{:02x}:{:02x}.0".format(*place)


def bind_to_cpus(address: str, num_local_ranks: int) -> None:
    """Let this thread, and those that it starts, run on the CPUs next to a device only.

    Memory follows: Linux takes it from the NUMA node on which it is written first. Nothing changes
    where the CPUs are unknown, as in a container without /sys, or where the job has so few of them
    next to the device that this rank would get less than its share of the job's CPUs.

    Args:
        address: The PCI address of this rank's GPU, such as `0000:1b:00.0`.
        num_local_ranks: Ranks of this node.
    """
    try:
        near = parse_cpus((PCI_DEVICES / address / "local_cpulist").read_text())
    except (OSError, ValueError):
        return
    allowed = os.sched_getaffinity(0)
    usable = near & allowed
    if len(usable) * num_local_ranks < len(allowed):
        return
    os.sched_setaffinity(0, usable)
    logger.info("bound to %d of %d CPUs, those next to GPU %s", len(usable), len(allowed), address)


def parse_cpus(text: str) -> set[int]:
    """Return the CPUs of a list as the kernel writes it, such as `0-15,32-47`.

    Raises:
        ValueError: The text is no such list.
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus
