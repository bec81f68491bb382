"""The inputs of the converter: tsv files as people have them, LXMERT's, .npz files, HDF5."""

import base64
import csv
import gzip
import textwrap

import numpy as np
import pytest

from tests.extracted import Made, b64, check, fields, ids_of, made, write_tsv
from util.convert_data import convert, main
from util.region_files import read_rows

IMAGES = [made(f"COCO_val2014_00000000{n:04d}", 2 + n % 3, 6) for n in (11, 7, 300)]
NAMES = [image.name for image in IMAGES]


def encoded(image: Made, wrap) -> list[str]:
    """The fields of an image with base64 in another form."""
    line = fields(image)
    raw = [base64.b64decode(text) for text in line[4:]]
    return [*line[:4], *map(wrap, raw)]


WRAPS = {
    "lines": lambda raw: base64.encodebytes(raw).decode(),
    "lines of 64": lambda raw: "\n".join(textwrap.wrap(base64.b64encode(raw).decode(), 64)),
    "spaces": lambda raw: " ".join(base64.encodebytes(raw).decode().split()),
    "bytes": lambda raw: str(base64.b64encode(raw)),
    "bytes in lines": lambda raw: str(base64.encodebytes(raw)),
    "blanks": lambda raw: f"  {base64.b64encode(raw).decode()} ",
}


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, None])
@pytest.mark.parametrize("kind", WRAPS)
def test_base64_in_other_forms(tmp_path, kind, quoting):
    rows = [encoded(image, WRAPS[kind]) for image in IMAGES]
    with open(tmp_path / "x.tsv", "w", newline="") as file:
        if quoting is None:
            file.writelines("\t".join(row) + "\r\n" for row in rows)
        else:
            csv.writer(file, delimiter="\t", quoting=quoting).writerows(rows)
    convert([str(tmp_path / "x.tsv")], str(tmp_path / "out"))
    check(tmp_path / "out", *IMAGES)
    assert ids_of(tmp_path / "out") == NAMES


def test_blank_rows_a_header_and_damage_between_broken_lines(tmp_path, capsys):
    names = ["img_id", "img_h", "img_w", "num_boxes", "features", "boxes", "more"]
    rows = []
    for image in IMAGES:
        name, width, height, n, boxes, features = encoded(image, WRAPS["lines"])
        rows += [[name, height, width, n, features, f'"{boxes}"', "x"], [""]]
    rows.insert(2, ["cut", "12", "34"])
    tsv = write_tsv(tmp_path / "x.tsv", ["", "", ""], names, *rows)
    convert([tsv], str(tmp_path / "out"), ids=NAMES)
    check(tmp_path / "out", *IMAGES)
    with pytest.raises(ValueError, match="'cut': .* row .: 3 fields, expected 7: image_id"):
        convert([tsv], str(tmp_path / "out"))


def test_a_stray_quote_damages_one_row(tmp_path, capsys):
    rows = [fields(image) for image in IMAGES]
    rows[1][5] = '"' + rows[1][5][:50]
    tsv = write_tsv(tmp_path / "x.tsv", *rows, fields(IMAGES[1]))
    convert([tsv], str(tmp_path / "out"), ids=NAMES)
    check(tmp_path / "out", *IMAGES)
    assert "row 2" in capsys.readouterr().out


@pytest.mark.parametrize("first", [0, 1, 3])
def test_two_glued_rows_are_no_row_of_lxmert(tmp_path, capsys, first):
    """A row that is cut inside its boxes and the next one have ten fields together."""
    images = [made(n, 4, 6, size=(200, 90)) for n in range(5)]
    rows = [fields(image) for image in images]
    cut, following = rows[first], rows[first + 1]
    glued = [*cut[:4], cut[4][:20] + following[0], *following[1:]]
    assert len(glued) == 10
    tsv = write_tsv(tmp_path / "x.tsv", *rows[:first], glued, *rows[first + 2 :])
    with pytest.raises(ValueError, match=f"row {first + 1}: 10 fields, expected 6: image_id"):
        convert([tsv], str(tmp_path / "bad"))
    more = write_tsv(tmp_path / "more.tsv", *rows)
    convert([tsv, more], str(tmp_path / "out"), ids=list("01234"))
    check(tmp_path / "out", *images)
    rows = [lxmert(image) for image in images]
    rows[first] = fields(images[first])
    with pytest.raises(ValueError, match=f"row {first + 1}: 6 fields, expected 10: image_id"):
        convert([write_tsv(tmp_path / "x.tsv", *rows)], str(tmp_path / "bad"))


def broken(row: list[str], index: int, place: int) -> list[str]:
    return [*row[:index], f"{row[index][:place]}\n{row[index][place:]}", *row[index + 1 :]]


