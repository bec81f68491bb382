"""Files of region features to arrays: the order, the ids, the counts, damaged rows, the target."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import train
import util.convert_data as convert_data
from data import PrecompDataset
from tests.conftest import train_args
from tests.extracted import b64, check, fields, ids_of, made, spoiled, write_tsv
from util.convert_data import convert
from vocab import deserialize_vocab

ROOT = Path(train.__file__).parent


def test_file_order_filling_and_counts(tmp_path):
    images = [made("b", 3), made("a", 1), made("c", 4)]
    first = write_tsv(tmp_path / "1.tsv", fields(images[0]), fields(images[1]))
    second = write_tsv(tmp_path / "2.tsv", fields(images[2]))
    out = str(tmp_path / "new" / "train")
    assert convert([first, second], out, max_boxes=4) == 3
    assert np.load(f"{out}_ims.npy").shape == (3, 4, 5)
    check(out, *images)
    assert ids_of(out) == ["b", "a", "c"]
    assert len(os.listdir(tmp_path / "new")) == 5


def test_ids_choose_and_order(tmp_path):
    images = {name: made(name, 2) for name in "abcd"}
    tsv = write_tsv(tmp_path / "x.tsv", *map(fields, images.values()))
    (tmp_path / "ids.txt").write_text("\ufeffd\nb\n\na\n", encoding="utf-8")
    out = str(tmp_path / "dev")
    convert_data.main([tsv, "--out", out, "--ids", str(tmp_path / "ids.txt"), "--dtype", "float16"])
    assert np.load(f"{out}_ims.npy").shape == (3, 36, 5)
    check(out, *(images[name] for name in "dba"), features=np.float16, tolerance=1e-3)
    with pytest.raises(
        ValueError, match="1 of 2 ids are in no tsv file, the first 'z'.*as '[abc]'"
    ):
        convert([tsv], out, ids=["z", "d"])


@pytest.mark.parametrize("order", ["even", "uneven", "shuffled"])
def test_a_list_may_name_an_image_once_per_caption(tmp_path, capsys, order):
    images = {name: made(name, 2) for name in "abcde"}
    tsv = write_tsv(tmp_path / "x.tsv", *map(fields, images.values()))
    ids = [name for name in "cad" for _ in range(4)]
    if order == "uneven":
        ids += ["c", "e"]
    if order == "shuffled":
        ids = np.random.default_rng(0).permutation(ids).tolist()
    distinct = list(dict.fromkeys(ids))
    out = tmp_path / "test"
    assert convert([tsv], str(out), ids=ids) == len(distinct)
    check(out, *(images[name] for name in distinct))
    said = capsys.readouterr().out
    assert ids_of(out) == distinct
    assert f"the {len(ids)} lines of the list of ids name {len(distinct)} images" in said
    table = tmp_path / "test_caption_image.txt"  # the captions follow the list
    assert table.exists() == (order != "even") == ("caption_image.txt" in said)
    if order != "even":
        assert [distinct[int(row)] for row in table.read_text().split()] == ids
    assert convert([tsv], str(tmp_path / "all"), ids=ids, repeat_rows=True) == len(ids)
    check(tmp_path / "all", *(images[name] for name in ids))
    assert ids_of(tmp_path / "all") == ids


def test_a_shuffled_list_and_its_captions_are_read_as_pairs(tiny):
    """What the converter writes says which image each caption is of."""
    folder = tiny / "data" / "tiny_precomp"
    images = {str(n): made(n, 4, 12) for n in range(10)}
    tsv = write_tsv(tiny / "x.tsv", *map(fields, images.values()))
    ids = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 5)).astype(str).tolist()
    for more in (False, True):
        convert([tsv], str(folder / "dev"), ids=ids, max_boxes=4, repeat_rows=more)
        vocab = deserialize_vocab("vocab/tiny_precomp_vocab.json")
        data = PrecompDataset(str(folder), "dev", vocab, 12)
        for caption in (0, 7, 49):
            got = data[caption]["images"].numpy()
            np.testing.assert_array_equal(got, images[ids[caption]].features)


def test_the_list_itself_is_not_replaced(tmp_path):
    """data/x/train_ids.txt may be the list, a line per caption: its lines must not be lost."""
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("7")), fields(made("8")))
    listed = tmp_path / "train_ids.txt"
    listed.write_text("0008\n0008\n7\n")
    convert_data.main([tsv, "--out", str(tmp_path / "train"), "--ids", str(listed)])
    assert listed.read_text() == "0008\n0008\n7\n"
    check(tmp_path / "train", made("8"), made("7"))


def test_ids_are_compared_as_numbers_and_names(tmp_path):
    images = [made(x) for x in ("391895", "12.0", "img_3", "COCO_val2014_000000000042.jpg", "9")]
    tsv = write_tsv(tmp_path / "x.tsv", *map(fields, images))
    ids = ["42", "000000391895", "img_3.jpg", "val2014/COCO_val2014_000000000012.jpg"]
    convert([tsv], str(tmp_path / "out"), ids=ids)
    check(tmp_path / "out", images[3], images[0], images[2], images[1])
    assert ids_of(tmp_path / "out") == ids
    with pytest.raises(ValueError, match="1 of 1 ids are in no tsv file, the first 'img_9'"):
        convert([tsv], str(tmp_path / "out"), ids=["img_9"])
    clash = write_tsv(tmp_path / "y.tsv", fields(made("cats/1.jpg")), fields(made("dogs/1.jpg")))
    assert convert([clash], str(tmp_path / "both"), ids=["dogs/1.jpg", "cats/1.jpg"]) == 2
    check(tmp_path / "both", made("dogs/1.jpg"), made("cats/1.jpg"))
    with pytest.raises(ValueError, match="'cats/1.jpg' and 'dogs/1.jpg' of the files both fit '1'"):
        convert([clash], str(tmp_path / "both"), ids=["1"])


DAMAGE = [
    (["a", "b"], "row 2: 2 fields, expected 6: image_id, image_w"),
    ([*fields(made("bad")), "more"], "row 2: 7 fields, expected 6"),
    (spoiled(made("bad"), 3, "three"), "row 2: image_w, image_h, num_boxes are .*, expected num"),
    (spoiled(made("bad"), 1, "inf"), "row 2: image_w, image_h, num_boxes are .*, expected num"),
    (spoiled(made("bad"), 2, "0"), "row 2: an image of 100 x 0 pixels"),
    (spoiled(made("bad"), 3, "40"), "row 2: 40 boxes, expected 1 to 36; see --max_boxes"),
    (spoiled(made("bad"), 3, "0"), "row 2: 0 boxes"),
    (spoiled(made("bad"), 3, "-3"), "row 2: -3 boxes"),
    (spoiled(made("bad"), 4, "AAA"), "row 2: boxes is not base64"),
    (spoiled(made("bad"), 5, "%%%%"), "row 2: features is not base64"),
    (spoiled(made("bad"), 4, b64(np.zeros(8))), "row 2: boxes holds 32 bytes; expected 3 boxes"),
    (spoiled(made("bad"), 4, b64(np.full(12, np.inf))), "row 2: NaN or Inf among boxes"),
    (spoiled(made("bad"), 5, b64(np.zeros(12))), "row 2: features holds 48 bytes; expected 3 box"),
    (spoiled(made("bad"), 5, ""), "row 2: features holds 0 bytes"),
    (spoiled(made("bad"), 5, b64(np.full(15, np.nan))), "row 2: NaN or Inf among features"),
    (spoiled(made("bad"), 5, b64(np.zeros(15))), "row 2: the features are all zero"),
]


@pytest.mark.parametrize(("line", "message"), DAMAGE)
def test_an_image_that_is_nowhere_whole_is_named_and_leaves_nothing(tmp_path, line, message):
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("good")), line)
    with pytest.raises(ValueError, match=message) as error:
        convert([tsv], str(tmp_path / "out"))
    assert "x.tsv" in str(error.value) and repr(line[0]) in str(error.value)
    with pytest.raises(ValueError, match=message):
        convert([tsv], str(tmp_path / "out"), ids=["good", line[0]])
    assert sorted(os.listdir(tmp_path)) == ["x.tsv"]


@pytest.mark.parametrize(("line", "message"), DAMAGE)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_row_is_skipped_if_its_image_is_whole_elsewhere(
    tmp_path, capsys, line, message, place
):
    images = [made("c"), made(line[0]), made("d")]
    rows = [fields(image) for image in images]
    rows.insert(place, line)
    tsv = write_tsv(tmp_path / "x.tsv", *rows)
    assert convert([tsv], str(tmp_path / "out")) == 3
    check(tmp_path / "out", *images)
    said = capsys.readouterr().out
    assert f"x.tsv: row {place + 1}: " in said and repr(line[0]) in said
    assert "x.tsv: 1 damaged rows were skipped" in said


def test_only_wanted_rows_are_decoded(tmp_path, capsys):
    lines = [line for line, _ in DAMAGE]
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("z")), *lines, fields(made("good")))
    assert convert([tsv], str(tmp_path / "out"), ids=["good"]) == 1
    check(tmp_path / "out", made("good"))
    assert "warning" not in capsys.readouterr().out


def test_a_row_without_a_readable_id_is_said(tmp_path, capsys):
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("a")), spoiled(made("a"), 0, ""), ["", "x", ""])
    assert convert([tsv], str(tmp_path / "out")) == 1
    said = capsys.readouterr().out
    assert "row 2: no image id" in said and "2 damaged rows" in said


def test_many_damaged_rows_are_counted(tmp_path, capsys):
    bad = [spoiled(made(n), 5, "AAA") for n in range(30)]
    tsv = write_tsv(tmp_path / "x.tsv", *bad, *(fields(made(n)) for n in range(30)))
    assert convert([tsv], str(tmp_path / "out")) == 30
    said = capsys.readouterr().out
    assert "30 damaged rows" in said and said.count("warning") == 11


@pytest.mark.parametrize("ids", [None, ["c", "b", "a"]])
def test_of_two_whole_rows_the_last_counts(tmp_path, capsys, ids):
    old, new = made("b", 4, seed=1), made("000b".lstrip("0"), 2, seed=2)
    bad = spoiled(made("b"), 5, "AAAA")
    rows = [fields(made("a")), fields(old), bad, fields(made("c")), fields(new), bad]
    tsv = write_tsv(tmp_path / "x.tsv", *rows)
    convert([tsv], str(tmp_path / "out"), ids=ids, max_boxes=5)
    images = {"a": made("a"), "b": new, "c": made("c")}
    check(tmp_path / "out", *(images[name] for name in ids or "abc"))
    assert "1 images come more than once; the last row of each counts" in capsys.readouterr().out


def test_filling_of_the_extractor_is_not_counted(tmp_path, capsys):
    image, whole = made("a", 3), made("b", 5)
    padded = [np.pad(x, ((0, 2), (0, 0))) for x in (image.features, image.boxes)]
    wide = image._replace(features=padded[0], boxes=padded[1])
    within = made("c", 4)
    within.features[1] = 0  # a region between others stays
    tsv = write_tsv(tmp_path / "x.tsv", *map(fields, (wide, whole, within)))
    convert([tsv], str(tmp_path / "out"), max_boxes=5)
    check(tmp_path / "out", image, whole, within)
    assert "1 images end with regions whose features are all zero" in capsys.readouterr().out
    convert([tsv], str(tmp_path / "few"), ids=["a"], max_boxes=3)
    check(tmp_path / "few", image)


def test_too_many_boxes_say_how_many(tmp_path):
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("a", 36)), fields(made("b", 57)))
    with pytest.raises(ValueError, match="row 2: 57 boxes, expected 1 to 36; see --max_boxes"):
        convert([tsv], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["x.tsv"]
    assert convert([tsv], str(tmp_path / "out"), max_boxes=57) == 2


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.tsv: no such tsv file"):
        convert([str(tmp_path / "no.tsv")], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="none of the requested images"):
        convert([write_tsv(tmp_path / "x.tsv")], str(tmp_path / "out"))
    (tmp_path / "ids.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="ids.txt: no image ids in it"):
        convert_data.main(["x.tsv", "--out", "y", "--ids", str(tmp_path / "ids.txt")])
    with pytest.raises(FileNotFoundError, match="no.txt: no such image id file"):
        convert_data.main(["x.tsv", "--out", "y", "--ids", str(tmp_path / "no.txt")])


def test_memory_does_not_grow(tmp_path):
    """The conversion of 60 MB of features never holds more than a few MB."""
    line = "\t".join(fields(made("{}", 36, 2048)))
    with open(tmp_path / "big.tsv", "w") as file:
        for i in (*range(100), *range(200)):  # 100 of them twice
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
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("фото")), fields(made("кино")))
    assert convert([tsv], str(tmp_path / "out")) == 2
    assert ids_of(tmp_path / "out") == ["фото", "кино"]


def test_features_that_do_not_fit_are_refused(tmp_path):
    tsv = write_tsv(tmp_path / "x.tsv", spoiled(made("bad"), 5, b64(np.full(15, 7e4))))
    assert convert([tsv], str(tmp_path / "out")) == 1
    with pytest.raises(ValueError, match="image bad: a feature above 65504, too large for float16"):
        convert([tsv], str(tmp_path / "half"), dtype="float16")


@pytest.mark.parametrize("name", ["reorder", "write_lines"])
def test_a_run_that_breaks_leaves_what_was_there(tmp_path, monkeypatch, name):
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("a")), fields(made("b")))
    convert([tsv], str(tmp_path / "out"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_data, name, dies)
    with pytest.raises(KeyboardInterrupt):
        convert([tsv], str(tmp_path / "out"), ids=["b", "a"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("slash", ["", "/"])
def test_out_may_be_a_folder(tmp_path, capsys, slash):
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("a")))
    folder = tmp_path / "made"
    if not slash:
        folder.mkdir()
    convert_data.main([tsv, "--out", f"{folder}{slash}"])
    names = ["ids.txt", "ims.npy", "ims_bbx.npy", "ims_size.npy", "num_boxes.npy"]
    assert sorted(os.listdir(folder)) == names
    said = capsys.readouterr().out
    assert "--out is a folder" in said and f"{folder}/ims.npy: 1 images" in said
    (tmp_path / "train").mkdir()  # perhaps of pictures: train_ims.npy stands beside it
    convert([tsv], str(tmp_path / "train"))
    assert (tmp_path / "train_ims.npy").exists() and not os.listdir(tmp_path / "train")


def test_the_target_is_checked_before_reading(tmp_path, monkeypatch):
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("a")))
    monkeypatch.setattr(convert_data, "read_rows", lambda paths: pytest.fail("it reads"))
    (tmp_path / "dev_ims.npy").mkdir()
    with pytest.raises(ValueError, match="dev_ims.npy is a folder; move it away"):
        convert([tsv], str(tmp_path / "dev"))
    with pytest.raises(ValueError, match="cannot make the folder .*x.tsv"):
        convert([tsv], str(tmp_path / "x.tsv" / "dev"))


def test_runs_by_its_path_and_feeds_training(tiny):
    """Run the published command from another folder, then a training step on its output."""
    for split, n in (("train", 20), ("dev", 10)):
        images = [made(f"{split}{i}", 1 + i % 4, 12) for i in range(n)]
        write_tsv(tiny / f"{split}.tsv", *map(fields, images))
        script = ROOT / "util" / "convert_data.py"
        out = f"data/tiny_precomp/{split}"
        args = [sys.executable, script, f"{split}.tsv", "--out", out, "--max_boxes", "4"]
        done = subprocess.run(args, capture_output=True, text=True)
        assert done.returncode == 0 and f"{n} images" in done.stdout, done.stderr
    train.main(train_args(num_epochs=1))


@pytest.mark.parametrize(
    "text", ["8\n\n8\n7\n\n", "\ufeff8\n8\n7\n", " 8\n8 \n7", "8\r\n8\r\n7\r\n"]
)
def test_a_list_with_blanks_is_written_anew(tmp_path, text):
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("7")), fields(made("8")))
    listed = tmp_path / "train_ids.txt"
    listed.write_bytes(text.encode())
    convert_data.main([tsv, "--out", str(tmp_path / "train"), "--ids", str(listed)])
    assert listed.read_bytes() == b"8\n8\n7\n"
    check(tmp_path / "train", made("8"), made("7"))


@pytest.mark.parametrize(
    ("out", "right"),
    [
        *(("x/train_ims.npy", "x/train"), ("x/dev_ids.txt", "x/dev"), ("x/test_", "x/test")),
        *(("x/test.npy", "x/test"), ("", "data/my_precomp/train"), ("_", "data/my_precomp/train")),
    ],
)
def test_the_name_of_a_file_is_no_target(tmp_path, monkeypatch, out, right):
    monkeypatch.chdir(tmp_path)
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("a")))
    with pytest.raises(ValueError, match=f"--out '{out}': expected .* such as --out {right}$"):
        convert_data.main([tsv, "--out", out])
    assert os.listdir(tmp_path) == ["x.tsv"]
