"""Which pictures of a folder are taken, and their captions."""

import os
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pillow")

from data import PrecompDataset
from tests.tiny_backend import OUT, check_rows, draw, extract, files, ids, photo_folder  # noqa: F401
from util.cli import InputError
from util.photo_folder import list_photos
from vocab import build_vocab


@pytest.mark.parametrize(
    "written", ["é.jpeg\nc.png\na b.JPG\n", "é\nc\na b.jpg\n", "x/é.jpeg\nc.jpg\na b\n"]
)
def test_a_list_selects_and_orders(photos, written):
    Path("ids.txt").write_text(written)
    extract("--ids", "ids.txt")
    check_rows(["é.jpeg", "c.png", "a b.JPG"], photos)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("b.jpg\nnone.jpg\nnone2.jpg\n", "2 of the 3 pictures of --ids are not in it.*'none.jpg'"),
        ("b.jpg\ntwin\n", "'twin' may be 'twin.jpg' or 'twin.png'"),
        ("b.jpg\nb\n", "two of its ids mean the picture 'b.jpg'"),
    ],
)
def test_lists_that_are_not_clear(photos, written, said):
    draw(photos / "twin.jpg")
    draw(photos / "twin.png")
    Path("ids.txt").write_text(written)
    with pytest.raises(InputError, match=said):
        extract("--ids", "ids.txt")
    assert not OUT.exists()


def test_equal_names_with_other_endings_stay_apart(photos):
    draw(photos / "b.png", seed=8)
    extract()
    check_rows(sorted(x.name for x in photos.iterdir()), photos)


def test_what_is_no_picture_is_not_read(photos, capsys):
    (photos / "inner").mkdir()
    draw(photos / "inner" / "z.jpg")
    (photos / "notes.txt").write_text("x")
    (photos / "photo.heic").write_bytes(b"x")
    (photos / "._b.jpg").write_bytes(b"of a Mac")
    extract()
    said = capsys.readouterr().out
    assert "1 folder is not read" in said and "2 files are not read, such as 'notes" in said
    assert len(ids()) == 7
    with pytest.raises(InputError, match="b.jpg: is a file; give the folder it is in"):
        list_photos(str(photos / "b.jpg"))


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\tb.jpg", " a.jpg", os.fsdecode(b"\xff.jpg")])
def test_names_that_cannot_stand_in_a_list_are_refused(photos, name):
    draw(photos / "x.jpg").rename(photos / name)
    with pytest.raises(InputError, match="cannot stand in a list of ids") as error:
        extract()
    assert "\n" not in str(error.value)


def test_captions_of_a_table(photos, capsys):
    lines = ["b.jpg#0\tA dog .", "c.png\tA cat\twith tabs", "b.jpg#1\ttwo dogs", "zzz.jpg\tother"]
    lines += ["é\tohne Endung", "é.jpeg\tfull"]
    Path("caps.txt").write_text("".join(f"{line}\n" for line in lines))
    extract("--captions", "caps.txt", split="train")
    said = capsys.readouterr().out
    assert "1 line is of other photos, such as 'zzz.jpg'" in said
    assert "no caption of 4 of 7 photos" in said
    captions = (OUT / "train_caps.txt").read_text().splitlines()
    rows = [int(x) for x in (OUT / "train_caption_image.txt").read_text().split()]
    names = [ids("train")[row] for row in rows]
    assert list(zip(names, captions, strict=True)) == [
        ("b.jpg", "A dog ."),
        ("b.jpg", "two dogs"),
        ("c.png", "A cat with tabs"),
        ("é.jpeg", "ohne Endung"),
        ("é.jpeg", "full"),
    ]
    (OUT / "dev_caps.txt").write_text("A dog .\n")
    dataset = PrecompDataset(str(OUT), "train", build_vocab("data", OUT.name, 1))
    assert dataset.n_captions == 5 and dataset.n_images == 3
    assert [dataset.ids[k] for k in dataset.image_of.tolist()] == names


