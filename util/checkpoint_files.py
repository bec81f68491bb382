"""Checkpoint files as bytes: a seal that tells damage, the newest whole file, which old ones go.

`seal` writes a line into the comment of a file of torch.save, which is a zip archive:

    epoch 3 batch 17 sha256 9f86d081...

It says where the run stands, and the SHA-256 of all bytes before these 64 digits. A damaged file is
found by it. In a file without a seal, the checksums (CRC-32) of the archive's records tell most
damage. Any file may have `{file}.sha256` beside it, as sha256sum writes it.
"""

import glob
import hashlib
import os
import re
import struct
import zipfile
from pathlib import Path

from util.cli import InputError
from util.file_kinds import kind_of

SUFFIX = ".pth.tar"
INTERRUPTED, BEST = f"interrupted{SUFFIX}", f"model_best{SUFFIX}"
PART = ".part"  # what a file is called while it is written

_SEAL = re.compile(rb"(?:epoch (\d{1,9}) batch (\d{1,9}) )?sha256 ([0-9a-f]{64})")
# What zipfile raises on damage.
_UNREADABLE = zipfile.BadZipFile, EOFError, OSError, OverflowError, RuntimeError, ValueError
_UNREADABLE += (struct.error,)
_BLOCK = 2**20  # bytes that are read at once
# An archive of a million tiny records would take minutes and gigabytes to open.
_LONGEST_TABLE = 2**24  # bytes of an archive's table of contents: room for 150,000 records
_END, _LONGEST_COMMENT = 22, 2**16 - 1  # bytes of the end of an archive without its comment
_LEGACY = b"\x80"  # the first byte of the files that PyTorch wrote before 1.6: plain pickles


def seal(path: str | os.PathLike, place: tuple[int, int] | None = None) -> None:
    """Write the SHA-256 of a new file of torch.save into its archive's comment.

    `place`: the epochs that are finished, and the batches of the next one; `newest_whole` reads it.
    """
    note = b"" if place is None else b"epoch %d batch %d " % place
    note += b"sha256 "
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment; there is none yet
        file.write(struct.pack("<H", len(note) + 64) + note)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(digest.encode())


def check_whole(path: str | os.PathLike) -> None:
    """Raise InputError if a checkpoint's bytes are damaged; it offers the whole one before it.

    Of a file that has no checksum at all, a notice says so.
    """
    fault = fault_of(path)
    if fault is not None:
        raise InputError(f"{path}: not a checkpoint, or a damaged one ({fault}); {what_else(path)}")
    with open(path, "rb") as file:
        legacy = file.read(1) == _LEGACY
    if legacy and not os.path.exists(f"{path}.sha256"):
        print(
            f"notice: {path} is of an old PyTorch and carries no checksum: damage would not be "
            f"seen; if you know its SHA-256, put it into {path}.sha256, as sha256sum writes it"
        )


def fault_of(path: str | os.PathLike) -> str | None:
    """What is wrong with the bytes of a file, by its archive, its seal and its .sha256 file."""
    with open(path, "rb") as file:
        head, fault = file.read(4), None
        if head == b"PK\x03\x04":
            fault = _fault_of_archive(file)
        elif head[:1] != _LEGACY:
            fault = f"it is {kind_of(path) or 'no file of torch.save'}"
    if fault is not None:
        return fault
    if not os.path.isfile(f"{path}.sha256"):
        return None
    with open(f"{path}.sha256", "rb") as file:
        expected = re.match(rb"\\?([0-9a-fA-F]{64})\b", file.read(100))
    if expected is None:
        return f"{path}.sha256 does not begin with a SHA-256 as sha256sum writes it"
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected[1].decode().lower():
        return f"its SHA-256 is not that of {path}.sha256"
    return None


def what_else(path: str | os.PathLike) -> str:
    """What to do about a damaged checkpoint."""
    directory = os.path.dirname(os.path.abspath(path))
    others = newest_first(directory)
    own = os.path.join(directory, os.path.basename(path))
    before = others[others.index(own) + 1 :] if own in others else others
    other = next((x for x in before if fault_of(x) is None), None)
    if other is None:
        return "copy it again"
    shown = os.path.join(os.path.dirname(path), os.path.basename(other))
    return f"copy it again, or take {shown}, the newest whole one before it"


def newest_whole(directory: str | os.PathLike, quiet: bool = False) -> str | None:
    """The newest checkpoint of a run's folder whose bytes are whole, by where the run stood.

    A notice names each newer one that is damaged, unless `quiet`. None: there is no whole one.
    """
    for path in newest_first(directory):
        fault = fault_of(path)
        if fault is None:
            return path
        if not quiet:
            print(f"notice: {path} is damaged ({fault}) and not used")
    return None


