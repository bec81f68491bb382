"""The faults of scripts/fault_drill.py: each does harm to a run, and says how the run ended.

A fault gets a Bench, an empty folder (its place) and random numbers. It raises Lost if the run does
not end as it should, or does not go on to the weights of the unbroken run.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.drill_data import NAME
from scripts.drill_runs import (
    BEGUN,
    RUN,
    Bench,
    Lost,
    Process,
    check_checkpoints,
    check_end,
    comparable,
    copy_unbroken,
    first_difference,
)
from scripts.process_tree import children, command_of
from util.cli import InputError

KILL, KILL_IN_SAVE = "kill -9 at a random moment", "kill -9 while it saves"
SIGNALS = {f"{s.name} at a random moment": s for s in (signal.SIGTERM, signal.SIGINT)}
SIGNALS["SIGHUP at a random moment"] = signal.SIGHUP
STOPS = (KILL, KILL_IN_SAVE, *SIGNALS)
STOPS_OF_A_RUN = 6  # then it may go on to its end


class Skipped(Exception):
    """This machine does not allow a fault: what it lacks."""


# A run that is stopped, and started again with the same line


def stop_and_go_on(
    bench: Bench, place: Path, rng: random.Random, queue: list[str], done: list[tuple[str, str]]
) -> None:
    """Stop one run several times, as the queue says, then let it end.

    What was done leaves the queue; `done` gets it, and how it ended.
    """
    while queue and len(done) < STOPS_OF_A_RUN:
        process = bench.start(place, workers=rng.randrange(2))
        ended = stop(process, queue[0], bench, rng)
        if ended is None:  # the run was over before
            check_end(process, process.wait(), {0})
            break
        done.append((queue.pop(0), ended))
        check_checkpoints(place / RUN)
    bench.go_on(place)


def stop(process: Process, kind: str, bench: Bench, rng: random.Random) -> str | None:
    """Stop a process, and say where it was; None: it ended before."""
    folder, began = process.place / RUN, time.time() - 0.1
    if kind == KILL_IN_SAVE:
        seen, saves = set(), rng.randrange(4)

        def saving() -> bool:
            seen.update(new_parts(folder, began))
            return len(seen) > saves

        there = process.wait_until(saving)
        time.sleep(rng.uniform(0, 0.06))
    else:
        moment = process.start + rng.uniform(0, bench.life)
        there = process.wait_until(lambda: time.monotonic() > moment)
    if not there or not process.runs():
        return None
    if kind in SIGNALS:
        return signalled(process, SIGNALS[kind], bench.epochs, to_all=rng.random() < 0.5)
    os.kill(process.pid, signal.SIGKILL)
    status = process.wait()
    check_end(process, status, {0, -signal.SIGKILL})
    if new_parts(folder, began):
        return "half a file beside"
    return "in training" if "Epoch: [" in process.out() else "in start-up"


def new_parts(folder: Path, since: float) -> set[str]:
    """The files that are half written, and were begun since a time."""
    found = set()
    for path in folder.glob("*.part*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            if path.stat().st_mtime >= since:
                found.add(path.name)
    return found


def signalled(process: Process, number: signal.Signals, epochs: int, to_all: bool) -> str | None:
    """Send a signal to all processes of a run, as a terminal and SLURM do, or to the first only."""
    (os.killpg if to_all else os.kill)(process.pid, number)
    status = process.wait()
    out, err = process.out(), process.err()
    if status == 0:
        return None
    if status == 128 + number:
        check_end(process, status, {status})
        if "saved epoch" not in out or not (process.place / RUN / "interrupted.pth.tar").exists():
            raise Lost(f"exit status {status} without interrupted.pth.tar")
        return "saved"
    # While it imports, SIGINT ends Python with a traceback of its own.
    importing = "KeyboardInterrupt" in err and "Epoch: [" not in out
    allowed = {-number} | ({1} if err.strip().endswith("interrupted") else set())
    if status not in allowed or ("Traceback" in err and not importing):
        raise Lost(f"exit status {status}; at the end: {(err.strip().splitlines() or [''])[-1]}")
    over = (process.place / RUN / f"checkpoint_{epochs - 1}.pth.tar").exists()
    if "Epoch: [" in out and number != signal.SIGHUP and not over:
        raise Lost("ended in training without saving")
    return "ended in start-up" if "Epoch: [" not in out else "ended at once"


# Files that are damaged


def damaged_checkpoint(bench: Bench, place: Path, rng: random.Random, damage: Callable) -> str:
    """The newest checkpoint is damaged: it must be refused, and a run goes on from one before it.

    It may load if the damage changed no value: a bit of the seal itself.
    """
    path = copy_unbroken(bench, place, rng.randrange(2, bench.epochs - 1))
    whole = comparable(path)
    damage(path, rng)
    refused = False
    try:
        if first_difference(whole, comparable(path)):
            raise Lost(f"{path.name} is damaged, and loads with other values")
    except InputError:
        refused = True
    except Lost:
        raise
    except Exception as error:  # whatever it raises, a user would see a traceback
        raise Lost(f"loading {path.name} raises {type(error).__name__}: {error}") from None
    process = bench.go_on(place)
    if refused and path.name not in process.out() + process.err():
        raise Lost(f"skipped {path.name} without a notice")
    return "skipped with a notice" if refused else "harmless"


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip_bit(path: Path, rng: random.Random) -> None:
    with open(path, "r+b") as file:
        place = rng.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def torn_log(bench: Bench, place: Path, rng: random.Random) -> str:
    """The log ends at a random byte, as after a power cut; checkpoints reach the disk before it."""
    epoch = rng.randrange(1, bench.epochs - 1)
    copy_unbroken(bench, place, epoch)
    log = place / RUN / "log.jsonl"
    truncate(log, rng)
    torn = log.read_bytes()[-1:] not in (b"", b"\n")
    process = bench.go_on(place, lines_lost=epoch + 1)
    if torn and "log.jsonl" not in process.out() + process.err():
        raise Lost("dropped a torn line of log.jsonl without a notice")
    return "goes on"


# Data that change under a run


def changed_data(bench: Bench, place: Path, rng: random.Random, change: Callable) -> str:
    """Data change while a run reads them; they are restored, and it goes on.

    A removed file stays readable for the processes that have it open, so that the run may end with
    a warning.
    """
    shutil.copytree(bench.folder / "data", place / "data")
    process = bench.start(place, data="data", workers=rng.randrange(2))
    in_training(process)
    time.sleep(rng.uniform(0, 0.3))
    path = place / "data" / NAME / rng.choice(("train_ims.npy", "dev_ims.npy"))
    change(path, rng)
    status = process.wait()
    check_end(process, status, {0, 1} if change is remove else {1})
    if path.name not in process.out() + process.err():
        raise Lost(f"{path.name} was changed, and nothing said so")
    shutil.copy2(bench.folder / "data" / NAME / path.name, path)
    check_checkpoints(place / RUN)
    bench.go_on(place, data="data")
    return "one error line, then goes on" if status else "a warning, ends whole"


def in_training(process: Process) -> None:
    """Wait until the second epoch is under way."""
    if not process.wait_until(lambda: BEGUN in process.out()):
        raise Lost(f"it did not come to train: {process.err()[-300:]}")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def replace_in_place(path: Path, rng: random.Random) -> None:
    """Write other features into a file; its times may stay, as some copying tools leave them."""
    before = path.stat()
    array = np.load(path, mmap_mode="r+")
    array[:] = array[::-1].copy()
    array.flush()
    if rng.random() < 0.5:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Disks


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system in memory of `size` bytes at place/disk. Raises Skipped."""
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        raise Skipped("only root may mount the small disk that it needs")
    try:
        yield disk
    except Lost:
        shutil.copytree(disk, place / "disk_as_it_was")
        raise
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for `left` bytes; returns the file that does it."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)
    return ballast


