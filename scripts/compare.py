"""Train several systems under one protocol, test them, and write one table.

    python scripts/compare.py --data_path data --data_name f30k_precomp --num_epochs 9 --seeds 0 1
    python scripts/compare.py --data_path data --data_name f30k_precomp --minutes 20
    python scripts/compare.py ... --systems scan chan -- --batch_size 64      # flags of train.py
    python scripts/compare.py ... --systems chan --seeds 6 --vary "" "--margin 0.1"  # is it real?

All systems get the flags of PROTOCOL; each also gets the flags of its own row (`System.compared`).
`--vary` compares settings of one system instead: each is a text of further flags. `--seeds 6` are
six seeds, 0 to 5; two numbers and more are the seeds themselves. On the CPU there is a run per
core, with one thread each; `--processes 1` runs one after the other, each with the whole machine.
`--minutes` gives each system the same wall time, including validation: the time of its second epoch
decides how many whole epochs fit (at least two). The learning rate is divided by ten after 70 % of
the epochs. The best epoch on dev is tested. The script writes table.md (means over the seeds, the
standard deviation of the sample, 95 % intervals, paired tests; needs scipy), table.csv (one row per
run), and the curves of dev over the epochs (scripts/compare_curves.py) to --out. If it is stopped,
the same command continues after the last whole epoch; with other flags or other captions, earlier
runs move to earlier_1. If there is no test split, dev becomes the test split, the last tenth of the
training images (at most 200) becomes dev, and the vocabulary is built from the new train and dev.
`--held_out 1000 --split dev` looks for good flags: the last 1,000 training images become dev and
are tested on, and no image of the data set's own dev and test is seen.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from multiprocessing import connection, get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint as ckpt
import evaluation
import options
from intervals import check_scipy
from ranking import Ranks
from scripts import compare_curves
from scripts.compare_data import prepare
from scripts.compare_table import (
    RECALLS,
    SYSTEMS,
    Setting,
    read_ranks,
    run_intervals,
    save_ranks,
    settings_of,
    write,
)
from util.arguments import COUNT, FOLDER, FROM_0, POSITIVE, Parser
from util.cli import InputError, counted, replacing, run
from util.devices import pick_device
from util.log import read_json_lines

PROTOCOL = (
    "--batch_size 128 --learning_rate 5e-4 --bi_gru --max_violation --vse_mean_warmup_epochs 1 "
    "--val_step 0 --log_step 50 --workers 1"
)
# Flags of train.py that this script sets; they must not follow --.
SET_HERE = "model data_path data_name vocab_path img_dim device seed num_epochs lr_update resume"
SET_HERE = [f"--{name}" for name in f"{SET_HERE} model_name logger_name".split()]


def read_log(folder: Path) -> list[dict]:
    """The log of train.py, one dict per epoch."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:  # a torn line, which train.py leaves out too
        return read_json_lines(path)


