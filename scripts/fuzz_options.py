"""Compare random options of all systems with plain loops in float64.

    python scripts/fuzz_options.py --n 1000                 # 2 minutes on two cores
    python scripts/fuzz_options.py --n 200 --model gsmn     # one system
    python scripts/fuzz_options.py --seed 154 --n 1         # one case again

Run it after every change to the mathematics. tests/random_options.py draws case k from seed k, so a
case in the output can be run again. That file also defines the values that are compared, and the
tolerances. The script prints each case outside the tolerances; if there is one, it exits with
status 1.
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.random_options import SYSTEMS, check, draw
from util.arguments import Parser
from util.cli import InputError, progress, run, say


def examine(seed: int, system: str | None) -> tuple[int, str, str, list[str]]:
    """Check one case; return its seed, its system, the case in words, and the findings."""
    case = draw(seed, system)
    try:
        findings = [str(finding) for finding in check(case)]
    except Exception as error:  # the other cases continue; the error counts as a finding
        findings = [f"{type(error).__name__}: {error}"]
    return seed, case.system, str(case), findings


def examined(seeds: range, opt: argparse.Namespace) -> Iterator[tuple[int, str, str, list[str]]]:
    """Yield all cases as they finish, from `opt.jobs` processes with one thread each."""
    if opt.jobs == 1:
        yield from (examine(seed, opt.model) for seed in seeds)
        return
    with concurrent.futures.ProcessPoolExecutor(
        opt.jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        jobs = [pool.submit(examine, seed, opt.model) for seed in seeds]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=1000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--model", choices=sorted(SYSTEMS), help="one system; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    opt = parser.parse_args(argv)
    for name in ("n", "jobs"):
        if getattr(opt, name) < 1:
            raise InputError(f"--{name} {getattr(opt, name)}: expected at least 1")
    if opt.seed < 0:
        raise InputError(f"--seed {opt.seed}: expected at least 0")

    start, cases, wrong = time.time(), collections.Counter(), collections.Counter()
    seeds = range(opt.seed, opt.seed + opt.n)
    for seed, system, words, findings in progress(examined(seeds, opt), "cases", total=opt.n):
        cases[system] += 1
        wrong[system] += bool(findings)
        if findings:
            say(f"seed {seed}: {words}\n    " + "\n    ".join(findings))
    counts = ", ".join(f"{name} {wrong[name]} of {cases[name]}" for name in sorted(cases))
    print(f"{wrong.total()} of {opt.n} cases too far from float64 ({counts})", end="")
    print(f" in {time.time() - start:.0f} s")
    if wrong.total():
        sys.exit(1)


if __name__ == "__main__":
    run(main)
