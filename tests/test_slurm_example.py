"""scripts/slurm_example.sh under a stand-in for Slurm's scheduler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.conftest import read_log, same_weights, train_args

ROOT = Path(train.__file__).parent
# Within the second epoch of the first start, the scheduler signals the script, and only it.
STAND_IN = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train
from util import cli

step = train.train_step

def train_step(run, *args):
    if run.state.Eiters == 9 and not os.path.exists({mark!r}):
        open({mark!r}, "w").close()
        os.kill(os.getppid(), signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGTERM)
        while signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            time.sleep(0.01)  # until the script has passed it on
    return step(run, *args)

train.train_step = train_step
sys.argv = sys.argv[1:]
cli.run(train.main)
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def job(tiny):
    """Starts the script as Slurm does: a copy of it, somewhere else."""
    (tiny / "spool").mkdir()
    copy = tiny / "spool" / "slurm_script"
    copy.write_bytes((ROOT / "scripts" / "slurm_example.sh").read_bytes())
    (tiny / "bin").mkdir()
    executable(tiny / "bin" / "scontrol", f'echo "$@" >> "{tiny}/scontrol.log"')

    def start(python: Path, *args: str) -> subprocess.CompletedProcess:
        env = os.environ | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "42"}
        env |= {"PATH": f"{tiny}/bin:{os.environ['PATH']}", "PYTHON": str(python)}
        command = ["bash", str(copy), *args]
        said = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=tiny / "spool", env=env, **said)

    return start


def test_a_stopped_job_queues_again_and_equals_an_unbroken_one(tiny, job):
    (tiny / "start.py").write_text(STAND_IN.format(root=str(ROOT), mark=str(tiny / "signalled")))
    python = executable(tiny / "python", f'exec "{sys.executable}" "{tiny}/start.py" "$@"')
    flags = train_args(num_epochs=4, model_name=None, logger_name=None)
    flags += ["--data_path", str(tiny / "data"), "--vocab_path", str(tiny / "vocab")]
    first = job(python, str(tiny / "run"), *flags)
    assert first.returncode == 143, first.stderr
    assert "saved epoch 1, batch 3" in first.stdout and "it queues again" in first.stdout
    assert Path("scontrol.log").read_text() == "requeue 42\n"
    second = job(python, str(tiny / "run"), *flags)
    assert second.returncode == 0, second.stderr
    assert "interrupted.pth.tar: 1 epoch and 3 steps done" in second.stdout
    assert Path("scontrol.log").read_text() == "requeue 42\n"
    assert [line["epoch"] for line in read_log("run")] == [0, 1, 2, 3]
    kept = sorted(path.name for path in Path("run").glob("checkpoint_*"))
    assert kept == [f"checkpoint_{k}.pth.tar" for k in (1, 2, 3)]
    train.main(train_args(num_epochs=4, model_name="whole", logger_name="whole"))
    assert same_weights("run/checkpoint_3.pth.tar", "whole/checkpoint_3.pth.tar")


def test_a_job_that_failed_does_not_queue_again(tiny, job):
    failing = executable(tiny / "python", "exit 3")
    assert job(failing, "run").returncode == 3 and not Path("scontrol.log").exists()
    for wrong in ([], ["--num_epochs", "3"]):
        done = job(failing, *wrong)
        assert done.returncode == 2 and "use: sbatch scripts/slurm_example.sh" in done.stderr