def rotate(directory: str | os.PathLike, keep: int) -> None:
    """Remove `checkpoint_{epoch}` files, but those of the newest `keep` epochs; 0 keeps all.

    The one that was written last stays, whatever its epoch. Nothing is removed while none of those
    that stay is whole.
    """
    numbered = [path for path in newest_first(directory) if _epoch_of(path) is not None]
    if not keep or len(numbered) <= keep:
        return
    stay = {*numbered[:keep], max(numbered, key=_modified)}
    if any(fault_of(path) is None for path in stay):
        for path in numbered:
            if path not in stay:
                os.remove(path)


def remove_parts(directory: str | os.PathLike) -> None:
    """Remove the half files of a run that was killed while it saved."""
    for path in glob.glob(os.path.join(glob.escape(directory), f"*{SUFFIX}{PART}")):
        os.remove(path)


def _fault_of_archive(file) -> str | None:
    """What is wrong with a zip archive: its seal if it has one, else the CRCs of its records."""
    size = file.seek(0, os.SEEK_END)
    try:
        if _length_of_table(file, size) > _LONGEST_TABLE:
            return "its archive lists more records than a checkpoint has"
        with zipfile.ZipFile(file) as archive:
            records, found = archive.infolist(), _SEAL.fullmatch(archive.comment)
            if any(x.compress_type or x.flag_bits & 1 for x in records):
                return "its archive is compressed or encrypted, which torch.save never does"
            if sum(x.file_size for x in records) > size:
                return "its archive claims to hold more bytes than the file has"
            if len({x.filename for x in records}) < len(records):
                return "its archive has two records of one name"
            if found is None:
                if archive.comment:
                    return "the SHA-256 that was saved with it is cut or damaged"
                _check_crcs(archive)
                return None
        if _hash_before_seal(file, size) != found[3].decode():
            return "its content does not fit the SHA-256 that was saved with it"
    except _UNREADABLE as error:
        return f"its archive cannot be read: {str(error)[:100]!r}"
    return None


def _check_crcs(archive: zipfile.ZipFile) -> None:
    """Read all records; zipfile raises BadZipFile at the end of one whose CRC is another."""
    for record in archive.infolist():
        with archive.open(record) as content:
            while content.read(_BLOCK):
                pass


def _length_of_table(file, size: int) -> int:
    """The bytes of a zip archive's table of contents, as its end states them."""
    file.seek(max(size - _END - _LONGEST_COMMENT, 0))
    start, tail = file.tell(), file.read()
    at = tail.rfind(b"PK\x05\x06")
    length = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    # A large archive (zip64) has a second end 56 bytes long, and 20 bytes that say where it is.
    file.seek(max(start + at - 20, 0))
    mark, place = file.read(4), file.read(12)[4:]
    if mark == b"PK\x06\x07":
        file.seek(int.from_bytes(place, "little"))
        return max(
            length if length < 2**32 - 1 else 0, int.from_bytes(file.read(56)[40:48], "little")
        )
    return length


def _hash_before_seal(file, size: int) -> str:
    """The SHA-256 of a sealed file without the digits at its end."""
    digest, left = hashlib.sha256(), size - 64
    file.seek(0)
    while left > 0 and (block := file.read(min(_BLOCK, left))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def newest_first(directory: str | os.PathLike) -> list[str]:
    """The checkpoints of a run's folder, the newest first, by the place that each was saved at."""
    folder = Path(directory)
    numbered = [str(x) for x in folder.glob(f"checkpoint_*{SUFFIX}") if _epoch_of(x) is not None]
    others = [str(x) for x in (folder / INTERRUPTED, folder / BEST) if x.is_file()]

    def place(path: str) -> tuple[int, int, bool]:
        epoch = _epoch_of(path)
        if epoch is not None:
            return epoch + 1, 0, True
        sealed = _sealed_place(path)
        if sealed is not None:
            return *sealed, False
        # An old file does not say it: then after the last epoch that was saved before it.
        older = [_epoch_of(x) + 1 for x in numbered if _modified(x) <= _modified(path)]
        return max(older, default=0), int(path.endswith(INTERRUPTED)), False

    return sorted(numbered + others, key=place, reverse=True)


def _epoch_of(path: str | os.PathLike) -> int | None:
    """The epoch in the name of a checkpoint; None: another file."""
    found = re.fullmatch(r"checkpoint_(\d{1,9})" + re.escape(SUFFIX), os.path.basename(path))
    return int(found[1]) if found else None


def _modified(path: str) -> int:
    return os.stat(path).st_mtime_ns


def _sealed_place(path: str) -> tuple[int, int] | None:
    """The place that a file's seal names, if it has one."""
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - 200, 0))
        found = re.search(_SEAL.pattern + rb"\Z", file.read())
    return (int(found[1]), int(found[2])) if found and found[1] else None
