"""Read arrays of plain objects that older programs pickled, without running code from the file.

A pickle may call any function of the machine that reads it. Even numpy's own functions, called with
chosen arguments, can read memory that they should not. So a name in the file can only reach the
stand-ins below. They take the arguments that numpy writes for numbers, strings and arrays, check
them, and keep them.
"""

import os
import pickle
import re

import numpy as np

from util.cli import InputError

# The dtypes of numbers, strings, bytes and objects, but no structured dtypes.
_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|[SU]\d{0,6}|O8?)")


def _refuse(what: str):
    raise pickle.UnpicklingError(what)


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
                self.value[k] = _plain(x)
        else:
            content = content.encode("latin1") if isinstance(content, str) else content
            if not isinstance(content, bytes) or len(content) != count * dtype.value.itemsize:
                _refuse("an array that is not as long as its content")
            self.value = np.frombuffer(content, dtype.value)
        self.value = self.value.reshape(shape, order="F" if fortran else "C")


def _plain(x):
    """An object with its stand-in arrays replaced by numpy's, also among the values of a dict."""
    if isinstance(x, dict):
        return {
            key: value.value if isinstance(value, _Array) else value for key, value in x.items()
        }
    return x.value if isinstance(x, _Array) else x


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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        return _ALLOWED.get((module, name)) or _refuse(f"{module}.{name}")

    def persistent_load(self, pid):
        _refuse("a persistent object")


def load_objects(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, of numbers or of plain objects (dicts, strings, numbers, arrays).

    A file that `array.dump` wrote, a pickle without a header, is read too. Raises InputError if the
    file is not an array or names anything else; no code from it runs.
    """
    try:
        with open(path, "rb") as file:
            if file.peek(6)[:6] != b"\x93NUMPY" and file.peek(1)[:1] in (b"\x80", b"c"):
                array = _Unpickler(file, encoding="latin1").load()
                return array.value if isinstance(array, _Array) else _refuse("no array")
            version = np.lib.format.read_magic(file)
            read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, _, dtype = read(file)
            if not dtype.hasobject:
                file.seek(0)
                return np.load(file, allow_pickle=False)
            objects = _Unpickler(file, encoding="latin1").load()
            objects = objects.value if isinstance(objects, _Array) else _refuse("no array")
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, a pickle that holds more than dicts, strings, numbers and arrays "
            f"({error}); get the file from its authors, or save a plain array"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere in its reader
        raise InputError(
            f"{path}: not a whole .npy array ({type(error).__name__}: {error}); copy it again"
        ) from None
    if objects.shape != shape:
        raise InputError(f"{path}: an array of shape {objects.shape}, its header says {shape}")
    return objects
