"""Arrays of plain objects that older programs saved by pickling, read without running anything.

A pickle may call any function of the machine it is read on. Here nothing but what rebuilds numbers,
strings, dicts and numpy arrays can be named; a file that names anything else is refused.
"""

import os
import pickle

import numpy as np

from util.cli import InputError


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 write bytes: as text in latin1."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
_ALLOWED |= {("_codecs", "encode"): _encode}
for _core in ("core", "_core"):  # before and since numpy 2
    _ALLOWED[f"numpy.{_core}.multiarray", "_reconstruct"] = _RECONSTRUCT
    _ALLOWED[f"numpy.{_core}.multiarray", "scalar"] = _SCALAR


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}") from None

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("a persistent object")


def load_objects(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, of numbers or of plain objects (dicts, strings, numbers, arrays).

    Raises InputError for a file that is no array or holds anything else, before any of it runs.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, fortran, dtype = read(file)
            if not dtype.hasobject:
                file.seek(0)
                return np.load(file, allow_pickle=False)
            objects = _Unpickler(file, encoding="latin1").load()
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
    if not isinstance(objects, np.ndarray) or objects.shape != shape:
        raise InputError(f"{path}: expected an array of shape {shape} in its pickle")
    return objects