@pytest.mark.parametrize("empty", ["c.png\t", "c.png\t \t ", "c.png#0\t", "zzz.jpg\t"])
def test_empty_captions_are_left_out(photos, capsys, empty):
    Path("caps.txt").write_text(f"b.jpg\tA dog\n{empty}\nb.jpg\ttwo\tdogs\n")
    extract("--captions", "caps.txt")
    said = capsys.readouterr().out
    assert "caps.txt: 1 line is without a caption, the first line 2, and left out" in said
    assert (OUT / "test_caps.txt").read_text() == "A dog\ntwo dogs\n"
    Path("caps.txt").write_text(f"zzz.jpg\tother\n{empty}\n")
    with pytest.raises(InputError, match="line 2: expected a caption behind the tab; found none"):
        extract("--captions", "caps.txt")


@pytest.mark.parametrize("k", [1, 4, 5])
def test_plain_captions_in_the_order_of_the_ids(photos, k):
    names = ["c.png", "b.jpg", "g.gif"]
    Path("ids.txt").write_text("".join(f"{x}\n" for x in names))
    captions = [f"{x} {i}" for x in names for i in range(k)]
    Path("caps.txt").write_text("".join(f"{x}\n" for x in captions))
    extract("--ids", "ids.txt", "--captions", "caps.txt")
    assert (OUT / "test_caps.txt").read_text().splitlines() == captions
    table = OUT / "test_caption_image.txt"
    assert table.exists() == (k != 5)
    if k != 5:
        assert table.read_text().split() == [str(row) for row in range(3) for _ in range(k)]


def test_a_list_with_a_line_per_caption(photos):
    lines = ["c.png", "b.jpg", "c.png", "b.jpg", "b.jpg"]
    Path("ids.txt").write_text("".join(f"{x}\n" for x in lines))
    Path("caps.txt").write_text("".join(f"{x} {k}\n" for k, x in enumerate(lines)))
    extract("--ids", "ids.txt", "--captions", "caps.txt")
    assert ids() == ["c.png", "b.jpg"]
    expected = ["c.png 0", "c.png 2", "b.jpg 1", "b.jpg 3", "b.jpg 4"]
    assert (OUT / "test_caps.txt").read_text().splitlines() == expected
    assert (OUT / "test_caption_image.txt").read_text().split() == list("00111")


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("A dog .\nA cat .\n", [], "no tabs in it"),
        ("b.jpg\tA dog\njust words\n", [], "line 2: expected a file name, a tab and a caption"),
        ("x.jpg\tA dog\n", [], "no captions of these photos: it names 'x.jpg'"),
        ("a\nb\nc\n", ["--ids", "ids.txt"], "3 captions for the 2 lines of --ids"),
        ("", [], "no captions in it"),
    ],
)
def test_captions_that_do_not_fit_are_refused_before_the_work(photos, text, more, said):
    Path("ids.txt").write_text("b.jpg\nc.png\n")
    Path("caps.txt").write_text(text)
    with pytest.raises(InputError, match=said):
        extract("--captions", "caps.txt", *more)
    assert not OUT.exists()


def test_captions_may_come_later_and_are_never_lost(photos, capsys):
    extract()
    before = files()
    names = ids()
    Path("caps.txt").write_text("".join(f"{x}\tof {x}\n" for x in names))
    extract("--captions", "caps.txt")
    assert (OUT / "test_caps.txt").read_text().splitlines() == [f"of {x}" for x in names]
    assert {name: files()[name] for name in before} == before
    Path("caps.txt").write_text("".join(f"{x}\tother {x}\n" for x in names))
    with pytest.raises(InputError, match="test_caps.txt: of other captions; move it away"):
        extract("--captions", "caps.txt")
    extract("--captions", "caps.txt", "--overwrite")
    assert (OUT / "test_caps.txt").read_text().startswith("other")


def test_captions_of_pictures_that_were_replaced_are_named(photos, capsys):
    extract()
    (OUT / "test_caps.txt").write_text("mine\n")
    (photos / "b.jpg").unlink()
    capsys.readouterr()
    extract("--overwrite")
    assert "test_caps.txt: older than these features" in capsys.readouterr().out
    assert (OUT / "test_caps.txt").read_text() == "mine\n"
