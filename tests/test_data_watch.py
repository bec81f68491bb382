"""Data files that are cut, replaced or touched while a run reads them."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import options
import systems
import train
from tests.conftest import read_log, same_weights, train_args
from util.arrays import open_array
from util.cli import InputError
from util.data_watch import DataWatch
from util.fingerprint import sampled_hash, sampled_rows
from vocab import deserialize_vocab

FOLDER = Path("data/tiny_precomp")
TRAIN, DEV = FOLDER / "train_ims.npy", FOLDER / "dev_ims.npy"


def other_rows(path: Path) -> None:
    """Write other numbers of the same size into the same file."""
    array = np.load(path)
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) - array.nbytes)
        file.write((array + 1).tobytes())


def in_secret(path: Path) -> None:
    """As other_rows, with the old time of writing put back, as cp -p does."""
    before = os.stat(path)
    other_rows(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 200)  # in the first page, where a mapping reads zeros


def grown(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def by_rename(path: Path) -> None:
    """Put another file in the place of the old one, which stays as it is."""
    np.save("new.npy", np.load(path) + 1)
    os.replace("new.npy", path)


def copied(path: Path) -> None:
    shutil.copyfile(path, "new.npy")
    os.replace("new.npy", path)


def before_step(monkeypatch, number: int, action) -> None:
    """Do something, once, before a step of training, counted from 0."""
    step, left = train.train_step, [action]

    def train_step(run, *args):
        if run.state.Eiters == number and left:
            left.pop()()
        return step(run, *args)

    monkeypatch.setattr(train, "train_step", train_step)


@pytest.fixture
def whole(tiny):
    """A run of 2 epochs of 7 steps that nothing disturbs."""
    train.main(train_args(num_epochs=2, model_name="whole", logger_name="whole"))
    return tiny


@pytest.mark.parametrize(
    ("change", "path", "step"),
    [
        (other_rows, TRAIN, 6),
        (cut, TRAIN, 6),
        (in_secret, TRAIN, 9),
        (grown, DEV, 6),
        (other_rows, DEV, 9),
        (cut, DEV, 9),
    ],
)
def test_a_changed_file_ends_the_run_in_one_line(tiny, monkeypatch, change, path, step):
    """Whether it happens in an epoch's last step (6) or within an epoch (9): it is not saved."""
    whole = path.read_bytes()
    before_step(monkeypatch, step, lambda: change(path))
    with pytest.raises(InputError) as error:
        train.main(train_args(num_epochs=3))
    said = str(error.value)
    assert "\n" not in said and path.name in said and "shared memory" not in said
    assert f"{len(whole):,} bytes of 2" in said and f"{path.stat().st_size:,} bytes of 2" in said
    assert len(list(Path("run").glob("checkpoint_*"))) == step // 7


def test_a_run_goes_on_when_the_old_file_is_back(whole, monkeypatch, capsys):
    old = TRAIN.read_bytes()
    before_step(monkeypatch, 9, lambda: other_rows(TRAIN))
    with pytest.raises(InputError, match="train_ims.npy: changed"):
        train.main(train_args(num_epochs=2))
    TRAIN.write_bytes(old)
    capsys.readouterr()
    train.main(["--resume", "run/checkpoint_0.pth.tar", "--num_epochs", "2", "--workers", "0"])
    assert same_weights("run/checkpoint_1.pth.tar", "whole/checkpoint_1.pth.tar")
    assert "trained on other data" not in capsys.readouterr().out


def test_loader_processes_name_the_file_too(tiny, monkeypatch):
    before_step(monkeypatch, 2, lambda: cut(TRAIN))
    with pytest.raises(InputError, match=r"train_ims.npy: changed .* 3,968 bytes .* 200 bytes"):
        train.main(train_args(num_epochs=20, workers=1))


@pytest.mark.parametrize("change", [os.utime, copied, lambda path: os.chmod(path, 0o600)])
def test_the_same_content_is_no_change(whole, monkeypatch, capsys, change):
    before_step(monkeypatch, 3, lambda: change(TRAIN))
    train.main(train_args(num_epochs=2))
    assert same_weights("run/checkpoint_1.pth.tar", "whole/checkpoint_1.pth.tar")
    assert TRAIN.name not in capsys.readouterr().out


