"""What a run does if its disk is full, and with a log that a power cut has torn."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

import checkpoint as ckpt
import train
from tests.conftest import read_log, same_weights, train_args
from util.cli import InputError
from util.log import Writers, append_json, forget_epochs_from, read_json_lines
from util.tracker import NoTracker

# Saving an epoch


def full_disk(monkeypatch, *failing: str) -> None:
    """Let the disk be full when these checkpoints are written."""
    save = ckpt.save

    def save_or_fail(state, directory, name, *args, **more):
        if name in failing:
            raise ckpt.SaveError(f"{directory}/{name}: 9 bytes are needed, 3 are free")
        save(state, directory, name, *args, **more)

    monkeypatch.setattr(ckpt, "save", save_or_fail)


def scores(monkeypatch, *rsums: float) -> None:
    """Let validations find these sums of recalls."""
    real, found = train.retrieval_metrics, iter(rsums)

    def retrieval_metrics(*args, **more):
        return real(*args, **more) | {"rsum": next(found)}

    monkeypatch.setattr(train, "retrieval_metrics", retrieval_metrics)


def epoch(name: str) -> int:
    return ckpt.load(f"run/{name}.pth.tar")["epoch"]


@pytest.mark.parametrize(("what", "epochs"), [("stop", 3), ("continue", 2)])
def test_a_full_disk_ends_the_run(tiny, monkeypatch, capsys, what, epochs):
    """After the last epoch in any case: none follows that could be saved."""
    full_disk(monkeypatch, "checkpoint_1.pth.tar")
    with pytest.raises(ckpt.SaveError, match="checkpoint_1.pth.tar: 9 bytes are needed"):
        train.main(train_args(num_epochs=epochs, on_save_error=what))
    assert "the run goes on" not in capsys.readouterr().out
    monkeypatch.undo()
    os.chdir(tiny)
    train.main(["--resume", "run/checkpoint_0.pth.tar", "--num_epochs", "2", "--workers", "0"])
    assert [line["epoch"] for line in read_log("run")] == [0, 1]


def test_a_run_may_go_on_with_a_full_disk(tiny, monkeypatch, capsys):
    train.main(train_args(num_epochs=3, model_name="whole", logger_name="whole"))
    capsys.readouterr()
    full_disk(monkeypatch, "checkpoint_1.pth.tar")
    train.main(train_args(num_epochs=3, on_save_error="continue"))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "are needed" in x]
    assert line.startswith("warning: run/checkpoint_1.pth.tar: ") and "the run goes on" in line
    assert not Path("run/checkpoint_1.pth.tar").exists()
    assert same_weights("run/checkpoint_2.pth.tar", "whole/checkpoint_2.pth.tar")
    assert [line["epoch"] for line in read_log("run")] == [0, 1, 2]


def test_the_best_is_that_on_the_disk(tiny, monkeypatch, capsys):
    """Epoch 1 is the best of all, and cannot be saved: then 2 is the best, and 3 is not."""
    full_disk(monkeypatch, "checkpoint_1.pth.tar")
    scores(monkeypatch, 100, 300, 200, 150, 250)
    train.main(train_args(num_epochs=4, on_save_error="continue"))
    assert epoch("model_best") == 2
    assert [ckpt.load(f"run/checkpoint_{k}.pth.tar")["best_rsum"] for k in (0, 2, 3)] == [
        *(100, 200, 200)
    ]
    out = capsys.readouterr().out
    assert out.count("new best: saved") == 2 and "best: rsum 200.0 after epoch 2, saved in" in out
    train.main(["--resume", "run/checkpoint_3.pth.tar", "--num_epochs", "5", "--workers", "0"])
    assert epoch("model_best") == 4


@pytest.mark.parametrize("what", ["stop", "continue"])
def test_an_interrupted_run_says_what_could_not_be_saved(tiny, monkeypatch, what):
    """Then it ends in any case: with the error, not as if it were saved."""
    full_disk(monkeypatch, "interrupted.pth.tar")
    step = train.train_step

    def train_step(run, *args):
        if run.state.Eiters == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *args)

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(ckpt.SaveError, match="interrupted.pth.tar: 9 bytes are needed"):
        train.main(train_args(num_epochs=2, on_save_error=what))


# Logs


def test_no_half_line_is_left(tmp_path, capsys):
    """The log has room for 10 bytes more, then for all."""
    path = str(tmp_path / "log.jsonl")
    assert append_json(path, [{"epoch": 0}])
    before = Path(path).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        assert not append_json(path, [{"epoch": 1}, {"epoch": 2, "more": "x" * 50}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path(path).read_bytes() == before
    out = capsys.readouterr().out
    assert f"warning: {path}: 88 bytes could not be written (File too large, " in out
    assert " bytes are free there)" in out and out.count("\n") == 1
    assert append_json(path, [{"epoch": 1}]) and len(read_json_lines(path)) == 2


def test_lines_that_could_not_be_written_are_written_later(tiny, monkeypatch, capsys):
    """/dev/full is a file on a full disk; in epoch 1 it has the log's name."""
    finish = train.finish_epoch

    def finish_epoch(run, *args):
        if run.state.epoch == 1:
            os.rename("run/log.jsonl", "run/aside")
            os.symlink("/dev/full", "run/log.jsonl")
        finish(run, *args)
        if run.state.epoch == 2:
            os.replace("run/aside", "run/log.jsonl")

    monkeypatch.setattr(train, "finish_epoch", finish_epoch)
    train.main(train_args(num_epochs=3))
    out = capsys.readouterr().out
    assert out.count("warning: run/log.jsonl: ") == 1 and "No space left on device" in out
    assert [line["epoch"] for line in read_log("run")] == [0, 1, 2]
    assert Path("run/checkpoint_2.pth.tar").is_file()


