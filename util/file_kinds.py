"""Say what a file is, for messages about a file that is not what it should be."""

import os
import zipfile

NPY = b"\x93NUMPY"

# First bytes, and what the file is. Text has no mark: `kind_of` knows its kinds by their words.
_MARKS = (
    (NPY, "a NumPy array (.npy)"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", "a file of torch.save, of an old version"),
    *((bytes((0x80, version)), "a Python pickle") for version in range(2, 6)),
    (b"\x1f\x8b", "a file compressed with gzip: unpack it (gunzip, or tar xzf for a .tar.gz)"),
    *(
        (b"BZh%d1AY&SY" % level, "a file compressed with bzip2: unpack it (bunzip2)")
        for level in range(1, 10)
    ),
    (b"\xfd7zXZ\x00", "a file compressed with xz: unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd: unpack it (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"MATLAB 5.0 MAT-file", "a MATLAB file"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"%PDF-", "a PDF document"),
)


def kind_of(path: str | os.PathLike) -> str | None:
    """What a file is, and where it helps what to do; None for plain text and for unknown bytes.

    It reads the first bytes, and the table of contents of a zip file. The answer continues a
    message: f"{path}: expected captions, found {kind}".
    """
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        return "an empty file (0 bytes): copy or download it again"
    if not any(head):
        return "zero bytes at its beginning, a download that did not finish: get it again"
    for mark, kind in _MARKS:
        if head.startswith(mark):
            return kind
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_zip(path)
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it (tar xf)"
    return _kind_of_text(head.removeprefix(b"\xef\xbb\xbf").lstrip().lower())


def _kind_of_text(head: bytes) -> str | None:
    """The kind of a text that stands in the place of a file, from its first words."""
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the file itself: get it with `git lfs pull`"
    if head.startswith(b"/annex/objects/"):
        return "a git-annex pointer, not the file itself: get it with `git annex get`"
    if head.startswith(b"<!doctype html") or (head.startswith(b"<") and b"<html" in head):
        return (
            "a web page (HTML), not the file itself: download it again; Google Drive shows a page "
            "instead of a large file, or when too many people downloaded it, and other sites show "
            "one to log in"
        )
    if head.startswith(b"<?xml") and b"<error>" in head:
        return "an error message of a server (XML), not the file itself: download it again"
    return None


def _kind_of_zip(path: str | os.PathLike) -> str:
    """The kind of a zip file, from the names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a zip archive that is cut or damaged: copy or download it again"
    if any(name.endswith("/data.pkl") for name in names):
        return "a file of torch.save"
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of arrays (.npz)"
    return "a zip archive: unpack it"
