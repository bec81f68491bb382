"""One run on several processes: `torchrun --nproc_per_node=N train.py ...`.

Every process holds the model and encodes its share of each batch; what a score needs of the others'
shares is gathered with its gradient, so that loss and gradient are those of one process with the
whole batch. Started plainly, each function here does nothing.
"""

import contextlib
import gc
import os
import signal
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist

# DistributedDataParallel imports this module, whose functions' default arguments hold for good the
# group that there is at the time: so import it before there is one.
import torch.distributed.nn  # noqa: F401
from torch import Tensor

from util.cli import InputError


def rank() -> int:
    """The number of this process; 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def let_go(error: BaseException) -> None:
    """Drop the local variables of the frames that an exception, and all behind it, keep."""
    errors = [error]
    for one in errors:
        traceback.clear_frames(one.__traceback__)
        behind = (one.__cause__, one.__context__)
        errors += [x for x in behind if x is not None and x not in errors]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the other processes if torchrun started this one, whose device it is.

    Gathers go through NCCL on GPUs, one a process, and through gloo on CPUs. Only process 0 prints.
    A process that ends early makes the others end with an InputError. What was made inside must be
    gone at the end, an exception's frames too: a group that something still holds can abort the
    process as it exits, or hang it, when gloo's threads wait for Python's lock to let go of the
    last tensors.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # not torchrun
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Counts and lengths stay on the host, so gloo serves beside NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    agreed = False  # do all processes end here?
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        try:
            yield
            agreed = True
        except BaseException as error:
            agreed = isinstance(error, SystemExit)
            lost = isinstance(error, RuntimeError) and "gloo" in str(error)
            lost |= isinstance(error, dist.DistError)
            if lost:  # torchrun ends the processes that are left; this one says why first.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            let_go(error)
            if lost:
                raise InputError(
                    f"process {rank()} of {world()}: lost another process of the run; why stands "
                    "near this line, or as an exit code in torchrun's report below; checkpoints "
                    "already written, if any, are whole: go on from the newest with --resume "
                    f"({str(error).splitlines()[0]})"
                ) from error
            raise
        finally:
            gc.collect()
            # Left standing, gloo can abort the process; NCCL would wait for processes in trouble.
            if agreed or device.type == "cpu":
                dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process: what all of them then act on at one place."""
    if world() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def add_up(x: Tensor) -> Tensor:
    """Sum of a tensor over the processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


class Gather(torch.autograd.Function):
    """Rows of all processes; the gradient goes back to where each row came from."""

    @staticmethod
    def forward(ctx, x, shapes, sum_gradients):
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        padded = x.new_zeros(largest)
        padded[tuple(map(slice, x.shape))] = x
        parts = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(parts, padded)
        start = sum(shape[0] for shape in shapes[: rank()])
        ctx.own = (slice(start, start + len(x)), *map(slice, x.shape[1:]))
        ctx.sum_gradients = sum_gradients
        return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        if ctx.sum_gradients:
            grad = add_up(grad.clone(memory_format=torch.contiguous_format))
        return grad[ctx.own], None, None


def gather(x: Tensor, sum_gradients: bool = True) -> Tensor:
    """Rows (b, ...) of all processes in their order, (B, ...); b may differ among them.

    Further dimensions may differ too: they are padded with zeros. `sum_gradients`: each process
    computes its own part of the loss from the rows; without it all compute the same loss.
    """
    if world() == 1:
        return x
    shapes = [torch.empty(x.dim(), dtype=torch.long) for _ in range(world())]
    dist.all_gather(shapes, torch.tensor(x.shape))
    return Gather.apply(x, [shape.tolist() for shape in shapes], sum_gradients)
