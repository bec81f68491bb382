"""Pickled .npy files (GSMN's image sizes): plain values are read, and no code in them runs."""

import pickle

import numpy as np
import pytest

from util.arrays import read_sizes
from util.cli import InputError
from util.plain_pickle import load_objects


def test_sizes_of_pickled_dicts_are_read(tiny_graphs):
    path = "data/tiny_precomp/train_ims_size.npy"
    want = read_sizes(path, 20)
    rows = np.load(path)
    as_dicts = [{"image_w": int(w), "image_h": int(h)} for w, h in rows]
    for one in (as_dicts, [{k: np.int64(v) for k, v in row.items()} for row in as_dicts]):
        np.save(path, np.array(one, dtype=object), allow_pickle=True)
        np.testing.assert_array_equal(read_sizes(path, 20), want)
    # Python 2 wrote it with protocol 2 and the old module names of numpy.
    objects = pickle.dumps(np.array(as_dicts, dtype=object), protocol=2)
    objects = objects.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": (20,)}
        )
        file.write(objects)
    np.testing.assert_array_equal(read_sizes(path, 20), want)


class Hostile:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tiny_graphs, wrapped):
    import os

    path = "data/tiny_precomp/train_ims_size.npy"
    evil = Hostile(os.mkdir, "ran")
    row = {"image_w": 1, "image_h": evil} if wrapped else evil
    np.save(path, np.array([row] * 20, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="refused, a pickle that holds more .*mkdir"):
        read_sizes(path, 20)
    assert not os.path.exists("ran")
    for function in (eval, getattr, np.load, print, np.ndarray, np.frombuffer):
        np.save(path, np.array([Hostile(function, "1")], dtype=object), allow_pickle=True)
        with pytest.raises(InputError, match="refused"):
            load_objects(path)


def write_pickle(path, stream, shape=(1,)):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": shape}
        )
        file.write(stream)


class Twisted:
    """An array in the form that numpy pickles, with parts that numpy would not write."""

    def __init__(self, shape, dtype, content):
        self.state = (1, shape, dtype, False, content)

    def __reduce__(self):
        function, args, _ = np.empty(0).__reduce__()
        return function, args, self.state


class Dtype:
    def __init__(self, name, state):
        self.parts = name, state

    def __reduce__(self):
        name, state = self.parts
        return np.dtype, (name, False, True), state


PLAIN = (3, "|", None, None, None, -1, -1, 63)
FIELDS = (3, "|", None, ("image_w",), {"image_w": (np.dtype("O"), 0)}, 8, 1, 0)


@pytest.mark.parametrize(
    "evil",
    [
        Hostile(np.ndarray, (1,), np.dtype("O"), b"A" * 8),
        Twisted((1,), Dtype("V8", FIELDS), b"A" * 8),  # pointers disguised as bytes
        Twisted((1,), Dtype("i8", FIELDS), b"A" * 8),
        Twisted((1,), Dtype("O8", PLAIN), b"A" * 8),
        Twisted((10**9,), Dtype("O8", PLAIN), []),
        Twisted((10**9,), Dtype("i8", PLAIN), b""),
        Twisted((-1,), Dtype("i8", PLAIN), b""),
        Hostile(np.float64(0).__reduce__()[0], np.dtype("O"), b"A" * 8),
        Hostile(np.float64(0).__reduce__()[0], np.dtype("i8"), b"A"),
        Hostile(np.float64(0).__reduce__()[0], np.dtype("i8"), b"A" * 16),
        Twisted((1,), Dtype("O,i8", PLAIN), [1]),  # its name makes it structured
    ],
)
def test_numpy_does_not_read_what_it_should_not(tmp_path, evil):
    """Arrays that lie about their type would let numpy read memory that is not theirs."""
    path = tmp_path / "x.npy"
    for x in (evil, Twisted((1,), Dtype("O8", PLAIN), [{"image_w": evil}])):
        write_pickle(path, pickle.dumps(x, protocol=2).replace(b"_core.multi", b"core.multi"))
        with pytest.raises(InputError, match="x.npy: (refused|not a whole)"):
            load_objects(path)


def test_functions_of_a_pickle_keep_no_state(tmp_path):
    """BUILD would set attributes of the functions that the file names."""
    for name in (b"numpy\ndtype", b"_codecs\nencode", b"numpy\nndarray"):
        stream = b"c" + name + b"\n}S'x'\nI1\nsb."
        write_pickle(tmp_path / "x.npy", stream)
        with pytest.raises(InputError, match="refused.*a function with a state"):
            load_objects(tmp_path / "x.npy")
    write_pickle(tmp_path / "x.npy", b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.")
    with pytest.raises(InputError, match="refused.*bytes in rot13"):
        load_objects(tmp_path / "x.npy")


def test_arrays_and_numbers_inside_objects(tmp_path):
    rows = [
        {"image_w": np.array(3.0), "name": "a", "b": b"x"},
        {"image_w": np.float32(4), "n": None},
    ]
    for protocol in range(5):  # np.save writes 2 to 4
        stream = pickle.dumps(np.array(rows, dtype=object), protocol)
        write_pickle(tmp_path / "x.npy", stream, (2,))
        first, second = load_objects(tmp_path / "x.npy")
        assert first["image_w"] == 3 and first["name"] == "a" and first["b"] == b"x"
        assert second == {"image_w": 4, "n": None}


def test_an_error_about_endless_rows_ends(tiny_graphs):
    row = []
    for _ in range(60):
        row = [row, row]
    write_pickle("x.npy", pickle.dumps(np.array([{"image_w": row}], dtype=object)))
    with pytest.raises(InputError, match="expected rows with numbers"):
        read_sizes("x.npy", 1)
