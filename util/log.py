"""The log of a run: printed lines, TensorBoard and a tracker, and one JSON line per epoch."""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from util.cli import replacing, say

SILENCE = 60.0  # seconds after which a sign of life is printed


def duration(seconds: float) -> str:
    """A time in one unit that suits it: 34 ms, 0.4 s, 16 s, 3.2 min, 2.5 h, 3.1 days."""
    units = ((172800, 86400, "days"), (5400, 3600, "h"), (90, 60, "min"), (0.1, 1, "s"))
    size, unit = next((x[1:] for x in units if seconds >= x[0]), (0.001, "ms"))
    if seconds < 0.0005:
        return "0 s"
    number = seconds / size
    return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"


@contextlib.contextmanager
def sign_of_life(what: str, quiet: bool = False) -> Iterator[None]:
    """Within it, a line every minute says that `what` goes on."""
    if quiet:
        yield
        return
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(SILENCE):
            say(f"  {what}: {duration(time.monotonic() - start)} so far")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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


class Phase:
    """What the loss of an epoch is, and how the run goes on after it; for the printed lines."""

    def __init__(self, name: str, summed: bool, epochs_after: int, val_step: int):
        self.name = name  # e.g. hardest negatives
        self.summed = summed  # whether the loss is a sum over the pairs of a batch
        self.epochs_after, self.val_step = epochs_after, val_step
        self.validation: float | None = None  # seconds of one, once it is known

    def left(self, step: int, batch: int, batches: int, seconds: float) -> str:
        """The time left of the epoch and of the run, at `seconds` a step."""
        steps = batches - batch + self.epochs_after * batches
        validations = self.epochs_after + 1
        if self.val_step:
            validations += (step + steps) // self.val_step - step // self.val_step
        run = steps * seconds + validations * (self.validation or 0)
        return f"left {duration((batches - batch) * seconds)}, run {duration(run)}"

    def loss(self, loss: float, size: int) -> str:
        """The loss per pair of a batch of `size` pairs."""
        return f"{self.name}: {loss / size if self.summed else loss:.4f}/pair"


class StepLog:
    """Prints a line every `every` steps, and writes the TensorBoard tags of each step.

    `loss` is the mean loss of the epoch so far; a resumed run continues it. With a `phase`, a line
    with names follows the published one, and stands alone after a minute of silence. Norms of
    gradients stay on their device until a line is printed, because reading one waits for the step;
    the tags of the steps are written then.
    """

    def __init__(self, tb, every: int, loss: Average, phase: Phase | None = None):
        self.tb, self.every, self.loss, self.phase = tb, every, loss, phase
        self.batch_time, self.data_time = Average(), Average()
        self.waiting: list[tuple[int, float, dict[str, float], Tensor]] = []
        self.losses: list[tuple[float, int]] = []  # and the pairs of each step
        self.pairs, self.said = 0, time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Start the clock of the next step."""
        self.end = time.time()

    def batch_is_there(self) -> None:
        """Call this when the loader has given a batch."""
        self.data_time.update(time.time() - self.end)

    def step_is_done(
        self,
        loss: float,
        norm: Tensor,
        size: int,
        epoch: int,
        batch: int,
        batches: int,
        step: int,
        lr: float,
    ) -> None:
        """Log a step on `size` pairs; `batch` counts from 1 to `batches` within an epoch.

        `norm` () is that of the gradient, before clipping.
        """
        self.loss.update(loss, size)
        self.losses.append((loss, size))
        self.batch_time.update(time.time() - self.end)
        self.pairs += size
        values = {"epoch": epoch, "step": batch - 1, "Eit": step, "lr": lr, "Le": loss}
        values |= {"batch_time": self.batch_time.val, "data_time": self.data_time.val}
        values["pairs_per_second"] = size / max(self.batch_time.val, 1e-9)
        self.waiting.append((step, time.time(), values, norm))
        due = step % self.every == 0
        if due:
            say(
                f"Epoch: [{epoch}][{batch}/{batches}]  Eit {step}  lr {lr:g}  Le {self.loss}  "
                f"Time {self.batch_time}  Data {self.data_time}"
            )
        if self.phase and (due or time.monotonic() - self.said > SILENCE):
            where = "" if due else f"epoch {epoch}, step {batch} of {batches}  "
            left = self.phase.left(step, batch, batches, self.batch_time.avg)
            say(f"  {where}{self.phase.loss(loss, size)}  {self.speed(norm)}  {left}")
            self.said = time.monotonic()
        if due or batch == batches or len(self.waiting) == 100:
            self.write()
        self.restart()

    def speed(self, norm: Tensor) -> str:
        """The gradient's norm, and the mean speed of the epoch so far."""
        norm, speed = float(norm), self.pairs / max(self.batch_time.total, 1e-9)
        norm = f"{norm:,.0f}" if 1000 <= norm < 1e6 else f"{norm:.3g}"
        return f"grad {norm}  {speed:{',.0f' if speed >= 10 else '.1f'}} pairs/s"

    def write(self) -> None:
        """Write the tags of the steps since the last time; all norms are read at once."""
        waiting, self.waiting = self.waiting, []
        norms = torch.stack([norm for *_, norm in waiting]).tolist() if waiting else []
        for (step, when, values, _), norm in zip(waiting, norms, strict=True):
            for tag, number in (values | {"grad_norm": norm}).items():
                self.tb.add_scalar(tag, number, step, when)


