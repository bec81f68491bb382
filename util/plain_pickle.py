"""Read arrays and vocabularies that older programs pickled, without running code from the file.

A pickle may call any function of the machine that reads it. Even numpy's own functions, called with
chosen arguments, can read memory that they should not. So a name in the file can only reach the
stand-ins below. They take the arguments that numpy writes for numbers, strings and arrays, check
them, and keep them; of an object of the class Vocabulary they keep the attributes.
"""

import os
import pickle
import re
from typing import BinaryIO

import numpy as np

from util.cli import InputError
from util.json_file import fault_of, first_line
from util.npy_reader import read_array, read_header
from util.pickle_scan import check_pickle

# The dtypes of numbers, strings, bytes and objects, but no structured dtypes.
_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|[SU]\d{0,6}|O8?)")


class _Refused(pickle.UnpicklingError):
    """The file asks for more than this reader gives."""


def _refuse(what: str):
    raise _Refused(what)


class _Call:
    """The stand-in for a permitted name: it can only be called, like the original."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        _refuse("a function with a state")


class _Dtype:
    """A dtype as numpy pickles it: a short name, then the byte order as state."""

    __slots__ = ("value",)

    def __init__(self, name, *_):
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            _refuse(f"dtype {str(name)[:20]}")
        self.value = np.dtype(name)

    def __setstate__(self, state):
        _, order, part, names, fields, *_ = state
        if part is not None or names is not None or fields is not None or order not in "<>|=":
            _refuse("a structured dtype")
        if order in "<>":
            self.value = self.value.newbyteorder(order)


class _Array:
    """An array as numpy pickles it: first empty, then its shape, dtype and content as state."""

    __slots__ = ("value",)

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        count = int(np.prod([int(n) for n in shape], dtype=object))
        if dtype.value.hasobject:
            if not isinstance(content, list) or len(content) != count:
                _refuse("an array that is not as long as its content")
            self.value = np.empty(count, dtype=object)
            for k, x in enumerate(content):  # one by one: numpy would unpack lists
                self.value[k] = plain_value(x)
        else:
            content = content.encode("latin1") if isinstance(content, str) else content
            if not isinstance(content, bytes) or len(content) != count * dtype.value.itemsize:
                _refuse("an array that is not as long as its content")
            self.value = np.frombuffer(content, dtype.value)
        self.value = self.value.reshape(shape, order="F" if fortran else "C")


def plain_value(x):
    """An object with stand-ins for arrays and dtypes replaced by numpy's, also in a dict."""
    if isinstance(x, dict):
        return {
            key: value.value if isinstance(value, _NUMPY) else value for key, value in x.items()
        }
    return x.value if isinstance(x, _NUMPY) else x


_NUMPY = _Array, _Dtype


def _scalar(dtype, content):
    content = content.encode("latin1") if isinstance(content, str) else content
    if dtype.value.hasobject or len(content) != dtype.value.itemsize:
        _refuse("a number that is not as long as its dtype")
    return np.frombuffer(content, dtype.value)[0]


def _bytes(text, encoding):
    """Bytes, which pickles of protocol 2 write as text in latin1."""
    return text.encode("latin1") if encoding == "latin1" else _refuse(f"bytes in {encoding}")


_ALLOWED = {
    ("numpy", "ndarray"): _Call(lambda *_: _refuse("numpy.ndarray called")),
    ("numpy", "dtype"): _Call(_Dtype),
    ("_codecs", "encode"): _Call(_bytes),
}
for _core in ("core", "_core"):  # before numpy 2, and since
    _ALLOWED[f"numpy.{_core}.multiarray", "_reconstruct"] = _Call(lambda *_: _Array())
    _ALLOWED[f"numpy.{_core}.multiarray", "scalar"] = _Call(_scalar)


# The same by full name, for torch's own restricted reader, which must know the types of objects.
NUMPY = {".".join(name): stand_in for name, stand_in in _ALLOWED.items() if name[0] != "_codecs"}
NUMPY |= {"numpy.ndarray": _Array, "numpy.dtype": _Dtype}


