"""Give every reader of files damaged files, and count what it does with them.

    python scripts/fuzz_readers.py                            # 10,000 files for each reader
    python scripts/fuzz_readers.py --n 1000 --only ims.npy    # some readers
    python scripts/fuzz_readers.py --only ims.npy --seed 4711 --n 1   # one file again

A reader may return a value or refuse the file in one line. tests/reader_cases.py says what counts
as a crash, and tests/reader_arrays.py and tests/reader_texts.py make the valid files. File k is
damaged with random numbers of seed k. Each reader runs in a process of its own with a bound on its
memory; a process that dies or hangs is a crash, and the next one goes on behind that file. The
files of crashes and silent faults are kept in --out. The script prints a table, and exits with
status 1 if there was a crash, or a damaged file that was taken for a whole one although it has a
checksum.
"""

import argparse
import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no file may ask the network

import torch

from tests.reader_cases import SECONDS, Bench, Crash, Reader, SilentlyWrong, readers
from util.arguments import COUNT, Parser
from util.cli import InputError, run, say

CRASHED, WRONG = "crashed", "silently wrong"
COLUMNS = ("accepted", "refused", CRASHED, WRONG)
# Forked processes share what is imported here: a new one costs milliseconds.
FORK = multiprocessing.get_context("fork" if sys.platform != "win32" else None)


def examine(reader: Reader, seeds: range, folder: str, connection) -> None:
    """Give a reader the files of some seeds; send the outcome of each."""
    with contextlib.chdir(folder):
        bench = Bench(reader, Path(folder))
        for seed in seeds:
            text = ""
            try:
                outcome = bench.try_one(bench.damaged(random.Random(seed)))
            except Crash as error:
                outcome = WRONG if isinstance(error, SilentlyWrong) else CRASHED
                text = str(error)
            connection.send((outcome, text))


class Trial:
    """The files of one reader, and what came of them."""

    def __init__(self, reader: Reader, seeds: range, out: Path):
        self.reader, self.seeds, self.out = reader, seeds, out
        self.done = 0  # of the seeds
        self.counts: collections.Counter[str] = collections.Counter()
        self.first: dict[str, int] = {}  # the seed of the first crash with a text
        self.start = time.time()
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz_readers_")
        self.fork()

    def fork(self) -> None:
        """Start a process for the files that are left."""
        self.connection, other = FORK.Pipe(duplex=False)
        place = tempfile.mkdtemp(dir=self.folder.name)
        left = self.seeds[self.done :]
        arguments = (self.reader, left, place, other)
        self.process = FORK.Process(target=examine, args=arguments, daemon=True)
        self.process.start()
        other.close()
        self.heard = time.time()

    def listen(self) -> None:
        """Count one outcome; or, if the process has died, that of the file that it died of."""
        self.heard = time.time()
        try:
            outcome, text = self.connection.recv()
        except EOFError:
            self.process.join()
            self.count(CRASHED, f"the process ended with status {self.process.exitcode}")
            self.fork()
            return
        self.count(outcome, text)

    def kill_if_silent(self) -> None:
        """End a process that hangs where Python's own alarm does not reach it."""
        if time.time() - self.heard > 3 * SECONDS:
            self.process.kill()

    def count(self, outcome: str, text: str) -> None:
        seed = self.seeds[self.done]
        self.done += 1
        self.counts[outcome] += 1
        if outcome in (CRASHED, WRONG):
            kind = re.sub(r"\d+", "0", text)[:60]
            if kind not in self.first:  # of many alike, one is kept
                self.first[kind] = seed
                self.keep(seed, f"{outcome}: {text}")

    def keep(self, seed: int, text: str) -> None:
        """Write the file of a seed to the folder of findings."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            bench = Bench(self.reader, Path(folder))
            name = re.sub(r"[^\w.]+", "_", self.reader.name)
            path = self.out / f"{name}.{seed}"
            path.write_bytes(bench.damaged(random.Random(seed)))
        say(f"{self.reader.name}, seed {seed} ({path}): {text[:500]}")

    @property
    def ended(self) -> bool:
        return self.done == len(self.seeds)

    def close(self) -> None:
        self.process.join()
        self.seconds = time.time() - self.start
        self.folder.cleanup()


def fuzz(chosen: list[Reader], seeds: range, processes: int, out: Path) -> list[Trial]:
    """Run the readers, some at the same time."""
    waiting, running, ended = list(chosen), [], []
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(Trial(waiting.pop(0), seeds, out))
        ready = multiprocessing.connection.wait([x.connection for x in running], timeout=1)
        for trial in list(running):
            if trial.connection in ready:
                trial.listen()
            else:
                trial.kill_if_silent()
            if trial.ended:
                trial.close()
                running.remove(trial)
                ended.append(trial)
                each = 1000 * trial.seconds / len(seeds)
                say(f"{trial.reader.name}: {trial.seconds:.0f} s, {each:.1f} ms a file")
    return ended


def choose(names: list[str] | None) -> list[Reader]:
    """The readers of some names, or all of them."""
    known = {reader.name: reader for reader in readers()}
    for name in names or ():
        if name not in known:
            raise InputError(f"--only {name!r}: expected some of {', '.join(map(repr, known))}")
    return [reader for name, reader in known.items() if not names or name in names]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=COUNT, default=10_000, help="number of files for each reader")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some readers; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first file")
    parser.add_argument("--processes", type=COUNT, default=1, help="readers at the same time")
    parser.add_argument("--out", type=Path, default="fuzz_findings", help="folder for bad files")
    opt = parser.parse_args(argv)
    torch.set_num_threads(1)
    trials = fuzz(choose(opt.only), range(opt.seed, opt.seed + opt.n), opt.processes, opt.out)
    print(f"| reader | inputs | {' | '.join(COLUMNS)} |")
    print("|" + " --- |" * 6)
    for trial in sorted(trials, key=lambda trial: trial.reader.name):
        counts = " | ".join(f"{trial.counts[name]:,}" for name in COLUMNS)
        print(f"| {trial.reader.name} | {trial.done:,} | {counts} |")
    if any(trial.counts[CRASHED] + trial.counts[WRONG] for trial in trials):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
