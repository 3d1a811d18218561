"""GPUs that a run is planned for, and the share of their published speed that kernels reach.

Published figures: the makers' data sheets of the SXM modules, dense bf16 without sparsity. The
shares are assumptions, the same for every GPU; nothing here was measured.
"""

from dataclasses import dataclass

from megatron_eso.quantities import GIB

GPUS_PER_NODE = 8

# Dense bf16 peaks that the vendors publish, in FLOP/s, by a part of the device's name. A name that
# contains another one comes first.
PUBLISHED_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,  # GH200 as well
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU and its links."""

    name: str
    memory: float
    """Bytes that a process can allocate, the CUDA context included."""
    bf16_flops: float
    """Published dense peak of the tensor cores, FLOP/s."""
    fp32_flops: float
    """Published peak of float32 outside the tensor cores, FLOP/s."""
    bandwidth: float
    """Published bandwidth of the memory, bytes/s."""
    nvlink: float
    """Bandwidth to the other GPUs of the node, bytes/s in each direction."""
    network: float
    """Bandwidth of this GPU's share of the node's network adapters, bytes/s in each direction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Assumed shares of the published speeds, and fixed costs."""

    gemm: float = 0.65
    """Share of the bf16 peak that matrix products reach."""
    flash: float = 0.40
    """Share of the bf16 peak that fused attention reaches."""
    fp32: float = 0.70
    """Share of the float32 peak that kernels reach."""
    bandwidth: float = 0.80
    """Share of the memory's bandwidth that kernels reach."""
    link: float = 0.80
    """Share of the bandwidth of NVLink and of the network that collectives reach."""
    kernel_seconds: float = 4e-6
    """Shortest time of a kernel."""
    link_seconds: float = 20e-6
    """Shortest time of a collective."""


EFFICIENCY = Efficiency()
DEFAULT_MFU = 0.3
"""Model FLOPs utilization that hours are counted with where none is stated."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            memory=79.1 * GIB,
            bf16_flops=PUBLISHED_PEAKS["H100"],
            fp32_flops=67e12,
            bandwidth=3.35e12,
            nvlink=450e9,
            network=50e9,
        ),
        Gpu(
            name="h200",
            memory=139.8 * GIB,
            bf16_flops=PUBLISHED_PEAKS["H200"],
            fp32_flops=67e12,
            bandwidth=4.8e12,
            nvlink=450e9,
            network=50e9,
        ),
        Gpu(
            name="a100",
            memory=79.1 * GIB,
            bf16_flops=PUBLISHED_PEAKS["A100"],
            fp32_flops=19.5e12,
            bandwidth=2.04e12,
            nvlink=300e9,
            network=25e9,
        ),
        Gpu(
            name="b200",
            memory=178.4 * GIB,
            bf16_flops=PUBLISHED_PEAKS["B200"],
            fp32_flops=75e12,
            bandwidth=7.7e12,
            nvlink=900e9,
            network=50e9,
        ),
    )
}


def find_peak(name: str) -> float | None:
    """Return the published dense bf16 FLOP/s of a GPU by its name; None if unknown."""
    return next((peak for part, peak in PUBLISHED_PEAKS.items() if part in name), None)
