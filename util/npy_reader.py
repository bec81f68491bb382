"""Read .npy arrays and .npz archives that may be damaged, or made to do harm.

Nothing in them is unpickled, and a small file cannot ask for much memory.
"""

import io
import math
import os
import reprlib  # what repr() says of a hostile file may have no end
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

VERSIONS = (1, 0), (2, 0), (3, 0)  # of .npy files
LONGEST_HEADER = 10_000  # bytes, as in numpy
LARGEST = 2**63  # what one number of bytes can be
LARGEST_MEMBER = 2**28  # bytes of an unpacked array of a .npz file, which is of one image
METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # numpy writes no others
# What reading a damaged archive raises.
ZIP_ERRORS = zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError


def type_name(dtype: np.dtype) -> str:
    """The name of a dtype for a message, without the names of fields, which may have no end."""
    return dtype.str if dtype.kind == "V" else str(dtype)


class PickledArray(ValueError):
    """An array of Python objects."""


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape of a .npy file, whether it is in Fortran's order, and its dtype.

    The file then stands at its content. Raises ValueError, with a short text, if the header is
    damaged.
    """
    version = np.lib.format.read_magic(file)
    if version not in VERSIONS:
        raise ValueError(f"version {version[0]}.{version[1]}")
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(file.read(width), "little")
    if length > LONGEST_HEADER:  # numpy reads it before it looks
        raise ValueError(f"{length} bytes long")
    file.seek(-width, os.SEEK_CUR)
    # Version 3 differs from 2 only in the encoding of field names.
    read = getattr(np.lib.format, f"read_array_header_{min(version[0], 2)}_0")
    try:
        shape, fortran, dtype = read(file)
    except OSError:
        raise
    except Exception as error:  # a damaged header can fail anywhere in its reader
        raise ValueError(reprlib.repr(str(error))) from None
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape {reprlib.repr(shape)}")
    if math.prod(max(n, 1) for n in shape) * max(dtype.itemsize, 1) >= LARGEST:
        raise ValueError(f"shape {reprlib.repr(shape)}, too large for any file")
    return shape, fortran, dtype


def read_array(file: BinaryIO, size: int) -> np.ndarray:
    """The array of numbers of a .npy file of `size` bytes. Raises ValueError if it is not whole."""
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise PickledArray("an array is pickled")
    count = math.prod(shape)
    if file.tell() + count * dtype.itemsize > size:
        raise ValueError(f"{size} bytes for an array of shape {reprlib.repr(shape)}")
    content = file.read(count * dtype.itemsize)
    return np.ndarray(shape, dtype, content, order="F" if fortran else "C")


class NpzFile(zipfile.ZipFile):
    """The arrays of a .npz file. All methods raise OSError and ZIP_ERRORS."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        # zipfile itself does not see that an entry of the table is lost.
        self.fp.seek(-22 - len(self.comment), os.SEEK_END)
        count = int.from_bytes(self.fp.read(22)[10:12], "little")
        if count != len(self.infolist()):
            raise zipfile.BadZipFile(f"{len(self.infolist())} files, its end says {count}")
        for member in self.infolist():  # compares the name in the table with that in the file
            self.open(member).close()

    def get(self, name: str) -> np.ndarray | None:
        """The array of a name, if it is there."""
        if f"{name}.npy" not in self.NameToInfo:
            return None
        member = self.getinfo(f"{name}.npy")
        if member.compress_type not in METHODS:
            raise ValueError(f"{name} is compressed in a way that numpy does not use")
        if member.file_size > LARGEST_MEMBER:
            raise ValueError(f"{name} unpacks to {member.file_size} bytes, more than an image has")
        content = self.read(member)
        return read_array(io.BytesIO(content), len(content))
