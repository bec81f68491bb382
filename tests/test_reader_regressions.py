"""Files that readers of arrays and features once took for good ones, or failed on.

Each of them is refused in one line that names the file, in a bounded time and memory; see
reader_cases.py. Random relatives of them are in test_readers.py.
"""

import gzip
import io
import json
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import exports
from data import PrecompDataset, read_counts
from gsmn_data import GraphDataset
from pfan_data import PositionDataset
from score_files import read_mean
from tests import reader_arrays
from tests.conftest import write_graphs, write_positions, write_split
from tests.extracted import fields, made, write_tsv
from tests.reader_cases import Bench, bounded, check_line
from util import positions, region_tsv
from util.arrays import open_array, read_sizes
from util.cli import InputError
from util.convert_data import convert

DIGITS = "9" * 5000


def refused(match: str, read, *arguments, **more) -> str:
    """What a reader says of a file that it refuses."""
    with pytest.raises(InputError, match=match) as error, bounded(memory=2**28):
        read(*arguments, **more)
    check_line(str(error.value))
    return str(error.value)


def npy(shape="(2, 3, 4)", descr="'<f4'", version=(1, 0), length=None, content=b"") -> bytes:
    """A .npy file with any header."""
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    width = 2 if version == (1, 0) else 4
    length = (len(head) if length is None else length).to_bytes(width, "little")
    return b"\x93NUMPY" + bytes(version) + length + head + content


