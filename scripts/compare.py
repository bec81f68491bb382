"""Train several systems under one protocol, test them, and write one table.

    python scripts/compare.py --data_path data --data_name f30k_precomp --num_epochs 9 --seeds 0 1
    python scripts/compare.py --data_path data --data_name f30k_precomp --minutes 20
    python scripts/compare.py ... --systems scan chan -- --batch_size 64      # flags of train.py

All systems get the flags of PROTOCOL; each also gets the flags of its own row (`System.compared`).
`--minutes` gives each system the same wall time, including validation: the time of its second epoch
decides how many whole epochs fit (at least two). The learning rate is divided by ten after 70 % of
the epochs. The best epoch on dev is tested. The script writes table.md (means over the seeds, and
the standard deviation of the sample) and table.csv (one row per run) to --out. If it is stopped,
the same command continues after the last whole epoch; with other flags or other captions, earlier
runs move to earlier_1. If there is no test split, dev becomes the test split, the last tenth of the
training images (at most 200) becomes dev, and the vocabulary is built from the new train and dev.
"""

import argparse
import csv
import json
import math
import os
import shlex
import signal
import statistics
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
import systems
import vocab
from caption_images import CaptionImages, caption_images
from scripts.benchmark import machine
from system import System
from util.arguments import COUNT, FOLDER, FROM_0, POSITIVE
from util.arrays import open_array, read_sizes
from util.cli import InputError, replacing, run
from util.devices import pick_device
from util.fingerprint import fingerprint
from vocab import read_captions

PROTOCOL = (
    "--batch_size 128 --learning_rate 5e-4 --bi_gru --max_violation --vse_mean_warmup_epochs 1 "
    "--val_step 0 --log_step 50 --workers 1"
)
# The systems to compare: `compared` is a title, and the flags of the paper's Flickr30K row.
SYSTEMS = {name: system for name, system in systems.SYSTEMS.items() if system.compared}
WAYS = [(way, f"r{k}") for way in ("i2t", "t2i") for k in (1, 5, 10)]
RECALLS = [f"{way}_{name}" for way, name in WAYS]
HELD_OUT = 200
# Flags of train.py that this script sets; they must not follow --.
SET_HERE = "model data_path data_name vocab_path img_dim device seed num_epochs lr_update resume"
SET_HERE = [f"--{name}" for name in f"{SET_HERE} model_name logger_name".split()]


def own_flags(system: str) -> str:
    """The flags of a system's row."""
    return f"--model {system} {SYSTEMS[system].compared[1]}"


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
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


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
) -> dict[str, int | float | str]:
    """Train and test one system with one seed; return its row of table.csv."""
    folder = Path(opt.out) / f"{system}_seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"flags": flags, "minutes": opt.minutes, "num_epochs": opt.num_epochs}
    asked["captions"] = opt.captions  # other data may lie under the same name
    known = folder / "asked.json"
    if not known.is_file() or json.loads(known.read_text()) != asked:
        if known.is_file():
            ckpt.prepare(opt.out, ("table.*",))
        ckpt.prepare(str(folder), ("*.pth.tar", "*.json*", "*.log", "events.out.tfevents.*"))
        known.write_text(json.dumps(asked))
    done = folder / f"result_{opt.split}.json"
    if done.is_file():
        print(f"{folder}: done before")
        return json.loads(done.read_text())
    print(f"{SYSTEMS[system].compared[0]}, seed {seed}: {shlex.join(flags)}", flush=True)
    log = fit(folder, flags, opt)
    best = str(folder / "model_best.pth.tar")
    model, _, _ = ckpt.load_model(best)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    del model
    start = time.perf_counter()
    metrics = evaluation.evalrank(best, split=opt.split, device=opt.device)
    seconds = time.perf_counter() - start
    result = {"system": system, "seed": seed, "epochs": len(log)}
    result["best_epoch"] = max(log, key=lambda epoch: epoch["rsum"])["epoch"] + 1
    result |= {f"{way}_{name}": metrics[way][name] for way, name in WAYS}
    result |= {"rsum": metrics["rsum"], "parameters": weights}
    result |= {"train_minutes": sum(epoch["seconds"] for epoch in log) / 60}
    result |= {"test_seconds": seconds, "peak_mib": max(epoch["peak_mib"] or 0 for epoch in log)}
    result |= {"flags": shlex.join(flags)}
    with replacing(done) as part:
        Path(part).write_text(json.dumps(result))
    return result


