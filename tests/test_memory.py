"""The peak memory of a process, from every source that reports it."""

import builtins
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util import memory
from util.memory import peak_mib

CPU = torch.device("cpu")


def test_it_grows_with_what_is_held():
    """They run in processes of their own, because this one has the peak of earlier tests."""

    def peak(numbers):
        code = "import numpy, torch, util.memory as m\n"
        code += f"x = numpy.ones({numbers})\ndel x\nprint(m.peak_mib(torch.device('cpu')))"
        root = Path(memory.__file__).parent.parent
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
        )
        return int(done.stdout)

    assert 256 < peak(2**26) - peak(1) < 1024  # 512 MiB, and what the allocator also keeps


@pytest.mark.parametrize("status", ["", "VmRSS: 3 kB\n", None])
def test_without_the_peak_in_proc(monkeypatch, status):
    def read_text(self):
        if status is None:
            raise FileNotFoundError(self)
        return status

    want = peak_mib(CPU)
    monkeypatch.setattr(Path, "read_text", read_text)
    got = peak_mib(CPU)  # it may start at the memory of the previous process
    assert want / 2 < got < 2**16

    load = builtins.__import__

    def absent(name, *args, **more):
        if name == "resource":
            raise ImportError(name)
        return load(name, *args, **more)

    monkeypatch.delitem(sys.modules, "resource", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    assert peak_mib(CPU) is None
