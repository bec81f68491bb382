"""Batches: items put together, in a shuffle that a resumed run can go on with, by processes.

The keys of a batch are in the table at the head of data.py. Shapes: B pairs, R regions, F numbers
per region, W words.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util.cli import InputError
from util.worker_limits import workers_that_fit


class Batch(dict):
    """Tensors by name; a name that the dataset does not give is an error in one line."""

    def __missing__(self, key: str):
        raise InputError(
            f"the model reads {key!r} of a batch, but its dataset gives only {', '.join(self)}; "
            "its System needs a dataset() that gives it (docs/adding_a_model.md)"
        )


def collate_fn(items: list[dict]) -> Batch:
    """Items to a batch: images (B, R, F), captions (B, W), lengths (B,), and the rest by name.

    Tensors of different shapes are padded with zeros to the largest. If images have different
    numbers of regions, 'filling' (B, R) says what is padding, and 'region_mask' what is scored.
    'widest' (B,) says of how many regions the image is that --drop left most of.
    """
    batch = Batch()
    for name in items[0]:
        values = [item[name] for item in items]
        if name == "captions":
            batch["lengths"] = torch.tensor([len(x) for x in values])  # (B,)
        if not isinstance(values[0], Tensor):
            batch[name] = torch.tensor(values)  # (B,)
            continue
        if name == "images" and len({len(x) for x in values}) > 1:
            counts = torch.tensor([len(x) for x in values])  # (B,)
            filling = torch.arange(int(counts.max())) >= counts[:, None]  # (B, R)
            batch |= {"filling": filling, "region_mask": ~filling}
        largest = [max(sizes) for sizes in zip(*(x.shape for x in values), strict=True)]
        values = [pad_to(x, largest) for x in values]
        batch[name] = default_collate(values)  # in a worker, straight into shared memory
    if "region_mask" in items[0]:
        left = batch["region_mask"].sum(1)  # (B,)
        batch["widest"] = left.max().expand(len(left)).clone()  # (B,)
    return batch


def pad_to(x: Tensor, shape: list[int]) -> Tensor:
    """x with zeros behind it, up to a shape."""
    if list(x.shape) == shape:
        return x
    behind = [(0, size - own) for own, size in zip(x.shape, shape, strict=True)]
    return F.pad(x, [n for pair in reversed(behind) for n in pair])


class EpochSampler(Sampler[list[int]]):
    """Batches of a shuffle that depends on (seed, epoch) only, from batch `first` on.

    Because the order follows from the epoch, a resumed run equals an unbroken one. With several
    processes each takes its share of every batch. The last one may be short; with `drop_last` it is
    left out then, unless it is the only one (Q27).
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.batches = -(-n // batch_size)  # of a whole epoch
        if drop_last:
            self.batches = max(n // batch_size, 1)
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.n, generator=generator)
        for batch in order.split(self.batch_size)[self.first : self.batches]:
            yield (
                batch[self.rank :: self.world_size] if self.shared(len(batch)) else batch
            ).tolist()

    def shared(self, size: int) -> bool:
        """Whether a batch is split; one with too few pairs is taken whole by each process."""
        return size >= self.world_size

    def __len__(self) -> int:
        return max(self.batches - self.first, 0)


def leave_signals_to_the_loop(worker: int) -> None:
    """Let a loader worker end only when its training loop says so.

    Ctrl-C and the SIGTERM of a scheduler reach the workers too, and a worker that dies of one tears
    the loop's step. The loop's own process ends a worker by SIGTERM, so only that one counts.
    """
    sys.excepthook = say_nothing_of_a_loop_that_is_gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGBUS"):  # torch's handler would say that shared memory is short
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def say_nothing_of_a_loop_that_is_gone(kind, error, trace) -> None:
    """Stands in for sys.excepthook in a loader worker.

    A thread of torch's hands batches to the loop. If the loop's process stops for a signal at that
    moment, the connection breaks, and the thread would print a traceback.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def largest_item(dataset: Dataset) -> int:
    """Bytes of an item in a batch, where all regions that there is room for are there."""
    item = dataset[0]
    size = sum(x.nbytes for x in item.values() if isinstance(x, Tensor))
    return size * dataset.images.shape[1] // len(item["images"])


def get_train_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    seed: int,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    multiprocessing_context: str | None = None,
) -> DataLoader:
    """Shuffled batches; set `loader.batch_sampler.epoch` (and `.first`) before each epoch.

    Process `rank` of `world_size` gets its share of each batch. `drop_last` leaves out a last batch
    that is short. `multiprocessing_context` is how workers are started (fork, forkserver, spawn);
    None: as the platform does.
    """
    if workers:
        workers = workers_that_fit(workers, largest_item(dataset) * -(-batch_size // world_size))
    return DataLoader(
        dataset,
        batch_sampler=EpochSampler(len(dataset), batch_size, seed, rank, world_size, drop_last),
        collate_fn=collate_fn,
        num_workers=workers,
        multiprocessing_context=multiprocessing_context if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_loop,
        # Its own: seeding the workers must not draw from the state that a resume restores.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
