"""The fault drill in short, its judges, and the watcher of the soak: each must be able to fail."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts import drill_faults, drill_runs, fault_drill, soak
from scripts.drill_faults import KILL, KILL_IN_SAVE, damaged_checkpoint
from scripts.drill_runs import RUN, Bench, Lost, Process, check_end, copy_unbroken, difference
from scripts.fault_drill import Drill
from scripts.process_tree import held
from util.checkpoint_files import seal
from util.cli import InputError

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the drill reads /proc")
TRUNCATED, FLIPPED = list(drill_faults.FAULTS)[:2]


def train_in(place: str, paths: list[str], argv: list[str]) -> None:
    """What a forked process does: train.py with these arguments."""
    import train

    os.setsid()
    os.chdir(place)
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = ["train.py", *argv]
    torch.set_num_threads(1)
    train.cli.run(train.main)


class Forked:
    """Stands in for a process of train.py: a fork of one that has imported it, which is quicker."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def __init__(self, command, cwd, stdout, stderr, **_):
        argv = command[2:]
        args = str(cwd), [stdout.name, stderr.name], argv
        self.process = self.context.Process(target=train_in, args=args)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("train.py", timeout)
        return self.process.exitcode


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """SCAN's unbroken run of four epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Process, "popen", Forked)
        yield Bench("scan", tmp_path_factory.mktemp("drill"), seed=0, epochs=4, words=500)
        Process.kill_all()


@pytest.fixture
def place(bench, request):
    return bench.new_place("".join(filter(str.isalnum, request.node.name)))


def test_a_short_drill_loses_nothing(bench):
    drill = Drill(bench.folder, seed=0)
    drill.stops(bench, {KILL: 2})
    for name in (TRUNCATED, FLIPPED):
        drill.fault(bench, name, 0)
    assert not drill.lost
    tried = {name: ends.total() for name, ends in drill.ends.items() if ends}
    assert tried == {KILL: 2, TRUNCATED: 1, FLIPPED: 1}
    assert drill.table().splitlines()[-1].startswith("| all | 4 | 4 | 0 |")
    assert not list(bench.folder.glob("stops*")), "a trial that survived leaves no folder"


def change(path: Path, what: str) -> None:
    """Change one value in a checkpoint, and seal it as if it were whole."""
    state = torch.load(path, weights_only=False)
    run = state["run"]
    if what == "weight":
        weight = next(iter(state["model"][0].values())).view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    elif what == "sign of zero":
        run["optimizer"]["state"][0]["exp_avg"].view(-1)[0] = -0.0
    elif what == "optimizer":
        run["optimizer"]["param_groups"][0]["lr"] *= 1 + 1e-9
    elif what == "random state":
        run["rng"][100] ^= 1
    else:
        state["Eiters"] += 1
    torch.save(state, path)
    seal(path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("checkpoint_3", "weight"),
        ("checkpoint_3", "optimizer"),
        ("checkpoint_3", "sign of zero"),
        ("model_best", "random state"),
        ("model_best", "counter"),
    ],
)
def test_a_value_that_differs_in_one_bit_is_seen(bench, place, what, name):
    shutil.copytree(bench.unbroken / RUN, place / RUN)
    assert difference(bench.unbroken / RUN, place / RUN) is None
    change(place / RUN / f"{name}.pth.tar", what)
    found = difference(bench.unbroken / RUN, place / RUN)
    assert found.startswith(f"{name}.pth.tar: ") and found.endswith(" differs")


def test_what_is_missing_or_other_in_the_log_is_seen(bench, place):
    shutil.copytree(bench.unbroken / RUN, place / RUN)
    log = place / RUN / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)

    def found(*lines: str, lost: int = 0) -> str | None:
        log.write_text("".join(lines))
        return difference(bench.unbroken / RUN, place / RUN, lost)

    assert found(*lines) is None
    assert found(*lines[1:]) == "log.jsonl: no line of epoch 0"
    assert found(*lines[1:], lost=1) is None
    assert found(lines[0], *lines) == "log.jsonl: an epoch has two lines"
    other = lines[2].replace('"Le": ', '"Le": 1')
    assert found(*lines[:2], other, lines[3], lost=4) == "log.jsonl: the line of epoch 2 differs"
    assert "log.jsonl: " in found(*lines[:3], lines[3][:20])
    (place / RUN / "model_best.pth.tar").unlink()
    assert "model_best.pth.tar: " in found(*lines)


def test_a_run_that_goes_on_from_other_weights_is_lost(bench, place):
    change(copy_unbroken(bench, place, 2), "weight")
    with pytest.raises(Lost, match="not as the unbroken run: checkpoint_3.pth.tar: model"):
        bench.go_on(place)


def test_damage_that_loads_with_other_values_is_lost(bench, place):
    with pytest.raises(Lost, match="loads with other values"):
        damaged_checkpoint(bench, place, bench.draw("x"), lambda path, rng: change(path, "weight"))


def test_a_damaged_checkpoint_beside_a_run_is_lost(bench, place):
    path = copy_unbroken(bench, place, 3)
    assert drill_runs.check_checkpoints(path.parent) == str(path)
    drill_faults.truncate(path.parent / "checkpoint_1.pth.tar", bench.draw("x"))
    with pytest.raises(Lost, match="a checkpoint is not whole: .*checkpoint_1"):
        drill_runs.check_checkpoints(path.parent)


TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 1\nKeyError: 3\n'


@pytest.mark.parametrize(
    ("status", "err", "lost"),
    [
        (1, "error: a\n", None),
        (1, "notice: x\nerror: a\n", None),
        (1, "", "0 error lines"),
        (1, "error: a\nerror: b\n", "2 error lines"),
        (1, f"{TRACEBACK}error: a\n", "a traceback"),
        (-11, "", "exit status -11"),
        (0, "", None),
        (0, "error: a\n", "exit status 0, but error: a"),
    ],
)
def test_how_a_process_may_end(status, err, lost):
    process = SimpleNamespace(err=lambda: err)
    with pytest.raises(Lost, match=lost) if lost else contextlib.nullcontext():
        check_end(process, status, {0, 1})


@pytest.fixture
def popen(monkeypatch):
    """Process starts commands again, not forks."""
    monkeypatch.setattr(Process, "popen", subprocess.Popen)


def test_a_process_that_hangs_is_lost_and_killed(popen, tmp_path):
    process = Process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    with pytest.raises(Lost, match="did not end within"):
        process.wait(0.2)
    assert process.process.poll() == -signal.SIGKILL and not Process.alive


def test_a_drill_that_lost_something_fails_and_keeps_its_folder(tmp_path, monkeypatch, capsys):
    bench = SimpleNamespace(system="scan", draw=str, new_place=tmp_path.joinpath)
    (tmp_path / "stops_0").mkdir()

    def lose(drill, *_, **__):
        def stops(place, rng, done):
            done += [(KILL, "in training"), (KILL_IN_SAVE, "half a file beside")]
            raise Lost("the weights differ")

        drill.trial(bench, "stops", 0, stops)

    monkeypatch.setattr(fault_drill, "drill_system", lose)
    with pytest.raises(SystemExit) as ended:
        fault_drill.main(["--folder", str(tmp_path), "--systems", "scan"])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and (tmp_path / "stops_0").is_dir()
    assert "LOST: scan stops 0: the weights differ" in out
    assert f"| {KILL} | 1 | 0 | 1 |" in out and "| all | 2 | 0 | 2 |" in out


# The soak


@pytest.mark.parametrize(
    ("kind", "per_hour", "noise", "grew"),
    [
        (0, 0, 5, False),
        (0, 12, 5, False),  # less than a twentieth of 300 MiB
        (0, 40, 5, True),
        (0, -40, 5, False),
        (1, 1, 3, False),
        (1, 6, 3, True),
        (2, 0, 0, False),
        (2, 3, 0, True),
    ],
)
def test_a_trend_is_told_from_noise(kind, per_hour, noise, grew):
    hours = np.linspace(0.1, 1, 300)
    for seed in range(20):
        values = 300 + per_hour * hours + np.random.default_rng(seed).normal(0, noise, 300)
        found = soak.trend(hours, values, soak.QUANTITIES[kind])
        assert found.grew == grew
        assert found.last - found.first == pytest.approx(0.675 * per_hour, abs=2.5)


LEAK = """
import time
kept, opened = [], []
for k in range(600):
    kept.append(bytearray(200_000))
    opened.append(open("/dev/null"))
    time.sleep(0.005)
