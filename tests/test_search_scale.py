"""scripts/search_scale.py on a tiny set: the grown sets, the exhaustive ranks, the table."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import first_stage as stage
from scripts import search_scale
from tests.two_stages import FOLDER, captions, matrix, searcher, write_model
from util.cli import InputError

SIZES = ["--sizes", "15", "30", "60", "--shortlists", "3", "15", "--queries", "6"]


@pytest.fixture
def small(tiny, monkeypatch):
    """A model, blocks of a few images, and no process of its own for each size."""
    monkeypatch.setattr(search_scale, "BLOCK", 8)

    class Here:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, do, job):
            done = do(job)
            return type("Done", (), {"result": lambda self: done})()

    monkeypatch.setattr(search_scale, "ProcessPoolExecutor", Here)
    return ["model.pth.tar", "--data_path", "data", "--data_name", "tiny_precomp"]


def main(args: list[str], *more: str) -> str:
    threads = torch.get_num_threads()
    write_model()
    search_scale.main([*args, "--split", "test", "--workdir", "big", *SIZES, *more])
    torch.set_num_threads(threads)
    return Path("big/search_scale.md").read_text()


def test_all_sets_begin_with_the_same_images_and_a_seed_draws_the_same(small):
    real, train = (np.load(f"{FOLDER}/{x}_ims.npy") for x in ("test", "train"))
    os.mkdir("a")
    for size in (20, 35, 60):
        search_scale.grow("a", size, real, train, 3)
        assert len(np.load(f"a/n{size}_ims.npy")) == size
    large = np.load("a/n60_ims.npy")
    np.testing.assert_array_equal(large[:35], np.concatenate([real, train]).astype(np.float16))
    for size in (20, 35):
        assert np.array_equal(np.load(f"a/n{size}_ims.npy"), large[:size])
    os.mkdir("b")
    search_scale.grow("b", 60, real, train, 3)
    assert np.array_equal(np.load("b/n60_ims.npy"), large)
    search_scale.grow("b", 60, real, train, 4)  # another seed: made again
    other = np.load("b/n60_ims.npy")
    assert np.array_equal(other[:35], large[:35]) and not np.array_equal(other[35:], large[35:])
    # A mixed region lies between two regions of train, nearer to one of them.
    flat = train.reshape(-1, 12)
    for region in large[35:].reshape(-1, 12)[::7].astype(float):
        best = np.inf
        for x in flat:
            t = np.linspace(0, 0.3, 61)[:, None, None]
            best = min(best, np.abs((1 - t) * x + t * flat - region).max(2).min())
        assert best < 0.03


def test_the_table_is_that_of_all_scores(small, capsys):
    table = main(small)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if re.match(r"\| \d", line)
    ]
    assert [row[:2] for row in rows] == [
        [n, k] for n in ("15", "30", "60") for k in ("all", "3", "15")
    ]
    scores = matrix("model.pth.tar")
    chosen = [5 * image + image % 5 for image in (0, 2, 5, 7, 10, 12)]
    ranks = [int((scores[:, c] >= scores[c // 5, c]).sum()) - 1 for c in chosen]
    recalls = [100 * np.mean([r < k for r in ranks]) for k in (1, 5, 10)]
    assert rows[0][2] == " / ".join(f"{x:.1f}" for x in recalls)
    assert rows[2][2:5] == [rows[0][2], "+0.0 / +0.0 / +0.0", "100.0 %"]  # all are in the list
    found = searcher("model.pth.tar")
    short = [found.images_for(captions()[c], 3, 3).places for c in chosen]
    ranks = [p.index(c // 5) if c // 5 in p else 99 for p, c in zip(short, chosen, strict=True)]
    recalls = [100 * np.mean([r < k for r in ranks]) for k in (1, 5, 10)]
    assert rows[1][2] == " / ".join(f"{x:.1f}" for x in recalls)
    assert "mixed" in table and "flat index" in table
    assert table in capsys.readouterr().out


def test_a_large_set_is_searched_in_two_stages_only(small, monkeypatch):
    pytest.importorskip("faiss", reason="pip install faiss-cpu")
    monkeypatch.setattr(stage, "LARGE", 50)
    table = main(small, "--exhaustive", "30")
    lines = [line for line in table.splitlines() if line.startswith("| 60 ")]
    assert len(lines) == 2 and all(" |  |  | " in line for line in lines)
    assert "60 images: IVF index" in table


def test_sets_that_are_there_are_not_made_twice(small, monkeypatch):
    first = main(small)

    def fail(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(search_scale, "mixed", fail)
    again = main(small)
    numbers = [re.findall(r"^\| \d+ \| \w+ \| [\d./ ]+", x, re.M) for x in (first, again)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 9
    assert json.loads(Path("big/n60_made.json").read_text())["seed"] == 0


def test_wrong_sizes_are_refused(small):
    with pytest.raises(InputError, match="15 images and 75 captions of test.*--sizes of at least"):
        main(small, "--sizes", "14")
    Path(f"{FOLDER}/test_caps.txt").write_text("\n".join(captions()[:70]))
    with pytest.raises(InputError, match="as many captions for each image"):
        main(small)