@pytest.mark.parametrize(("index", "place"), [(1, 1), (4, 0), (4, 9), (5, 0), (5, 50)])
def test_the_tail_of_a_broken_row_is_no_image(tmp_path, index, place):
    images = [made(n, 4, 6) for n in range(3)]
    rows = [fields(image) for image in images]
    tsv = write_tsv(tmp_path / "x.tsv", rows[0], broken(rows[1], index, place), *rows[1:])
    convert([tsv], str(tmp_path / "out"))
    check(tmp_path / "out", *images)


def test_ids_that_cannot_be_read_and_long_ones(tmp_path, capsys):
    long = "x" * 150
    rows = [fields(made(name)) for name in ("a", "b" * 300, "c\x01", long)]
    rows.append([long, *rows[3][1:5], "AAA"])
    convert([write_tsv(tmp_path / "x.tsv", *rows)], str(tmp_path / "out"))
    assert ids_of(tmp_path / "out") == ["a", long]
    said = capsys.readouterr().out
    assert said.count("no image id that can be read") == 2 and long[:40] in said
    assert long[:50] not in said


def test_compressed_files(tmp_path):
    whole = "".join("\t".join(fields(image)) + "\n" for image in IMAGES).encode()
    for name in ("x.tsv.gz", "x.tsv"):  # whatever it is called
        (tmp_path / name).write_bytes(gzip.compress(whole))
        convert([str(tmp_path / name)], str(tmp_path / "out"))
        check(tmp_path / "out", *IMAGES)
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(ValueError, match="x.tsv.gz: the compressed file is cut or damaged behind"):
        convert([str(tmp_path / "x.tsv.gz")], str(tmp_path / "out"))


def test_other_files_are_named(tmp_path):
    path = tmp_path / "x.tsv"
    for content, kind in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git-LFS pointer"),
        (b"<!DOCTYPE html><html><body>Quota exceeded</body></html>", "a web page"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"x.tsv: expected a tsv, .*, found .*{kind}"):
            convert([str(path)], str(tmp_path / "out"))


def lxmert(image: Made, **types) -> list[str]:
    name, width, height, n, boxes, features = fields(image, **types)
    ints, floats = b64(np.arange(len(image.boxes)), "<i8"), b64(np.ones(len(image.boxes)))
    return [name, height, width, ints, floats, ints, floats, n, boxes, features]


@pytest.mark.parametrize("name", ["123", "COCO_train2014_000000000123", "vg/123.jpg"])
def test_the_ten_fields_of_lxmert(tmp_path, name):
    images = [made(name, 4, 7, size=(200, 90)), made("5", 2, 7, size=(50, 300))]
    tsv = write_tsv(tmp_path / "x.tsv", *map(lxmert, images))
    other = write_tsv(tmp_path / "y.tsv", fields(made("6", 3, 7)))
    convert([tsv, other], str(tmp_path / "out"), ids=["6", name, "5"])
    check(tmp_path / "out", made("6", 3, 7), *images)
    wrong = lxmert(images[0])
    wrong[9] = wrong[9][:-8]
    tsv = write_tsv(tmp_path / "x.tsv", wrong, lxmert(images[1]))
    with pytest.raises(ValueError, match="x.tsv: row 1: features"):
        convert([tsv], str(tmp_path / "out"))


def write_npz(path, image: Made, turned=False, **more) -> None:
    """As bottom-up-attention.pytorch writes an image; `info` is pickled."""
    info = {"image_id": image.name, "objects_conf": np.ones(3)}
    arrays = {
        "x": image.features.T if turned else image.features,
        "bbox": image.boxes,
        "num_bbox": len(image.boxes),
        "image_w": image.size[0],
        "image_h": image.size[1],
        "info": info,
    }
    arrays = {name: x for name, x in (arrays | more).items() if x is not None}
    np.savez_compressed(path, **arrays)


@pytest.mark.parametrize("turned", [False, True])
def test_a_folder_of_npz(tmp_path, turned):
    folder = tmp_path / "features"
    (folder / "more").mkdir(parents=True)
    for place, image in zip(("", "more/", ""), IMAGES, strict=True):
        write_npz(folder / f"{place}{image.name}.jpg.npz", image, turned)
    main([str(folder), "--out", str(tmp_path / "all")])
    assert ids_of(tmp_path / "all") == [f"{NAMES[n]}.jpg" for n in (0, 2, 1)]
    check(tmp_path / "all", IMAGES[0], IMAGES[2], IMAGES[1])
    files = sorted(map(str, folder.rglob("*.npz")))
    convert(files, str(tmp_path / "out"), ids=["300", "11", "000000000007"])
    check(tmp_path / "out", IMAGES[2], IMAGES[0], IMAGES[1])


