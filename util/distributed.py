"""One run on several processes: `torchrun --nproc_per_node=N train.py ...`.

Each process holds the model and encodes its share of each batch. The processes gather the encodings
that a score needs from each other, with their gradients. So the loss and the gradient are those of
one process with the whole batch. Without torchrun, the functions here do nothing.
"""

import contextlib
import datetime
import gc
import os
import signal
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist

# The default arguments of this module's functions keep the process group that exists when it is
# imported. DistributedDataParallel would import it when a group exists; here none exists yet.
import torch.distributed.nn  # noqa: F401
from torch import Tensor

from util.cli import InputError

# In the messages of gloo, which connects processes on CPUs.
OF_GLOO = "gloo", "Application timeout caused pair closure"
TIMEOUT = 1800  # seconds that a process waits for the others, as in PyTorch with gloo


def rank() -> int:
    """The number of this process; only process 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def clear_frames(error: BaseException) -> None:
    """Drop the local variables that the frames of an exception and of its causes keep alive."""
    errors = [error]
    for one in errors:
        traceback.clear_frames(one.__traceback__)
        behind = (one.__cause__, one.__context__)
        errors += [x for x in behind if x is not None and x not in errors]


@contextlib.contextmanager
def process_group(device: torch.device, timeout: int = TIMEOUT) -> Iterator[None]:
    """Join the other processes if torchrun started this one; `device` is this process's device.

    Gathers use NCCL on GPUs, one GPU per process, and gloo on CPUs. Only process 0 prints. If a
    process ends early, or does not answer for `timeout` seconds, the others end with an InputError.
    All objects made within this context must be freed at its end, also those in the frames of an
    exception. If something still refers to the group, the process can abort or hang at exit: gloo's
    threads wait for Python's lock to free the last tensors.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun did not start it
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Counts and lengths stay on the host, so NCCL alone is not enough.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout),
    )
    agreed = False  # whether all processes end here
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        try:
            yield
            agreed = True
        except BaseException as error:
            agreed = isinstance(error, SystemExit)
            lost = isinstance(error, RuntimeError) and any(x in str(error) for x in OF_GLOO)
            lost |= isinstance(error, dist.DistError)
            if lost:  # torchrun ends the remaining processes; this one first prints the reason
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            clear_frames(error)
            if lost:
                raise InputError(
                    f"process {rank()} of {world_size()}: {what_is_lost(str(error), timeout)}; "
                    "checkpoints already written are whole: go on from the newest with --resume "
                    f"({str(error).splitlines()[0]})"
                ) from error
            raise
        finally:
            gc.collect()
            # A gloo group that is left can abort the process. Destroying an NCCL group would wait
            # for processes that have failed.
            if agreed or device.type == "cpu":
                dist.destroy_process_group()


def what_is_lost(said: str, timeout: int) -> str:
    """What an error of PyTorch's says of the other processes."""
    if "timed out" in said.lower() or "timeout" in said.lower():
        return (
            f"another process of the run did not answer for {timeout} s: it was stopped, or it "
            "hangs, or it needs longer than --rank_timeout"
        )
    return (
        "lost another process of the run; the reason stands near this line, or as an exit code in "
        "torchrun's report below"
    )


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process, so that all processes act at the same point."""
    return bool(all_reduce_max(torch.tensor([int(flag)])))


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(x: Tensor) -> Tensor:
    """The largest of each number over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


class GatherRows(torch.autograd.Function):
    """Rows of all processes; the gradient of each row goes back to its process."""

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
            grad = all_reduce_sum(grad.clone(memory_format=torch.contiguous_format))
        return grad[ctx.own], None, None


def gather_rows(x: Tensor, sum_gradients: bool = True) -> Tensor:
    """Gather the rows (b, ...) of all processes, in their order, to (B, ...).

    b may differ between processes. The other sizes may differ too: they are padded with zeros. With
    `sum_gradients`, each process computes its own part of the loss from the rows; without it, all
    compute the same loss.
    """
    if world_size() == 1:
        return x
    shapes = [torch.empty(x.dim(), dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(shapes, torch.tensor(x.shape))
    return GatherRows.apply(x, [shape.tolist() for shape in shapes], sum_gradients)
