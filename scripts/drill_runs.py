"""The runs of scripts/fault_drill.py: processes of train.py, and the judges of what they leave."""

import contextlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint as ckpt
import options
from scripts.drill_data import FLAGS, WORDS, write_data
from scripts.process_tree import tree
from util.checkpoint_files import check_whole, newest_whole
from util.cli import InputError

EPOCHS = 12
LONGEST = 180.0  # seconds after which a process counts as hanging
RUN = "run"  # the folder of checkpoints and logs in a trial's place
BEGUN = "Epoch: [1]"  # printed when the second epoch is under way
# Options of this set that only some systems have.
MORE = ("--is_sparse",)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# What a log's line holds that two equal runs do not share.
OWN = {"seconds", "peak_mib"}


class Lost(Exception):
    """A trial that went wrong: what was lost, or said badly."""


class Process:
    """A process in a group of its own; what it prints goes to files in its folder."""

    alive: set["Process"] = set()
    last: "Process | None" = None  # that was started
    popen = subprocess.Popen

    def __init__(self, command: list, place: Path, preexec: Callable | None = None):
        self.command, self.place = [str(word) for word in command], place
        self.paths = place / "stdout.txt", place / "stderr.txt"
        with open(self.paths[0], "w") as out, open(self.paths[1], "w") as err:
            self.process = Process.popen(
                self.command,
                cwd=place,
                stdout=out,
                stderr=err,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                preexec_fn=preexec,
            )
        self.pid, self.start = self.process.pid, time.monotonic()
        Process.alive.add(self)
        Process.last = self

    def out(self) -> str:
        return self.paths[0].read_text(errors="replace")

    def err(self) -> str:
        return self.paths[1].read_text(errors="replace")

    def runs(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, ready: Callable[[], bool], seconds: float = LONGEST) -> bool:
        """Wait until something holds. False: the process ended before, or it took too long."""
        end = time.monotonic() + seconds
        while self.runs() and time.monotonic() < end:
            if ready():
                return True
            time.sleep(0.002)
        return False

    def wait(self, seconds: float = LONGEST) -> int:
        """The exit status. Raises Lost if the process does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Lost(f"it did not end within {seconds:.0f} s") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill it with its children and its group: what it left, and what torchrun started."""
        for kill, pid in [(os.kill, pid) for pid in tree(self.pid)] + [(os.killpg, self.pid)]:
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        self.process.wait()
        Process.alive.discard(self)

    @classmethod
    def kill_all(cls) -> None:
        for process in list(cls.alive):
            process.kill()


