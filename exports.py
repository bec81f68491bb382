"""Figures for other tools: JSON, CSV, and the run and qrels files of TREC.

docs/evaluation.md shows all of them. Shapes: N images, M captions, P right pairs.
"""

import contextlib
import csv
import datetime
import hashlib
import io
import math
import os
import platform
from collections.abc import Iterator, Sequence

import numpy as np
import torch

import checkpoint as ckpt
import intervals
import systems
from metrics import METRICS
from ranking import Ranking
from util.cli import InputError, progress, replacing
from util.fingerprint import file_hash, fingerprint_of, sampled_rows
from util.git import commit_of
from util.json_file import read_json

CONFIDENCE = 0.95
WAYS = "i2t", "t2i"
# The median of whole ranks has no useful interval.
FIGURES = [[name] if name == "medr" else [name, f"{name}_low", f"{name}_high"] for name in METRICS]
# How text files are read and written: a file that is read stays the same, byte by byte.
AS_IT_IS = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
COLUMNS = "date source split images captions fold direction".split() + sum(FIGURES, [])
SECOND = "Q" + "0"  # the second column of a run; in one piece, it would be the id of a quirk
TOP = 100  # candidates of each query in a run
STEP, LEAST = 2.0**-22, 1e-30  # between scores of a run: two steps of float32; of scores near 0
BLOCK = 256  # queries at a time
MANY = 100  # entries of an option that is no setting, but data


def trec_files(prefix: str) -> list[str]:
    return [f"{prefix}.{way}.{kind}" for way in WAYS for kind in ("run", "qrels")]


def check(json: str | None, csv: str | None, trec: str | None, report: str | None) -> None:
    """Raise InputError, before hours of scoring, if one of these outputs cannot be made."""
    if trec and os.path.basename(trec) in ("", ".", ".."):
        raise InputError(f"--trec {trec}: a folder; expected the beginning of file names, as scan")
    if json or csv:
        intervals.check_scipy()
    if csv:
        first_line(csv)
    if json and os.path.isfile(json) and os.path.getsize(json):
        check_figures(json)
    if report and os.path.isfile(report) and os.path.getsize(report):
        check_page(report)


def check_page(path: str) -> None:
    """Raise InputError if a file that would be replaced is no HTML page."""
    with open(path, "rb") as file:
        ours = file.read(100).lstrip().lower().startswith(b"<!doctype html")
    if not ours:
        raise InputError(f"{path}: exists, and is no report; give another name")


def check_figures(path: str) -> None:
    """Raise InputError if a file that would be replaced is not one of --json."""
    try:
        found = read_json(path)
    except InputError:
        found = None
    if not isinstance(found, dict) or "metrics" not in found:
        raise InputError(f"{path}: exists, and holds no figures of --json; give another name")


# JSON


def write_json(path: str, ranking: Ranking) -> None:
    """Write all figures, their intervals, and what they are of; an older file is replaced."""
    import json

    n, m = ranking.scores.shape
    record = {
        "metrics": ranking.metrics,
        "intervals": intervals.intervals_or_none(ranking.ranks, CONFIDENCE),
        "confidence": CONFIDENCE,
        "split": ranking.split,
        "images": n,
        "captions": m,
        "fold5": ranking.fold5,
        "sources": [describe_source(ranking, k) for k in range(len(ranking.sources))],
        "data": describe_data(ranking),
        "versions": versions(),
    }
    with replacing(path) as part, open(part, "w") as file:
        json.dump(plain(record), file, indent=2, allow_nan=False)
        file.write("\n")
    print(f"Figures saved to {path}")


def describe_source(ranking: Ranking, k: int) -> dict:
    """A checkpoint or a file of scores or embeddings: its path and hash, and a model's options."""
    path = ranking.sources[k]
    found: dict = {"path": path, "sha256": file_hash(path) if os.path.isfile(path) else None}
    if ranking.splits:
        opt = ranking.splits[k].opt
        found |= {"system": systems.of(opt).name, "epoch": ckpt.load(path).get("epoch")}
        found["options"] = {
            name: f"{len(x):,} entries" if isinstance(x, (dict, list)) and len(x) > MANY else x
            for name, x in sorted(vars(opt).items())
        }
    return found