"""


def test_the_watcher_sees_a_leak_and_an_early_end(popen, tmp_path, capsys):
    process = Process([sys.executable, "-c", LEAK], tmp_path)
    try:
        samples = soak.watch(process.pid, 1.5 / 60, lambda: 7, "things")
        with pytest.raises(InputError, match="has ended"):
            soak.watch(process.pid, 10 / 60, lambda: 7, "things")
    finally:
        process.kill()
    assert soak.judge(samples)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[-1] for row in rows[2:]] == ["grew |", "grew |", "flat |"]
    assert (samples[:, 4] == 7).all()


def test_memory_is_a_programs_own(tmp_path):
    """Neither a mapped file counts, nor who else has it open; a child's memory does."""
    path, wait = tmp_path / "mapped", "; print('ready', flush=True); input()"
    path.write_bytes(bytes(40 * 2**20))
    read = f"import mmap; f = open({str(path)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, "
    read += f"prot=mmap.PROT_READ); sum(m[::4096]){wait}"
    grow = f"import os; r = os.fork() and os.wait(); x = r or b'x' * (40 * 2**20){wait}"
    found = []
    with contextlib.ExitStack() as stack:
        for code in ("pass" + wait, read, read, grow):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", code], **pipes))
            stack.callback(process.stdin.close)
            assert process.stdout.readline() == b"ready\n"
            found.append(held(process.pid).mib)
    assert max(found[:3]) - min(found[:3]) < 5 and found[3] > found[0] + 35
