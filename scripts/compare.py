"""Train several systems under one protocol, test them, and write one table.

    python scripts/compare.py --data_path data --data_name f30k_precomp --num_epochs 9 --seeds 0 1
    python scripts/compare.py --data_path data --data_name f30k_precomp --minutes 20
    python scripts/compare.py ... --systems scan chan -- --batch_size 64      # flags of train.py

All systems get the flags of PROTOCOL; each also gets the flags of its own row (`System.compared`).
`--minutes` gives each system the same wall time, including validation: the time of its second epoch
decides how many whole epochs fit (at least two). The learning rate is divided by ten after 70 % of
the epochs. The best epoch on dev is tested. The script writes table.md (means over the seeds, the
standard deviation of the sample, 95 % intervals, paired tests; needs scipy) and table.csv (one row
per run) to --out. If it is stopped, the same command continues after the last whole epoch; with
other flags or other captions, earlier runs move to earlier_1. If there is no test split, dev
becomes the test split, the last tenth of the training images (at most 200) becomes dev, and the
vocabulary is built from the new train and dev.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint as ckpt
import evaluation
import options
import vocab
from caption_images import CaptionImages, caption_images
from intervals import check_scipy
from ranking import Ranks
from scripts.compare_table import (
    RECALLS,
    SYSTEMS,
    own_flags,
    read_ranks,
    run_intervals,
    save_ranks,
    write,
)
from system import System
from util.arguments import COUNT, FOLDER, FROM_0, POSITIVE, Parser
from util.arrays import open_array, read_sizes
from util.cli import InputError, replacing, run
from util.devices import pick_device
from util.fingerprint import fingerprint
from util.log import read_json_lines
from vocab import read_captions

PROTOCOL = (
    "--batch_size 128 --learning_rate 5e-4 --bi_gru --max_violation --vse_mean_warmup_epochs 1 "
    "--val_step 0 --log_step 50 --workers 1"
)
HELD_OUT = 200
# Flags of train.py that this script sets; they must not follow --.
SET_HERE = "model data_path data_name vocab_path img_dim device seed num_epochs lr_update resume"
SET_HERE = [f"--{name}" for name in f"{SET_HERE} model_name logger_name".split()]


def hold_out(source: Path, folder: Path) -> None:
    """Write a data set: its dev is the end of the training images, its test is the source's dev."""
    for old in ("train", "dev"):
        images = open_array(str(source / f"{old}_ims.npy"), 3)
        text = source / f"{old}_caps.txt"
        captions = read_captions(text)
        pairs = caption_images(str(source / old), images, str(text), len(captions))
        first = len(pairs.rows)
        if old == "train":
            first -= min(HELD_OUT, first // 10)
            if first == len(pairs.rows):
                raise InputError(f"{source}: {first} training images, too few to cut dev off")
            rest = range(first, len(pairs.rows))
            write_part(source / old, pairs, captions, rest, folder / "dev")
        split = "train" if old == "train" else "test"
        write_part(source / old, pairs, captions, range(first), folder / split)


def write_part(
    old: Path, pairs: CaptionImages, captions: list[str], some: range, new: Path
) -> None:
    """Write some of the images of the split `old`, a row per image, and their captions as `new`.

    The captions stand image by image: with one caption per image, a row and a line are a pair.
    """
    rows = pairs.rows[some.start : some.stop].tolist()
    stored = len(open_array(f"{old}_ims.npy", 3))
    for name in ("ims", "ims_bbx", "boxes", "num_boxes"):
        path = f"{old}_{name}.npy"
        if not os.path.isfile(path):
            continue
        array = open_array(path, 1 if name == "num_boxes" else 3, integers=name != "ims")
        if len(array) != stored:
            raise InputError(f"{path}: {len(array)} rows, but {old}_ims.npy has {stored}")
        shape = (len(rows), *array.shape[1:])
        part = np.lib.format.open_memmap(f"{new}_{name}.npy", "w+", array.dtype, shape)
        for place, row in enumerate(rows):  # one row in memory at a time
            part[place] = array[row]
        part.flush()
    path = f"{old}_ims_size.npy"
    if os.path.isfile(path):
        np.save(f"{new}_ims_size.npy", read_sizes(path, stored)[rows])
    image_of = pairs.image_of.tolist()
    kept = [k for k in pairs.image_of.argsort(stable=True).tolist() if image_of[k] in some]
    Path(f"{new}_caps.txt").write_text("".join(f"{captions[k]}\n" for k in kept), "utf-8")
    table = "".join(f"{image_of[k] - some.start}\n" for k in kept)
    Path(f"{new}_caption_image.txt").write_text(table)


def prepare(opt: argparse.Namespace) -> list[str]:
    """Make missing data (splits, blocks, vocabulary). Returns the flags of train.py for it.

    Sets `opt.captions`, the fingerprint of the captions. Raises InputError, also if the vocabulary
    is of other captions.
    """
    folder = Path(System().find_data(opt.data_path, opt.data_name))
    if opt.split != "test" and not (folder / f"{opt.split}_ims.npy").is_file():
        raise FileNotFoundError(f"{folder}/{opt.split}_ims.npy: no such file; give another --split")
    if opt.split == "test" and not (folder / "test_ims.npy").is_file():
        cut = Path(opt.out) / "data" / opt.data_name
        cut.mkdir(parents=True, exist_ok=True)
        print(
            f"notice: {folder}: no test split: dev becomes the test split, and a new dev is cut "
            f"off train, in {cut}; the vocabulary of this data is in {opt.out}/vocab"
        )
        files = sorted(folder.glob("*_*.*"))
        source = {str(x.resolve()): [x.stat().st_size, x.stat().st_mtime] for x in files}
        mark = cut / "source.json"
        if not mark.is_file():
            hold_out(folder, cut)
            mark.write_text(json.dumps(source))
        elif json.loads(mark.read_text()) != source:
            raise InputError(f"{cut}: made from other data than {folder}; give another --out")
        folder = cut
        opt.vocab_path = str(Path(opt.out) / "vocab")  # from fewer captions
    for name in opt.systems:
        for split in ("train", "dev", opt.split):
            try:
                SYSTEMS[name].prepare_split(str(folder / split))
            except FileNotFoundError as error:
                raise InputError(f"{error}; or leave {name} out of --systems") from None
    data = ["--data_path", str(folder.parent), "--data_name", opt.data_name]
    words = Path(opt.vocab_path)
    if words.suffix not in (".json", ".pkl"):
        words /= f"{opt.data_name}_vocab.json"
    words = vocab.existing_file(words)
    if os.path.isfile(words):
        vocab.check_file(words, str(folder))
    else:
        vocab.main([*data, "--out", words])
    opt.captions = fingerprint(folder)
    numbers = open_array(str(folder / "train_ims.npy"), 3).shape[2]
    return [*data, "--vocab_path", opt.vocab_path, "--img_dim", str(numbers)]


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


def one_run(
    system: str, seed: int, flags: list[str], opt: argparse.Namespace
) -> tuple[dict[str, int | float | str], Ranks]:
    """Train and test one system with one seed; return its row of table.csv, and its ranks."""
    folder = Path(opt.out) / f"{system}_seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"flags": flags, "minutes": opt.minutes, "num_epochs": opt.num_epochs}
    asked["captions"] = opt.captions  # other data may lie under the same name
    known = folder / "asked.json"
    if not known.is_file() or json.loads(known.read_text()) != asked:
        if known.is_file():
            ckpt.prepare(opt.out, ("table.*",))
        old = "*.pth.tar", "*.json*", "*.npz", "*.log", "events.out.tfevents.*"
        ckpt.prepare(str(folder), old)
        known.write_text(json.dumps(asked))
    done, ranks = (folder / f"{x}" for x in (f"result_{opt.split}.json", f"ranks_{opt.split}.npz"))
    if done.is_file() and ranks.is_file():
        print(f"{folder}: done before")
        return json.loads(done.read_text()), read_ranks(ranks)
    print(f"{SYSTEMS[system].compared[0]}, seed {seed}: {shlex.join(flags)}", flush=True)
    # A result without ranks, of an older version, is of a finished training.
    log = read_log(folder) if done.is_file() else fit(folder, flags, opt)
    best = str(folder / "model_best.pth.tar")
    model, _, _ = ckpt.load_model(best)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    del model
    start = time.perf_counter()
    metrics, found = evaluate(best, opt)
    seconds = time.perf_counter() - start
    result = {"system": system, "seed": seed, "epochs": len(log)}
    result["best_epoch"] = max(log, key=lambda epoch: epoch["rsum"])["epoch"] + 1
    result |= {name: metrics[name[:3]][name[4:]] for name in RECALLS}
    result |= {"rsum": metrics["rsum"], "parameters": weights}
    result |= {"train_minutes": sum(epoch["seconds"] for epoch in log) / 60}
    result |= {"test_seconds": seconds, "peak_mib": max(epoch["peak_mib"] or 0 for epoch in log)}
    result |= run_intervals(found) | {"flags": shlex.join(flags)}
    with replacing(done) as part:
        Path(part).write_text(json.dumps(result))
    save_ranks(ranks, found)
    return result, found


def evaluate(path: str, opt: argparse.Namespace) -> tuple[dict, Ranks]:
    """The metrics of a checkpoint on --split, as evalrank prints them, and the ranks."""
    where = {"data_path": None, "vocab_path": None, "batch_size": None}  # as in training
    where |= {"split": opt.split, "device": pick_device(opt.device)}
    ranking = evaluation.rank_models([path], False, None, False, **where)
    return ranking.metrics, ranking.ranks


def main(argv: list[str] | None = None) -> None:
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
    parser.add_argument("--seeds", type=FROM_0, nargs="+", default=[0], help="one run per seed")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--split", default="test", help="the split to test on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    opt = parser.parse_args(argv[:at])
    opt.flags = argv[at + 1 :]
    own = [flag for flag in opt.flags if flag.partition("=")[0] in SET_HERE]
    if own:
        parser.error(f"{' '.join(own)}: this script sets that itself")
    opt.out = opt.out or f"runs/compare_{opt.data_name}"
    opt.seeds, opt.systems = (list(dict.fromkeys(x)) for x in (opt.seeds, opt.systems))
    pick_device(opt.device)
    check_scipy()
    flags_of = {s: [*PROTOCOL.split(), *own_flags(s).split(), *opt.flags] for s in opt.systems}
    for flags in flags_of.values():  # find wrong flags before hours of training
        options.parse(flags)
    data = prepare(opt)
    results, ranks = [], []
    for seed in opt.seeds:
        for system in opt.systems:
            flags = [*data, "--device", opt.device, "--seed", str(seed), *flags_of[system]]
            result, found = one_run(system, seed, flags, opt)
            results.append(result)
            ranks.append(found)
            write(results, ranks, opt, [*PROTOCOL.split(), *opt.flags])
    print((Path(opt.out) / "table.md").read_text())


if __name__ == "__main__":
    run(main)
