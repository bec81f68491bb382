"""What training and evaluation cost here: ours beside the usual loop.

    python scripts/benchmark.py              # the paper's size; some 25 minutes
    python scripts/benchmark.py --model gsmn # scoring, step and memory of GSMN; or chan
    python scripts/benchmark.py --quick      # small, a minute: a look, not a figure to quote
    python scripts/benchmark.py --json       # one JSON object on stdout and nothing else
    python scripts/benchmark.py --plot a.png # the growth with the number of images, too

Everything compared runs in one process, in turns, so that a busy machine slows all alike; times are
medians. The usual loop is that of tests/reference.py (what the tests compare the scores with): one
caption after the other, attended vectors built, every pair kept for the backward pass (CHAN: all
captions at once), the GRU called as a whole. Our step is timed twice, without and with
--grad_checkpointing; the usual one is without. Peak memory is that of a process of its own, its
Python and torch included.
"""

import argparse
import contextlib
import functools
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
from unittest import mock

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint as ckpt
import evaluation
import options
from chan import CHAN
from data import PrecompDataset, collate_fn
from gsmn import GSMN
from model import SCAN, ContrastiveLoss, l2norm, xattn_score
from tests.reference import caption_loop, chan_plain, gsmn_caption_loop
from util.cli import InputError, progress, run
from util.memory import peak_mib
from vocab import SPECIAL, Vocabulary

PAPER = {"img_dim": 2048, "embed_size": 1024, "word_dim": 300, "batch": 128, "images": 1000}
QUICK = {"img_dim": 256, "embed_size": 256, "word_dim": 64, "batch": 32, "images": 60}
REGIONS, WORDS, N_VOCAB = 36, (9, 21), 8481
GROWTH, GROWTH_CAPTIONS = (250, 500, 1000, 2000, 5000), 250
LAMBDAS = {"t2i": (9.0, 6.0), "i2t": (4.0, 5.0)}  # of softmax and LogSumExp, as in the paper
PARTS = ("scoring", "step", "memory", "evalrank", "growth")
# What is measured of a system, each in turn.
WAYS = {"scan": ("t2i", "i2t"), "gsmn": ("dense",), "chan": ("VHA",)}
BATCH = {"dense": 64, "VHA": 384}  # as published; else 128
PARTS_OF_BATCH = 12  # where a step is timed with --grad_checkpointing
USUAL_GRU = mock.patch("model.packed_gru", lambda rnn, packed: rnn(packed)[0].data)


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