def describe_data(ranking: Ranking) -> dict:
    """Fingerprints of what was ranked: captions with their images, and a sample of the features."""
    found: dict = {"folder": ranking.folder, "captions_sha256": None, "features": None}
    if ranking.captions is not None:
        pairs = [str(image) for image in ranking.own_image]
        found["captions_sha256"] = fingerprint_of([ranking.captions, pairs], "")["sha256"]
    if ranking.splits:
        dataset = ranking.splits[0].dataset
        found["features"] = describe_features(dataset.path, dataset.images)
    return found


def describe_features(path: str, features: np.ndarray) -> dict:
    """The shape, dtype and size of an array, and the hash of a few of its rows."""
    rows = sampled_rows(len(features))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.ascontiguousarray(features[row]).tobytes())
    return {
        "path": path,
        "shape": list(features.shape),
        "dtype": str(features.dtype),
        "bytes": os.path.getsize(path),
        "sampled_rows": rows,
        "sampled_rows_sha256": digest.hexdigest(),
    }


def versions() -> dict:
    """The programs that computed the figures, and when."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit_of(os.path.dirname(os.path.abspath(__file__))),
        "date": now(),
    }


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def plain(x):
    """A value as JSON can hold it; NaN and infinities are null."""
    if isinstance(x, (np.generic, np.ndarray, torch.Tensor)):
        x = x.tolist()
    if isinstance(x, dict):
        return {str(name): plain(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x if x is None or isinstance(x, (bool, int, str)) else str(x)


# CSV


def write_csv(path: str, ranking: Ranking) -> None:
    """Write a line per direction, and per fold; a table that is there already gets more lines."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    table.writerows(csv_rows(ranking))
    first_line(path)
    with open(path, "a+b") as file:  # each write goes to the file's end
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # for evaluations that run at once
        file.seek(0)
        old = file.read()
        head = "" if old else f"{','.join(COLUMNS)}\n"
        gap = "" if not old or old.endswith(b"\n") else "\n"
        file.write(f"{head}{gap}{text.getvalue()}".encode("utf-8", "surrogateescape"))
    print(f"Figures added to {path}")


