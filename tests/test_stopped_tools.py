"""A tool that is killed leaves no half-written files, nor a folder of them."""

import os
import signal
import subprocess
import sys
import time

import pytest

import util.convert_data as convert_data
from tests.conftest import hear_sigint
from tests.extracted import fields, made, write_tsv


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_killed_conversion_leaves_nothing(tmp_path, number):
    write_tsv(tmp_path / "whole.tsv", *(fields(made(k)) for k in range(3)))
    (tmp_path / "out").mkdir()
    command = [sys.executable, convert_data.__file__, "whole.tsv", "--out", "out/train"]
    code = (
        "import sys, time, runpy, util.npy_writer as w\n"
        "real = w.NpyWriter.write\n"
        "def slow(*x):\n    real(*x)\n    print('written', flush=True)\n    time.sleep(60)\n"
        "w.NpyWriter.write = slow\n"
        f"sys.argv = {command[1:]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    root = os.path.dirname(os.path.dirname(convert_data.__file__))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_sigint,
    )
    while process.stdout.readline() != "written\n":
        assert process.poll() is None
    process.send_signal(number)
    start = time.time()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and "interrupted" in said and time.time() - start < 50
    assert os.listdir(tmp_path / "out") == []
