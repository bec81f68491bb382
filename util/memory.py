"""The peak memory of a process."""

import contextlib
import sys
from pathlib import Path

import torch


def peak_mib(device: torch.device) -> int | None:
    """The peak memory of this process so far, in MiB: GPU memory on CUDA, else resident memory.

    Resident memory includes the parts of memory-mapped files that were read. Returns None if the
    system does not report it.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux
        # ru_maxrss comes second: it starts at the memory of the parent process.
        status = Path("/proc/self/status").read_text()
        return round(int(status.partition("VmHWM:")[2].split()[0]) / 2**10)
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    return None
