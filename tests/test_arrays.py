"""Arrays of a data set: what a file is, if it is no array; pickles of mapped files."""

import bz2
import copy
import gzip
import io
import lzma
import multiprocessing
import os
import pickle
import shlex
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from util.arrays import MappedArray, open_array, read_sizes
from util.cli import InputError
from util.file_kinds import kind_of


def npy(array, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def saved(function, *args, **options) -> bytes:
    stream = io.BytesIO()
    function(*args, stream, **options)
    return stream.getvalue()


def zipped(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("test_ims.npy"))
    return stream.getvalue()


def npz(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3865470\n"
S3 = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'
ARRAY = npy(np.zeros((3, 4, 5), np.float32))
OTHER_FILES = {
    "empty": (b"", "an empty file"),
    "zeros": (bytes(5000), "a download that did not finish"),
    "lfs": (LFS.encode(), "a git-LFS pointer.*git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s9--0f.npy\n", "a git-annex pointer.*git annex get"),
    "html": (b"<!DOCTYPE html><html><title>Google Drive</title>", "a web page.*download it again"),
    "HTML": (b"\xef\xbb\xbf\n  <HTML lang='en'>\n<head>", "a web page"),
    "login": (b"<!-- sign in -->\r\n<html>", "a web page"),
    "s3": (S3.encode(), "an error message of a server"),
    "npz": (npz(features=np.zeros(3)), r"an archive of arrays \(.npz\); expected one array"),
    "zip": (zipped(readme=b"a"), "a zip archive: unpack it"),
    "empty zip": (zipped(), "a zip archive"),
    "cut zip": (zipped(readme=b"a" * 99)[:60], "a zip archive that is cut or damaged"),
    "torch": (saved(torch.save, torch.zeros(3)), "a file of torch.save"),
    "old torch": (
        saved(torch.save, [1], _use_new_zipfile_serialization=False),
        "a file of torch.save",
    ),
    "pickle": (pickle.dumps([1, 2]), "a Python pickle.*np.save"),
    "python 2": (pickle.dumps([1, 2], 2), "a Python pickle"),
    "gz": (gzip.compress(ARRAY), "gzip: unpack it"),
    "bz2": (bz2.compress(ARRAY, 5), "bzip2: unpack it"),
    "xz": (lzma.compress(ARRAY), "xz: unpack it"),
    "tar": (tarred(), "a tar archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG picture"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_no_array_is_called_what_it_is(tmp_path, name):
    content, message = OTHER_FILES[name]
    path = tmp_path / "test_ims.npy"
    path.write_bytes(content)
    for read in (lambda: open_array(str(path), 3), lambda: open_array(str(path), 1, integers=True)):
        with pytest.raises(InputError, match=rf"test_ims.npy: .*{message}") as raised:
            read()
        assert "truncated" not in str(raised.value) and "\n" not in str(raised.value)
    if content[:1] != b"\x80":  # sizes may be a pickle
        with pytest.raises(InputError, match=message):
            read_sizes(str(path), 1)
    assert kind_of(path)


def test_text_is_shown_and_arrays_are_known(tmp_path):
    path = tmp_path / "x.npy"
    path.write_text("A dog runs on the beach .\nTwo cats .\n")
    assert kind_of(path) is None
    with pytest.raises(InputError, match="a file that begins with b'A dog runs"):
        open_array(str(path), 3)
    path.write_bytes(ARRAY)
    assert kind_of(path) == "a NumPy array (.npy)"
    for text in ("BZh9 is a band .\n", "%PD\n", '[["A", 1]]', "\ufeffCaption\n", "<start> a dog"):
        path.write_text(text, encoding="utf-8")
        assert kind_of(path) is None


def test_only_an_array_that_is_cut_is_called_truncated(tmp_path):
    path = tmp_path / "x.npy"
    for missing in (1, 17, 240):
        path.write_bytes(ARRAY[:-missing])
        found = f"truncated, {len(ARRAY) - missing} bytes of {len(ARRAY)} are here"
        with pytest.raises(InputError, match=found):
            open_array(str(path), 3)
    for cut in (1, 5, 7, 9, 60, 127):
        path.write_bytes(ARRAY[:cut])
        with pytest.raises(InputError, match=f"its header is cut or damaged .*, {cut} bytes are"):
            open_array(str(path), 3)
    path.write_bytes(ARRAY + b"more")  # as numpy reads it
    assert open_array(str(path), 3).shape == (3, 4, 5)


def test_a_damaged_header_is_one_line(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.npy"
    for _ in range(300):
        content = bytearray(ARRAY)
        for at in rng.integers(6, 100, 3):
            content[at] = rng.integers(256)
        path.write_bytes(content)
        try:
            open_array(str(path), 3)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 400
    path.write_bytes(ARRAY.replace(b"(3, 4, 5)", b"(3,-4,-5)"))
    with pytest.raises(InputError, match="damaged"):
        open_array(str(path), 3)


def test_arrays_of_objects_are_explained(tmp_path):
    path = tmp_path / "x.npy"
    ragged = np.empty(3, object)
    ragged[:] = [np.zeros((n, 5), np.float32) for n in (2, 3, 4)]
    for array in (ragged, np.array([{"a": 1}]), np.array([None, 3.0])):
        path.write_bytes(npy(array, allow_pickle=True))
        with pytest.raises(InputError, match="array of Python objects.*_num_boxes.npy") as raised:
            open_array(str(path), 3)
        assert "truncated" not in str(raised.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 4), complex), "found complex128 .*x.real.astype"),
        (np.zeros((2, 3, 4), bool), "found bool of shape"),
        (np.zeros((2, 3, 4), np.uint8), "found uint8 of shape"),
        (np.zeros((2, 3, 4), "U7"), "found text"),
        (np.zeros((2, 3, 4), "V2"), r"found raw bytes \(.*bfloat16"),
        (np.zeros((2,), [("x", "f4"), ("b", "i8")]), r"a structured array \(fields 'x, b'\)"),
        (np.zeros((2, 3), np.float16), r"found float16 of shape \(2, 3\)"),
        (np.zeros((2, 3, 4), ">f4"), r"\(>f4\) have the byte order of another"),
    ],
)
def test_other_numbers_are_refused_by_name(tmp_path, array, message):
    path = str(tmp_path / "x.npy")
    np.save(path, array)
    with pytest.raises(InputError, match=message):
        open_array(path, 3)


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]
)
def test_boxes_may_be_integers(tmp_path, dtype):
    path = str(tmp_path / "x.npy")
    want = np.arange(24).reshape(2, 3, 4).astype(dtype)
    np.save(path, want)
    got = open_array(path, 3, integers=True)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    with pytest.raises(InputError, match="expected an array of 2 axes of floats or integers"):
        open_array(path, 2, integers=True)
    np.save(path, want.astype(bool))
    with pytest.raises(InputError, match="found bool"):
        open_array(path, 3, integers=True)