def full_disk(bench: Bench, place: Path, rng: random.Random, policy: str) -> str:
    """The disk of the checkpoints and the log is full after a few epochs; later there is room."""
    with small_disk(place, 20 * bench.size) as disk:
        ballast = fill(disk, int(rng.uniform(0.1, 6) * bench.size))
        run = {"run": "disk/run", "keep": 0}
        process = bench.start(place, "--on_save_error", policy, **run)
        if policy == "continue":
            if process.wait_until(lambda: "free" in process.out() + process.err()):
                time.sleep(rng.uniform(0, 0.5))
            ballast.unlink()
        status = process.wait()
        check_end(process, status, {1} if policy == "stop" else {0, 1})
        if any(disk.glob("run/*.part*")):
            raise Lost("it left a half file")
        ballast.unlink(missing_ok=True)
        check_checkpoints(disk / "run")
        bench.go_on(place, **run)
    return "one error line, then goes on" if status else "goes on by itself"


def file_size_limit(bench: Bench, place: Path, rng: random.Random) -> str:
    """No file may grow to the size of a checkpoint: saving fails as on a full disk."""
    if resource is None:
        raise Skipped("this system has no limits of file sizes")
    most = int(rng.uniform(0.1, 0.9) * bench.size)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    process = bench.start(place, preexec=limit)
    check_end(process, process.wait(), {1})
    if any((place / RUN).glob("*.part*")):
        raise Lost("it left a half file")
    bench.go_on(place)
    return "one error line, then goes on"


