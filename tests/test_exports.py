"""exports.py: JSON, CSV, and runs whose recalls, read by ir-measures, are ours."""

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluation
import exports
from metrics import METRICS
from ranking import Ranking, rank_scores
from score_files import save_scores
from util.cli import InputError
from util.fingerprint import SAMPLED_ROWS

pytest.importorskip("scipy")
WAYS = "i2t", "t2i"
UNEVEN = {"five": (None, 75), "shuffled": (np.random.default_rng(0).permutation(75) // 5, 75)}
UNEVEN["uneven"] = np.repeat(np.arange(15), [9, 1, 2, 3, 4] * 3), 57


def made(kind="five", rounded=None, fold5=False, ids=None) -> Ranking:
    """Scores of 15 images; the fewer digits, the more of them are equal."""
    image_of, m = UNEVEN[kind]
    scores = np.random.default_rng(m).normal(size=(15, m)).astype(np.float32)
    own = np.arange(m) // 5 if image_of is None else image_of
    scores[own, np.arange(m)] += 1
    scores = scores if rounded is None else scores.round(rounded)
    return rank_scores(["a.npy"], scores, image_of, fold5, ids=ids)


# JSON


def read_json(path) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


@pytest.mark.parametrize("fold5", [False, True])
def test_json_says_what_was_evaluated(untrained, fold5):
    path = "model.pth.tar"
    want = evaluation.evalrank(path, split="test", fold5=fold5)
    flags = [path, "--split", "test", "--json", "a.json", *(["--fold5"] if fold5 else [])]
    evaluation.main(flags)
    got = read_json("a.json")
    assert got["metrics"] == want and ("folds" in got["metrics"]) == fold5
    for way in WAYS:
        for name in ("r1", "r5", "r10", "meanr"):
            low, high = got["intervals"][way][name]
            assert low <= want[way][name] <= high
    assert (got["split"], got["images"], got["captions"]) == ("test", 15, 75)
    assert got["fold5"] == fold5 and got["confidence"] == 0.95
    (source,) = got["sources"]
    assert source["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert (source["path"], source["epoch"], source["system"]) == (path, 3, "scan")
    assert source["options"]["cross_attn"] == "i2t" and source["options"]["img_dim"] == 12
    assert source["options"]["word2idx"] == "200 entries"
    assert got["data"]["folder"] == "data/tiny_precomp"
    assert got["data"]["features"]["shape"] == [15, 4, 12]
    assert {"python", "torch", "numpy", "commit", "date"} == got["versions"].keys()
    first = Path("a.json").read_text().partition('"versions"')[0]
    evaluation.main(flags)  # an older file is replaced, and all but the date is the same
    assert Path("a.json").read_text().partition('"versions"')[0] == first
    assert "a.json.part" not in os.listdir()


def test_the_fingerprint_tells_data_apart(untrained):
    def data() -> dict:
        evaluation.main(["model.pth.tar", "--json", "a.json"])
        found = read_json("a.json")["data"]
        return {"captions": found["captions_sha256"], **found["features"]}

    folder = Path("data/tiny_precomp")
    first = data()
    assert data() == first and first["sampled_rows"] == list(range(15))
    text = (folder / "test_caps.txt").read_text()
    (folder / "test_caps.txt").write_text(text.replace("\n", "\r\n"))
    assert data() == first  # line ends are no text
    (folder / "test_caps.txt").write_text(text.replace("dog", "cat", 1))
    assert data()["captions"] != first["captions"]
    (folder / "test_caps.txt").write_text(text)
    (folder / "test_caption_image.txt").write_text("".join(f"{k % 15}\n" for k in range(75)))
    assert data()["captions"] != first["captions"]  # other pairs of the same captions
    os.remove(folder / "test_caption_image.txt")
    features = np.load(folder / "test_ims.npy")
    features[3, 0, 0] += 1
    np.save(folder / "test_ims.npy", features)
    got = data()
    assert got["captions"] == first["captions"]
    assert {k for k in got if got[k] != first[k]} == {"sampled_rows_sha256"}
    np.save(folder / "test_ims.npy", features.astype(np.float16))
    assert data()["dtype"] == "float16"


def test_only_a_few_rows_of_large_features_are_read(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5000, 3, 2), np.float32))
    path = str(tmp_path / "x.npy")
    found = exports.describe_features(path, np.load(path, mmap_mode="r"))
    assert len(found["sampled_rows"]) == SAMPLED_ROWS and found["sampled_rows"][-1] == 4999
    assert found["bytes"] == os.path.getsize(path)


def test_json_of_score_matrices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save_scores(f"{name}.npy", made("uneven").scores, UNEVEN["uneven"][0])
    evaluation.main(["a.npy", "b.npy", "--json", "x.json"])
    got = read_json("x.json")
    assert [source["path"] for source in got["sources"]] == ["a.npy", "b.npy"]
    assert all(len(source["sha256"]) == 64 for source in got["sources"])
    assert got["split"] is None and got["data"]["features"] is None


def test_values_that_json_has_no_word_for():
    x = {"a": float("nan"), "b": (1, float("-inf")), "c": np.float32(0.5), 1: {2}}
    x |= {"d": torch.tensor([1, 2]), "e": np.array([[1.0, np.nan]]), "f": None, "g": True}
    got = exports.plain(x)
    assert got == {
        **{"a": None, "b": [1, None], "c": 0.5, "1": "{2}", "d": [1, 2]},
        **{"e": [[1.0, None]], "f": None, "g": True},
    }
    json.dumps(got, allow_nan=False)


# CSV


def read_csv(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("fold5", [False, True])
def test_csv_has_a_line_per_direction_and_fold(tmp_path, fold5):
    path, found = str(tmp_path / "a.csv"), made("uneven", 0, fold5)
    exports.write_csv(path, found)
    rows = read_csv(path)
    assert len(rows) == (12 if fold5 else 2) and list(rows[0]) == exports.COLUMNS
    for row, way in zip(rows, WAYS, strict=False):
        assert row["direction"] == way and row["source"] == "a.npy"
        assert row["fold"] == ("mean" if fold5 else "")
        assert {n: float(row[n]) for n in METRICS} == pytest.approx(found.metrics[way])
        for name in ("r1", "r5", "r10", "meanr"):
            assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
    for row in rows[2:]:
        want = found.metrics["folds"][int(row["fold"]) - 1][row["direction"]]
        assert {n: float(row[n]) for n in METRICS} == pytest.approx(want)
        assert row["r1_low"] == "" and row["images"] == "3"
    if fold5:
        assert sorted(row["fold"] for row in rows[2::2]) == list("12345")
        assert sum(int(row["captions"]) for row in rows[2::2]) == 57
    else:
        assert (rows[0]["images"], rows[0]["captions"]) == ("15", "57")


@pytest.mark.parametrize("end", ["\n", "\r\n", "", "\n# mine: \udcff\n"])
def test_lines_are_added_to_an_older_table(tmp_path, end):
    path = tmp_path / "a.csv"
    exports.write_csv(str(path), made())
    old = path.read_text().rstrip("\n").encode() + end.encode(errors="surrogateescape")
    path.write_bytes(old)
    exports.write_csv(str(path), made("uneven"))
    assert path.read_bytes().startswith(old)
    lines = path.read_text(errors="replace").splitlines()
    assert len(lines) == (6 if "mine" in end else 5)
    assert [row.split(",")[4] for row in lines[-2:]] == ["57", "57"]


@pytest.mark.parametrize("other", ["name,r1\nx,1\n", "\0\1", "date,source", "x" * 9999])
def test_another_table_is_left_alone(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", made().scores)
    Path("a.csv").write_text(other)
    monkeypatch.setattr(evaluation, "rank_files", None)
    with pytest.raises(InputError, match="a.csv: exists, and is not a table of --csv"):
        evaluation.main(["a.npy", "--csv", "a.csv"])
    assert Path("a.csv").read_text() == other


def test_one_image_has_no_intervals(tmp_path):
    ranking = rank_scores(["a.npy"], np.ones((1, 3), np.float32), None, False)
    exports.write_json(tmp_path / "a.json", ranking)
    assert read_json(tmp_path / "a.json")["intervals"] is None
    exports.write_csv(tmp_path / "a.csv", ranking)
    assert {(row["r1"], row["r1_low"]) for row in read_csv(tmp_path / "a.csv")} == {("100.0", "")}


# TREC


def of_ir_measures(prefix: str, queries: dict[str, set] | None = None) -> dict:
    """Success@K each way, and R@K text to image, in percent; of some queries only."""
    measures = pytest.importorskip("ir_measures")
    found = {}
    for way in WAYS:
        right = list(measures.read_trec_qrels(f"{prefix}.{way}.qrels"))
        run = list(measures.read_trec_run(f"{prefix}.{way}.run"))
        if queries:
            right = [x for x in right if x.query_id in queries[way]]
            run = [x for x in run if x.query_id in queries[way]]
        kinds = [measures.Success] + ([measures.R] if way == "t2i" else [])
        found[way] = [
            {f"r{k}": 100 * measures.calc_aggregate([kind @ k], right, run)[kind @ k]}
            for kind in kinds
            for k in (1, 5, 10)
        ]
    return found


def same(got: dict, metrics: dict) -> bool:
    return all(
        value == pytest.approx(metrics[way][name], abs=1e-9)
        for way in WAYS
        for one in got[way]
        for name, value in one.items()
    )


@pytest.mark.parametrize("fold5", [False, True])
@pytest.mark.parametrize("rounded", [None, 1, 0, -1])
@pytest.mark.parametrize("kind", UNEVEN)
def test_ir_measures_has_our_recalls(tmp_path, kind, rounded, fold5):
    """Also where many scores are equal, or all of them."""
    found = made(kind, rounded, fold5)
    prefix = str(tmp_path / "x")
    exports.write_trec(prefix, found)
    if not fold5:
        assert same(of_ir_measures(prefix), found.metrics)
        return
    for (images, captions), metrics in zip(found.folds(), found.metrics["folds"], strict=True):
        queries = {"i2t": {f"image_{x}" for x in images}}
        queries["t2i"] = {f"caption_{x}" for x in captions}
        assert same(of_ir_measures(prefix, queries), metrics)
    if kind != "uneven":
        assert same(of_ir_measures(prefix), found.metrics)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("base", "scale"),
    [(0, x) for x in (1, 0, -1, 1e-40, 1e-20, 3e37, 1e300)] + [(1, 1e-9), (-7, 0)],
)
def test_scores_that_differ_little_or_not_at_all(tmp_path, base, scale, dtype):
    """Of the numbers that trec_eval reads, each is smaller than the one before it."""
    scale = min(scale, float(np.finfo(dtype).max) / 10)
    scores = (base + made("uneven", 0).scores.astype(float) * scale).astype(dtype)
    found = rank_scores(["a"], scores, UNEVEN["uneven"][0], False)
    exports.write_trec(str(tmp_path / "x"), found)
    for way in WAYS:
        last = {}
        for line in (tmp_path / f"x.{way}.run").read_text().splitlines():
            query, _, _, rank, score, _ = line.split()
            score = np.float32(float(score))
            assert int(rank) == 1 or score < last[query]
            assert np.isfinite(score)
            last[query] = score
    assert same(of_ir_measures(str(tmp_path / "x")), found.metrics)


def test_more_candidates_than_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "TOP", 12)
    monkeypatch.setattr(exports, "BLOCK", 4)
    found = made("shuffled", 0)
    exports.write_trec(str(tmp_path / "x"), found)
    lines = (tmp_path / "x.i2t.run").read_text().splitlines()
    assert len(lines) == 15 * 12
    assert same(of_ir_measures(str(tmp_path / "x")), found.metrics)


def test_several_images_a_caption(tmp_path):
    scores = np.random.default_rng(0).normal(size=(30, 10)).round(1)
    found = rank_scores(["a"], scores, None, False, True)
    exports.write_trec(str(tmp_path / "x"), found)
    got = of_ir_measures(str(tmp_path / "x"))
    got["t2i"] = got["t2i"][:3]  # Success: R counts all three images
    assert same(got, found.metrics)


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([f"{k}.jpg" for k in range(15)], True),
        ([str(k) for k in range(15)], True),
        ([f"a b{k}" for k in range(15)], False),
        ([f"a\u00a0{k}" for k in range(15)], False),
        (["a", "", *map(str, range(13))], False),
        (["a", "a", *map(str, range(13))], False),
        (None, False),
    ],
)
def test_names_of_images(tmp_path, ids, kept, capsys):
    exports.write_trec(str(tmp_path / "x"), made(ids=ids))
    lines = [line.split() for line in (tmp_path / "x.t2i.qrels").read_text().splitlines()]
    names = ids if kept else [f"image_{k}" for k in range(15)]
    said = "notice: not all image ids differ" in capsys.readouterr().out
    assert said == (ids is not None and not kept)
    assert lines == [[f"caption_{k}", "0", names[k // 5], "1"] for k in range(75)]
