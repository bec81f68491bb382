"""Ids of images: which are equal, and which stay apart."""

import numpy as np
import pytest

import extended
from tests.extracted import fields, made, write_tsv
from util.convert_data import main
from util.image_ids import ImageIds, id_key, written_key

ONE = """391895 000000391895 391895.0 391895. 3.918950000000000000e+05 391895.jpg 000000391895.PNG
COCO_val2014_000000391895.jpg COCO_val2014_000000391895 val2014/COCO_val2014_000000391895.jpg
/data/coco/391895.npz 391895.jpg.npz val2014\\391895.jpeg coco_train2014_000000391895""".split()


def test_one_image_in_many_writings():
    assert {id_key(text) for text in (*ONE, " 391895", "391895\t")} == {391895}


@pytest.mark.parametrize(
    "ids",
    [
        ["img_12", "img_13", "img_012", "12", "13", "12.5", "12a", "a12", "1 2", "120"],
        ["12e4", "120000", "0x12", "1_2", "12-1", "12#1", "٣", "3"],
        ["COCO_val2014_12x", "xCOCO_val2014_000000000012", "12.jpg.txt", "12.tar"],
        ["", "/", ".jpg", "jpg", "0"],
    ],
)
def test_other_images_stay_apart(ids):
    assert len({id_key(text) for text in ids}) == len(ids)


@pytest.mark.parametrize("name", ["0", "0.0", "000", "0.jpg", "x/0.png", "COCO_val2014_0.jpg"])
def test_the_image_of_number_0(name):
    assert id_key(name) == 0


def test_names_lose_folder_and_ending():
    assert id_key("a/b/Photo.One.JPG") == id_key("Photo.One") == "Photo.One"
    assert id_key("12.50") == id_key("12.5") != id_key("12")
    assert written_key("12.jpg") == "12.jpg" and written_key("0012") == written_key("12.0") == 12


def test_a_list_that_names_images_again():
    images = ImageIds(["7", "b.jpg", "07", "7.0", "b.jpg", "c"])
    assert images.names == ["7", "b.jpg", "c"] and images.lines == [0, 1, 0, 0, 1, 2]
    assert [images.find(x) for x in ("x/b.png", "0007", "c", "d", "7.jpg")] == [1, 0, 2, None, None]


def test_names_that_differ_only_in_folder_or_ending_are_compared_as_written():
    images = ImageIds(["a/1.jpg", "b/1.jpg", "2.jpg"])
    assert images.alike == [("a/1.jpg", "b/1.jpg")]
    found = [images.find(x) for x in ("1.jpg", "1", "a/1.jpg", "b/1.jpg", "c/2.png")]
    assert found == [None, None, 0, 1, 2]


def test_the_very_id_of_the_list_is_preferred():
    images = ImageIds(["1"])
    assert images.find("a/1.jpg") == 0 and images.find("01") == 0  # the second is the id itself
    assert images.find("a/1.jpg") is None
    with pytest.raises(ValueError, match="'a/2' and 'b/2' of the files both fit '2' in the list"):
        [ImageIds(["2"]).find(x) for x in ["a/2"]]
        images = ImageIds(["2"])
        [images.find(x) for x in ("a/2", "b/2")]


def test_without_a_list_each_writing_of_a_name_is_an_image():
    images = ImageIds()
    assert [images.find(x) for x in ("a/1.jpg", "1", "b/1.jpg", "01", "a/1.jpg")] == [0, 1, 2, 1, 0]
    assert images.names == ["a/1.jpg", "1", "b/1.jpg"]


def test_the_converter_reads_what_extended_writes(tmp_path, capsys):
    pytest.importorskip("eccv_caption")
    extended.write_ids(tmp_path)
    listed = tmp_path / "testall_ids.txt"
    ids = listed.read_text().split()
    assert len(ids) == 25000
    images = [made(f"COCO_val2014_{int(x):012}", 1, 2) for x in sorted(set(ids))]
    tsv = write_tsv(tmp_path / "x.tsv", *map(fields, images))
    main([tsv, "--ids", str(listed), "--out", str(tmp_path / "testall"), "--max_boxes", "1"])
    assert "the 25000 lines of the list of ids name 5000 images" in capsys.readouterr().out
    distinct = list(dict.fromkeys(ids))
    of = {str(int(image.name[-12:])): image.features for image in images}
    np.testing.assert_array_equal(
        np.load(tmp_path / "testall_ims.npy"), np.stack([of[x] for x in distinct])
    )
    assert listed.read_text().split() == ids  # the list stays


def test_the_number_of_a_caption_is_no_part_of_an_id():
    lines = [f"{name}.jpg#{n}" for name in ("1000092795", "b_7") for n in range(5)]
    images = ImageIds(lines)
    assert images.names == ["1000092795.jpg", "b_7.jpg"] and not images.alike
    assert images.lines == [0] * 5 + [1] * 5
    assert [images.find(x) for x in ("b_7", "1000092795.jpg", "b_7.jpg", "7")] == [1, 0, 1, None]
    assert id_key("x/12.PNG#3") == 12 and id_key("a#3") == "a#3"


@pytest.mark.parametrize("exact_first", [False, True])
def test_the_very_id_that_comes_damaged_is_not_replaced(tmp_path, exact_first):
    whole, bad = fields(made("train/1.jpg")), fields(made("val/1.jpg"))
    bad[5] = "AAA"
    rows = [bad, whole] if exact_first else [whole, bad]
    tsv = write_tsv(tmp_path / "x.tsv", *rows)
    (tmp_path / "list.txt").write_text("val/1.jpg\n")
    args = [tsv, "--ids", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="'val/1.jpg': .*features is not base64"):
        main(args)
    write_tsv(tmp_path / "x.tsv", *rows, fields(made("val/1.jpg", 2)))
    main(args)
    assert np.load(tmp_path / "out_num_boxes.npy").tolist() == [2]