def test_other_names_in_npz(tmp_path):
    image = IMAGES[0]
    longer = [np.pad(x, ((0, 5), (0, 0))) for x in (image.features, image.boxes)]
    write_npz(
        tmp_path / "file.npz",
        image._replace(features=longer[0].astype(np.float16)),
        **{"bbox": None, "boxes": longer[1].astype(np.float64), "num_bbox": None, "x": None},
        **{"features": longer[0][None].astype(np.float64), "num_boxes": [len(image.boxes)]},
        **{"image_id": np.array(77), "image_w": None, "image_h": None},
        **{"image_width": 100.0, "image_height": 80.0},
    )
    convert([str(tmp_path / "file.npz")], str(tmp_path / "out"))
    check(tmp_path / "out", image)
    assert ids_of(tmp_path / "out") == ["77"]


@pytest.mark.parametrize("names", [["train/1", "val/1"], ["1/feats", "2/feats", "other"]])
def test_npz_files_of_equal_names_stay_apart(tmp_path, names):
    images = [made(name, 3, 6) for name in names]
    for image in images:
        path = tmp_path / "features" / f"{image.name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, image)
    convert([str(tmp_path / "features")], str(tmp_path / "out"))
    assert sorted(ids_of(tmp_path / "out")) == sorted(names)
    convert([str(tmp_path / "features")], str(tmp_path / "out"), ids=names)
    check(tmp_path / "out", *images)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
            "a git-LFS pointer",
        ),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (b"some text", "bytes of another kind"),
    ],
)
def test_a_npz_that_is_none_is_called_what_it_is(tmp_path, content, kind):
    (tmp_path / "1.npz").write_bytes(content)
    with pytest.raises(ValueError, match=f"1.npz: expected a .npz file, found {kind}") as error:
        convert([str(tmp_path)], str(tmp_path / "out"))
    assert "pickle" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "no features in it, expected one of features, x"),
        ({"x": np.array([{"a": 1}])}, "not a whole .npz file of arrays of numbers .*pickle"),
        ({"x": np.array(["text"])}, "features of type <U4, expected numbers"),
        ({"bbox": np.ones((2, 5))}, r"boxes of shape \(2, 5\), expected \(R, 4\)"),
        ({"bbox": np.ones((3, 4))}, r"features of shape \(4, 6\) for 4 boxes"),
        ({"num_bbox": 40}, r"features of shape \(4, 6\) for 40 boxes"),
        ({"num_bbox": 0}, r"features of shape \(4, 6\) for 0 boxes"),
        ({"x": np.full((4, 6), np.nan)}, "NaN or Inf among features"),
        ({"bbox": None}, "no boxes, which other images have"),
        ({"image_h": None}, "no image_w and image_h, which other images have"),
    ],
)
def test_a_damaged_npz_is_skipped_or_named(tmp_path, capsys, change, message):
    image = made("9", 4, 6)
    for n in range(3):
        write_npz(tmp_path / f"{n}.npz", made(n, 4, 6))
    write_npz(tmp_path / "bad.npz", image, **change)
    with pytest.raises(ValueError, match=f"'bad': .*bad.npz: {message}"):
        convert([str(tmp_path)], str(tmp_path / "out"))
    write_npz(tmp_path / "last.npz", image, image_id="bad")
    assert convert([str(tmp_path)], str(tmp_path / "out")) == 4
    assert "bad.npz" in capsys.readouterr().out


