"""Measure a search in two stages, from 1,000 to a million images: what is lost, time, memory.

    python scripts/search_scale.py runs/x/model_best.pth.tar --data_path data --workdir big
    python scripts/search_scale.py ... --sizes 1000 10000 --shortlists 20 100 --queries 200

The queries are captions of the split --split of real images, one caption of each. Around these
images the script grows sets in --workdir: first the real images of train, then mixed ones. A mixed
image takes each of its regions from one of two images of train, and adds up to 30 % of a region of
the other. All sets begin with the same images, and --seed draws the same ones.

Each size is measured in a process of its own. Up to --exhaustive images all pairs are scored too:
what the shortlists lose is measured against that ranking. Writes {workdir}/search_scale.md.

Shapes: N images, Q queries, R regions, F numbers per region.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import first_stage as stage
from data import collate_fn
from searcher import Searcher
from util.arguments import COUNT, FROM_0, Parser
from util.arrays import open_array
from util.cli import InputError, progress, replacing, run
from util.devices import to_device
from util.folders import find_folder
from util.memory import peak_mib
from vocab import read_captions

BLOCK = 1000  # images that are mixed at once
MOST = 0.3  # of the other image's region in a mixed one
KS = 1, 5, 10


# The grown sets


def mixed(train: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Block `number` of mixed images (BLOCK, R, F), of train's (N, R, F)."""
    rng = np.random.default_rng((seed, number))
    n, r, _ = train.shape
    pair = rng.integers(n, size=(BLOCK, 2))
    side = rng.integers(2, size=(BLOCK, r))  # which image of the pair a region is of
    one, other = (np.take_along_axis(pair, x, 1) for x in (side, 1 - side))  # (BLOCK, R)
    x, y = (train[rows, rng.integers(r, size=(BLOCK, r))] for rows in (one, other))
    t = rng.uniform(0, MOST, size=(BLOCK, r, 1)).astype(np.float32)
    return ((1 - t) * x + t * y).astype(np.float16)  # (BLOCK, R, F)