def train(folder: Path, flags: list[str]) -> list[dict]:
    """Run train.py in a folder from its last whole epoch on; return its log. Output: train.log."""
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    command += ["--model_name", str(folder), "--logger_name", str(folder)]
    done = len(list(folder.glob("checkpoint_*.pth.tar")))
    if done:
        command += ["--resume", str(folder / f"checkpoint_{done - 1}.pth.tar")]
    with open(folder / "train.log", "a") as out:
        out.write(shlex.join(command) + "\n")
        out.flush()
        # It runs in its own session: Ctrl-C reaches only this script, which passes it on.
        streams = {"stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, start_new_session=True)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code:
        last = (folder / "train.log").read_text().strip().splitlines()[-1]
        raise InputError(f"{folder}/train.log: training ended with {code}: {last}")
    return read_log(folder)


def fit(folder: Path, flags: list[str], opt: argparse.Namespace) -> list[dict]:
    """Train for --num_epochs, or for as many whole epochs as fit into --minutes."""

    def schedule(epochs: int) -> list[str]:
        return ["--num_epochs", str(epochs), "--lr_update", str(math.ceil(0.7 * epochs))]

    if opt.num_epochs:
        return train(folder, flags + schedule(opt.num_epochs))
    log = read_log(folder)
    if len(log) < 2:  # the rate stays the same in both
        log = train(folder, [*flags, "--num_epochs", "2", "--lr_update", "2"])
    # The first epoch, with the summed hinge loss, is slower.
    first, second = (epoch["seconds"] for epoch in log[:2])
    epochs = 2 + max(0, int((60 * opt.minutes - first - second) / max(second, 0.1)))
    return log if epochs == 2 else train(folder, flags + schedule(epochs))


def folder_of(setting: Setting, seed: int, opt: argparse.Namespace) -> Path:
    return Path(opt.out) / f"{setting.folder}_seed{seed}"


def results_of(folder: Path, opt: argparse.Namespace) -> tuple[Path, Path]:
    """The files of a run that is finished: its row, and its ranks."""
    return folder / f"result_{opt.split}.json", folder / f"ranks_{opt.split}.npz"


def one_run(
    setting: Setting, seed: int, flags: list[str], opt: argparse.Namespace
) -> tuple[dict[str, int | float | str], Ranks]:
    """Train and test one setting with one seed; return its row of table.csv, and its ranks."""
    folder = folder_of(setting, seed, opt)
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"flags": flags, "minutes": opt.minutes, "num_epochs": opt.num_epochs}
    asked["captions"] = opt.captions  # other data may lie under the same name
    known = folder / "asked.json"
    if not known.is_file() or json.loads(known.read_text()) != asked:
        if known.is_file():
            ckpt.prepare(opt.out, ("table.*", "curves.*"))
        old = "*.pth.tar", "*.json*", "*.npz", "*.log", "events.out.tfevents.*"
        ckpt.prepare(str(folder), old)
        known.write_text(json.dumps(asked))
    done, ranks = results_of(folder, opt)
    if done.is_file() and ranks.is_file():
        if opt.processes == 1:
            print(f"{folder}: done before")
        return {"setting": setting.folder} | json.loads(done.read_text()), read_ranks(ranks)
    name = f"{setting.title}, seed {seed}"
    print(f"{name} ({folder}/train.log): {shlex.join(flags)}", flush=True)
    # A result without ranks, of an older version, is of a finished training.
    log = read_log(folder) if done.is_file() else fit(folder, flags, opt)
    best = str(folder / "model_best.pth.tar")
    model, _, _ = ckpt.load_model(best)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    del model
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if opt.processes > 1:  # the lines of several runs would mix
            out = stack.enter_context(open(folder / "test.log", "w"))
            stack.enter_context(contextlib.redirect_stdout(out))
        metrics, found = evaluate(best, opt)
    seconds = time.perf_counter() - start
    result = {"setting": setting.folder, "system": setting.system, "seed": seed, "epochs": len(log)}
    result["best_epoch"] = max(log, key=lambda epoch: epoch["rsum"])["epoch"] + 1
    result |= {name: metrics[name[:3]][name[4:]] for name in RECALLS}
    result |= {"rsum": metrics["rsum"], "parameters": weights}
    result |= {"train_minutes": sum(epoch["seconds"] for epoch in log) / 60}
    result |= {"test_seconds": seconds, "peak_mib": max(epoch["peak_mib"] or 0 for epoch in log)}
    result |= run_intervals(found) | {"flags": shlex.join(flags)}
    with replacing(done) as part:
        Path(part).write_text(json.dumps(result))
    save_ranks(ranks, found)
    took = f"{counted(result['epochs'], 'epoch')} took {result['train_minutes']:.1f} minutes"
    print(f"{name}: summed recalls {result['rsum']:.1f} on {opt.split}; {took}", flush=True)
    return result, found


