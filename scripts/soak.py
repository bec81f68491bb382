"""Run training or the server for an hour, and see whether memory, handles or threads grow.

    python scripts/soak.py train --minutes 60
    python scripts/soak.py serve --minutes 60          # pip install fastapi uvicorn

`train` trains SCAN on small random data with a loader process, validates and saves after each
epoch, and keeps the newest two checkpoints. `serve` starts serve.py with a small model and a search
page. Clients ask for scores and searches without a pause, and compare each score. Others send what
is no request: broken and deep JSON, bodies of wrong types or sizes, bodies and headers that stop
half-way.

Every ten seconds the script reads from /proc what the process and its children hold. After a
warm-up (the first tenth) it fits a line to each quantity. It prints the mean of the first and of
the last quarter, and the slope. It exits with status 1 if a line rises by more than its bound
(memory: a twentieth, or 10 MiB if that is more; file handles and threads: 2), after two standard
errors are taken off the slope; also if the process ended before, or a good client got a wrong
answer. It needs Linux.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.drill_data import FLAGS, NAME, write_data
from scripts.drill_runs import RUN, Lost, Process, check_end
from scripts.process_tree import PROC, held
from util.arguments import FOLDER, POSITIVE, Parser
from util.cli import InputError, run, say

SECONDS = 10.0  # between two samples, in a long soak
LEAST_SAMPLES = 60
WARM_UP = 0.1  # part of the samples that is not judged
IMAGES = {"train": 400, "dev": 50}
WORDS = 1000  # small checkpoints: an hour saves thousands
EPOCHS = 1_000_000
LONGER = "--lr_update 1000000 --learning_rate 0.0005 --log_step 500 --workers 1 --keep 2".split()
CLIENTS, SEARCHERS, HOSTILE = 4, 2, 2


class Quantity(NamedTuple):
    """What is watched, and by how much it may grow: a part of its mean, or a number."""

    name: str
    part: float
    least: float


QUANTITIES = (
    Quantity("memory (MiB)", 0.05, 10),
    Quantity("file handles", 0, 2),
    Quantity("threads", 0, 2),
)


class Trend(NamedTuple):
    """How a quantity developed."""

    first: float  # the mean of the first quarter
    last: float  # and of the last one
    slope: float  # per hour
    grew: bool


def trend(hours: np.ndarray, values: np.ndarray, quantity: Quantity) -> Trend:
    """Fit a line to the samples of a quantity; both arrays (n,), n at least 3."""
    n, quarter = len(values), max(1, len(values) // 4)
    first, last = values[:quarter].mean(), values[-quarter:].mean()
    x = hours - hours.mean()
    slope = float(x @ values / (x @ x))
    left = values - values.mean() - slope * x
    error = float(np.sqrt(left @ left / max(n - 2, 1) / (x @ x)))  # the slope's standard error
    growth = (slope - 2 * error) * (hours[-1] - hours[0])
    return Trend(first, last, slope, bool(growth > max(quantity.part * first, quantity.least)))


def watch(pid: int, minutes: float, count: Callable[[], int], done: str) -> np.ndarray:
    """Samples (n, 5) of a process: hours, MiB, handles, threads, and what `count` gives.

    Raises InputError if the process ends meanwhile. `done` names what is counted.
    """
    start, samples = time.monotonic(), []
    pause = min(SECONDS, 60 * minutes / LEAST_SAMPLES)
    said = start
    while time.monotonic() - start < 60 * minutes:
        time.sleep(pause)
        try:
            now = held(pid)
        except ProcessLookupError as error:
            raise InputError(f"after {len(samples)} samples: {error}") from None
        hours = (time.monotonic() - start) / 3600
        samples.append((hours, now.mib, now.handles, now.threads, count()))
        if time.monotonic() - said > 300:
            said = time.monotonic()
            say(
                f"{60 * hours:.0f} min: {now.mib:.0f} MiB, {now.handles} handles, {now.threads} "
                f"threads, {count()} {done}"
            )
    return np.array(samples, float)


def judge(samples: np.ndarray) -> bool:
    """Print a table of the samples (n, 5); returns whether anything grew."""
    kept = samples[int(WARM_UP * len(samples)) :]
    print("| | first quarter | last quarter | slope per hour | |")
    print("|---|---|---|---|---|")
    grew = False
    for column, quantity in enumerate(QUANTITIES, 1):
        found = trend(kept[:, 0], kept[:, column], quantity)
        word = "grew" if found.grew else "flat"
        numbers = f"{found.first:.1f} | {found.last:.1f} | {found.slope:+.2f}"
        print(f"| {quantity.name} | {numbers} | {word} |")
        grew |= found.grew
    return grew


# Training


def train_command(*flags) -> list:
    where = ["--data_path", "data", "--vocab_path", "vocab"]
    where += ["--model_name", RUN, "--logger_name", RUN]
    return [sys.executable, ROOT / "train.py", *FLAGS, *LONGER, *where, *flags]


def soak_train(folder: Path, minutes: float) -> bool:
    """Watch a training run, then stop it as a scheduler would; returns whether all was well."""
    process, log = Process(train_command("--num_epochs", EPOCHS), folder), folder / RUN
    if not process.wait_until((log / "log.jsonl").exists):
        raise InputError(f"training did not begin: {process.err()[-500:]}")

    def epochs() -> int:
        return (log / "log.jsonl").read_bytes().count(b"\n")

    samples = watch(process.pid, minutes, epochs, "epochs")
    os.kill(process.pid, signal.SIGTERM)
    status = process.wait()
    check_end(process, status, {128 + signal.SIGTERM})
    print(f"{epochs()} epochs in {minutes:g} minutes; exit status on SIGTERM: {status}")
    kept = sorted(path.name for path in log.glob("*.pth.tar"))
    print(f"checkpoints at the end: {', '.join(kept)}")
    return not judge(samples) and len(kept) <= 4


# The server


def soak_serve(folder: Path, minutes: float) -> bool:
    """Watch the server under load; returns whether all was well."""
    from scripts.load_server import Client, random_bodies  # they need fastapi
    from scripts.soak_clients import Hostile, Searcher

    first = Process(train_command("--num_epochs", 1), folder)
    check_end(first, first.wait(), {0})
    path = folder / RUN / "checkpoint_0.pth.tar"
    bodies, want = scored_bodies(path, random_bodies)
    search = ["--data_path", "data", "--data_name", NAME, "--split", "dev"]
    command = [sys.executable, ROOT / "serve.py", path, "--port", 0, "--device", "cpu", *search]
    process = Process(command, folder)
    if not process.wait_until(lambda: "http://" in process.out()):
        raise InputError(f"the server did not start: {process.err()[-500:]}")
    port = int(process.out().partition("http://127.0.0.1:")[2].split()[0])
    good = [Client(k, port, bodies, want) for k in range(CLIENTS)]
    others = [Searcher(port) for _ in range(SEARCHERS)]
    others += [Hostile(port, seed) for seed in range(HOSTILE)]

    def answered() -> int:
        return sum(len(client.times) for client in good)

    with running([*good, *others]):
        samples = watch(process.pid, minutes, answered, "answers")
        for client in (*good, *others):
            client.stopping.set()
        os.kill(process.pid, signal.SIGTERM)
        status = process.wait()
    check_end(process, status, {0})
    errors = [error for client in (*good, *others) for error in client.errors]
    print(f"{answered()} good answers in {minutes:g} minutes; exit status on SIGTERM: {status}")
    print(f"largest difference from scoring alone: {max(c.worst for c in good):.1e}")
    for kind in (Searcher, Hostile):
        counts = sum((c.counts for c in others if isinstance(c, kind)), type(others[0].counts)())
        print(f"{kind.__name__}: {', '.join(f'{n} {what}' for what, n in counts.most_common())}")
    print(f"errors: {len(errors)}")
    for error in errors[:5]:
        print(error, file=sys.stderr)
    return not judge(samples) and not errors and answered() > 0


def scored_bodies(path: Path, random_bodies: Callable) -> tuple[list[bytes], list[dict]]:
    """Requests, and the scores that they should get."""
    import serve

    scorer = serve.Scorer(str(path), None, torch.device("cpu"), serve.Limits())
    bodies = random_bodies(scorer, images=4)
    return bodies, [scorer.score([scorer.read(body)])[0] for body in bodies]


@contextlib.contextmanager
def running(clients: list[threading.Thread]) -> Iterator[None]:
    """Start clients, and stop them at the end."""
    for client in clients:
        client.start()
    try:
        yield
    finally:
        for client in clients:
            client.stopping.set()
            client.stop.set()
        for client in clients:
            client.join()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "serve"])
    parser.add_argument("--minutes", type=POSITIVE, default=60.0)
    parser.add_argument("--folder", type=FOLDER, help="for the run; default: a temporary one")
    opt = parser.parse_args(argv)
    if not PROC.is_dir():
        raise InputError("this script reads /proc, which only Linux has")
    if opt.folder:
        Path(opt.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak_", dir=opt.folder) as name:
        folder = Path(name)
        write_data(folder, images=IMAGES, words=WORDS)
        try:
            soak = soak_train if opt.what == "train" else soak_serve
            well = soak(folder, opt.minutes)
        except Lost as error:
            raise InputError(f"{opt.what}: {error}") from None
        finally:
            Process.kill_all()
    if not well:
        sys.exit(1)


if __name__ == "__main__":
    run(main, clean_up=True)
