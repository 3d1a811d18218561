"""Bytes of device memory that are alive, by the part that they belong to, and their peak."""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, UntypedStorage

BLOCK = 512
"""Bytes that the caching allocator rounds up to."""


@dataclass(slots=True)
class _Storage:
    size: int
    label: str
    alive: weakref.ref[UntypedStorage]


class Memory:
    """The storages of a device, from their creation to their end."""

    def __init__(self, device_type: str) -> None:
        self._held: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._device_type = device_type
        self._total = self._highest = 0
        self._storages: dict[int, _Storage] = {}

    @property
    def held(self) -> dict[str, int]:
        """Bytes alive, by label."""
        return {label: size for label, size in self._held.items() if size}

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by label at the moment with the most bytes since `restart`."""
        return {label: size for label, size in self._peak.items() if size}

    def restart(self) -> None:
        """Forget the peak so far."""
        self._peak, self._highest = self._held.copy(), self._total

    def add(self, tensor: Tensor, label: str) -> bool:
        """Count a tensor's storage if it is new; return whether this is the highest total."""
        if tensor.device.type != self._device_type:
            return False
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return False
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        alive = weakref.ref(storage, lambda _: self._remove(key))
        self._storages[key] = _Storage(size, label, alive)
        self._held[label] += size
        self._total += size
        if self._total <= self._highest:
            return False
        self._peak, self._highest = self._held.copy(), self._total
        return True

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count the storages of `tensors` under `label` from now on."""
        for tensor in tensors:
            self.add(tensor, label)
            storage = self._storages.get(id(tensor.untyped_storage()))
            if storage is not None:
                self._held[storage.label] -= storage.size
                self._held[label] += storage.size
                storage.label = label

    def _remove(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._held[storage.label] -= storage.size
        self._total -= storage.size