def test_the_command_for_another_byte_order_mends_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    want = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(">f8")
    np.save("x.npy", want)
    with pytest.raises(InputError) as raised:
        open_array("x.npy", 3)
    program, *arguments = shlex.split(str(raised.value)[str(raised.value).index("python -c") :])
    subprocess.run([sys.executable, *arguments], check=True)
    os.replace("native.npy", "x.npy")
    got = open_array("x.npy", 3)
    np.testing.assert_array_equal(got, want)
    torch.from_numpy(np.array(got[1]))


def test_fortran_order_is_read(tmp_path):
    path = str(tmp_path / "x.npy")
    want = np.random.default_rng(0).normal(size=(4, 3, 5))
    np.save(path, np.asfortranarray(want))
    array = open_array(path, 3)
    np.testing.assert_array_equal(array, want)
    np.testing.assert_array_equal(torch.from_numpy(np.array(array[2])).numpy(), want[2])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)), want)


def test_an_array_without_rows(tmp_path):
    path = str(tmp_path / "x.npy")
    np.save(path, np.zeros((0, 3, 4), np.float32))
    array = open_array(path, 3)
    assert array.shape == pickle.loads(pickle.dumps(array)).shape == (0, 3, 4)


# Pickles


@pytest.fixture
def mapped(tmp_path):
    """A file of 4 MB, its content, and the open array."""
    want = np.random.default_rng(0).normal(size=(1000, 10, 100)).astype(np.float32)
    path = tmp_path / "train_ims.npy"
    np.save(path, want)
    return path, want, open_array(str(path), 3)


