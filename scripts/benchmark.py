"""What training and evaluation cost here: this project beside the usual loop.

    python scripts/benchmark.py              # the paper's size; some 25 minutes
    python scripts/benchmark.py --model gsmn # scoring, step and memory of another system
    python scripts/benchmark.py --quick      # small, a minute: a look, not a figure to quote
    python scripts/benchmark.py --json       # one JSON object on stdout and nothing else
    python scripts/benchmark.py --plot a.png # the growth with the number of images, too

Everything compared runs in one process, in turns, so that a busy machine slows all alike; times are
medians. The usual loop is that of tests/reference.py, with which the tests compare the scores: one
caption after the other, attended vectors built, every pair kept for the backward pass (CHAN: all
captions at once). A system without such a loop is compared with the floor only: its encoders and
one matrix product. The step of this project is timed twice, without and with --grad_checkpointing;
the usual one is without. Peak memory is that of a process of its own, its Python and torch
included.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint as ckpt
import evaluation
import options
import systems
from attention import xattn_score
from data import PrecompDataset, collate_fn
from scripts.benchmark_tables import plot, print_tables
from scripts.benchmark_work import (
    LOOPS,
    PARTS_OF_BATCH,
    REGIONS,
    WORDS,
    Work,
    size_flags,
    write_split,
)
from system import System
from tests.reference import caption_loop
from util.arguments import Parser
from util.cli import InputError, progress, run
from util.devices import pick_device, to_device
from util.memory import peak_mib
from util.norms import l2norm

PAPER = {"img_dim": 2048, "embed_size": 1024, "word_dim": 300, "images": 1000}
QUICK = {"img_dim": 256, "embed_size": 256, "word_dim": 64, "batch": 32, "images": 60}
GROWTH, GROWTH_CAPTIONS = (250, 500, 1000, 2000, 5000), 250
PARTS = ("scoring", "step", "memory")
MORE_PARTS = {"scan": ("evalrank", "growth")}  # parts that only some systems have


def say(*words) -> None:
    print(*words, file=sys.stderr, flush=True)


def machine() -> dict:
    """What the figures were taken on."""
    cpu = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        names = [x.partition(":")[2].strip() for x in info if x.startswith("model name")]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def medians(jobs: dict[str, Callable], repeats: int, again: bool = True) -> dict[str, float]:
    """Median seconds of each job, in turns; with `again`, of a run right after one not timed.

    So each job finds memory and caches as in a loop of its own, not as the one before it left them.
    """
    times = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            for timed in (False, True) if again else (True,):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                start = time.perf_counter()
                job()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if timed:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def published_evalrank(path: str, data_path: str, batch_size: int, device: torch.device) -> dict:
    """The published procedure: images encoded once a caption, blocks of 128, caption by caption."""
    model, vocab, opt = ckpt.load_model(path, device=device)
    model.eval()
    dataset = PrecompDataset(os.path.join(data_path, opt.data_name), "test", vocab, opt.img_dim)
    regions, words, lengths = [], [], []
    longest = int(dataset.lengths.max())
    for some in torch.arange(len(dataset)).split(batch_size):
        batch = collate_fn([dataset[k] for k in some.tolist()])
        images, captions = model(to_device(batch, device))
        regions.append(images["regions"])
        pad = longest - captions["words"].size(1)
        words.append(torch.nn.functional.pad(captions["words"], (0, 0, 0, pad)))
        lengths += captions["lengths"].tolist()
    k = dataset.n_captions // dataset.n_images
    regions, words = torch.cat(regions)[::k], torch.cat(words)
    scores = np.zeros((len(regions), len(words)), np.float32)
    config = model.config
    numbers = config.raw_feature_norm, config.agg_func, config.lambda_softmax, config.lambda_lse
    for i in range(0, len(regions), 128):
        for c in progress(range(0, len(words), 128), "the usual loop"):
            block = words[c : c + 128], lengths[c : c + 128]
            part = caption_loop(opt.cross_attn, regions[i : i + 128], *block, *numbers)
            scores[i : i + 128, c : c + 128] = part.cpu().numpy()
    return evaluation.retrieval_metrics(scores)


def time_evalrank(size: dict, system: System, way: str, device: torch.device, repeats: int) -> dict:
    """evalrank end to end, files and encoding included; the published procedure runs once."""
    with tempfile.TemporaryDirectory() as folder:
        vocab = write_split(Path(folder) / "noise_precomp", size["images"], size["img_dim"])
        flags = f"--data_name noise_precomp {system.benchmarks[way]} {size_flags(size)}"
        opt = options.parse(flags.split())
        torch.manual_seed(0)
        model = ckpt.build_model(opt, len(vocab))
        state = {"epoch": 0, "model": ckpt.state_dicts(model, opt), "opt": opt}
        ckpt.save(state | {"best_rsum": 0.0, "vocab": vocab.state_dict()}, folder, "x.pth.tar")
        del model, state
        path = os.path.join(folder, "x.pth.tar")

        def ours() -> dict:
            with contextlib.redirect_stdout(io.StringIO()):
                return evaluation.evalrank(path, folder, "test", device=device)

        metrics = []
        seconds = medians({"ours": lambda: metrics.append(ours())}, repeats, again=False)["ours"]
        start = time.perf_counter()
        published = published_evalrank(path, folder, size["batch"], device)
        loop = time.perf_counter() - start
        metrics = metrics[-1]
    apart = max(
        abs(metrics[way][f"r{k}"] - published[way][f"r{k}"])
        for way in ("i2t", "t2i")
        for k in (1, 5, 10)
    )
    if apart > 100 / size["images"]:  # one near-tie may fall the other way
        raise AssertionError(f"evalrank and the published procedure differ by {apart} points")
    return {"evalrank_s": seconds, "evalrank_loop_s": loop, "evalrank_speedup": loop / seconds}


def peak_memory(name: str, system: System, way: str, quick: bool, device: str) -> float:
    """Peak memory, in MiB, of a process that does one job."""
    command = [sys.executable, __file__, "--peak", name, "--model", system.name, "--way", way]
    command += ["--device", device] + ["--quick"] * quick
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_peak(name: str, size: dict, system: System, way: str, device: torch.device) -> None:
    """The process that peak_memory starts."""
    if name.startswith("growth"):
        job = growth_job(int(name.removeprefix("growth")), size, system, way, device)
    else:
        job = getattr(Work(size, system, way, device), name)
    for _ in range(1 if name.startswith("growth") else 3):
        job()
    print(peak_mib(device) or "nan")


def growth_job(
    n: int, size: dict, system: System, way: str, device: torch.device
) -> Callable[[], Tensor]:
    """Scoring of n encoded images with GROWTH_CAPTIONS captions."""
    torch.manual_seed(0)
    config = Work(size | {"batch": 2}, system, way, device).model.config
    regions = l2norm(torch.randn(n, REGIONS, size["embed_size"], device=device), -1)
    lengths = torch.randint(WORDS[0], WORDS[1] + 1, (GROWTH_CAPTIONS,))
    words = torch.randn(GROWTH_CAPTIONS, int(lengths.max()), size["embed_size"], device=device)
    words = l2norm(words, -1)

    @torch.no_grad()
    def job() -> Tensor:
        return xattn_score(regions, words, lengths, config)

    return job


def measure(
    opt: argparse.Namespace, size: dict, system: System, way: str, device: torch.device
) -> dict:
    """All figures of one way."""
    result = {}

    def told(part: dict) -> dict:
        """A part of the result, printed as soon as it is there."""
        say(f"{way}:", ", ".join(f"{key} {value:.4g}" for key, value in part.items()))
        return part

    if {"scoring", "step"} & set(opt.only):
        work = Work(size, system, way, device)
        result["dots"] = len(work.rows[0]) * len(work.rows[1])
        if work.usual:
            apart = (work.score_ours() - work.score_loop()).abs().max().item()
            if apart > 1e-5:
                raise AssertionError(f"the scores differ by {apart}")
            result["score_max_difference"] = apart
    usual = ("loop",) if LOOPS.get(system.name) else ()
    if "scoring" in opt.only:
        jobs = {name: getattr(work, f"score_{name}") for name in ("ours", *usual)}
        t = medians(jobs | {"gemm": work.gemm}, 3 * opt.repeats)  # short, so more of them
        result |= told({f"score_{name}_s": seconds for name, seconds in t.items()})
        result["score_vs_gemm"] = t["ours"] / t["gemm"]
        if usual:
            result["score_speedup"] = t["loop"] / t["ours"]
    if "step" in opt.only:
        jobs = {name: getattr(work, f"step_{name}") for name in ("ours", "parts", *usual)}
        t = medians(jobs | {"encoders": work.encoders, "gemm": work.gemm}, opt.repeats)
        result |= told({f"step_{name}_s": seconds for name, seconds in t.items()})
        result["step_vs_floor"] = t["ours"] / (t["encoders"] + t["gemm"])
        result["step_parts_vs_floor"] = t["parts"] / (t["encoders"] + t["gemm"])
        if usual:
            result["step_speedup"] = t["loop"] / t["ours"]
    if "memory" in opt.only:
        names = ["score_ours", "step_ours", "step_parts", "encoders"]
        names += [f"{job}_{name}" for job in ("score", "step") for name in usual]
        peaks = {f"{x}_mib": peak_memory(x, system, way, opt.quick, opt.device) for x in names}
        result |= told(peaks)
        for name in ("step", "step_parts") if usual else ():
            own = peaks["step_ours_mib" if name == "step" else "step_parts_mib"]
            result[f"{name}_memory_ratio"] = peaks["step_loop_mib"] / own
    if "evalrank" in opt.only:
        result |= told(time_evalrank(size, system, way, device, opt.repeats))
    if "growth" in opt.only:
        counts = [k for k in GROWTH if k <= 5 * size["images"]]
        result["growth"] = [told(growth_row(opt, n, size, system, way, device)) for n in counts]
    return result


def growth_row(
    opt: argparse.Namespace, n: int, size: dict, system: System, way: str, device: torch.device
) -> dict:
    """Time and memory of growth_job."""
    job = growth_job(n, size, system, way, device)
    row = {"images": n, "captions": GROWTH_CAPTIONS}
    row["seconds"] = medians({"job": job}, opt.repeats)["job"]
    row["mib"] = peak_memory(f"growth{n}", system, way, opt.quick, opt.device)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measured = [name for name, system in systems.SYSTEMS.items() if system.benchmarks]
    parser.add_argument("--model", default="scan", choices=measured, help="the system")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="PATH", help="write a picture (needs matplotlib)")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing, at least 5")
    every = [*PARTS, *(part for parts in MORE_PARTS.values() for part in parts)]
    parser.add_argument("--only", nargs="+", choices=every, help="parts to measure")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    opt = parser.parse_args(argv)
    if opt.repeats < 5:
        raise InputError(f"--repeats {opt.repeats}: medians of fewer than 5 say little")
    if opt.plot and not importlib.util.find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    system = systems.of(opt)
    parts = PARTS + MORE_PARTS.get(system.name, ())
    opt.only = opt.only or parts
    if not set(opt.only) <= set(parts):
        raise InputError(f"--only: of {opt.model} there are {', '.join(parts)}")
    size = QUICK if opt.quick else PAPER | {"batch": system.benchmark_batch}
    device = pick_device(opt.device)
    if opt.peak:
        print_peak(opt.peak, size, system, opt.way, device)
        return
    result = {"machine": machine(), "size": size | {"regions": REGIONS, "words": WORDS}}
    result["model"], result["ways"] = system.name, list(system.benchmarks)
    for way in system.benchmarks:
        result[way] = measure(opt, size, system, way, device)
    if opt.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result, PARTS_OF_BATCH)
    if opt.plot:
        plot(result, opt.plot, GROWTH_CAPTIONS)


if __name__ == "__main__":
    run(main)