def csv_rows(ranking: Ranking) -> Iterator[dict]:
    """The lines of an evaluation; with five folds, their mean stands first, without a number."""
    sizes = [(len(images), len(captions)) for images, captions in ranking.folds()]
    about = {"date": now(), "source": " + ".join(ranking.sources), "split": ranking.split or ""}
    found = intervals.intervals_or_none(ranking.ranks, CONFIDENCE) or {way: {} for way in WAYS}
    n, m = (total // len(sizes) for total in ranking.scores.shape)
    parts = [("mean" if ranking.fold5 else "", n, m, ranking.metrics, found)]
    for fold, metrics in enumerate(ranking.metrics.get("folds", []), 1):
        parts.append((fold, *sizes[fold - 1], metrics, {way: {} for way in WAYS}))
    for fold, images, captions, metrics, ranges in parts:
        for way in WAYS:
            row = about | {"images": images, "captions": captions, "fold": fold, "direction": way}
            row |= {name: metrics[way][name] for name in METRICS}
            for name, (low, high) in ranges[way].items():
                row |= {f"{name}_low": low, f"{name}_high": high}
            yield row


def first_line(path: str) -> None:
    """Raise InputError if a file that is there already is not a table of --csv."""
    head = ",".join(COLUMNS)
    if not os.path.exists(path) or not os.path.getsize(path):
        return
    with open(path, **AS_IT_IS) as file:
        first = file.readline(len(head) + 3)
    if first.removeprefix("\ufeff").rstrip("\r\n") != head:
        raise InputError(
            f"{path}: exists, and is not a table of --csv, to which lines are added: its first "
            f"line is not {head[:30]}...; give another name"
        )


# TREC


def write_trec(prefix: str, ranking: Ranking) -> None:
    """Write PREFIX.i2t.run, PREFIX.i2t.qrels and those of t2i, with the first TOP of each query."""
    names = names_of(ranking)
    pairs, folds = ranking.right_pairs, list(ranking.folds())
    scores, tag = ranking.scores, "_".join(os.path.basename(prefix).split())
    for way in WAYS:
        with replacing(f"{prefix}.{way}.qrels") as part, open(part, "w", **AS_IT_IS) as file:
            for query, item in zip(*pairs, strict=True):
                file.write(f"{names[0][query]} 0 {names[1][item]} 1\n")
        with replacing(f"{prefix}.{way}.run") as part, open(part, "w", **AS_IT_IS) as file:
            for query, items, values in progress(best_of(scores, *pairs, folds), f"writing {way}"):
                for rank, (item, value) in enumerate(zip(items, decreasing(values), strict=True)):
                    line = names[0][query], SECOND, names[1][item], rank + 1, f"{value:.9g}", tag
                    file.write(" ".join(map(str, line)) + "\n")
        # Then images and captions exchange their roles.
        scores, names, pairs = scores.T, names[::-1], pairs[::-1]
        folds = [fold[::-1] for fold in folds]
    print(f"Runs saved to {', '.join(trec_files(prefix))}: the first {TOP} of each query")
    if any(len({len(fold[k]) for fold in folds}) > 1 for k in (0, 1)):
        print(
            "notice: the five folds are not of one size: other tools print the mean over all "
            "queries, which differs from the mean over folds"
        )


def names_of(ranking: Ranking) -> tuple[list[str], list[str]]:
    """The names of the images and of the captions in the files of TREC."""
    n, m = ranking.scores.shape
    ids = ranking.ids or []
    if len(set(ids)) != n or any(len(name.split()) != 1 for name in ids):
        if ids:
            print(
                "notice: not all image ids differ and are without blanks, so the runs name images "
                "image_0, image_1, ..."
            )
        ids = [f"image_{image}" for image in range(n)]
    return ids, [f"caption_{caption}" for caption in range(m)]


def best_of(
    scores: np.ndarray,
    query: np.ndarray,
    item: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each query, its first TOP items and their scores; of equal scores, a wrong item is first.

    scores (Q, C); query and item (P,) are the right pairs; `folds` holds the queries and the items
    of each fold.
    """
    ends = np.bincount(query, minlength=len(scores)).cumsum()[:-1]
    right_of = np.split(item[np.argsort(query, kind="stable")], ends)  # Q arrays
    place = np.empty(scores.shape[1], int)  # of an item in its fold
    for queries, items in folds:
        place[items] = np.arange(len(items))
        for start in range(0, len(queries), BLOCK):
            chunk = queries[start : start + BLOCK]  # (q,)
            block = scores[chunk][:, items]  # (q, c), a copy
            wrong = torch.from_numpy(block.copy())
            for k, number in enumerate(chunk):
                wrong[k, place[right_of[number]]] = -torch.inf
            value, best = (x.numpy() for x in wrong.topk(min(TOP, len(items)), dim=1))  # (q, TOP)
            for k, number in enumerate(chunk):
                found = best[k][np.isfinite(value[k])]
                both = np.concatenate([found, place[right_of[number]]])
                is_right = np.arange(len(both)) >= len(found)
                order = both[np.lexsort((both, is_right, -block[k, both]))[:TOP]]
                yield number, items[order], block[k, order]


def decreasing(scores: np.ndarray) -> Iterator[float]:
    """Scores (k,), best first, as numbers of float32, each smaller than the one before.

    trec_eval reads float32, and orders equal scores by their names.
    """
    before = math.inf
    for score in np.clip(scores, -1e38, 1e38).astype(np.float32).tolist():
        if score >= before:
            score = float(np.float32(before - max(abs(before) * STEP, LEAST)))
        before = score
        yield score
