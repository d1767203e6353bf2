"""Figures of accelerators that a plan is made with, as their makers publish them: nothing here was measured.

Memory, dense bfloat16 FLOP/s and memory bandwidth: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and DGX
B200 (its figures / 8). `link_bytes_s`: NVLink, each way, half of the sheets' total. `network_bytes_s`: one adapter for
each GPU, as in the reference systems: 200 Gb/s beside A100, 400 Gb/s beside the others; host memory: 2 TB for eight.
`mfu` is an assumption.
"""

from dataclasses import dataclass

from palestra.core.errors import UserError

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device. `reserved_bytes` is what it holds before a model comes: driver context, communication buffers.

    `host_bytes`: its share of the host's memory; `host_link_bytes_s`: to and from there. `mfu`: the share of `flops`
    that training reaches.
    """

    name: str
    memory_bytes: int
    host_bytes: int
    reserved_bytes: int
    flops: float
    memory_bytes_s: float
    link_bytes_s: float
    network_bytes_s: float
    host_link_bytes_s: float
    mfu: float


def _gpu(name: str, memory_gb: int, tflops: float, memory: float, link: float, network: float, host: float) -> Hardware:
    """Rates in GB/s."""
    return Hardware(
        name=name,
        memory_bytes=memory_gb * GB,
        host_bytes=250 * GB,
        reserved_bytes=3 * GB,
        flops=tflops * 1e12,
        memory_bytes_s=memory * GB,
        link_bytes_s=link * GB,
        network_bytes_s=network * GB,
        host_link_bytes_s=host * GB,
        mfu=0.35,
    )


HARDWARE = {
    "A100": _gpu("A100", 80, 312, 2_039, 300, 25, 25),
    "H100": _gpu("H100", 80, 989, 3_350, 450, 50, 55),
    "H200": _gpu("H200", 141, 989, 4_800, 450, 50, 55),
    "B200": _gpu("B200", 180, 2_250, 8_000, 900, 50, 55),
}
CPU_FLOPS = 5e10
"""Of one core, float32; a guess, for orders of magnitude."""


def hardware_of(name: str, *, cpu_memory_bytes: int, threads: int, ranks: int) -> Hardware:
    """`cpu` is this machine, whose memory its ranks share. Errors: UserError."""
    if name in HARDWARE:
        return HARDWARE[name]
    if name != "cpu":
        raise UserError(f"--gpu {name} is not known; take one of {', '.join([*HARDWARE, 'cpu'])}")
    return Hardware(
        name="cpu",
        memory_bytes=cpu_memory_bytes // ranks,
        host_bytes=0,
        reserved_bytes=GB // 2,
        flops=CPU_FLOPS * threads,
        memory_bytes_s=10 * GB,
        link_bytes_s=2 * GB,
        network_bytes_s=GB,
        host_link_bytes_s=10 * GB,
        mfu=0.5,
    )
