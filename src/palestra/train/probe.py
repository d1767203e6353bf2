"""Memory and speed of the device that this process computes on."""

import gc
import time
from pathlib import Path

import torch

_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
_PRODUCTS = 6


class Memory:
    """Bytes in use: on a GPU those of torch's allocator, on a CPU those of the process, without files it maps."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"

    def now(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if self._is_cuda else _status("RssAnon")

    def forget_peak(self) -> None:
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # of this process alone

    def peak(self) -> int:
        """Since `forget_peak`."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - _status("RssFile") - _status("RssShmem")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Watch:
    """Wall and processor seconds of steps, from when the device has done what it was asked before."""

    def __init__(self, device: torch.device):
        self._device = device
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def start(self) -> None:
        settle(self._device)
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        settle(self._device)
        wall_s, cpu_s = self._began
        self.wall_s.append(time.perf_counter() - wall_s)
        self.cpu_s.append(time.process_time() - cpu_s)


def settle(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some large matrix products."""
    size = _PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    took_s = []
    for _ in range(_PRODUCTS):
        settle(device)
        began = time.perf_counter()
        a @ b
        settle(device)
        took_s.append(time.perf_counter() - began)
    return 2 * size**3 / min(took_s)
