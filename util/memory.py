"""How much memory a process took."""

import contextlib
import os
from pathlib import Path

import torch


def peak_mib(device: torch.device) -> float:
    """The most this process has held so far, in MiB: of the GPU on CUDA, else of its own memory.

    The latter counts what it mapped of files and read.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if os.path.exists("/proc/self/status"):  # ru_maxrss would start at the parent's memory
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
    return float("nan")
