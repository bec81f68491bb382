"""Folders of pictures become a split: aligned files, broken pictures, stops, other settings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow")

from tests.tiny_backend import (  # noqa: F401
    CELLS,
    DIM,
    OUT,
    arrays,
    check_rows,
    draw,
    extract,
    files,
    ids,
    photo_folder,
)
from util import extract_regions, visualize
from util.cli import InputError

ROOT = Path(__file__).resolve().parent.parent


def test_all_pictures_by_name(photos, capsys):
    extract()
    check_rows(sorted(x.name for x in photos.iterdir()), photos)
    assert "7 images, 9 regions of 6 numbers" in capsys.readouterr().out
    assert not list(OUT.glob("*.part")) and not (OUT / "test_caps.txt").exists()
    boxes = arrays()["ims_bbx"][0]
    width, height = arrays()["ims_size"][0]
    assert boxes.min() == 0 and tuple(boxes[:, 2:].max(0)) == (width, height)


@pytest.mark.parametrize("batch", [1, 2, 3, 32])
@pytest.mark.parametrize("broken", [["a b.JPG"], ["é.jpeg"], ["a b.JPG", "b.jpg", "é.jpeg"]])
def test_broken_pictures_are_named_and_all_files_stay_aligned(photos, capsys, batch, broken):
    (photos / broken[0]).write_bytes(b"")
    for name in broken[1:]:
        (photos / name).write_bytes((photos / name).read_bytes()[:300])
    names = sorted(x.name for x in photos.iterdir())
    Path("caps.txt").write_text("".join(f"{x}\tof {x} {k}\n" for k in range(5) for x in names))
    extract("--captions", "caps.txt", batch=batch)
    said = capsys.readouterr().out
    assert f"skipped {len(broken)} of 7 pictures: " in said
    assert f"notice: {5 * len(broken)} captions are of pictures that were skipped" in said
    assert "7 pictures read in" in said
    assert all(f"'{name}'" in said for name in broken)
    left = [name for name in names if name not in broken]
    check_rows(left, photos)
    captions = (OUT / "test_caps.txt").read_text().splitlines()
    assert captions == [f"of {x} {k}" for x in left for k in range(5)]
    assert json.loads((OUT / "test_extractor.json").read_text())["skipped"] == sorted(broken)


def test_nothing_can_be_read(photos):
    for path in photos.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(
        InputError, match="none of the pictures could be read, the first: .*a b.JPG"
    ):
        extract()
    assert not files()
    empty = Path("empty")
    empty.mkdir()
    with pytest.raises(InputError, match="empty: no pictures in it"):
        extract_regions.main(["empty", "--out", "data/x"])
    with pytest.raises(InputError, match="nowhere: no such folder"):
        extract_regions.main(["nowhere", "--out", "data/x"])


def test_photos_are_taken_as_they_are_seen(photos):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    plain = Image.open(photos / "c.png")
    plain.transpose(Image.Transpose.ROTATE_270).save(photos / "seen.png")
    plain.save(photos / "turned.png", exif=exif)
    Path("ids.txt").write_text("seen.png\nturned.png\n")
    extract("--ids", "ids.txt")
    for array in arrays().values():
        assert np.array_equal(array[0], array[1])
    assert arrays()["ims_size"][1].tolist() == (30, 42)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("broken", [False, True])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(photos, monkeypatch, capsys, after, broken):
    if broken:
        (photos / "a b.JPG").write_bytes(b"")
    extract()
    expected = files()
    for path in OUT.iterdir():
        path.unlink()
    write, calls = extract_regions.State.write, []

    def stop(state):
        calls.append(state.done)
        if len(calls) > after:
            # What was not written to the state may stand half in the files.
            with open(Path(state.path).parent / "ims.npy", "ab") as file:
                file.write(b"half a row")
            raise Killed
        write(state)

    monkeypatch.setattr(extract_regions.State, "write", stop)
    with pytest.raises(Killed):
        extract()
    assert not files(), "no file appears before all are whole"
    monkeypatch.setattr(extract_regions.State, "write", write)
    capsys.readouterr()
    extract()
    assert files() == expected and not list(OUT.glob("*.part"))
    assert ("going on behind" in capsys.readouterr().out) == (after > 1)


def test_a_stop_between_the_renamings(photos, monkeypatch):
    extract()
    expected = files()
    for path in OUT.iterdir():
        path.unlink()
    replace, left = os.replace, [3]

    def stop(a, b):
        if ".part/" in str(a) and str(a).endswith("npy"):
            left[0] -= 1
            if not left[0]:
                raise Killed
        replace(a, b)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(Killed):
        extract()
    monkeypatch.setattr(os, "replace", replace)
    extract()
    assert files() == expected and not list(OUT.glob("*.part"))


def test_a_killed_process(photos):
    """SIGKILL at some moment: no final file is there, and the same command ends well."""
    for k in range(60):
        draw(photos / f"more{k}.jpg", (300, 200))
    code = (
        "import sys, time; from util import extract_regions as e; "
        "from util.region_backends import BACKENDS; BACKENDS['tiny'] = 'tests.tiny_backend'; "
        "write = e.State.write; e.State.write = lambda s: (write(s), time.sleep(0.1)); "
        f"e.main('photos --out {OUT} --backend tiny --grid 3 --batch_size 2'.split())"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    state = OUT / "test_extract.part" / "state.json"
    for _ in range(3000):
        if state.is_file() and json.loads(state.read_text())["done"] >= 4:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    assert not files()
    extract()
    check_rows(sorted(x.name for x in photos.iterdir()), photos)


def begin(monkeypatch, *more: str) -> None:
    """An extraction that is stopped after its first batch."""
    write, calls = extract_regions.State.write, []

    def stop(state):
        write(state)
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(extract_regions.State, "write", stop)
        with pytest.raises(Killed):
            extract(*more)


@pytest.mark.parametrize("change", ["grid", "pictures", "state"])
def test_other_settings_are_refused_or_begin_afresh(photos, monkeypatch, change):
    begin(monkeypatch)
    more, said = [], "damaged|expected a JSON object"
    if change == "grid":
        more, said = ["--grid", "4"], "an extraction with grid 3, not 4 was begun"
    elif change == "pictures":
        draw(photos / "new.jpg")
        said = r"an extraction with other pictures \(7 before, now 8\) was begun"
    else:
        (OUT / "test_extract.part" / "state.json").write_text("{half")
    with pytest.raises(InputError, match=said):
        extract(*more)
    extract(*more, "--overwrite")
    check_rows(sorted(x.name for x in photos.iterdir()), photos)
    assert arrays()["ims"].shape[1] == (16 if more else 9)


def test_files_that_are_there(photos, capsys, monkeypatch):
    extract()
    before = files()
    times = {path: path.stat().st_mtime_ns for path in OUT.iterdir()}
    extract()
    assert "is there already, of just these pictures" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in OUT.iterdir()}
    with pytest.raises(InputError, match=r"is there already, of .* settings \(grid 3, not 4\)"):
        extract("--grid", "4")
    assert files() == before
    with monkeypatch.context() as patch:
        begin(patch, "--grid", "4", "--overwrite")
    assert files() == before, "the old files stay until the new ones are whole"
    extract("--grid", "4", "--overwrite")
    assert arrays()["ims"].shape == (7, 16, DIM)
    (OUT / "test_extractor.json").unlink()  # files of another program
    with pytest.raises(InputError, match=r"is there already, .*\(no .*test_extractor.json\)"):
        extract("--grid", "4")


def test_an_empty_folder_of_work_does_not_hide_files_that_are_whole(photos, capsys):
    extract()
    before = files()
    (OUT / "test_extract.part").mkdir()
    extract()
    assert "is there already, of just these pictures" in capsys.readouterr().out
    assert files() == before and not list(OUT.glob("*.part"))


@pytest.mark.parametrize("change", ["fewer", "more", "first", "middle", "last", "short"])
def test_other_pictures_are_seen(photos, change):
    """Also those of the same names and lengths."""
    draw(photos / "long.bmp", (200, 100))
    extract()
    path, said = photos / ("f.bmp" if change == "short" else "long.bmp"), r"\(other pictures\)"
    if change == "fewer":
        path.unlink()
        said = r"\(other pictures \(8 before, now 7\)\)"
    elif change == "more":
        draw(photos / "new.bmp")
        said = r"\(other pictures \(8 before, now 9\)\)"
    else:
        data = bytearray(path.read_bytes())
        at = {"first": 100, "middle": len(data) // 2, "last": -1, "short": len(data) // 4}[change]
        data[at] ^= 255
        path.write_bytes(data)
    with pytest.raises(InputError, match=f"is there already, of .* settings {said}"):
        extract()
    extract("--overwrite")
    check_rows(sorted(x.name for x in photos.iterdir()), photos)


def test_overwrite_replaces_damaged_settings(photos):
    extract()
    (OUT / "test_extractor.json").write_text("{half")
    with pytest.raises(InputError, match="expected a JSON object"):
        extract()
    extract("--overwrite")
    check_rows(sorted(x.name for x in photos.iterdir()), photos)


def test_splits_that_are_extracted_otherwise_are_warned_of(photos, capsys):
    extract(split="train")
    extract(split="dev")
    assert "warning" not in capsys.readouterr().out
    extract("--grid", "4")
    said = capsys.readouterr().out
    assert "train was extracted with grid 3, and test with 4; a model needs them alike" in said


def test_the_attention_picture_finds_the_photos(photos):
    stem = str(OUT / "test")
    assert visualize.recorded_photos(stem) is None
    extract()
    assert visualize.recorded_photos(stem) == str(photos)
    photos.rename("elsewhere")
    assert visualize.recorded_photos(stem) is None


def test_the_bytes_do_not_depend_on_the_day(photos):
    found = []
    for _ in range(2):
        extract("--overwrite")
        found.append(files())
        time.sleep(0.01)
    assert found[0] == found[1]


def test_only_the_features_of_a_network_that_is_whole(photos, monkeypatch):
    from util.region_backends.grid import GridExtractor

    monkeypatch.setattr(GridExtractor, "_maps", lambda s, x: torch.full((len(x), 6, 8, 8), np.nan))
    with pytest.raises(InputError, match="gives NaN or Inf"):
        extract()
    monkeypatch.setattr(GridExtractor, "_maps", lambda s, x: torch.full((len(x), 6, 8, 8), 1e5))
    with pytest.raises(InputError, match="a feature above 65504, too large for float16"):
        extract("--overwrite")
    assert not files()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--grid", str(CELLS + 1)], "--grid 9: the feature map has 8 cells a side"),
        (["--regions", "9"], "--regions is for detectors and --boxes"),
        (["--boxes", "boxes.tsv"], "--grid: --boxes says the regions"),
        (["--half", "--device", "cpu"], "--half is for a GPU"),
    ],
)
def test_options_that_do_not_fit(photos, flags, said):
    with pytest.raises(InputError, match=said):
        extract(*flags)


def test_damaged_settings_are_said(photos):
    assert extract_regions.read_settings(str(OUT / "test")) is None
    extract()
    path = OUT / "test_extractor.json"
    good = json.loads(path.read_text())
    assert extract_regions.read_settings(str(OUT / "test")) == good
    wrong = [json.dumps(good | {key: 3}) for key in ("backend", "weights")]
    for text in ("[]", "{", "[" * 200_000, *wrong):
        path.write_text(text)
        with pytest.raises(InputError, match="test_extractor.json: "):
            extract_regions.read_settings(str(OUT / "test"))
