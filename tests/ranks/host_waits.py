"""Training steps whose host waits are counted, on a CPU that stands for the GPU."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.step import train_step
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.loop import run_loop
from tests.ranks.training import open_batches, take_step
from tests.support.training import Overrides, tiny_config

HOST = (None, "cpu")
"""How torch's optimizers name the host; the stand-in of the GPU is a torch.device."""


class HostWaits(TorchDispatchMode):
    """The places where the host would wait for a GPU: it reads a tensor, or makes one of numbers.

    Tensors of the host are those that were made without a device, and what is computed from them
    alone. All others would lie on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._of_host = WeakTensorKeyDictionary()
        self._patches: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if "_local_scalar_dense" in str(function):
            self._note_reading(inputs[0])
        outputs = function(*args, **kwargs or {})
        is_made_here = not inputs and (kwargs or {}).get("device") is None
        if is_made_here or (inputs and all(self._is_of_host(each) for each in inputs)):
            self._mark(outputs)
        return outputs

    def _is_of_host(self, tensor: Tensor) -> bool:
        is_generator_state = tensor.dtype == torch.uint8
        return is_generator_state or tensor in self._of_host

    def _mark(self, outputs: Any) -> None:
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self._of_host[leaf] = True

    def _note_reading(self, tensor: Tensor) -> None:
        if not self._is_of_host(tensor):
            self._note()

    def _note(self) -> None:
        frames = [
            f"{Path(frame.filename).name}:{frame.name}"
            for frame in traceback.extract_stack()
            if "megatron" in frame.filename
        ]
        self.places[frames[-1] if frames else "elsewhere"] += 1

    def __enter__(self) -> Self:
        # What no dispatch mode sees, because nothing is computed where GPU and host are one.
        of_cpu, of_tolist = torch.Tensor.cpu, torch.Tensor.tolist
        of_new, of_tensor = torch.Tensor.new_tensor, torch.tensor

        def fetch(tensor: Tensor) -> Tensor:
            self._note_reading(tensor)
            fetched = of_cpu(tensor).clone()
            self._mark(fetched)
            return fetched

        def list_values(tensor: Tensor) -> Any:
            self._note_reading(tensor)
            return of_tolist(tensor)

        def make_alike(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._note_reading(tensor)
            return of_new(tensor, *args, **kwargs)

        def make(*args: Any, **kwargs: Any) -> Tensor:
            for leaf in tree_leaves(args):
                if isinstance(leaf, Tensor):
                    self._note_reading(leaf)
            made = of_tensor(*args, **kwargs)
            if kwargs.get("device") in HOST:
                self._mark(made)
            else:
                self._note()
            return made

        # Every one of them still does what it does.
        self._patches = [
            mock.patch.object(torch.Tensor, "cpu", fetch),
            mock.patch.object(torch.Tensor, "tolist", list_values),
            mock.patch.object(torch.Tensor, "new_tensor", make_alike),
            mock.patch.object(torch, "tensor", make),
        ]
        for patch in self._patches:
            patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()


def count_waits(
    run: Path, data: Path, overrides: Overrides
) -> tuple[Counter[str], tuple[int, ...]]:
    """Take two steps, and count the waits of the second by file and function.

    Returns:
        The waits, and the requests of all ranks: the first one is the number of this rank.
    """
    config = tiny_config(run, data, overrides)
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        with HostWaits() as waits:
            take_step(config, state, batches, groups)
            waits.places.clear()
            step = batches.step(state.counters.step, state.counters.consumed_samples)
            result = train_step(
                state,
                batches.plan_step(step, groups.dp.rank()),
                batches.objective,
                config.train,
                groups,
                flops_per_token=1.0,
                dropout_seed=None,
                read_requests=lambda: (dist.get_rank(), 0),
            )
    return waits.places, result.requests


def count_waits_of_run(run: Path, data: Path, overrides: Overrides) -> Counter[str]:
    """Train to the end, and count the waits of all steps by file and function."""
    with HostWaits() as waits:
        assert run_loop(run, data, overrides).error is None
    return waits.places