def last_of_each(flags: list[str]) -> str:
    """The flags that take effect: if one is given twice, the last."""
    kept: dict[str, list[str]] = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if flag.startswith("--"):
            kept.pop(name, None)
            kept[name] = [value] if equals else []
        else:
            kept[list(kept)[-1]].append(flag)
    return shlex.join(part for name, values in kept.items() for part in (name, *values))


def table(results: list[dict], opt: argparse.Namespace) -> str:
    """The table in Markdown: one row per system, with means over its seeds."""
    where = machine()
    device = where["gpu"] if opt.device != "cpu" and where["gpu"] else where["cpu"]
    time_given = f"{opt.minutes:g} minutes" if opt.minutes else f"{opt.num_epochs} epochs"
    lines = [
        f"{opt.data_name}, {opt.split} split; {time_given} each; seeds "
        f"{', '.join(map(str, opt.seeds))}; {device}, {where['threads']} threads, torch "
        f"{where['torch']}.",
        "",
        f"All: `{last_of_each([*PROTOCOL.split(), *opt.flags])}`",
        "",
        "| | image to text R@1 / 5 / 10 | text to image R@1 / 5 / 10 | summed recalls | epochs "
        "(best on dev) | parameters | training | test | peak memory of training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for system in opt.systems:
        runs = [result for result in results if result["system"] == system]

        def mean(name: str, form: str = ".1f", runs: list[dict] = runs) -> str:
            return format(statistics.mean(result[name] for result in runs), form)

        total = mean("rsum")
        if len(runs) > 1:
            total += f" (sd {statistics.stdev(result['rsum'] for result in runs):.1f})"
        epochs = ", ".join(f"{result['epochs']} ({result['best_epoch']})" for result in runs)
        recalls = [" / ".join(mean(name) for name in part) for part in (RECALLS[:3], RECALLS[3:])]
        cells = [SYSTEMS[system].compared[0], *recalls, total, epochs]
        cells.append(f"{runs[0]['parameters'] / 1e6:.1f} M")
        cells += [f"{mean('train_minutes')} min", f"{mean('test_seconds', '.0f')} s"]
        cells.append(f"{mean('peak_mib', '.0f')} MiB")
        lines.append(f"| {' | '.join(cells)} |")
    own = [f"{SYSTEMS[s].compared[0]}: `{own_flags(s)}`" for s in opt.systems]
    return "\n".join([*lines, "", *(f"- {line}" for line in own), ""])


def write(results: list[dict], opt: argparse.Namespace) -> None:
    """Write table.md and table.csv of the finished runs."""
    done = argparse.Namespace(**vars(opt))
    done.systems = [s for s in opt.systems if any(result["system"] == s for result in results)]
    (Path(opt.out) / "table.md").write_text(table(results, done))
    with open(Path(opt.out) / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
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
    flags_of = {s: [*PROTOCOL.split(), *own_flags(s).split(), *opt.flags] for s in opt.systems}
    for flags in flags_of.values():  # find wrong flags before hours of training
        options.parse(flags)
    data = prepare(opt)
    results = []
    for seed in opt.seeds:
        for system in opt.systems:
            flags = [*data, "--device", opt.device, "--seed", str(seed), *flags_of[system]]
            results.append(one_run(system, seed, flags, opt))
            write(results, opt)
    print((Path(opt.out) / "table.md").read_text())


if __name__ == "__main__":
    run(main)