def grown_blocks(real: np.ndarray, train: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The images of all sets, in blocks: real ones, train's, then mixed ones without end."""
    for array in (real, train):
        for start in range(0, len(array), BLOCK):
            yield np.asarray(array[start : start + BLOCK], np.float16)
    in_memory, number = np.array(train, np.float16), 0
    while True:
        yield mixed(in_memory, seed, number)
        number += 1


def grow(folder: str, size: int, real: np.ndarray, train: np.ndarray, seed: int) -> None:
    """Write the features of `size` images to `{folder}/n{size}_ims.npy`, if they are not there."""
    path, made = f"{folder}/n{size}_ims.npy", f"{folder}/n{size}_made.json"
    of = {"real": len(real), "train": len(train), "seed": seed, "shape": list(real.shape[1:])}
    if os.path.isfile(path) and os.path.isfile(made) and json.loads(Path(made).read_text()) == of:
        return
    row = 0
    with replacing(path) as part:
        array = np.lib.format.open_memmap(part, "w+", np.float16, (size, *real.shape[1:]))
        for block in progress(grown_blocks(real, train, seed), f"{size:,} images", size // BLOCK):
            array[row : row + len(block)] = block[: size - row]
            row += len(block)
            if row >= size:
                break
        del array
    Path(made).write_text(json.dumps(of))


# One size


class Job(NamedTuple):
    """What one process measures."""

    opt: argparse.Namespace
    size: int
    sentences: list[str]
    images: list[int]  # the right image of each sentence


def own_memory() -> float:
    """The memory of this process in MiB, without mapped files, whose pages may be dropped."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 2**10


@torch.inference_mode()
def exhaustive(searcher: Searcher, job: Job) -> tuple[np.ndarray, np.ndarray, float]:
    """The rank of each query's image (Q,) among all, the best ten (Q, 10), and seconds per query.

    The images are encoded block by block, and each block is scored with all queries at once.
    """
    start, reader = time.perf_counter(), searcher.exact
    batch = collate_fn([reader.sentence(text) for text in job.sentences])
    captions = reader.model.encode_captions(to_device(batch, reader.device))
    scores = torch.empty(searcher.n_images, len(job.images))  # (N, Q)
    blocks = range(0, searcher.n_images, stage.BLOCK)
    for first in progress(blocks, "scoring all pairs", len(blocks)):
        some = range(first, min(first + stage.BLOCK, searcher.n_images))
        items = [reader.dataset.image_item(image) for image in some]
        for places, encoding in stage.encoded_groups(
            reader.model.encode_images, items, reader.device
        ):
            found = reader.model.similarity(encoding, captions)  # (b, Q)
            scores[first + torch.tensor(places)] = found.cpu()
    seconds = (time.perf_counter() - start) / len(job.images)
    own = scores[torch.tensor(job.images), torch.arange(len(job.images))]  # (Q,)
    ranks = (scores >= own).sum(0) - 1  # (Q,)
    best = scores.topk(min(10, len(scores)), 0).indices.mT  # (Q, 10)
    return ranks.numpy(), best.numpy(), seconds


def two_stages(searcher: Searcher, job: Job, shortlist: int) -> dict:
    """The ranks, the best ten, and the milliseconds of each query with one length of shortlist."""
    ranks, best, times, memory = [], [], [], 0.0
    shortlist = min(shortlist, searcher.n_images)
    for sentence, image in zip(job.sentences, job.images, strict=True):
        found = searcher.images_for(sentence, shortlist, shortlist)
        ranks.append(found.places.index(image) if image in found.places else 10**9)
        best.append(found.places[:10])
        times.append(found.milliseconds)
        memory = max(memory, own_memory())
    medians = {name: statistics.median(x[name] for x in times) for name in times[0]}
    medians["all"] = statistics.median(sum(x.values()) for x in times)
    slow = float(np.percentile([sum(x.values()) for x in times], 95))
    found = {"ranks": np.array(ranks), "best": best, "ms": medians, "p95": slow}
    return found | {"memory": memory, "with_files": peak_mib(torch.device("cpu"))}


def measure(job: Job) -> dict:
    """All figures of one size."""
    opt, start = job.opt, time.perf_counter()
    torch.set_num_threads(opt.threads)
    workdir = opt.workdir
    searcher = Searcher(
        opt.checkpoint,
        *os.path.split(workdir),
        f"n{job.size}",
        opt.first_stage,
        opt.vocab_path,
        "cpu",
        os.path.join(workdir, "vectors"),
    )
    index = searcher.image_index
    found = {"size": job.size, "ready": time.perf_counter() - start, "index": index.about}
    searcher.images_for(job.sentences[0])  # the first query loads libraries
    found["rows"] = [(k, two_stages(searcher, job, k)) for k in opt.shortlists]
    if job.size <= opt.exhaustive:
        found["exhaustive"] = exhaustive(searcher, job)
    return found


# The table


def recalls(ranks: np.ndarray) -> list[float]:
    return [100 * float((ranks < k).mean()) for k in KS]


def table_rows(found: dict) -> Iterator[str]:
    """The lines of one size in the table."""
    exact, size = found.get("exhaustive"), f"{found['size']:,}"
    if exact:
        numbers = " / ".join(f"{x:.1f}" for x in recalls(exact[0]))
        yield f"| {size} | all | {numbers} | | | {1000 * exact[2]:,.0f}, in one batch | | |"
    for k, row in found["rows"]:
        own = recalls(row["ranks"])
        numbers, lost, same = " / ".join(f"{x:.1f}" for x in own), "", ""
        if exact:
            pairs = zip(own, recalls(exact[0]), strict=True)
            lost = " / ".join(f"{a - b:+.1f}" for a, b in pairs)
            pairs = zip(row["best"], exact[1].tolist(), strict=True)
            same = f"{100 * statistics.mean(len({*a} & {*b}) / len(b) for a, b in pairs):.1f} %"
        ms = row["ms"]
        times = f"{ms['all']:.0f} ({ms['encode']:.0f} + {ms['first']:.1f} + {ms['exact']:.0f})"
        memory = f"{row['memory']:,.0f}"
        yield (
            f"| {size} | {k} | {numbers} | {lost} | {same} | {times} | {row['p95']:.0f} | "
            f"{memory} |"
        )


def write_table(path: str, opt: argparse.Namespace, results: list[dict], about: str) -> None:
    """Write the table in Markdown, and print it."""
    lines = [
        about,
        "",
        "| images | shortlist | R@1 / 5 / 10 | less than all | same top 10 | ms, median "
        "(query + first + exact) | ms, 95 % | own memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
        *(line for found in results for line in table_rows(found)),
        "",
        *(
            f"- {found['size']:,} images: {found['index']}; ready after {found['ready']:.1f} s."
            for found in results
        ),
    ]
    text = "\n".join(lines) + "\n"
    with replacing(path) as part:
        Path(part).write_text(text, encoding="utf-8")
    print(text)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=os.path.expanduser)
    parser.add_argument("--first_stage", metavar="CHECKPOINT", help="as in search.py")
    parser.add_argument("--vocab_path", help="as in search.py")
    parser.add_argument("--data_path", default="data")
    parser.add_argument("--data_name", default="flickr8k_precomp")
    parser.add_argument("--split", default="dev", help="of the queries and their images")
    parser.add_argument("--workdir", required=True, help="for the grown sets: 2 GB for 100,000")
    parser.add_argument("--sizes", type=COUNT, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--shortlists", type=COUNT, nargs="+", default=[20, 100, 500])
    parser.add_argument("--queries", type=COUNT, default=500)
    parser.add_argument(
        "--exhaustive", type=COUNT, default=100_000, help="the largest set that is scored whole"
    )
    parser.add_argument("--threads", type=COUNT, default=2)
    parser.add_argument("--seed", type=FROM_0, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    opt = build_parser().parse_args(argv)
    opt.workdir = os.path.abspath(os.path.expanduser(opt.workdir))
    folder = find_folder(opt.data_path, opt.data_name)
    real, train = (open_array(f"{folder}/{x}_ims.npy", 3) for x in (opt.split, "train"))
    captions = read_captions(f"{folder}/{opt.split}_caps.txt")
    n, k = len(real), len(captions) // len(real)
    if k * n != len(captions) or min(opt.sizes) < n:
        raise InputError(
            f"{folder}: {n} images and {len(captions)} captions of {opt.split}; expected as many "
            "captions for each image, and --sizes of at least the images"
        )
    count = min(opt.queries, n)
    images = [q * n // count for q in range(count)]
    sentences = [captions[image * k + image % k] for image in images]
    os.makedirs(opt.workdir, exist_ok=True)
    results = []
    for size in sorted(opt.sizes):
        grow(opt.workdir, size, real, train, opt.seed)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as pool:  # each size starts with empty memory
            results.append(pool.submit(measure, Job(opt, size, sentences, images)).result())
        about = (
            f"{count} captions of {n:,} real images of {opt.data_name}, {opt.split}; then up to "
            f"{len(train):,} real images of train; all others are mixed of train's. "
            f"{os.path.basename(os.path.dirname(opt.checkpoint))}/"
            f"{os.path.basename(opt.checkpoint)}, --threads {opt.threads}."
        )
        write_table(os.path.join(opt.workdir, "search_scale.md"), opt, results, about)


if __name__ == "__main__":
    run(main)
