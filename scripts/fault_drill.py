"""Do harm to real training runs, and see whether anything is lost.

    python scripts/fault_drill.py                     # all systems; about 40 minutes on one core
    python scripts/fault_drill.py --systems scan --kills 10 --verbose
    python scripts/fault_drill.py --faults kill disk  # those with one of these words in their name

For each system the script makes random data and trains an unbroken run. Then it starts other runs
(processes of train.py) and harms them: it kills them at random moments, also while they save; sends
signals; damages their newest checkpoint or their log; changes their data; fills their disk or makes
it read-only; kills a loader process; kills or stops one of two processes of torchrun (with the
first system only). After each fault, all checkpoints that it did not damage must be whole, the
newest must load, and the same command line (`--resume auto`) must go on to the end. There, the
weights, the optimizer, the random state and the log must equal those of the unbroken run bit by
bit. An error must be one line, without a traceback.

The script prints a table, and exits with status 1 if anything was lost. A trial that lost something
keeps its folder, and its last command is printed. The random numbers of a trial follow from --seed,
but moments are moments: where a kill hits differs from run to run. Faults that this machine does
not allow (only root may mount a small disk) are skipped with a notice. It needs Linux.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import systems
from scripts.drill_faults import (
    FAULTS,
    KILL,
    KILL_IN_SAVE,
    RANK_FAULTS,
    SIGNALS,
    STOPS,
    Skipped,
    stop_and_go_on,
)
from scripts.drill_runs import Bench, Lost, Process, shown
from scripts.process_tree import PROC
from util.arguments import FOLDER, FROM_0, Parser
from util.cli import InputError, run, say

NAMES = (*STOPS, *FAULTS, *RANK_FAULTS)
Done = list[tuple[str, str]]  # faults, and how each ended


class Drill:
    """Runs trials, and counts them by fault."""

    def __init__(self, folder: Path, seed: int, verbose: bool = False):
        self.folder, self.seed, self.verbose = folder, seed, verbose
        self.ends: dict[str, Counter] = {name: Counter() for name in NAMES}
        self.lost: Counter = Counter()
        self.skipped: dict[str, str] = {}

    def trial(self, bench: Bench, name: str, number: int, job: Callable) -> None:
        """One trial: `job` gets a place, random numbers and a list of what it has done.

        What it has done, or else the fault `name`, counts as survived, or as lost.
        """
        label = f"{bench.system} {name} {number}"
        place = bench.new_place("".join(x if x.isalnum() else "_" for x in f"{name}_{number}"))
        start, done = time.monotonic(), []
        try:
            job(place, bench.draw(f"{name} {number}"), done)
        except Skipped as missing:
            self.skipped[name] = str(missing)
        except Lost as error:
            done = done or [(name, "")]
            self.lost.update(fault for fault, _ in done)
            say(f"LOST: {label}: {error}\n  its folder: {place}")
            if Process.last is not None:
                say(f"  its last command: {shown(Process.last)}")
            return
        finally:
            Process.kill_all()
        for fault, ended in done:
            self.ends[fault][ended] += 1
            if self.verbose:
                say(f"{label}: {fault}: {ended} ({time.monotonic() - start:.0f} s)")
        shutil.rmtree(place)

    def stops(self, bench: Bench, counts: dict[str, int]) -> None:
        """Stop runs of a system, each several times, until each kind of stop was tried."""
        queue = [name for name, count in counts.items() for _ in range(count)]
        bench.draw("stops").shuffle(queue)
        for number in range(2 * len(queue) + 5):
            if not queue:
                return
            self.trial(
                bench,
                "stops",
                number,
                lambda place, rng, done: stop_and_go_on(bench, place, rng, queue, done),
            )
        self.skipped |= dict.fromkeys(queue, "the runs were over before")

    def fault(self, bench: Bench, name: str, number: int) -> None:
        """Try one of the other faults."""

        def job(place: Path, rng: random.Random, done: Done) -> None:
            done.append((name, (FAULTS | RANK_FAULTS)[name][0](bench, place, rng)))

        self.trial(bench, name, number, job)

    def table(self) -> str:
        """What was tried, as a Markdown table."""
        lines = [
            "| fault | tried | survived | lost | how the runs ended |",
            "|---|---|---|---|---|",
        ]
        totals = [0, 0, 0]
        for name, ends in self.ends.items():
            counts = ends.total() + self.lost[name], ends.total(), self.lost[name]
            how = ", ".join(f"{count} {end}" for end, count in ends.most_common())
            if counts[0]:
                lines.append(f"| {name} | {' | '.join(map(str, counts))} | {how} |")
            totals = [a + b for a, b in zip(totals, counts, strict=True)]
        return "\n".join([*lines, f"| all | {' | '.join(map(str, totals))} | |"])


def drill_system(drill: Drill, system: str, names: list[str], kills: int, ranks: bool) -> None:
    """Try the faults `names` on one system; those of ranks only with `ranks`."""
    if set(names) & {*STOPS, *FAULTS}:
        bench = Bench(system, drill.folder / system, drill.seed)
        in_save = kills // 4
        counts = {KILL: kills - in_save, KILL_IN_SAVE: in_save} | dict.fromkeys(SIGNALS, 2)
        drill.stops(bench, {name: count for name, count in counts.items() if name in names})
        for name in FAULTS:
            for number in range(FAULTS[name][1] if name in names else 0):
                drill.fault(bench, name, number)
    if ranks and set(names) & set(RANK_FAULTS):
        bench = Bench(system, drill.folder / f"{system}_ranks", drill.seed, ranks=2)
        for name in RANK_FAULTS:
            for number in range(RANK_FAULTS[name][1] if name in names else 0):
                drill.fault(bench, name, number)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(systems.SYSTEMS)
    parser.add_argument("--systems", nargs="+", choices=known, default=known)
    parser.add_argument("--kills", type=FROM_0, default=102, help="kill -9 of all systems together")
    parser.add_argument("--faults", nargs="+", metavar="WORD", help="default: all faults")
    parser.add_argument("--seed", type=FROM_0, default=0)
    parser.add_argument("--folder", type=FOLDER, help="for the trials; default: a temporary one")
    parser.add_argument("--verbose", action="store_true", help="a line for each trial")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    if not PROC.is_dir():
        raise InputError("this script reads /proc, which only Linux has")
    names = [x for x in NAMES if not opt.faults or any(word in x for word in opt.faults)]
    if not names:
        raise InputError(f"--faults {' '.join(opt.faults)}: no such fault; there are {NAMES}")
    if opt.folder:
        Path(opt.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fault_drill_", dir=opt.folder))
    drill, start = Drill(folder, opt.seed, opt.verbose), time.monotonic()
    try:
        for number, system in enumerate(opt.systems):
            before = opt.kills * number // len(opt.systems)
            kills = opt.kills * (number + 1) // len(opt.systems) - before
            drill_system(drill, system, names, kills, ranks=number == 0)
    finally:
        Process.kill_all()
        print(drill.table())
        for name, missing in drill.skipped.items():
            print(f"notice: skipped: {name}: {missing}")
        if not drill.lost:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{(time.monotonic() - start) / 60:.0f} minutes")
    if drill.lost:
        sys.exit(1)


if __name__ == "__main__":
    run(main, clean_up=True)