def summary(array) -> tuple:
    """What a spawned process finds: type, rows, content."""
    return type(array).__name__, array.shape, array.tobytes()[:4000], float(array[-1].sum())


def test_a_mapped_file_is_pickled_by_its_path(mapped, monkeypatch):
    path, want, array = mapped
    monkeypatch.chdir(path.parent)
    relative = open_array("train_ims.npy", 3)
    monkeypatch.chdir("/")
    for one in (array, relative):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            stream = pickle.dumps(one, protocol)
            assert len(stream) < 1000
            again = pickle.loads(stream)
            assert isinstance(again, MappedArray) and not again.flags.writeable
            np.testing.assert_array_equal(again, want)
        assert len(pickle.dumps(pickle.loads(stream))) < 1000  # again and again
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(summary, (relative,)) == summary(array)
        assert pool.apply(summary, (array[5:9],)) == summary(np.array(want[5:9]))


def test_parts_and_copies_are_pickled_with_their_content(mapped):
    path, want, array = mapped
    cases = {
        "slice": (array[3:7], want[3:7]),
        "row": (array[4], want[4]),
        "column": (array[:, 2], want[:, 2]),
        "list": (array[[5, 1]], want[[5, 1]]),
        "steps": (array[::-5], want[::-5]),
        "all": (array[...], want),
        "copy": (array.copy(), want),
        "np.copy": (np.array(array), want),
        "copy.copy": (copy.copy(array), want),
        "deepcopy": (copy.deepcopy(array), want),
        "reshaped": (array.reshape(10, -1), want.reshape(10, -1)),
        "transposed": (array.T, want.T),
        "other type": (array.astype(np.float64), want.astype(np.float64)),
        "number": (array[1, 2, 3], want[1, 2, 3]),
    }
    streams = {name: pickle.dumps(part) for name, (part, _) in cases.items()}
    cases["deepcopy"][0][0] = 0  # a copy may be written to, and does not change the file
    path.unlink()
    for name, (_, expected) in cases.items():
        got = pickle.loads(streams[name])
        assert not isinstance(got, np.memmap), name
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_results_are_plain_arrays(mapped):
    _, want, array = mapped
    for got, expected in (
        (array + 1, want + 1),
        (array[2] * 2, want[2] * 2),
        (np.isfinite(array).all((1, 2)), np.ones(1000, bool)),
        (array.max(2), want.max(2)),
        (np.concatenate([array, array]), np.concatenate([want, want])),
    ):
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, expected)
    assert array.max() == want.max() and isinstance(array.max(), np.float32)


def test_a_file_that_changed_or_is_gone_is_named(mapped):
    path, want, array = mapped
    stream = pickle.dumps(array)
    changes = {
        "no such file": path.unlink,
        "changed since this program opened it": lambda: np.save(path, want[:-1]),
        "expected a float16 or float32 array of 3 axes": lambda: np.save(path, want[0]),
        "a git-LFS pointer": lambda: path.write_text(LFS),
    }
    for message, change in changes.items():
        change()
        with pytest.raises((InputError, FileNotFoundError), match=f"train_ims.npy: .*{message}"):
            pickle.loads(stream)
    np.save(path, want)  # only touched, which does no harm
    os.utime(path, (1, 1))
    np.testing.assert_array_equal(pickle.loads(stream), want)
    np.save(path, want + 1)  # of the same size, written later
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match="changed since"):
        pickle.loads(stream)


def test_a_file_that_is_cut_while_it_is_mapped_is_named(mapped):
    path, want, array = mapped
    part = array[:10]
    os.truncate(path, path.stat().st_size - 1)
    for read in (lambda: array[999], lambda: array[3, 0], lambda: array[[1, 2]]):
        with pytest.raises(InputError, match="train_ims.npy: .* bytes, but .* when it was opened"):
            read()
    np.testing.assert_array_equal(part, want[:10])  # its pages are there
