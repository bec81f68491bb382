"""A process and its children, and what they hold, read from Linux's /proc."""

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Held(NamedTuple):
    """What processes hold together."""

    mib: float  # memory of their own; a page that several of them share counts once
    handles: int  # open files, sockets and pipes
    threads: int
    processes: int


def children(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    found = []
    for task in PROC.glob(f"{pid}/task/*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return found


def tree(pid: int) -> list[int]:
    """A process, its children, theirs, and so on."""
    found = [pid]
    for one in found:
        found += children(one)
    return found


def command_of(pid: int) -> str:
    """The command line of a process, or nothing if it ended."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def held(pid: int) -> Held:
    """What a process and its children hold now. Raises ProcessLookupError if it has ended.

    The pages of files, such as libraries, are left out: a share of them counts for each program
    that maps them, so they grow and shrink with what else runs.
    """
    mib, handles, threads, processes = 0.0, 0, 0, 0
    for one in tree(pid):
        try:
            here = PROC / str(one)
            lines = (here / "smaps_rollup").read_text().splitlines()
            shares = [int(x.split()[1]) for x in lines if x.startswith(("Pss_Anon:", "Pss_Shmem:"))]
            opened, running = len(os.listdir(here / "fd")), len(os.listdir(here / "task"))
        except (FileNotFoundError, ProcessLookupError):
            if one == pid:
                raise ProcessLookupError(f"process {pid} has ended") from None
            continue
        mib += sum(shares) / 1024
        handles, threads, processes = handles + opened, threads + running, processes + 1
    return Held(mib, handles, threads, processes)