class Writers:
    """TensorBoard's writer and a tracker (util/tracker.py), which gets the same.

    A full disk must not end a training of days for its charts: that TensorBoard's events cannot be
    written is said once, and it gets nothing more.
    """

    def __init__(self, tb, tracker):
        self.tb, self.tracker = tb, tracker
        self.hook = threading.excepthook
        threading.excepthook = self._leave_out_events  # a thread of TensorBoard's writes them

    def add_scalar(self, tag: str, value: float, step: int, when: float | None = None) -> None:
        self._try(lambda tb: tb.add_scalar(tag, value, step, when))
        self.tracker.add_scalar(tag, value, step)

    def add_figure(self, tag: str, figure, step: int) -> None:
        self.tracker.add_figure(tag, figure, step)
        self._try(lambda tb: tb.add_figure(tag, figure, step))  # closes the figure

    def close(self) -> None:
        self._try(lambda tb: tb.close())
        threading.excepthook = self.hook
        self.tracker.close()

    def _try(self, call: Callable) -> None:
        if self.tb is None:
            return
        try:
            call(self.tb)
        except OSError as error:
            folder, self.tb = self.tb.log_dir, None
            say(
                f"warning: {folder}: TensorBoard's events cannot be written "
                f"({error.strerror or error}, {room(folder)}); the run goes on without them, and "
                "log.jsonl has the metrics"
            )

    def _leave_out_events(self, args: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread: the next call here raises its error again."""
        ours = type(args.thread).__module__.startswith("tensorboard.")
        if not (ours and issubclass(args.exc_type, OSError)):
            self.hook(args)


class NoWriter:
    """Stands in for the TensorBoard writer on all processes except the first."""

    def add_scalar(self, *_):
        pass

    def add_figure(self, *_):
        pass

    def close(self):
        pass


def room(folder: str) -> str:
    """How much of a file system is free, in words."""
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError:
        return "the folder cannot be reached"


def append_json(path: str, records: list[dict]) -> bool:
    """Append a JSON line for each record: all of them, or with a warning and False none."""
    lines = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    try:
        with open(path, "ab") as log:
            log.write(lines)
        return True
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)  # no half line
        say(
            f"warning: {path}: {len(lines):,} bytes could not be written "
            f"({error.strerror or error}, {room(os.path.dirname(path) or '.')}); the run goes on, "
            "and tries again after the next epoch"
        )
        return False


def read_json_lines(path: str | os.PathLike) -> list[dict]:
    """The epochs in a log; none if there is no such file.

    Damaged lines, as a power cut leaves one at the end, are left out with a notice.
    """
    if not os.path.isfile(path):
        return []
    lines, damaged = _epochs_in(Path(path).read_bytes())
    if damaged:
        print(f"notice: {path}: {in_words(damaged)}; left out")
    return [record for _, record in lines]


def forget_epochs_from(epoch: int, path: str) -> None:
    """Drop the log's lines of `epoch` and later ones, which a resumed run will write again.

    Damaged lines are dropped too; a log with one is first copied to `{path}.damaged`.
    """
    if not os.path.isfile(path):
        return
    content = Path(path).read_bytes()
    lines, damaged = _epochs_in(content)
    if damaged:
        shutil.copyfile(path, f"{path}.damaged")
        print(f"notice: {path}: {in_words(damaged)}; dropped, {path}.damaged has the old file")
    kept = b"".join(line + b"\n" for line, record in lines if record["epoch"] < epoch)
    if kept != content:
        with replacing(path) as part:
            Path(part).write_bytes(kept)


def in_words(damaged: list[int]) -> str:
    """Which lines of a log are damaged."""
    which = f"line {damaged[0]} is damaged"
    if len(damaged) > 1:
        which = f"{len(damaged)} lines are damaged, the first is line {damaged[0]}"
    return f"{which} (a power cut, or a full disk)"


def _epochs_in(content: bytes) -> tuple[list[tuple[bytes, dict]], list[int]]:
    """The lines of a log with what they hold, and the numbers of its damaged lines."""
    lines, damaged = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("epoch")) is int:
            lines.append((line, record))
        elif line.strip():
            damaged.append(number)
    return lines, damaged