class Work:
    """One batch at one size and way, and what is timed on it."""

    def __init__(self, size: dict, way: str, device: torch.device):
        torch.manual_seed(0)
        self.way, n = way, size["batch"]
        sizes = {name: size[name] for name in ("img_dim", "word_dim", "embed_size")}
        if way in LAMBDAS:
            lambdas = dict(zip(("lambda_softmax", "lambda_lse"), LAMBDAS[way], strict=True))
            model = SCAN(N_VOCAB, **sizes, bi_gru=True, cross_attn=way, **lambdas)
        elif way == "VHA":
            model = CHAN(N_VOCAB, **sizes, precomp_enc_type="selfattention")
        else:
            model = GSMN(N_VOCAB, **sizes, bi_gru=True, lambda_softmax=20.0)
        self.model = model.to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-4, fused=True)
        lengths = torch.randint(WORDS[0], WORDS[1] + 1, (n,))
        captions = torch.randint(len(SPECIAL), N_VOCAB, (n, int(lengths.max())))
        captions[torch.arange(captions.size(1)) >= lengths[:, None]] = 0
        images = torch.randn(n, REGIONS, size["img_dim"])
        batch = {"images": images, "captions": captions, "lengths": lengths}
        if way == "dense":
            batch["boxes"] = torch.rand(n, REGIONS, 2, 2).sort(2).values.flatten(2)
        self.batch = evaluation.to_device(batch, device)

    @functools.cached_property
    def encoded(self) -> tuple[dict, dict]:
        """The batch's images and captions, for what is timed without the encoders."""
        with torch.no_grad():
            return self.model(self.batch)

    @functools.cached_property
    def words(self) -> Tensor:
        """Without padding: (T, D)."""
        words, lengths = self.encoded[1]["words"], self.batch["lengths"].tolist()
        return torch.cat([x[:w] for x, w in zip(words, lengths, strict=True)])  # (T, D)

    def loop(self, images: dict, captions: dict) -> Tensor:
        how = self.model.how
        if self.way == "dense":
            return gsmn_caption_loop(self.model, images, captions, self.batch["boxes"])
        if self.way == "VHA":
            parts = images["regions"], captions["words"], captions["lengths"]
            return chan_plain(*parts, how.belta)
        lengths = captions["lengths"].tolist()
        parts = (images["regions"], captions["words"], lengths, how.raw_feature_norm, how.agg_func)
        return caption_loop(self.way, *parts, how.lambda_softmax, how.lambda_lse)

    @torch.no_grad()
    def score_ours(self) -> Tensor:
        return self.model.similarity(*self.encoded)

    @torch.no_grad()
    def score_loop(self) -> Tensor:
        return self.loop(*self.encoded)

    @torch.no_grad()
    def gemm(self) -> Tensor:
        """The product that every score needs, without padding: the floor of scoring."""
        return self.encoded[0]["regions"].flatten(0, 1) @ self.words.mT

    def step(self, similarity: Callable[[dict, dict], Tensor]) -> float:
        """A whole training step with hardest negatives."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = ContrastiveLoss(0.2, max_violation=True)(similarity(*self.model(self.batch)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        return loss.item()

    def step_ours(self) -> float:
        return self.step(self.model.similarity)

    @USUAL_GRU
    def step_loop(self) -> float:
        return self.step(self.loop)

    def step_parts(self) -> float:
        """Ours with --grad_checkpointing."""
        self.model.grad_checkpointing = PARTS_OF_BATCH
        loss = self.step_ours()
        self.model.grad_checkpointing = 0
        return loss

    def encoders(self) -> None:
        """Forward and backward of the encoders alone."""
        self.optimizer.zero_grad(set_to_none=True)
        images, captions = self.model(self.batch)
        outputs = images["regions"], captions["words"]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    @USUAL_GRU
    def encoders_usual(self) -> None:
        self.encoders()


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


def write_split(folder: Path, n: int, img_dim: int) -> Vocabulary:
    """n images of noise with five captions each, as a `test` split; and their vocabulary."""
    rng = np.random.default_rng(0)
    vocab = Vocabulary("one_sentence")
    for word in [*SPECIAL, *(f"w{k}" for k in range(N_VOCAB - len(SPECIAL)))]:
        vocab.add_word(word)
    folder.mkdir(parents=True)
    np.save(folder / "test_ims.npy", rng.normal(size=(n, REGIONS, img_dim)).astype(np.float32))
    with open(folder / "test_caps.txt", "w") as file:
        for _ in range(5 * n):
            length = rng.integers(WORDS[0] - 2, WORDS[1] - 1)  # <start> and <end> come on top
            words = rng.integers(N_VOCAB - len(SPECIAL), size=length)
            file.write(" ".join(f"w{k}" for k in words) + "\n")
    return vocab


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
        images, captions = model(evaluation.to_device(batch, device))
        regions.append(images["regions"])
        pad = longest - captions["words"].size(1)
        words.append(torch.nn.functional.pad(captions["words"], (0, 0, 0, pad)))
        lengths += captions["lengths"].tolist()
    regions, words = torch.cat(regions)[:: dataset.k], torch.cat(words)
    scores = np.zeros((len(regions), len(words)), np.float32)
    how = model.how
    numbers = how.raw_feature_norm, how.agg_func, how.lambda_softmax, how.lambda_lse
    for i in range(0, len(regions), 128):
        for c in progress(range(0, len(words), 128), "the usual loop"):
            block = words[c : c + 128], lengths[c : c + 128]
            part = caption_loop(opt.cross_attn, regions[i : i + 128], *block, *numbers)
            scores[i : i + 128, c : c + 128] = part.cpu().numpy()
    return evaluation.retrieval_metrics(scores)


def time_evalrank(size: dict, direction: str, device: torch.device, repeats: int) -> dict:
    """evalrank end to end, files and encoding included; the published procedure runs once."""
    lambda_softmax, lambda_lse = LAMBDAS[direction]
    with tempfile.TemporaryDirectory() as folder:
        vocab = write_split(Path(folder) / "noise_precomp", size["images"], size["img_dim"])
        flags = f"--data_name noise_precomp --cross_attn {direction} --bi_gru "
        flags += f"--lambda_softmax {lambda_softmax} --lambda_lse {lambda_lse} "
        flags += " ".join(f"--{k} {size[k]}" for k in ("img_dim", "embed_size", "word_dim"))
        opt = options.parse(flags.split())
        torch.manual_seed(0)
        model = ckpt.build_model(opt, len(vocab))
        state = {"epoch": 0, "model": ckpt.state_dicts(model, "scan"), "opt": opt}
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


def peak_memory(name: str, way: str, quick: bool, device: str) -> float:
    """Peak memory, in MiB, of a process that does one job."""
    command = [sys.executable, __file__, "--peak", name, "--way", way]
    command += ["--device", device] + ["--quick"] * quick
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_peak(name: str, size: dict, way: str, device: torch.device) -> None:
    """What peak_memory starts."""
    if name.startswith("growth"):
        job = growth_job(int(name.removeprefix("growth")), size, way, device)
    else:
        job = getattr(Work(size, way, device), name)
    for _ in range(1 if name.startswith("growth") else 3):
        job()
    print(peak_mib(device) or "nan")


def growth_job(n: int, size: dict, direction: str, device: torch.device) -> Callable[[], Tensor]:
    """Scoring of n encoded images with GROWTH_CAPTIONS captions."""
    torch.manual_seed(0)
    how = Work(size | {"batch": 2}, direction, device).model.how
    regions = l2norm(torch.randn(n, REGIONS, size["embed_size"], device=device), -1)
    lengths = torch.randint(WORDS[0], WORDS[1] + 1, (GROWTH_CAPTIONS,))
    words = torch.randn(GROWTH_CAPTIONS, int(lengths.max()), size["embed_size"], device=device)
    words = l2norm(words, -1)

    @torch.no_grad()
    def job() -> Tensor:
        return xattn_score(regions, words, lengths, how)

    return job


def measure(opt: argparse.Namespace, size: dict, way: str, device: torch.device) -> dict:
    """All figures of one way."""
    result = {}

    def told(part: dict) -> dict:
        """A part of the result, said as soon as it is there."""
        say(f"{way}:", ", ".join(f"{key} {value:.4g}" for key, value in part.items()))
        return part

    if {"scoring", "step"} & set(opt.only):
        work = Work(size, way, device)
        apart = (work.score_ours() - work.score_loop()).abs().max().item()
        if apart > 1e-5:
            raise AssertionError(f"the scores differ by {apart}")
        result["score_max_difference"] = apart
        result["dots"] = size["batch"] * REGIONS * len(work.words)
    if "scoring" in opt.only:
        jobs = {"ours": work.score_ours, "loop": work.score_loop, "gemm": work.gemm}
        t = medians(jobs, 3 * opt.repeats)  # short, so more of them
        result |= told({f"score_{name}_s": seconds for name, seconds in t.items()})
        result["score_speedup"] = t["loop"] / t["ours"]
        result["score_vs_gemm"] = t["ours"] / t["gemm"]
    if "step" in opt.only:
        jobs = {"ours": work.step_ours, "parts": work.step_parts}
        jobs |= {"loop": work.step_loop, "encoders": work.encoders}
        jobs |= {"encoders_usual": work.encoders_usual}
        t = medians(jobs | {"gemm": work.gemm}, opt.repeats)
        result |= told({f"step_{name}_s": seconds for name, seconds in t.items()})
        result["step_speedup"] = t["loop"] / t["ours"]
        result["encoders_speedup"] = t["encoders_usual"] / t["encoders"]
        result["step_vs_floor"] = t["ours"] / (t["encoders"] + t["gemm"])
        result["step_parts_vs_floor"] = t["parts"] / (t["encoders"] + t["gemm"])
    if "memory" in opt.only:
        names = ("score_ours", "score_loop", "step_ours", "step_parts", "step_loop")
        names += ("encoders", "encoders_usual")
        peaks = {f"{x}_mib": peak_memory(x, way, opt.quick, opt.device) for x in names}
        result |= told(peaks)
        result["step_memory_ratio"] = peaks["step_loop_mib"] / peaks["step_ours_mib"]
        result["step_parts_memory_ratio"] = peaks["step_loop_mib"] / peaks["step_parts_mib"]
    if "evalrank" in opt.only:
        result |= told(time_evalrank(size, way, device, opt.repeats))
    if "growth" in opt.only:
        result["growth"] = []
        for n in [k for k in GROWTH if k <= 5 * size["images"]]:
            job = growth_job(n, size, way, device)
            row = {"images": n, "captions": GROWTH_CAPTIONS}
            row["seconds"] = medians({"job": job}, opt.repeats)["job"]
            row["mib"] = peak_memory(f"growth{n}", way, opt.quick, opt.device)
            result["growth"].append(told(row))
    return result


ROWS = [
    ("scoring, ours / usual loop", "score_speedup", "{:.1f} x faster"),
    ("scoring, ours / bare matrix product", "score_vs_gemm", "{:.2f}"),
    ("training step, ours / usual loop", "step_speedup", "{:.1f} x faster"),
    ("training step, ours / floor", "step_vs_floor", "{:.2f}"),
    ("its encoders, with the usual GRU / ours", "encoders_speedup", "{:.1f} x faster"),
    ("peak memory of a step, usual loop / ours", "step_memory_ratio", "{:.1f} x less"),
    (f"step with --grad_checkpointing {PARTS_OF_BATCH} / floor", "step_parts_vs_floor", "{:.2f}"),
    ("its peak memory, usual loop / ours", "step_parts_memory_ratio", "{:.1f} x less"),
    ("evalrank, ours / published procedure", "evalrank_speedup", "{:.1f} x faster"),
]
AIMS = {
    "scan": {
        "score_speedup": "10 x faster",
        "score_vs_gemm": "1.15, 1.25",
        "step_speedup": "4 x faster",
        "step_vs_floor": "1.25",
        "step_memory_ratio": "2.5 x less",
        "evalrank_speedup": "10 x faster",
    },
    "gsmn": {"step_speedup": "5 x faster", "step_memory_ratio": "3 x less"},
    "chan": {
        "step_vs_floor": "1.25",
        "step_memory_ratio": "2.5 x less",
        "step_parts_vs_floor": "1.25",
        "step_parts_memory_ratio": "2.5 x less",
    },
}


def print_tables(result: dict) -> None:
    """The figures, for people."""
    here = result["machine"]
    print(
        f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads, "
        f"{here['memory_gib']} GiB; GPU: {here['gpu']}; torch {here['torch']}"
    )
    print(f"size: {result['size']}\n")
    ways = WAYS[result["model"]]
    print(f"| | {' | '.join(ways)} | aim |\n|---|{'---|' * len(ways)}---|")
    for title, key, form in ROWS:
        cells = [form.format(result[w][key]) if key in result[w] else "-" for w in ways]
        print(f"| {title} | {' | '.join(cells)} | {AIMS[result['model']].get(key, '-')} |")
    print(f"\n| seconds (median), MiB (peak) | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for key in result[ways[0]]:
        if key.endswith(("_s", "_mib")):
            print(f"| {key} | {' | '.join(f'{result[w][key]:.4g}' for w in ways)} |")
    if "growth" in result[ways[0]]:
        print("\n| images x captions | t2i s | MiB | i2t s | MiB |\n|---|---|---|---|---|")
        for rows in zip(*(result[w]["growth"] for w in ways), strict=True):
            cells = [f"{x:.4g}" for row in rows for x in (row["seconds"], row["mib"])]
            print(f"| {rows[0]['images']} x {rows[0]['captions']} | {' | '.join(cells)} |")


def plot(result: dict, path: str) -> None:
    """Times beside each other, and the growth with the number of images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    bars = [
        ("score_gemm_s", "bare product"),
        ("score_ours_s", "scoring"),
        ("score_loop_s", "usual loop"),
        ("step_encoders_s", "encoders"),
        ("step_ours_s", "step"),
        ("step_loop_s", "step, usual loop"),
    ]
    ways = WAYS[result["model"]]
    bars = [(key, name) for key, name in bars if key in result[ways[0]]]
    for at, way in enumerate(ways):
        shift = 0.4 * (at - (len(ways) - 1) / 2)
        heights = [result[way][key] for key, _ in bars]
        left.bar([k + shift for k in range(len(bars))], heights, 0.4, label=way)
        rows = result[way].get("growth", [])
        right.plot([r["images"] for r in rows], [r["seconds"] for r in rows], "o-", label=way)
    left.set_xticks(range(len(bars)), [name for _, name in bars], rotation=20)
    left.set(yscale="log", ylabel="seconds", title=f"batch {result['size']['batch']}")
    right.set(xlabel="images", ylabel="seconds", title=f"scoring with {GROWTH_CAPTIONS} captions")
    for axes in (left, right):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="scan", choices=WAYS, help="the system")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="PATH", help="write a picture (needs matplotlib)")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing, at least 5")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    opt = parser.parse_args(argv)
    if opt.repeats < 5:
        raise InputError(f"--repeats {opt.repeats}: medians of fewer than 5 say little")
    if opt.plot and not importlib.util.find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    parts = PARTS if opt.model == "scan" else PARTS[:3]
    opt.only = opt.only or parts
    if not set(opt.only) <= set(parts):
        raise InputError(f"--only: of {opt.model} there are {', '.join(parts)}")
    size = QUICK if opt.quick else PAPER
    batch = BATCH.get(opt.way or WAYS[opt.model][0])
    if batch and not opt.quick:
        size = size | {"batch": batch}
    device = evaluation.pick_device(opt.device)
    if opt.peak:
        print_peak(opt.peak, size, opt.way, device)
        return
    result = {"machine": machine(), "size": size | {"regions": REGIONS, "words": WORDS}}
    result["model"] = opt.model
    for way in WAYS[opt.model]:
        result[way] = measure(opt, size, way, device)
    if opt.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result)
    if opt.plot:
        plot(result, opt.plot)


if __name__ == "__main__":
    run(main)
