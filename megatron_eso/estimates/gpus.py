"""GPUs that a run is planned for, and the share of their published speed that kernels reach.

Published figures: the makers' data sheets of the SXM modules, dense bf16 without sparsity. The
shares are assumptions, the same for every GPU; nothing here was measured.
"""

from dataclasses import dataclass

GIB = 2**30
GPUS_PER_NODE = 8


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
    """Of the bf16 peak, in matrix products."""
    flash: float = 0.40
    """Of the bf16 peak, in fused attention."""
    fp32: float = 0.70
    """Of the float32 peak."""
    bandwidth: float = 0.80
    """Of the memory's bandwidth."""
    link: float = 0.80
    """Of the bandwidth of NVLink and of the network."""
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
            bf16_flops=989e12,
            fp32_flops=67e12,
            bandwidth=3.35e12,
            nvlink=450e9,
            network=50e9,
        ),
        Gpu(
            name="h200",
            memory=139.8 * GIB,
            bf16_flops=989e12,
            fp32_flops=67e12,
            bandwidth=4.8e12,
            nvlink=450e9,
            network=50e9,
        ),
        Gpu(
            name="a100",
            memory=79.1 * GIB,
            bf16_flops=312e12,
            fp32_flops=19.5e12,
            bandwidth=2.04e12,
            nvlink=300e9,
            network=25e9,
        ),
        Gpu(
            name="b200",
            memory=178.4 * GIB,
            bf16_flops=2250e12,
            fp32_flops=75e12,
            bandwidth=7.7e12,
            nvlink=900e9,
            network=50e9,
        ),
    )
}
