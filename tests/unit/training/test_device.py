"""Which device ranks train on, and what is set before CUDA, NCCL and gloo start."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megatron_eso.errors import ConfigError
from megatron_eso.estimates.gpus import find_peak
from megatron_eso.ranks import choose_gpu
from megatron_eso.runs.run_directory import RunDirectory
from megatron_eso.training.distributed import device
from megatron_eso.training.distributed.device import (
    compare_devices,
    describe_difference,
    set_defaults,
)
from megatron_eso.training.distributed.parallel import find_timeout, refuse_restarts, use_gpu
from tests.support.configs import make_config, replace_value
from tests.support.processes import HANG_SECONDS
from tests.support.training import tiny_arguments


def test_a_job_whose_gpus_do_not_work_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    refused = train(tmp_path / "refused", tiny_data, {})
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "SLURM_GPUS_ON_NODE = 8, but torch " in line
    assert 'train.device = "cpu"' in line
    status = RunDirectory(tmp_path / "refused").read_status()
    assert status is None
    assert train(tmp_path / "run", tiny_data, {"train.device": "cpu"}).returncode == 0


def train(run: Path, data: Path, overrides: dict[str, object]) -> subprocess.CompletedProcess[str]:
    arguments = tiny_arguments(run, data, overrides | {"train.num_steps": 1})
    return subprocess.run(
        [sys.executable, "-m", "pretrain.train", *arguments],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=os.environ | {"SLURM_GPUS_ON_NODE": "8"},
        check=False,
    )


@pytest.mark.parametrize("num_gpus", [None, "", "0"])
def test_a_machine_without_gpus_trains_on_its_cpu(
    num_gpus: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "GPU_FILE", tmp_path / "nvidia0")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if num_gpus is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", num_gpus)
    device.refuse_missing_gpus()
    (tmp_path / "nvidia0").touch()
    with pytest.raises(ConfigError, match="nvidia0 exists, but torch"):
        device.refuse_missing_gpus()


@pytest.mark.parametrize("devices", [(True, True), (False, False), (True, False)])
def test_ranks_with_other_devices_are_refused_on_every_rank(devices: tuple[bool, bool]) -> None:
    store, errors = HashStore(), ["", ""]

    def meet(rank: int) -> None:
        try:
            compare_devices(store, rank, 2, has_gpu=devices[rank])
        except ConfigError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors[0] == errors[1]
    assert bool(errors[0]) == (len(set(devices)) > 1)


def test_the_hosts_without_a_gpu_are_named() -> None:
    devices = [(True, "node1"), (True, "node1"), (False, "node2"), (False, "node2")]
    assert describe_difference(devices).startswith(
        "no working CUDA on node2, while other hosts have GPUs: "
    )
    many = [(True, "node0"), *((False, f"node{number}") for number in range(1, 11))]
    assert "node8 and 2 more, while" in describe_difference(many)


def test_a_rank_that_finds_one_gpu_uses_it() -> None:
    assert [choose_gpu(rank, 8) for rank in (0, 7, 8)] == [0, 7, None]
    assert [choose_gpu(rank, 1) for rank in (0, 7)] == [0, 0]
    assert choose_gpu(0, 0) is None


def test_a_rank_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 8 of this node has no GPU, as torch finds 8"):
        use_gpu(8, 8)


@pytest.mark.parametrize(
    ("num_nodes", "max_restarts", "keeps_store", "is_refused"),
    [
        ("2", "3", "True", True),
        ("2", "0", "True", False),  # as slurm/train.sbatch starts torchrun
        ("1", "3", "True", False),
        ("2", "3", "False", False),  # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        (None, None, None, False),  # LAUNCHER=srun
    ],
)
def test_restarts_that_would_find_earlier_ranks_are_refused(
    num_nodes: str | None,
    max_restarts: str | None,
    keeps_store: str | None,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "GROUP_WORLD_SIZE": num_nodes,
        "TORCHELASTIC_MAX_RESTARTS": max_restarts,
        "TORCHELASTIC_USE_AGENT_STORE": keeps_store,
    }.items():
        monkeypatch.setenv(name, value or "")  # so that it is restored
        if value is None:
            monkeypatch.delenv(name)
    if not is_refused:
        refuse_restarts()
        return
    with pytest.raises(ConfigError, match="--max-restarts 3 on 2 nodes: .* leave --max-restarts"):
        refuse_restarts()


VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_GLOO_LAZY_INIT",
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_ALGO",
)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("unset")
def test_variables_get_defaults_and_keep_what_the_user_has_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    config = make_config()
    set_defaults(config)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["TORCH_GLOO_LAZY_INIT"] == "1"
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7"
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    assert "NCCL_ALGO" not in os.environ
    set_defaults(replace_value(config, "parallel.tensor_model_parallel_size", 2))
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@pytest.mark.usefixtures("unset")
def test_torch_accepts_the_name_of_the_flight_recorders_size() -> None:
    set_defaults(make_config())
    barrier = (
        "import torch.distributed as dist; "
        "dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore()); "
        "dist.barrier()"
    )
    found = subprocess.run(
        [sys.executable, "-c", barrier],
        capture_output=True,
        text=True,
        check=True,
    )
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert "deprecated" not in found.stderr


@pytest.mark.usefixtures("unset")
def test_the_earlier_name_of_the_allocator_setting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    set_defaults(make_config())
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_the_timeout_of_collectives_is_longer_than_every_deadline() -> None:
    config = make_config()
    longest = config.watchdog.validation_seconds
    assert longest == max(config.watchdog.start_seconds, config.watchdog.step_seconds, longest)
    assert find_timeout(config.watchdog).total_seconds() == longest + 300
    without = replace_value(config, "watchdog.step_seconds", 0.0)
    assert find_timeout(without.watchdog).total_seconds() > 1e8


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", None),
    ],
)
def test_the_peak_follows_from_the_name(name: str, peak: float | None) -> None:
    assert find_peak(name) == peak
