"""A rank binds itself to the CPUs next to its GPU, as far as the job has them."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_eso.training.distributed import affinity
from megatron_eso.training.distributed.affinity import bind_to_cpus, find_address, parse_cpus

ADDRESS = "0000:1b:00.0"


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """Return the CPUs of this process, which are given back, while a folder stands for /sys."""
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(affinity, "PCI_DEVICES", tmp_path)
    yield sorted(before)
    os.sched_setaffinity(0, before)


def write_near(folder: Path, near: str) -> None:
    (folder / ADDRESS).mkdir()
    (folder / ADDRESS / "local_cpulist").write_text(f"{near}\n")


def test_the_address_of_a_gpu_is_that_of_its_folder() -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    assert find_address(properties) == ADDRESS
    assert find_address(SimpleNamespace()) is None


def test_lists_of_the_kernel_are_read() -> None:
    assert parse_cpus("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpus("\n") == set()


def test_a_rank_and_its_threads_run_next_to_the_gpu(allowed: list[int], tmp_path: Path) -> None:
    write_near(tmp_path, f"{allowed[0]},9000-9100")  # the second half is not of this job
    bind_to_cpus(ADDRESS, len(allowed))
    assert os.sched_getaffinity(0) == {allowed[0]}
    of_thread: list[set[int]] = []
    thread = threading.Thread(target=lambda: of_thread.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert of_thread == [{allowed[0]}]


@pytest.mark.parametrize("near", [None, "", "9000-9100", "none"])
def test_a_rank_stays_where_no_cpus_of_the_job_are_next_to_it(
    near: str | None, allowed: list[int], tmp_path: Path
) -> None:
    if near is not None:
        write_near(tmp_path, near)
    bind_to_cpus(ADDRESS, len(allowed))
    assert sorted(os.sched_getaffinity(0)) == allowed


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU cannot be less than a share")
def test_a_rank_stays_where_it_would_get_less_than_its_share(
    allowed: list[int], tmp_path: Path
) -> None:
    write_near(tmp_path, f"{allowed[0]}")
    bind_to_cpus(ADDRESS, len(allowed) - 1)
    assert sorted(os.sched_getaffinity(0)) == allowed