@pytest.mark.parametrize("at_close", [True, False])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_charts_that_cannot_be_written_end_nothing(tmp_path, capfd, at_close):
    folder = tmp_path / "log"
    writer = Writers(SummaryWriter(str(folder), flush_secs=0), NoTracker())
    thread = writer.tb.file_writer.event_writer._async_writer._worker
    shutil.rmtree(folder)
    writer.add_scalar("a", 1.0, 1)
    if not at_close:
        thread.join(10)  # it ends when it cannot write
        writer.add_scalar("a", 1.0, 2)
        writer.add_scalar("a", 1.0, 3)
    writer.close()
    writer.close()
    out, err = capfd.readouterr()
    assert out.startswith(f"warning: {folder}: TensorBoard's events cannot be written")
    assert out.count("\n") == 1 and err == ""


def test_a_full_disk_at_the_start_is_one_line(tiny, monkeypatch):
    def no_room(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train.run_log, "SummaryWriter", no_room)
    with pytest.raises(InputError, match="^run: TensorBoard's events .*No space left on device, "):
        train.main(train_args(num_epochs=1))


WHOLE = [json.dumps({"epoch": k, "rsum": 100.0 + k}).encode() for k in range(3)]


@pytest.mark.parametrize(
    ("content", "epochs", "said"),
    [
        (b"\n".join(WHOLE) + b"\n", [0, 1, 2], None),
        (b"\n".join(WHOLE), [0, 1, 2], None),  # cut at the end of the last line
        (b"\r\n".join(WHOLE) + b"\r\n", [0, 1, 2], None),
        (b"\n".join(WHOLE)[:-5], [0, 1], "line 3 is damaged"),
        (b"\n".join(WHOLE[:2]) + b"\n" + bytes(400), [0, 1], "line 3 is damaged"),
        (b"\n".join(WHOLE[:2]) + bytes(9) + b"\n", [0], "line 2 is damaged"),
        (WHOLE[0][:9] + WHOLE[1] + b"\n" + WHOLE[2] + b"\n", [2], "line 1 is damaged"),
        (b"\xff\xfe\n" + WHOLE[0] + b"\n[]\n{}\n7\n", [0], "4 lines are damaged, the first is"),
        (b"[" * 100_000 + b"\n" + WHOLE[0], [0], "line 1 is damaged"),
        (b'{"epoch": ' + b"9" * 5000 + b"}", [], "line 1 is damaged"),
        (b'{"epoch": "2"}\n{"epoch": true}', [], "2 lines are damaged, the first is line 1"),
        (b"", [], None),
    ],
)
def test_damaged_lines_of_a_log(tmp_path, capsys, content, epochs, said):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    assert [record["epoch"] for record in read_json_lines(str(path))] == epochs
    out = capsys.readouterr().out
    assert (out == "") if said is None else (out.startswith("notice: ") and said in out)
    assert path.read_bytes() == content  # reading changes nothing
    forget_epochs_from(2, str(path))
    kept = [k for k in epochs if k < 2]
    assert path.read_bytes().replace(b"\r", b"") == b"".join(WHOLE[k] + b"\n" for k in kept)
    copy = Path(f"{path}.damaged")
    assert copy.read_bytes() == content if said else not copy.exists()


def test_a_torn_log_does_not_block_resuming(tiny, capsys):
    train.main(train_args(num_epochs=2))
    with open("run/log.jsonl", "rb+") as log:
        log.truncate(os.path.getsize("run/log.jsonl") - 30)
    train.main(["--resume", "run/checkpoint_0.pth.tar", "--num_epochs", "2", "--workers", "0"])
    assert [line["epoch"] for line in read_log("run")] == [0, 1]
    assert capsys.readouterr().out.count("run/log.jsonl: line 2 is damaged") == 1
    torn = Path("run/log.jsonl").read_bytes()[:-40]
    Path("run/log.jsonl").write_bytes(torn)
    train.main(["--resume", "run/checkpoint_1.pth.tar", "--num_epochs", "3", "--workers", "0"])
    assert [line["epoch"] for line in read_log("run")] == [0, 2]
    assert Path("run/log.jsonl.damaged").read_bytes() == torn


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tiny):
    """What it left is moved aside, or was half a file."""
    Path("run").mkdir()
    for name in ("events.out.tfevents.1", "checkpoint_0.pth.tar.part"):
        Path("run", name).write_bytes(b"half")
    Path("run/log.jsonl").write_bytes(WHOLE[0][:9])
    for epochs in (1, 2):
        train.main(train_args(num_epochs=epochs, resume="auto"))
        assert [line["epoch"] for line in read_log("run")] == [*range(epochs)]
    assert Path("run/earlier_1/log.jsonl").read_bytes() == WHOLE[0][:9]
    assert Path("run/earlier_1/events.out.tfevents.1").is_file()
    assert not Path("run/earlier_2").exists() and not list(Path("run").glob("*.part"))