def run_alone(*job) -> None:
    """one_run in a process of its own, with one thread; it exits with 1 if it cannot end."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of train.py too
    torch.set_num_threads(1)

    def quietly() -> None:
        try:
            one_run(*job)
        except KeyboardInterrupt:  # the first process says so
            sys.exit(1)

    run(quietly)


def run_together(jobs: list[tuple], processes: int) -> int:
    """Make runs, so many at a time; the others go on if one fails. Returns how many failed."""
    waiting, running, failed = list(jobs), {}, 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                process = get_context("spawn").Process(target=run_alone, args=waiting.pop(0))
                process.start()
                running[process.sentinel] = process
            for sentinel in connection.wait(list(running)):
                process = running.pop(sentinel)
                process.join()
                failed += bool(process.exitcode)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
        signal.signal(signal.SIGTERM, before)
    return failed


def evaluate(path: str, opt: argparse.Namespace) -> tuple[dict, Ranks]:
    """The metrics of a checkpoint on --split, as evalrank prints them, and the ranks."""
    where = {"data_path": None, "vocab_path": None, "batch_size": None}  # as in training
    where |= {"split": opt.split, "device": pick_device(opt.device)}
    ranking = evaluation.rank_models([path], False, None, False, **where)
    return ranking.metrics, ranking.ranks


def build_parser() -> Parser:
    parser = Parser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s [-h] --data_path DATA_PATH --data_name DATA_NAME (--minutes M | "
        "--num_epochs N) [...] [-- flags of train.py for all]",
    )
    parser.add_argument(
        "--data_path", type=FOLDER, required=True, help="folder that holds DATA_NAME/"
    )
    parser.add_argument("--data_name", type=FOLDER, required=True, help="e.g. f30k_precomp")
    parser.add_argument(
        "--vocab_path",
        default="vocab",
        type=FOLDER,
        help="folder of the vocabulary, or its file; built if missing",
    )
    parser.add_argument(
        "--out",
        type=FOLDER,
        help="folder of the runs and tables; default: runs/compare_{data_name}",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=POSITIVE, help="wall time of each training")
    length.add_argument("--num_epochs", type=COUNT, help="epochs of each training")
    parser.add_argument(
        "--seeds", type=FROM_0, nargs="+", default=[1], help="how many seeds, or two and more seeds"
    )
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument(
        "--vary",
        action="append",
        metavar="FLAGS",
        help="settings of the one system of --systems, each a text in quotes with flags of "
        'train.py: --vary "" "--margin 0.1"',
    )
    parser.add_argument("--processes", type=COUNT, help="runs at a time; default: one per core")
    parser.add_argument("--split", default="test", help="the split to test on")
    parser.add_argument(
        "--held_out",
        type=COUNT,
        help="how many of the training images, the last ones, become dev; their captions count up "
        "to 5,000, as always with dev",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return parser


def each_varied(argv: list[str], parser: Parser) -> list[str]:
    """--vary A B as --vary=A --vary=B: argparse would take a flag of train.py for its own."""
    kept, varied = [], False
    for text in argv:
        if text.partition("=")[0] in parser._option_string_actions:
            varied = text == "--vary"
            kept += [] if varied else [text]
        elif varied and text and not text.startswith("-"):
            parser.error(f'--vary: {text} is no flag; quote each setting: --vary "" "--margin 0.1"')
        else:
            kept.append(f"--vary={text}" if varied else text)
    return kept


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    opt = parser.parse_args(each_varied(argv[:at], parser))
    opt.flags = argv[at + 1 :]
    varied = [flag for flags in opt.vary or () for flag in shlex.split(flags)]
    own = [flag for flag in (*opt.flags, *varied) if flag.partition("=")[0] in SET_HERE]
    if own:
        parser.error(f"{' '.join(own)}: this script sets that itself")
    opt.out = opt.out or f"runs/compare_{opt.data_name}"
    opt.seeds, opt.systems = (list(dict.fromkeys(x)) for x in (opt.seeds, opt.systems))
    if len(opt.seeds) == 1:
        opt.seeds = list(range(max(1, opt.seeds[0])))  # --seeds 0 was once seed 0
    opt.settings = settings_of(opt.systems, opt.vary, opt.flags)
    check_scipy()
    flags_of = {}
    for setting in opt.settings:
        flags = [*PROTOCOL.split(), *shlex.split(setting.flags), *opt.flags]
        flags_of[setting.folder] = [*flags, *shlex.split(setting.varied)]
        options.parse(flags_of[setting.folder])  # find wrong flags before hours of training
    runs = [(setting, seed) for seed in opt.seeds for setting in opt.settings]
    cores = 1 if pick_device(opt.device).type == "cuda" else os.cpu_count() or 1
    opt.processes = min(opt.processes or cores, len(runs))
    data, jobs = prepare(opt), []
    for setting, seed in runs:
        flags = [*data, "--device", opt.device, "--seed", str(seed), *flags_of[setting.folder]]
        jobs.append((setting, seed, flags, opt))
    try:
        failed = run_together(jobs, opt.processes) if opt.processes > 1 else 0
        collect(jobs, opt)
    except KeyboardInterrupt:
        print("stopped: the same command goes on, each run after its last whole epoch")
        raise
    if failed:
        raise InputError(f"{failed} of {len(jobs)} runs failed, as the lines above say")


def collect(jobs: list[tuple], opt: argparse.Namespace) -> None:
    """Make the runs that are not made yet, and write the tables; print them at the end.

    Of several processes' runs, those that have failed are left out.
    """
    results, ranks, logs, page = [], [], {}, ""
    alone = opt.processes == 1
    last = jobs[-1][:2]
    for setting, seed, *rest in jobs:
        folder = folder_of(setting, seed, opt)
        if alone or all(path.is_file() for path in results_of(folder, opt)):
            result, found = one_run(setting, seed, *rest)
            results.append(result)
            ranks.append(found)
            logs[setting.folder, seed] = read_log(folder)
        if results and (alone or (setting, seed) == last):
            write(results, ranks, opt, [*PROTOCOL.split(), *opt.flags])
            page = compare_curves.write(opt, opt.settings, logs, results)
    if results:
        print((Path(opt.out) / "table.md").read_text())
        print(page)
        print(f"written to {opt.out}: table.md, table.csv, curves.*")


if __name__ == "__main__":
    run(main)
