"""Bottom-up-attention tsv files to arrays."""

import base64
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import train
import util.convert_data as convert_data
from tests.conftest import train_args
from util.convert_data import convert

ROOT = Path(train.__file__).parent


def b64(array: np.ndarray) -> str:
    return base64.b64encode(np.asarray(array, "<f4").tobytes()).decode()


def row(image_id, boxes=3, dim=5, seed=0) -> tuple[str, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, boxes])
    box = rng.uniform(0, 90, (boxes, 4)).astype(np.float32)
    features = rng.normal(size=(boxes, dim)).astype(np.float32)
    line = "\t".join((str(image_id), "100", "80", str(boxes), b64(box), b64(features)))
    return line, box, features


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_file_order_padding_and_duplicates(tmp_path):
    rows = [row("b", 3, seed=1), row("a", 1, seed=2), row("c", 4, seed=3)]
    first = write(tmp_path / "1.tsv", rows[0][0], rows[1][0])
    second = write(tmp_path / "2.tsv", row("b", 2, seed=9)[0], rows[2][0])
    out = str(tmp_path / "new" / "train")
    assert convert([first, second], out, max_boxes=4) == 3
    images, boxes = np.load(f"{out}_ims.npy"), np.load(f"{out}_ims_bbx.npy")
    assert images.shape == (3, 4, 5) and boxes.shape == (3, 4, 4)
    assert images.dtype == boxes.dtype == np.float32
    for i, (_, box, features) in enumerate(rows):
        n = len(box)
        np.testing.assert_array_equal(images[i, :n], features)
        np.testing.assert_array_equal(boxes[i, :n], box)
        assert not images[i, n:].any() and not boxes[i, n:].any()
    sizes = np.load(f"{out}_ims_size.npy", allow_pickle=False)
    assert sizes["image_w"].tolist() == [100] * 3 and sizes["image_h"].tolist() == [80] * 3
    assert (tmp_path / "new" / "train_ids.txt").read_text() == "b\na\nc\n"
    assert not list((tmp_path / "new").glob("*.part"))


def test_ids_choose_and_order(tmp_path):
    rows = {name: row(name, 2, seed=i) for i, name in enumerate("abcd")}
    tsv = write(tmp_path / "x.tsv", *(r[0] for r in rows.values()))
    (tmp_path / "ids.txt").write_text("d\nb\na\n")
    out = str(tmp_path / "dev")
    convert_data.main([tsv, "--out", out, "--ids", str(tmp_path / "ids.txt"), "--dtype", "float16"])
    images = np.load(f"{out}_ims.npy")
    assert images.shape == (3, 36, 5) and images.dtype == np.float16
    for i, name in enumerate("dba"):
        np.testing.assert_array_equal(images[i, :2], rows[name][2].astype(np.float16))
        np.testing.assert_array_equal(np.load(f"{out}_ims_bbx.npy")[i, :2], rows[name][1])
    with pytest.raises(ValueError, match="1 of 2 ids are in no tsv file, the first 'z'"):
        convert([tsv], out, ids=["a", "z"])
    with pytest.raises(ValueError, match="1 ids occur twice"):
        convert([tsv], out, ids=["a", "a"])


def spoiled(index, value):
    fields = row("bad")[0].split("\t")
    fields[index] = value
    return "\t".join(fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a\tb", "row 2: 2 fields, expected 6: image_id, image_w"),
        (spoiled(3, "three"), "row 2: image_w, image_h, num_boxes are .*, expected numbers"),
        (spoiled(1, "inf"), "row 2: image_w, image_h, num_boxes are .*, expected numbers"),
        (spoiled(3, "40"), "row 2: 40 boxes, expected 1 to 36; see --max_boxes"),
        (spoiled(3, "0"), "row 2: 0 boxes"),
        (spoiled(4, "AAA"), "row 2: boxes is not base64"),
        (spoiled(5, "%%%%"), "row 2: features is not base64"),
        (spoiled(4, b64(np.zeros(8))), "row 2: boxes holds 32 bytes; expected 3 boxes x 4"),
        (spoiled(5, b64(np.zeros(12))), "row 2: features holds 48 bytes; expected 3 boxes x 5"),
        (spoiled(5, ""), "row 2: features holds 0 bytes"),
        (spoiled(5, b64(np.full(15, np.nan))), "row 2: NaN or Inf among features"),
    ],
)
def test_bad_rows_are_named_and_leave_nothing(tmp_path, line, message):
    tsv = write(tmp_path / "x.tsv", row("good")[0], line)
    with pytest.raises(ValueError, match=message) as error:
        convert([tsv], str(tmp_path / "out"))
    assert "x.tsv" in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["x.tsv"]


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.tsv: no such tsv file"):
        convert([str(tmp_path / "no.tsv")], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="none of the requested images"):
        convert([write(tmp_path / "x.tsv")], str(tmp_path / "out"))


def test_memory_does_not_grow(tmp_path):
    """The conversion of 60 MB of features never holds more than a few MB."""
    line = row("{}", 36, 2048)[0]
    with open(tmp_path / "big.tsv", "w") as file:
        for i in range(200):
            file.write(line.replace("{}", str(i), 1) + "\n")
    tracemalloc.start()
    try:
        ids = [str(i) for i in reversed(range(200))]
        convert([str(tmp_path / "big.tsv")], str(tmp_path / "out"), ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6
    assert os.path.getsize(tmp_path / "out_ims.npy") > 58e6


def test_non_ascii_ids_stay_apart(tmp_path):
    tsv = write(tmp_path / "x.tsv", row("фото")[0], row("кино", seed=1)[0])
    assert convert([tsv], str(tmp_path / "out")) == 2
    assert (tmp_path / "out_ids.txt").read_text(encoding="utf-8") == "фото\nкино\n"


def test_features_that_do_not_fit_are_refused(tmp_path):
    tsv = write(tmp_path / "x.tsv", spoiled(5, b64(np.full(15, 7e4))))
    assert convert([tsv], str(tmp_path / "out")) == 1
    with pytest.raises(ValueError, match="image bad: a feature above 65504, too large for float16"):
        convert([tsv], str(tmp_path / "half"), dtype="float16")


def test_a_run_that_breaks_while_ordering_leaves_nothing(tmp_path, monkeypatch):
    tsv = write(tmp_path / "x.tsv", row("a")[0], row("b")[0])

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_data, "reorder", dies)
    with pytest.raises(KeyboardInterrupt):
        convert([tsv], str(tmp_path / "out"), ids=["b", "a"])
    assert os.listdir(tmp_path) == ["x.tsv"]


def test_runs_by_its_path_and_feeds_training(tiny):
    """Run the published command from another folder, then a training step on its output."""
    for split, n in (("train", 20), ("dev", 10)):
        lines = [row(f"{split}{i}", 4, 12, seed=i)[0] for i in range(n)]
        write(tiny / f"{split}.tsv", *lines)
        script = ROOT / "util" / "convert_data.py"
        out = f"data/tiny_precomp/{split}"
        args = [sys.executable, script, f"{split}.tsv", "--out", out, "--max_boxes", "4"]
        done = subprocess.run(args, capture_output=True, text=True)
        assert done.returncode == 0 and f"{n} images" in done.stdout, done.stderr
    train.main(train_args(num_epochs=1))
