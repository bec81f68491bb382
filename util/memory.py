"""How much memory a process took."""

import contextlib
import sys
from pathlib import Path

import torch


def peak_mib(device: torch.device) -> int | None:
    """The most this process has held so far, in MiB: of the GPU on CUDA, else of its own memory.

    The latter counts what it mapped of files and read. None where the system does not say.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux
        # Before ru_maxrss, which would start at the memory of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return round(int(status.partition("VmHWM:")[2].split()[0]) / 2**10)
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    return None