class Bench:
    """A system's data and its unbroken run, with which other runs are compared."""

    def __init__(
        self,
        system: str,
        folder: Path,
        seed: int,
        ranks: int = 1,
        epochs: int = EPOCHS,
        words: int = WORDS,
    ):
        self.system, self.folder, self.seed = system, folder, seed
        self.ranks, self.epochs = ranks, epochs
        write_data(folder, seed, words=words)
        self.unbroken = self.new_place("unbroken")
        process = self.start(self.unbroken, keep=0)
        status = process.wait()
        self.life = time.monotonic() - process.start  # seconds
        check_end(process, status, {0})
        names = os.listdir(self.unbroken / RUN)
        if sum(name.startswith("checkpoint_") for name in names) != epochs:
            raise Lost(f"the unbroken run left {', '.join(sorted(names))}")
        self.size = (self.unbroken / RUN / "checkpoint_0.pth.tar").stat().st_size

    def new_place(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir()
        return place

    def draw(self, name: str) -> random.Random:
        """The random numbers of a trial."""
        return random.Random(f"{self.seed} {self.system} {name}")

    def start(
        self,
        place: Path,
        *flags: str,
        data: str = "../data",
        run: str = RUN,
        logs: str | None = None,
        workers: int = 0,
        keep: int = 2,
        preexec: Callable | None = None,
    ) -> Process:
        """Start train.py in a place. The same line starts a run and goes on with it."""
        owners = options.build_parser()[1]
        own = [flag for flag in MORE if self.system in owners[flag]]
        command = TORCHRUN if self.ranks > 1 else [sys.executable]
        command = [*command, ROOT / "train.py", *FLAGS, *own, "--model", self.system]
        command += ["--data_path", data, "--vocab_path", "../vocab", "--num_epochs", self.epochs]
        command += ["--model_name", run, "--logger_name", logs or run, "--resume", "auto"]
        command += ["--workers", workers, "--keep", keep, *flags]
        return Process(command, place, preexec)

    def go_on(self, place: Path, lines_lost: int = 0, **settings) -> Process:
        """Start the run again, wait for its end, and compare it with the unbroken one.

        Raises Lost. The log may lack the lines of the first `lines_lost` epochs.
        """
        process = self.start(place, **settings)
        check_end(process, process.wait(), {0})
        run, logs = settings.get("run", RUN), settings.get("logs")
        unequal = difference(self.unbroken / RUN, place / run, lines_lost, logs and place / logs)
        if unequal:
            raise Lost(f"not as the unbroken run: {unequal}")
        return process


def check_end(process: Process, status: int, allowed: set[int]) -> None:
    """Raise Lost unless a process ended with an allowed status, and with one line if with 1."""
    err = process.err()
    said = [line for line in err.splitlines() if line.startswith("error:")]
    last = (err.strip().splitlines() or ["nothing on stderr"])[-1]
    if status not in allowed:
        expected = " or ".join(map(str, sorted(allowed)))
        raise Lost(f"exit status {status}, expected {expected}; at the end: {last}")
    # torchrun's own report holds a traceback of torchrun.
    if f'File "{ROOT}' in err or ("Traceback" in err and "ChildFailedError" not in err):
        raise Lost(f"a traceback; at the end: {last}")
    if status == 1 and len(said) != 1:
        raise Lost(f"{len(said)} error lines, expected 1")
    if status == 0 and said:
        raise Lost(f"exit status 0, but {said[0]}")


def check_checkpoints(folder: Path) -> str | None:
    """The newest checkpoint of a folder, if there is one. Raises Lost if any is not whole."""
    try:
        for path in folder.glob("*.pth.tar"):
            check_whole(path)
        newest = newest_whole(folder, quiet=True) if folder.is_dir() else None
        if newest is not None:
            comparable(newest)
    except InputError as error:
        raise Lost(f"a checkpoint is not whole: {error}") from None
    return newest


def difference(
    unbroken: Path, run: Path, lines_lost: int = 0, logs: Path | None = None
) -> str | None:
    """Where the end of a run differs from the unbroken one; None: nowhere, not by a bit.

    Compared are the last and the best checkpoint (weights, optimizer, random state, counters) and
    the numbers in log.jsonl, which may lack the lines of the first `lines_lost` epochs.
    """
    try:
        want, got = (read_log(folder) for folder in (unbroken, logs or run))
    except (OSError, ValueError) as error:
        return f"log.jsonl: {error}"
    for name in (f"checkpoint_{max(want)}.pth.tar", "model_best.pth.tar"):
        try:
            states = [comparable(folder / name) for folder in (unbroken, run)]
        except (InputError, OSError) as error:
            return f"{name}: {error}"
        where = first_difference(*states)
        if where:
            return f"{name}: {where} differs"
    for epoch, line in want.items():
        if epoch in got and got[epoch] != line:
            return f"log.jsonl: the line of epoch {epoch} differs"
        if epoch not in got and epoch >= lines_lost:
            return f"log.jsonl: no line of epoch {epoch}"
    return None


def comparable(path: str | Path) -> dict:
    """What a checkpoint holds that equal runs share; its options name folders."""
    with contextlib.redirect_stdout(io.StringIO()):
        state = ckpt.load(str(path))
    return {key: state[key] for key in ("epoch", "model", "best_rsum", "Eiters", "vocab", "run")}


def first_difference(a: object, b: object, where: str = "") -> str | None:
    """Where two nested values differ; numbers and tensors must be equal bit by bit."""
    if type(a) is not type(b):
        return where or "its type"
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        # As bytes: NaN equals itself, and 0 is not -0.
        same = same and bytes_of(a) == bytes_of(b)
        return None if same else where
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{where} (its keys)"
        parts = [(a[key], b[key], f"{where}.{key}".lstrip(".")) for key in a]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where} (its length)"
        parts = [(x, y, f"{where}.{k}") for k, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else where
    return next((found for part in parts if (found := first_difference(*part))), None)


def bytes_of(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().numpy().tobytes()


def read_log(folder: Path) -> dict[int, dict]:
    """The lines of log.jsonl by epoch, without times and memory. Raises ValueError."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = {r["epoch"]: {k: x for k, x in r.items() if k not in OWN} for r in records}
    if len(found) != len(records):
        raise ValueError("an epoch has two lines")
    return found


def copy_unbroken(bench: Bench, place: Path, epoch: int) -> Path:
    """A place with the unbroken run as it was after an epoch; returns its newest checkpoint."""
    shutil.copytree(bench.unbroken / RUN, place / RUN)
    for later in range(epoch + 1, bench.epochs):
        (place / RUN / f"checkpoint_{later}.pth.tar").unlink()
    best = ckpt.load(str(bench.unbroken / RUN / "model_best.pth.tar"))
    if best["epoch"] > epoch:
        (place / RUN / "model_best.pth.tar").unlink()
    lines = (place / RUN / "log.jsonl").read_text().splitlines(keepends=True)
    (place / RUN / "log.jsonl").write_text("".join(lines[: epoch + 1]))
    return place / RUN / f"checkpoint_{epoch}.pth.tar"


def shown(process: Process) -> str:
    """The command that starts a process again, for a person."""
    return f"cd {shlex.quote(str(process.place))}; {shlex.join(process.command)}"
