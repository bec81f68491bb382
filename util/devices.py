"""Choose a device, and move batches to it."""

import os

import torch
from torch import Tensor

from util.cli import InputError


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device with this name; 'auto' and None mean CUDA if available, else the CPU.

    Under torchrun, each process gets its own GPU.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
                raise InputError(
                    f"--device {name}: each process takes a GPU of its own; give --device cuda"
                )
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch to the device; lengths stay on the host: packing and grouping read them."""
    moved = (
        x if name == "lengths" else x.to(device, non_blocking=True) for name, x in batch.items()
    )
    return type(batch)(zip(batch, moved, strict=True))