@pytest.mark.parametrize("change", [by_rename, os.remove])
def test_a_file_that_was_replaced_or_removed_is_read_on(whole, monkeypatch, capsys, change):
    """A warning says it once, and another one when the run is resumed with the new file."""
    before_step(monkeypatch, 3, lambda: change(TRAIN))
    train.main(train_args(num_epochs=2))
    assert same_weights("run/checkpoint_1.pth.tar", "whole/checkpoint_1.pth.tar")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "train_ims.npy" in x]
    assert line.startswith("warning: ")
    if change is by_rename:
        resume = ["--resume", "run/checkpoint_0.pth.tar", "--num_epochs", "2", "--workers", "0"]
        train.main(resume)
        (line,) = [x for x in capsys.readouterr().out.splitlines() if "train_ims.npy" in x]
        assert line.startswith("warning: run/checkpoint_0.pth.tar: it was trained on other data")
        assert len(read_log("run")) == 2


@pytest.mark.parametrize("marks", [None, 7, [], {"train_ims.npy": 7}, {"train_ims.npy": None}, {}])
def test_a_checkpoint_need_not_say_its_data(tiny, capsys, marks):
    """Older ones do not, and a foreign one may hold anything."""
    watch = DataWatch(SimpleNamespace(images=open_array(str(TRAIN), 3)))
    watch.compare(marks, "a.pth.tar")
    assert capsys.readouterr().out == ""
    watch.compare({"train_ims.npy": "0" * 64}, "a.pth.tar")
    assert "warning: a.pth.tar: " in capsys.readouterr().out


def test_a_replaced_file_may_go_on_changing(tiny, capsys):
    """The mapping is of the old one."""
    watch = DataWatch(SimpleNamespace(images=open_array(str(TRAIN), 3)))
    by_rename(TRAIN)
    for change in (os.utime, other_rows, grown, cut, os.remove):
        change(TRAIN)
        watch.check()
    assert capsys.readouterr().out.count("warning: ") == 1


@pytest.mark.parametrize(
    ("system", "names"),
    [("scan", "ims"), ("gsmn", "ims ims_bbx"), ("pfan_whole", "boxes ims who_ims")],
)
def test_all_mapped_files_are_watched(tiny_positions, system, names):
    opt = options.parse(["--model", system, "--img_dim", "12"])
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    np.save(FOLDER / "train_num_boxes.npy", np.full(20, 4))  # read at the start
    train_set = systems.open_split(str(FOLDER), "train", words, opt)
    watch = DataWatch(train_set, systems.open_split(str(FOLDER), "dev", words, opt))
    expected = {f"{split}_{name}.npy" for name in names.split() for split in ("train", "dev")}
    assert set(watch.marks) == expected
    other_rows(FOLDER / "train_num_boxes.npy")
    watch.check()
    assert (train_set.num_boxes == 4).all()
    for name in sorted(expected):
        old = (FOLDER / name).read_bytes()
        other_rows(FOLDER / name)
        for _ in range(2):
            with pytest.raises(InputError, match=name):
                watch.check()
        (FOLDER / name).write_bytes(old)
        watch.check()


@pytest.mark.parametrize(
    ("error", "unchanged"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "out of mem"),
        (InputError("row 3 holds NaN"), "row 3 holds NaN"),
        (OSError(5, "Input/output error"), "Input/output"),
    ],
)
def test_an_error_is_explained_by_the_data_first(tiny, error, unchanged):
    watch = DataWatch(SimpleNamespace(images=open_array(str(TRAIN), 3)))
    with pytest.raises((InputError, OSError), match=unchanged), watch.explaining():
        raise error
    other_rows(TRAIN)
    with pytest.raises(InputError, match="train_ims.npy: changed"), watch.explaining():
        raise error


def test_rows_of_the_whole_array_are_sampled():
    assert sampled_rows(5) == [0, 1, 2, 3, 4] and sampled_rows(0) == []
    for n in (17, 1000, 31014):
        rows = sampled_rows(n)
        assert len(rows) == 16 and rows[0] == 0 and rows[-1] == n - 1
        assert max(np.diff(rows)) - min(np.diff(rows)) <= 1
    array = np.zeros((100, 3), np.float32)
    hashes = {sampled_hash(array), sampled_hash(array.astype(np.float16)), sampled_hash(array.T)}
    for row in range(100):  # a small array is hashed whole
        other = array.copy()
        other[row, 1] = 1
        hashes.add(sampled_hash(other))
    assert len(hashes) == 103


def test_a_loader_process_that_ends_is_one_line(tiny, monkeypatch):
    """First its connection breaks, then its end is raised, while the log is closed."""

    def broken(loader):
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    def ended(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(train.DataLoader, "__iter__", broken)
    with pytest.raises(InputError, match="a loader process ended .*reset by peer.*fewer --workers"):
        train.main(train_args(num_epochs=1))
    monkeypatch.setattr(train.RunLog, "__exit__", ended)
    with pytest.raises(InputError, match="a loader process ended .*Killed.*fewer --workers"):
        train.main(train_args(num_epochs=1))
