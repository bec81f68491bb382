"""Pickles that ask for all memory, or for years, are refused before anything of them is made."""

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

import checkpoint as ckpt
from util.arrays import read_sizes
from util.cli import InputError
from util.pickle_scan import DEEPEST, check_pickle
from util.plain_pickle import load_vocabulary


class Call:
    """Pickled, it becomes the call of a function."""

    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


def nested(depth: int) -> tuple:
    x = ()
    for _ in range(depth - 1):
        x = (x, x)
    return x


def as_key(x, protocol: int) -> bytes:
    """The pickle of {x: 1}, without hashing x here."""
    head, body = (b"\x80\x02", pickle.dumps(x, 2)[2:-1])
    if protocol == 4:
        head, body = b"\x80\x04", pickle.dumps(x, 4)[11:-1]  # without its frame
    return head + b"}" + body + b"K\x01s."


HARMFUL = {
    "years": as_key(nested(60), 2),
    "years, protocol 4": as_key(nested(60), 4),
    "years in a set": pickle.dumps([Call(frozenset, [nested(60)])], 2),
    "memory": pickle.dumps([Call(bytearray, 10**11)], 2),
    "memory, protocol 4": pickle.dumps([Call(bytearray, 10**11)], 4),
    "time": pickle.dumps([Call(collections.Counter, Call(bytearray, 10**10))], 2),
    "a table": b"\x80\x02}r\xff\xff\xff\x7f.",
    # Into a message, which torch searches with a pattern that takes the square of its length.
    "a name": b"\x80\x02c" + b"x" * 10**5 + b"\ny\n.",
    "a name in texts": pickle.dumps("x" * 10**5, 4)[:-1] + b"\x8c\x01y\x93.",
    "a name that is called": pickle.dumps("x" * 10**5, 2)[:-1] + b")R.",
    "a name of a class": pickle.dumps("x" * 10**5, 2)[:-1] + b")\x81.",
    "a name of a storage": pickle.dumps(("x" * 10**5, 1), 2)[:-1] + b"Q.",
}


def torch_file(path: str, pickled: bytes, legacy: bool) -> None:
    if legacy:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        with open(path, "rb") as file:
            data = file.read()
        first = data.index(b"}q\x00.") - 2  # the pickle of {}, behind three others
        data = data[:first] + pickled + data[first + 6 :]
        with open(path, "wb") as file:
            file.write(data)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HARMFUL)
def test_a_checkpoint_that_asks_too_much(tmp_path, name, legacy):
    path = str(tmp_path / "x.pth.tar")
    torch_file(path, pickle.dumps({"model": [], "epoch": 3}, 2), legacy)
    with pytest.raises(InputError, match="expected a dict with 'model' and 'opt'"):
        ckpt.read(path)  # so far the file is read
    torch_file(path, HARMFUL[name], legacy)
    with pytest.raises(
        InputError, match="a damaged one .*(tuples lie|makes a|object number|a name of over)"
    ):
        ckpt.read(path)


@pytest.mark.parametrize("name", [x for x in HARMFUL if "years" in x or "table" in x])
def test_other_pickles_that_ask_too_much(tmp_path, name):
    vocabulary, sizes = tmp_path / "x_vocab.pkl", tmp_path / "x_ims_size.npy"
    vocabulary.write_bytes(HARMFUL[name])
    with pytest.raises(InputError, match="x_vocab.pkl: "):
        load_vocabulary(vocabulary)
    np.save(sizes, np.array([{"image_w": 3, "image_h": 4}], object), allow_pickle=True)
    data = sizes.read_bytes()
    sizes.write_bytes(data[:128] + HARMFUL[name])
    with pytest.raises(InputError, match="x_ims_size.npy: "):
        read_sizes(str(sizes), 1)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_ordinary_pickles_pass_and_are_read_to_their_end(protocol):
    values = {
        "numbers": [1, 2.5, True, None, 10**30, -3],
        "texts": ["a", "ä" * 300, b"bytes", "bytearray"],
        "tuples": {(1, (2, 3)): {(4,)}, nested(DEEPEST): frozenset([5])},
        "ordered": [collections.OrderedDict(a=1), collections.Counter("aab")],
        "long": list(range(3000)),
    }
    data = pickle.dumps(values, protocol)
    file = io.BytesIO(data + b"more")
    check_pickle(file, len(data))
    assert file.tell() == len(data)
    with pytest.raises(ValueError, match="tuples"):
        deeper = pickle.dumps([nested(DEEPEST + 2)], protocol)
        check_pickle(io.BytesIO(deeper), len(deeper))