class _Unpickler(pickle.Unpickler):
    allowed = _ALLOWED

    def find_class(self, module: str, name: str):
        return self.allowed.get((module, name)) or _refuse(f"{module}.{name}")

    def persistent_load(self, pid):
        _refuse("a persistent object")


class _Attributes:
    """The stand-in for an object: its class runs nothing, its attributes are kept."""

    __slots__ = ("value",)

    def __setstate__(self, state):
        self.value = state


def _new_object(kind, *_):
    return _Attributes() if kind is _Attributes else _refuse("an object of no class")


def _pairs(content=()):
    """A plain dict in place of those of `collections`, whose content may follow."""
    return dict(content)


class _VocabularyUnpickler(_Unpickler):
    """Objects as Python 2 and 3 pickle them: old and new classes, all protocols."""

    allowed = {
        **_ALLOWED,
        **{(module, "_reconstructor"): _Call(_new_object) for module in ("copy_reg", "copyreg")},
        # What a defaultdict makes is never made.
        **{
            (module, name): _Call(_refuse)
            for module in ("__builtin__", "builtins")
            for name in ("object", "int", "long", "float", "str", "list", "dict")
        },
        ("collections", "OrderedDict"): _Call(_pairs),
        ("collections", "Counter"): _Call(_pairs),
        ("collections", "defaultdict"): _Call(lambda _=None, *more: _pairs(*more)),
    }

    def find_class(self, module: str, name: str):
        return _Attributes if name == "Vocabulary" else super().find_class(module, name)


def _look_through(file: BinaryIO) -> None:
    """Check the pickle at the place of a file, which stays there."""
    start = file.tell()
    check_pickle(file, os.fstat(file.fileno()).st_size)
    file.seek(start)


def load_objects(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, of numbers or of plain objects (dicts, strings, numbers, arrays).

    A file that `array.dump` wrote, a pickle without a header, is read too. Raises InputError if the
    file is not an array or names anything else; no code from it runs.
    """
    try:
        with open(path, "rb") as file:
            if file.peek(6)[:6] != b"\x93NUMPY" and file.peek(1)[:1] in (b"\x80", b"c"):
                _look_through(file)
                array = _Unpickler(file, encoding="latin1").load()
                return array.value if isinstance(array, _Array) else _refuse("no array")
            shape, _, dtype = read_header(file)
            if not dtype.hasobject:
                file.seek(0)
                return read_array(file, os.fstat(file.fileno()).st_size)
            _look_through(file)
            objects = _Unpickler(file, encoding="latin1").load()
            objects = objects.value if isinstance(objects, _Array) else _refuse("no array")
    except _Refused as error:
        raise InputError(
            f"{path}: refused, a pickle that holds more than dicts, strings, numbers and arrays "
            f"({first_line(str(error))}); get the file from its authors, or save a plain array"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere in its reader
        raise InputError(
            f"{path}: not a whole .npy array ({fault_of(error)}); copy it again"
        ) from None
    if objects.shape != shape:
        raise InputError(f"{path}: an array of shape {objects.shape}, its header says {shape}")
    return objects


def load_vocabulary(path: str | os.PathLike) -> dict:
    """The attributes of a pickled object of the class Vocabulary, or a pickled dict of them.

    The class may be of any module, as only its name is looked at. Text of Python 2 is read as
    UTF-8, or else as latin1. Raises InputError if the file names anything else, or is cut.
    """
    try:
        try:
            return _read_vocabulary(path, "utf-8")
        except UnicodeDecodeError:
            return _read_vocabulary(path, "latin1")
    except _Refused as error:
        raise InputError(
            f"{path}: refused, a pickle that holds more than a Vocabulary of words and numbers "
            f"({first_line(str(error))}); get the file from its authors, or build one with "
            "vocab.py"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere in its reader
        raise InputError(
            f"{path}: not a whole pickled vocabulary ({fault_of(error)}); copy it again, or build "
            "one with vocab.py"
        ) from None


def _read_vocabulary(path: str | os.PathLike, encoding: str) -> dict:
    with open(path, "rb") as file:
        _look_through(file)
        found = _VocabularyUnpickler(file, encoding=encoding).load()
    found = getattr(found, "value", None) if isinstance(found, _Attributes) else found
    return found if isinstance(found, dict) else _refuse("no object with attributes")