def test_a_cut_npz_and_an_empty_folder(tmp_path):
    write_npz(tmp_path / "1.npz", IMAGES[0])
    whole = (tmp_path / "1.npz").read_bytes()
    (tmp_path / "1.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="'1': .*1.npz: not a whole .npz file"):
        convert([str(tmp_path)], str(tmp_path / "out"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: no .npz files in this folder"):
        convert([str(tmp_path / "none")], str(tmp_path / "out"))


def test_features_alone_are_enough_for_scan(tmp_path, capsys):
    for image in IMAGES:
        write_npz(tmp_path / f"{image.name}.npz", image, bbox=None, image_w=None, info=None)
    assert convert([str(tmp_path)], str(tmp_path / "out"), ids=NAMES) == 3
    assert "no boxes and no sizes of the images, which GSMN" in capsys.readouterr().out
    assert not (tmp_path / "out_ims_bbx.npy").exists()
    for row, image in enumerate(IMAGES):
        n = np.load(tmp_path / "out_num_boxes.npy")[row]
        np.testing.assert_array_equal(np.load(tmp_path / "out_ims.npy")[row, :n], image.features)
    np.save(tmp_path / "out_ims_bbx.npy", np.zeros((2, 2, 4)))
    with pytest.raises(ValueError, match="out_ims_bbx.npy: of other images, and these come withou"):
        convert([str(tmp_path)], str(tmp_path / "out"))


def test_features_without_boxes_and_count(tmp_path, capsys):
    for image in IMAGES:
        nothing = dict.fromkeys(("bbox", "num_bbox", "image_w", "image_h", "info"))
        write_npz(tmp_path / f"{image.name}.npz", image, **nothing)
    assert convert([str(tmp_path)], str(tmp_path / "out"), ids=NAMES) == 3
    assert "no boxes and no sizes of the images" in capsys.readouterr().out
    counts = np.load(tmp_path / "out_num_boxes.npy").tolist()
    assert counts == [len(image.boxes) for image in IMAGES]


def write_groups(file, prefix="") -> None:
    for n, image in enumerate(IMAGES):
        group = file.create_group(f"{prefix}{image.name}")
        group["features"], group["boxes"] = image.features, image.boxes
        for name, value in zip(("img_w", "img_h"), image.size, strict=True):
            if n == 1:
                group.attrs[name] = value
            else:
                group[name] = value
        group["obj_id"] = np.arange(len(image.boxes))


def write_flat(file) -> None:
    for image in IMAGES:
        for name, value in (("features", image.features), ("boxes", image.boxes)):
            file[f"{image.name}_{name}"] = value
        file[f"{image.name}_image_w"], file[f"{image.name}_image_h"] = image.size


def write_stacked(file, text=False) -> None:
    most = max(len(image.boxes) for image in IMAGES)
    for name, part in (("image_features", "features"), ("image_bb", "boxes")):
        arrays = [getattr(image, part) for image in IMAGES]
        file[name] = np.stack([np.pad(x, ((0, most - len(x)), (0, 0))) for x in arrays])
    file["num_boxes"] = [len(image.boxes) for image in IMAGES]
    file["image_id"] = NAMES if text else [int(name[-12:]) for name in NAMES]
    file["image_w"], file["image_h"] = np.transpose([image.size for image in IMAGES])


def write_lengths(file) -> None:
    """Arrays of variable length, as the extractors of nocaps and VisDial write them."""
    import h5py

    for name in ("features", "boxes"):
        data = file.create_dataset(name, (3,), h5py.vlen_dtype(np.float32))
        for n, image in enumerate(IMAGES):
            data[n] = getattr(image, name).ravel()
    file["image_id"] = [int(name[-12:]) for name in NAMES]
    file["width"], file["height"] = np.transpose([image.size for image in IMAGES])


HDF5 = {
    "groups": write_groups,
    "groups in groups": lambda file: write_groups(file, "val2014/"),
    "flat": write_flat,
    "stacked": write_stacked,
    "stacked, ids as text": lambda file: write_stacked(file, text=True),
    "variable length": write_lengths,
}


@pytest.mark.parametrize("kind", HDF5)
def test_hdf5(tmp_path, kind):
    h5py = pytest.importorskip("h5py")
    path = str(tmp_path / "x.h5")
    with h5py.File(path, "w") as file:
        HDF5[kind](file)
    order = [1, 2, 0]
    ids = [str(int(NAMES[n][-12:])) for n in order]
    convert([path], str(tmp_path / "out"), ids=ids)
    check(tmp_path / "out", *(IMAGES[n] for n in order))
    assert convert([path], str(tmp_path / "all")) == 3


def test_bad_hdf5_files_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "x.h5"
    for change, message in (
        (
            lambda file: file.pop("image_id"),
            "x.h5: no image ids in it; expected a dataset image_id",
        ),
        (
            lambda file: (file.pop("image_id"), file.update(image_id=[1, 2])),
            "x.h5: 2 image ids for 3 rows of features",
        ),
        (lambda file: file.pop("image_features"), "x.h5: no features in it, .* but found image_bb"),
        (lambda file: file["num_boxes"].__setitem__(1, 9), "row 1 .from 0.: features of shape"),
        (lambda file: file["image_bb"].__setitem__(2, np.nan), "row 2 .from 0.: NaN or Inf amo"),
    ):
        with h5py.File(path, "w") as file:
            write_stacked(file)
            change(file)
        with pytest.raises(ValueError, match=message):
            convert([str(path)], str(tmp_path / "out"))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="x.h5: not a whole HDF5 file"):
        convert([str(path)], str(tmp_path / "out"))


def test_hdf5_without_h5py_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError, match="x.h5: an HDF5 file, .*: pip install h5py"):
        list(read_rows([str(tmp_path / "x.h5")]))