def read_only(bench: Bench, place: Path, rng: random.Random) -> str:
    """The disk of the checkpoints becomes read-only during a run."""
    with small_disk(place, 20 * bench.size) as disk:
        run = {"run": "disk/run", "logs": "logs"}
        process = bench.start(place, **run)
        in_training(process)
        time.sleep(rng.uniform(0, 0.3))
        remount(disk, "ro", process)  # refused while it saves
        check_end(process, process.wait(), {1})
        again = bench.start(place, **run)
        check_end(again, again.wait(), {1})
        remount(disk, "rw")
        check_checkpoints(disk / "run")
        bench.go_on(place, **run)
    return "one error line, then goes on"


def remount(disk: Path, mode: str, process: Process | None = None) -> None:
    """Make a disk read-only or writable, again and again while a process holds its files."""
    command = ["mount", "-o", f"remount,{mode}", str(disk)]
    while subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        if process is None or not process.runs():
            raise Lost(f"the disk could not be made {mode}")


# Processes that die beside a run


def killed_worker(bench: Bench, place: Path, rng: random.Random) -> str:
    """A process that loads batches is killed."""
    process = bench.start(place, workers=rng.choice((1, 2)))
    in_training(process)
    time.sleep(rng.uniform(0, 0.3))
    workers = []
    if process.wait_until(lambda: workers.extend(children(process.pid)) or bool(workers)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(workers), signal.SIGKILL)
    status = process.wait()
    check_end(process, status, {0, 1})  # 0: its last batch was there already
    check_checkpoints(place / RUN)
    bench.go_on(place)
    return "one error line, then goes on" if status else "not missed"


def harmed_rank(bench: Bench, place: Path, rng: random.Random, number: signal.Signals) -> str:
    """One of two processes of torchrun is killed or stopped."""
    process = bench.start(place, "--rank_timeout", "10")
    in_training(process)
    time.sleep(rng.uniform(0, 0.3))
    ranks = [pid for pid in children(process.pid) if "train.py" in command_of(pid)]
    try:
        os.kill(rng.choice(ranks), number)
        check_end(process, process.wait(), {1})
        left = [pid for pid in ranks if "train.py" in command_of(pid)]
        if left:
            raise Lost(f"{len(left)} of its processes were left")
    finally:
        for pid in ranks:
            if "train.py" in command_of(pid):
                os.kill(pid, signal.SIGKILL)
    check_checkpoints(place / RUN)
    bench.go_on(place)
    return "one error line, then goes on"


# Each fault, and how often a system meets it.
FAULTS: dict[str, tuple[Callable, int]] = {
    "newest checkpoint truncated": (partial(damaged_checkpoint, damage=truncate), 2),
    "one bit of the newest checkpoint flipped": (partial(damaged_checkpoint, damage=flip_bit), 3),
    "log.jsonl torn at a random byte": (torn_log, 1),
    "data truncated under a run": (partial(changed_data, change=truncate), 1),
    "data removed under a run": (partial(changed_data, change=remove), 1),
    "data replaced in place under a run": (partial(changed_data, change=replace_in_place), 1),
    "full disk, --on_save_error stop": (partial(full_disk, policy="stop"), 1),
    "full disk, --on_save_error continue": (partial(full_disk, policy="continue"), 1),
    "limit of the size of files": (file_size_limit, 1),
    "disk becomes read-only": (read_only, 1),
    "loader process killed": (killed_worker, 1),
}
# Of two processes under torchrun.
RANK_FAULTS: dict[str, tuple[Callable, int]] = {
    "one of two ranks killed": (partial(harmed_rank, number=signal.SIGKILL), 2),
    "one of two ranks stopped": (partial(harmed_rank, number=signal.SIGSTOP), 2),
}
