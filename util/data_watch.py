"""Notice that the data files of a run change while it reads them.

A run maps its features, boxes and whole vectors, and reads a row when it needs it. All other files
are read once, at the start, so that what happens to them later does not matter to it.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import NamedTuple

from util.arrays import MappedArray, open_array
from util.cli import InputError, say
from util.fingerprint import sampled_hash
from util.worker_limits import explain


class FileState(NamedTuple):
    """What the system says of a file; times are nanoseconds."""

    file: tuple[int, int]  # the device, and the number of the file on it
    size: int
    written: int
    changed: int  # written, renamed or given other rights; no program can set it back

    def __str__(self) -> str:
        when = datetime.datetime.fromtimestamp(self.written / 1e9)
        return f"{self.size:,} bytes of {when:%Y-%m-%d %H:%M:%S}"


def state_of(path: str) -> FileState | None:
    """The state of a file; None: it is gone."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    file = found.st_dev, found.st_ino
    return FileState(file, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class DataWatch:
    """Compares the mapped files of datasets with what they were when it was made.

    Size and times come first. If only times differ, rows spread over the file are compared (all
    rows of a small one), so a file that was only touched does no harm. `marks` has the hash of
    these rows by the name of the file.
    """

    def __init__(self, *datasets: object):
        values = [x for dataset in datasets for x in vars(dataset).values()]
        mapped = [x for x in values if isinstance(x, MappedArray) and x.source]
        self.arrays = {x.source[0]: x for x in mapped}
        self.states = {path: state_of(path) for path in self.arrays}
        self.hashes = {path: sampled_hash(array) for path, array in self.arrays.items()}
        self.marks = {os.path.basename(path): mark for path, mark in self.hashes.items()}
        self.said: set[str] = set()  # paths that were warned of

    def check(self) -> None:
        """Raise InputError if a file has changed; warn once if another one has its name now."""
        for path, then in self.states.items():
            now = state_of(path)
            if now == then:
                continue
            if now is None or then is None or now.file != then.file:
                self._warn_of_another(path, now)
            elif now.size == then.size and sampled_hash(self.arrays[path]) == self.hashes[path]:
                self.states[path] = now  # it was only touched
            else:
                raise InputError(
                    f"{path}: changed while this run was reading it: {then} at the start, {now} "
                    "now; nothing that was learned from it since the last checkpoint is saved; put "
                    "the old file back and go on with --resume from the newest checkpoint, or "
                    "start anew with the new file"
                )

    def _warn_of_another(self, path: str, now: FileState | None) -> None:
        """Warn, once, that a file was removed, or replaced by one with other content."""
        if path in self.said or (now and self._has_same_rows(path)):
            return
        self.said.add(path)
        what = f"another file has its name now ({now})" if now else "it was removed"
        say(
            f"warning: {path}: {what}; this run goes on with the old file, which it holds open; "
            "put that back before you resume it"
        )

    def _has_same_rows(self, path: str) -> bool:
        try:
            found = open_array(path, self.arrays[path].ndim, integers=True)
            return sampled_hash(found) == self.hashes[path]
        except (InputError, OSError):  # it is none that a run could read
            return False

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Within it, an error says that the data has changed, if it has.

        Else, if a loader process has ended, it says what that means: torch raises such an error
        wherever the loop is at that moment.
        """
        try:
            yield
        except (RuntimeError, OSError, InputError) as error:
            self.check()
            said = explain(error) if isinstance(error, RuntimeError) else None
            if said is None:
                raise
            raise InputError(said) from None

    def compare(self, marks: object, path: str) -> None:
        """Warn if a checkpoint at `path` was trained on other data.

        `marks` are those in it, if it has any, of whatever form.
        """
        then = marks if isinstance(marks, dict) else {}
        known = {name: then[name] for name in self.marks if isinstance(then.get(name), str)}
        other = sorted(name for name, mark in known.items() if mark != self.marks[name])
        if other:
            folder = os.path.dirname(next(iter(self.arrays)))
            print(
                f"warning: {path}: it was trained on other data than is in {folder} now: "
                f"{', '.join(other)}; a resumed run equals an unbroken one only on the same files"
            )
