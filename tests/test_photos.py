"""util/photos.py: the photos of a split's images."""

import pytest

from util.cli import InputError
from util.photos import find_photos


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def names(paths):
    return [path and path.rpartition("/")[2] for path in paths]


def test_ids_are_names_file_names_or_numbers(tmp_path, capsys):
    files = "dog.jpg", "cat.JPEG", "a.b.png", "000000000012.jpg", "COCO_val2014_000000000013.jpg"
    touch(tmp_path, *files, "cat.txt", "x.npy")
    ids = ["a.b", "cat.jpg", "dog.jpg#2", "12", "val2014/COCO_val2014_000000000013.jpg", "13.0"]
    found = find_photos(tmp_path, None, "test", ids, len(ids))
    assert names(found) == ["a.b.png", "cat.JPEG", "dog.jpg", *files[3:], files[4]]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("id", "photo"), [("7", "7.jpg"), ("07", "07.png"), ("007", None)])
def test_the_id_as_it_is_written_comes_first_and_two_that_fit_are_none(tmp_path, id, photo):
    touch(tmp_path, "7.png", "7.jpg", "07.png", "9.png")
    assert names(find_photos(tmp_path, None, "test", ["9", id], 2)) == ["9.png", photo]


def test_folder_of_the_split_and_pictures_of_the_data(tmp_path, capsys):
    touch(tmp_path / "data/pictures/dev", "a.png")
    touch(tmp_path / "data/pictures/test", "a.png")
    touch(tmp_path / "mine", "a.jpg")
    data = tmp_path / "data"
    pictures, mine = str(data / "pictures"), str(tmp_path / "mine")
    assert find_photos(None, data, "test", ["a"], 1) == [f"{pictures}/test/a.png"]
    assert find_photos(pictures, None, "dev", ["a"], 1) == [f"{pictures}/dev/a.png"]
    assert find_photos(mine, data, "dev", ["a"], 1) == [f"{mine}/a.jpg"]
    assert find_photos(None, tmp_path, "test", ["a"], 1) == [None]
    assert find_photos(None, None, "", None, 2) == [None, None]
    assert capsys.readouterr().out == ""


def test_missing_photos_are_said_once(tmp_path, capsys):
    touch(tmp_path, "a.png")
    assert names(find_photos(tmp_path, None, "test", ["b", "a", "c"], 3)) == [None, "a.png", None]
    said = f"notice: {tmp_path}: 2 of the 3 photos are not there; the first is 'b'\n"
    assert capsys.readouterr().out == said
    with pytest.raises(InputError, match="none: no such folder of photos"):
        find_photos(tmp_path / "none", None, "test", ["a"], 1)


@pytest.mark.parametrize(
    ("there", "total", "said"),
    [
        (["a", "b"], 3, "1 of the 3 photos is not there; it is 'c'"),
        (["b"], 4, "3 of the 4 photos are not there; the first is 'a'"),
        ([], 2, "none of the 2 photos is there; the first is 'a'"),
        (["x"], 1, "the photo of the only image is not there; it is 'a'"),
    ],
)
def test_a_notice_counts_the_missing_photos(tmp_path, capsys, there, total, said):
    touch(tmp_path, *(f"{name}.png" for name in there))
    find_photos(tmp_path, None, "test", list("abcd")[:total], total)
    assert capsys.readouterr().out == f"notice: {tmp_path}: {said}\n"


@pytest.mark.parametrize(
    ("files", "all_there"),
    [
        (["0.jpg", "1.jpg", "2.jpg"], True),
        (["0000.png", "0001.png", "0002.png", "0003.png"], True),
        (["1.jpg", "2.jpg", "3.jpg"], False),
        (["139.jpg", "2.jpg", "0.jpg"], False),
        ([], False),
    ],
)
def test_without_ids_the_numbers_must_be_complete(tmp_path, files, all_there, capsys):
    touch(tmp_path, *files)
    found = find_photos(tmp_path, None, "test", None, 3)
    assert names(found) == (files[:3] if all_there else [None] * 3)
    assert capsys.readouterr().out.startswith("notice: ") != all_there


def test_two_pictures_of_one_stem_are_two_images(tmp_path, capsys):
    touch(tmp_path, "a.jpg", "a.png", "b.webp", "c.GIF", "d.tif", "e.bmp")
    ids = ["a.png", "a.jpg", "b", "c.gif", "d.tif", "e"]
    found = names(find_photos(tmp_path, None, "test", ids, len(ids)))
    assert found == ["a.png", "a.jpg", "b.webp", "c.GIF", "d.tif", "e.bmp"]
    assert capsys.readouterr().out == ""
