"""The log of a run: printed lines, TensorBoard, and one JSON line per epoch."""

import json
import os
import time

from util.cli import replacing, say


class Average:
    """The last value, and the mean over an epoch, weighted by batch size."""

    def __init__(self, total: float = 0.0, count: int = 0):
        self.val, self.total, self.count = 0.0, total, count

    def update(self, val: float, n: int = 1) -> None:
        self.val = val
        self.total += val * n
        self.count += n

    @property
    def avg(self) -> float:
        return self.total / max(self.count, 1)

    def __str__(self) -> str:
        return f"{self.val:.4f} ({self.avg:.4f})"


class StepLog:
    """Prints a line every `every` steps, and writes the published TensorBoard tags of each step.

    `loss` is the mean loss of the epoch so far; a resumed run continues it.
    """

    def __init__(self, tb, every: int, loss: Average):
        self.tb, self.every, self.loss = tb, every, loss
        self.batch_time, self.data_time = Average(), Average()
        self.restart()

    def restart(self) -> None:
        """Start the clock of the next step."""
        self.end = time.time()

    def batch_is_there(self) -> None:
        """Call this when the loader has given a batch."""
        self.data_time.update(time.time() - self.end)

    def step_is_done(
        self, loss: float, size: int, epoch: int, batch: int, batches: int, step: int, lr: float
    ) -> None:
        """Log a step on `size` pairs; `batch` counts from 1 to `batches` within an epoch."""
        self.loss.update(loss, size)
        self.batch_time.update(time.time() - self.end)
        if step % self.every == 0:
            say(
                f"Epoch: [{epoch}][{batch}/{batches}]  Eit {step}  lr {lr:g}  Le {self.loss}  "
                f"Time {self.batch_time}  Data {self.data_time}"
            )
        values = {"epoch": epoch, "step": batch - 1, "Eit": step, "lr": lr, "Le": loss}
        values |= {"batch_time": self.batch_time.val, "data_time": self.data_time.val}
        for tag, number in values.items():
            self.tb.add_scalar(tag, number, step)
        self.restart()


class NoWriter:
    """Stands in for the TensorBoard writer on all processes except the first."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, *_):
        pass


def append_json(path: str, record: dict) -> None:
    """Append one JSON line."""
    with open(path, "a") as log:
        log.write(json.dumps(record) + "\n")


def forget_epochs_from(epoch: int, path: str) -> None:
    """Drop the log's lines of `epoch` and later ones, which a resumed run will write again."""
    if not os.path.isfile(path):
        return
    with open(path) as log:
        lines = log.readlines()
    kept = [line for line in lines if json.loads(line)["epoch"] < epoch]
    if len(kept) < len(lines):
        with replacing(path) as part, open(part, "w") as log:
            log.writelines(kept)