NUMBERS = bytes(4 * 24)
HEADERS = {
    "a version that is none": npy(version=(1, 1), content=NUMBERS),
    "a header of 3 GiB": npy(version=(2, 0), length=3 * 2**30, content=NUMBERS),
    "a length of 1e30": npy("(1e30, 3, 4)"),
    "a length below 0": npy("(-2, 3, 4)"),
    "a length that is True": npy("(True, 6, 4)", content=NUMBERS),
    "a length of 4000 digits": npy(f"(2, {DIGITS[:4000]}, 4)"),
    "a length of 5000 digits": npy(f"(2, {DIGITS}, 4)"),
    "a length beyond any file": npy(f"({2**62}, {2**62}, 4)"),
    "nothing, of a length beyond any file": npy(f"(0, {2**62}, {2**62})"),
    "many axes": npy(f"({'1, ' * 70})", content=NUMBERS),
    "text of 5000 digits": npy(descr=f"'S{DIGITS}'"),
    "times": npy(descr="'<M8[ns]'", content=2 * NUMBERS),
    "complex numbers": npy(descr="'<c8'", content=2 * NUMBERS),
    "objects": npy(descr="'|O'", content=2 * NUMBERS),
    "fields in fields": npy(descr="[('a', [('\\n\\x1b[2J" + 900 * "b" + "', '<f4')])]"),
    "arrays in an array": npy(descr="('<f4', (1, 2))", content=2 * NUMBERS),
    "fields with titles": npy(descr="[(('title', 'a'), '<f4')]", content=NUMBERS),
    "no numbers at all": npy(descr="'|V0'"),
    "lists in lists": npy(9000 * "["),
    "signs before signs": npy(9000 * "-" + "1"),
    "a name": npy(descr="__import__('os')"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused(tmp_path, name):
    path = tmp_path / "x.npy"
    path.write_bytes(HEADERS[name])
    refused("x.npy: ", open_array, str(path), ndim=3)
    refused("x.npy: ", read_sizes, str(path), rows=2)
    refused("x.npy: ", read_mean, str(path))


def test_a_whole_header_of_3_gib_is_not_read(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(npy(version=(2, 0), length=3 * 2**30))
    os.truncate(path, 3 * 2**30 + 1000)  # sparse: it takes no room
    refused("x.npy: .*header.*3221225472 bytes long", open_array, str(path), ndim=3)


def test_the_builder_makes_whole_files(tmp_path):
    (tmp_path / "x.npy").write_bytes(npy(content=NUMBERS))
    assert open_array(str(tmp_path / "x.npy"), ndim=3).shape == (2, 3, 4)


@pytest.mark.parametrize("count", [2.9, np.nan, np.inf, -1, 0, 1e30, 4, 2j, True, "2"])
def test_counts_of_regions_are_whole_numbers_of_regions_that_are_there(tmp_path, count):
    path = tmp_path / "dev_num_boxes.npy"
    np.save(path, np.array([2, count, 1]) if not isinstance(count, bool) else np.array([count] * 3))
    refused("dev_num_boxes.npy: ", read_counts, str(tmp_path / "dev"), rows=3, regions=3)


# Features of one image


def write_npz(path: Path, **changed) -> str:
    """The .npz file of an image, with some arrays changed or (None) left out."""
    arrays = reader_arrays.of_picture() | changed
    np.savez_compressed(path, **{name: x for name, x in arrays.items() if x is not None})
    return str(path)


NPZ = {
    **{f"num_boxes {x}": {"num_bbox": x} for x in (2.9, np.nan, np.inf, -1, 1e30, 1j, "3")},
    "no number of boxes": {"num_bbox": []},
    **{f"width {x}": {"image_w": x} for x in (np.nan, np.inf, 0, -5, 1e30, "640", None, 1j)},
    "no width in it": {"image_w": []},
    "features of no axis": {"features": 3.0, "bbox": None, "num_bbox": None},
    "features of five axes": {"features": np.ones((2, 1, 3, 1, 8))},
    "fields of long names": {"features": np.zeros(3, [("\n" * 5000, "<f4")])},
    "an id of two lines": {"image_id": "a\nb"},
    "an id that moves the cursor": {"image_id": "\x1b[2J"},
    "a long id": {"image_id": "a" * 201},
    "a blank id": {"image_id": " "},
}


@pytest.mark.parametrize("name", NPZ)
def test_a_hostile_array_of_an_image_is_refused(tmp_path, capsys, name):
    if name == "width None":  # the sizes are missing in one file only
        write_npz(tmp_path / "other.npz", image_id="other")
    write_npz(tmp_path / "x.npz", **NPZ[name])
    refused("x.npz|none of the requested", convert, [str(tmp_path)], str(tmp_path / "out"))
    for line in capsys.readouterr().out.splitlines():
        check_line(line)
    assert not list(tmp_path.glob("out*"))


def rewritten(data: bytes, change: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> bytes:
    """An archive in which some members are others, with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change.get(name, old.read(name)))
    return out.getvalue()


def bomb(size: int) -> bytes:
    """A .npz file of a few kilobytes that says, truly, that its features unpack to `size`."""
    head = npy(f"({size // 4096}, 1024)")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = first + block * (size // 2**20) + packer.flush()
    name, total = b"features.npy", len(head) + size
    about = struct.pack("<HHHHHLLLHH", 20, 0, 8, 0, 0, 0, len(packed), total, len(name), 0)
    local = b"PK\x03\x04" + about + name + packed
    table = b"PK\x01\x02" + b"\x14\0" + about + bytes(10) + bytes(4) + name
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(table), len(local), 0)
    return local + table + end


def test_a_member_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(bomb(3 * 2**30))
    assert path.stat().st_size < 2**22
    refused(
        "x.npz: .*features unpacks to 32212.* bytes", convert, [str(path)], str(tmp_path / "out")
    )


def test_a_small_member_is_not_believed_to_be_large(tmp_path):
    path = Path(write_npz(tmp_path / "x.npz"))
    for change in (npy(f"({2**40}, 2)"), npy("(1e30,)"), b"", b"text", HEADERS["lists in lists"]):
        path.write_bytes(rewritten(path.read_bytes(), {"features.npy": change}))
        refused("x.npz: ", convert, [str(path)], str(tmp_path / "out"))


def test_members_that_are_packed_in_an_odd_way_are_refused(tmp_path):
    path = Path(write_npz(tmp_path / "x.npz"))
    path.write_bytes(rewritten(path.read_bytes(), {}, zipfile.ZIP_LZMA))
    refused("x.npz: .*compressed in a way", convert, [str(path)], str(tmp_path / "out"))


def test_a_damaged_table_of_an_archive_is_noticed(tmp_path):
    """Checksums are of the members: without a name in the table, an array is not there."""
    path = Path(write_npz(tmp_path / "x.npz"))
    whole = path.read_bytes()
    table = whole.index(b"PK\x01\x02")
    renamed = whole[:table] + whole[table:].replace(b"image_h.npy", b"image_g.npy")
    entry = whole.rindex(b"PK\x01\x02")
    swallowed = whole[: entry - len("image_w.npy") - 14] + b"\x3f\0" + whole[entry - 23 :]
    for data in (renamed, whole[:entry] + whole[whole.index(b"PK\x05\x06") :], swallowed):
        path.write_bytes(data)
        refused("x.npz: not a whole .npz file", convert, [str(path)], str(tmp_path / "out"))


def test_no_bit_of_the_table_of_an_archive_changes_what_is_read(tmp_path):
    reader = next(x for x in reader_arrays.READERS if x.name == "npz")
    bench = Bench(reader, tmp_path)
    start = bench.valid.index(b"PK\x01\x02")  # the table has no checksum of its own
    for place in range(start, len(bench.valid), 6):
        data = bytearray(bench.valid)
        data[place] ^= 1 << random.Random(place).randrange(8)
        bench.try_one(bytes(data))


TSV = {
    **{f"num_boxes {x}": (3, x) for x in ("2.9", "nan", "inf", "-3", "1e9", "1e400", DIGITS, "")},
    **{f"width {x}": (1, x) for x in ("1e30", "nan", "inf", "-1", "0", DIGITS, "\x1b[2J", "")},
    "an id of a line": (0, "a\x85b"),
    "a long id": (0, "a" * 201),
    "huge features": (5, "A" * 2**20),
    "huge boxes": (4, "A" * 2**20),
}


@pytest.mark.parametrize("name", TSV)
def test_a_hostile_field_of_a_row_is_refused(tmp_path, capsys, name):
    column, value = TSV[name]
    row = fields(made("a"))
    row[column] = value
    tsv = write_tsv(tmp_path / "x.tsv", fields(made("b")), row)
    if column:
        refused("x.tsv: row 2: ", convert, [tsv], str(tmp_path / "out"))
    else:  # its image cannot be told
        assert convert([tsv], str(tmp_path / "out")) == 1
    for line in capsys.readouterr().out.splitlines():
        check_line(line)


HEAD = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]


@pytest.mark.parametrize("name", ["image_i\0", "", "\x1b[2J", "n" * 70_000], ids=range(4))
def test_a_damaged_header_is_named(tmp_path, name):
    for place in (0, 3):
        head = [name if k == place else x for k, x in enumerate(HEAD)]
        tsv = write_tsv(tmp_path / "x.tsv", head, fields(made("a")))
        missing = HEAD[place]
        refused(f"x.tsv: row 1: .*without {missing}", convert, [tsv], str(tmp_path / "out"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_an_end_is_not_read_whole(tmp_path, packed):
    """Eight lines of 128 MiB each unpack from 1 MiB."""
    path = tmp_path / ("x.tsv.gz" if packed else "x.tsv")
    if packed:
        part = gzip.compress(bytes(2**20).replace(b"\0", b"a"))
        path.write_bytes(part * 512)
    else:
        path.touch()
        os.truncate(path, 2**33)  # sparse
        with open(path, "r+b") as file:
            file.write(b"image\t")
    said = refused("line 1 has more than 16,777,216", convert, [str(path)], str(tmp_path / "out"))
    assert path.name in said


def test_rows_that_are_broken_into_lines_do_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(region_tsv, "LONGEST_ROW", 1000)
    lines = ['a\t"', *("b" * 100 for _ in range(1000))]
    rows = [line for _, line in region_tsv.logical_lines(lines)]
    assert max(map(len, rows)) <= 1000 and sum(map(len, rows)) == sum(map(len, lines))


# Other files of a split, and scores


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    write_split(folder, "dev", 4, 2, 3, 6)
    write_graphs(folder, "dev", reader_arrays.VOCABULARY)
    write_positions(folder, "dev", 6)
    return folder


@pytest.fixture
def spoil(split):
    """Writes a file of a split; its old content comes back after the test."""
    before = {}

    def write(name: str, content: bytes) -> None:
        path = split / f"dev_{name}"
        before.setdefault(path, path.read_bytes() if path.exists() else None)
        path.write_bytes(content)

    yield write
    for path, content in before.items():
        path.unlink() if content is None else path.write_bytes(content)


def read_split(folder: Path, dataset=GraphDataset, **more) -> None:
    found = dataset(str(folder), "dev", reader_arrays.VOCABULARY, **more)
    for image in range(found.n_images):
        found.image_item(image)


DEEP = b"[" * 100_000
TEXTS = {
    "word ids of 5000 digits": ("precaps_stan.txt", f"1,{DIGITS}\n".encode() * 8),
    "word ids of 4000 digits": ("precaps_stan.txt", f"1,{DIGITS[:4000]}\n".encode() * 8),
    "word ids below 0": ("precaps_stan.txt", f"1,-{DIGITS[:4000]}\n".encode() * 8),
    "deep dependencies": ("caps.json", DEEP + b"]" * 100_000),
    "unclosed dependencies": ("caps.json", DEEP),
    "dependencies of 5000 digits": ("caps.json", f"[[[0, {DIGITS}]]]".encode()),
    "dependencies that are no numbers": ("caps.json", b"[[[0, NaN]]]" + b" " * 9),
    "long texts as dependencies": ("caps.json", json.dumps(["x" * 10**6] * 8).encode()),
    "rows of 5000 digits": ("caption_image.txt", f"{DIGITS}\n".encode() * 8),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_list_of_a_split_is_refused(split, spoil, name):
    file, content = TEXTS[name]
    spoil(file, content)
    refused(f"dev_{file}: ", read_split, split, dependencies=True)


@pytest.mark.parametrize("block", [np.nan, np.inf, 1e30, -1, 2.5])
def test_blocks_that_are_none_are_refused(split, spoil, block):
    blocks = np.load(split / "dev_boxes.npy")
    blocks[2, 1, 0] = block
    file = io.BytesIO()
    np.save(file, blocks)
    spoil("boxes.npy", file.getvalue())
    refused("dev_boxes.npy: row 2 .*region 1", read_split, split, PositionDataset)


def test_images_without_boxes_are_refused(split, spoil):
    spoil("ims_bbx.npy", npy("(4, 0, 4)"))
    stem, target = str(split / "dev"), str(split / "new.npy")
    refused(r"dev_ims_bbx.npy: .*\(4, 0, 4\)", positions.convert, stem, target=target)
    spoil("ims.npy", npy("(0, 3, 6)"))
    refused("dev_ims.npy: ", read_split, split, PrecompDataset)


SIMS = {
    "a text": "x" * 10**6,
    "lists of odd lengths": [[1.0], [1.0, 2.0]],
    "nothing": None,
    "objects": np.array([[{}]], dtype=object),
    "whole numbers": np.ones((2, 2), int),
}


@pytest.mark.parametrize("name", SIMS)
def test_what_is_no_matrix_of_scores_is_refused(tmp_path, name):
    np.save(tmp_path / "s.npy", np.array({"sims": SIMS[name]}, dtype=object), allow_pickle=True)
    refused("s.npy: ", read_mean, str(tmp_path / "s.npy"))


def test_structured_scores_are_named_in_short(tmp_path):
    np.save(tmp_path / "s.npy", np.zeros((2, 2), [("n" * 9000, "<f4")]))
    refused("s.npy: ", read_mean, str(tmp_path / "s.npy"))


@pytest.mark.parametrize("line", [DIGITS, "-1", "²", "1e0", "nan", ""])
def test_the_images_of_captions_are_rows_of_the_matrix(tmp_path, line):
    np.save(tmp_path / "s.npy", np.ones((2, 3), np.float32))
    (tmp_path / "s_caption_image.txt").write_text(f"0\n{line}\n1\n", encoding="utf-8")
    refused("s_caption_image.txt: expected 3 lines", read_mean, str(tmp_path / "s.npy"))


@pytest.mark.parametrize("text", [DEEP, b'"metrics"', b'["metrics"]', DIGITS.encode(), b"\xff{"])
def test_a_file_of_another_kind_is_not_replaced_by_figures(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    refused("x.json: exists, and holds no figures", exports.check_figures, str(tmp_path / "x.json"))
