"""Damage to a checkpoint's bytes is found, a full disk leaves the older ones, and a run goes on."""

import argparse
import errno
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import struct
import time
import zipfile

import pytest
import torch

import checkpoint as ckpt
import run_state
import train
from tests.conftest import same_weights, train_args
from tests.hostile import refusal, trained
from util import checkpoint_files
from util.checkpoint_files import check_whole, fault_of, newest_whole, rotate, seal
from util.cli import InputError


def place(epoch: int, batch: int = 0) -> dict:
    """A small state that stands at a place of a run."""
    return {"x": torch.arange(100.0), "run": {"epoch": epoch, "batch": batch}}


@pytest.fixture
def folder(tmp_path):
    """A folder with the checkpoints of epochs 0 to 3."""
    for k in range(4):
        ckpt.save(place(k + 1), str(tmp_path), f"checkpoint_{k}.pth.tar", is_best=k == 1)
        os.utime(tmp_path / f"checkpoint_{k}.pth.tar", (k, k))
    return tmp_path


def flip(path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def names(folder) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


def test_a_sealed_file_is_read_by_plain_torch(folder):
    path = folder / "checkpoint_3.pth.tar"
    for mapped in (False, True):
        assert torch.equal(torch.load(path, mmap=mapped)["x"], torch.arange(100.0))
    comment = zipfile.ZipFile(path).comment
    assert comment.startswith(b"epoch 4 batch 0 sha256 ")
    assert comment[-64:].decode() == hashlib.sha256(path.read_bytes()[:-64]).hexdigest()
    check_whole(path)


def test_every_flipped_bit_of_a_sealed_file_is_found(folder):
    """If it is not, as in the words in front of the digits, the content is that of the whole."""
    path = folder / "checkpoint_3.pth.tar"
    whole = path.read_bytes()
    bits = 8 * len(whole)
    end = range(bits - 8 * 150, bits)  # of the archive's end and the seal
    for bit in {*end, *range(0, 800), *random.Random(0).sample(range(bits), 500)}:
        flip(path, bit)
        if fault_of(path) is None:
            try:
                assert torch.equal(torch.load(path)["x"], torch.arange(100.0))
            finally:
                assert path.read_bytes()[:-200] == whole[:-200], bit
        flip(path, bit)
    assert fault_of(path) is None


@pytest.mark.parametrize("sealed", [True, False])
def test_damage_names_the_file_and_offers_the_one_before(folder, sealed):
    path = folder / "checkpoint_3.pth.tar"
    if not sealed:
        torch.save(place(4), path)
    with zipfile.ZipFile(path) as archive:
        at = next(x.header_offset for x in archive.infolist() if x.filename.endswith("/data/0"))
    flip(path, 8 * (at + 200))
    flip(folder / "checkpoint_2.pth.tar", 8000)
    for read in (check_whole, ckpt.load):
        with pytest.raises(InputError) as error:
            read(str(path))
        said = str(error.value)
        assert said.startswith(f"{path}: not a checkpoint, or a damaged one (")
        assert f"or take {folder}/checkpoint_1.pth.tar, the newest whole one before" in said


def test_cut_and_empty_files(folder):
    path = folder / "checkpoint_3.pth.tar"
    whole = path.read_bytes()
    for data in (b"", bytes(5000), *(whole[:n] for n in range(1, len(whole), 97)), whole + b"x"):
        path.write_bytes(data)
        if fault_of(path) is None:  # cut where the seal begins: the content is whole
            assert len(whole) - len(data) < 100
            assert torch.equal(torch.load(path)["x"], torch.arange(100.0))


def test_sidecars_and_old_files(tmp_path, capsys):
    path = tmp_path / "old.pth.tar"
    torch.save(trained(), path, _use_new_zipfile_serialization=False)
    ckpt.load(str(path))
    notice = f"notice: {path} is of an old PyTorch and carries no checksum"
    assert capsys.readouterr().out.count(notice) == 1
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    side = tmp_path / "old.pth.tar.sha256"
    for text in (f"{digest}  old.pth.tar\n", f"{digest.upper()} *old.pth.tar\n", digest):
        side.write_text(text)
        ckpt.load(str(path))
        assert not capsys.readouterr().out
    for text, said in (("0" * 64, "its SHA-256 is not that of"), ("x", "does not begin with a")):
        side.write_text(text)
        with pytest.raises(InputError, match=said):
            ckpt.load(str(path))
    torch.save(trained(), path)  # of any kind of file
    with pytest.raises(InputError, match="does not begin with a"):
        ckpt.load(str(path))


def archive_of(path, names: list[str], **options) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name in names:
            archive.writestr(name, bytes(10**6))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives(tmp_path):
    path = tmp_path / "x.pth.tar"
    archive_of(path, ["x/data.pkl"], compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in fault_of(path)
    archive_of(path, ["x/data.pkl", "x/data.pkl"])
    assert "two records of one name" in fault_of(path)
    archive_of(path, ["x/data.pkl", "x/data/0"])
    data = path.read_bytes()
    at = data.rindex(b"PK\x01\x02")  # both records are the first one
    path.write_bytes(data[: at + 42] + bytes(4) + data[at + 46 :])
    assert fault_of(path)
    size = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data[: at + 20] + size + data[at + 28 :])
    assert "more bytes than the file has" in fault_of(path)
    entry = data[at : at + 46 + len("x/data/0")]
    table = entry * 10**6
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 10, 10, len(table), at, 0)
    path.write_bytes(data[:at] + table + end)
    start = time.monotonic()
    assert "more records than" in fault_of(path)
    assert time.monotonic() - start < 5


def test_newest_whole_goes_by_where_the_run_stood(folder, capsys):
    newest = lambda: os.path.basename(newest_whole(folder) or "none")  # noqa: E731
    assert newest() == "checkpoint_3.pth.tar"
    ckpt.save(place(3, 7), str(folder), "interrupted.pth.tar")
    assert newest() == "checkpoint_3.pth.tar"
    ckpt.save(place(4, 1), str(folder), "interrupted.pth.tar")
    os.utime(folder / "interrupted.pth.tar", (0, 0))  # as a copy may have it
    assert newest() == "interrupted.pth.tar" and not capsys.readouterr().out
    torch.save(place(4, 1), folder / "interrupted.pth.tar")  # an old one has no seal
    assert newest() == "interrupted.pth.tar"
    os.utime(folder / "interrupted.pth.tar", (1.5, 1.5))
    assert newest() == "checkpoint_3.pth.tar"
    for k in (3, 2):
        (folder / f"checkpoint_{k}.pth.tar").write_bytes(b"PK\x03\x04")
        assert newest() == ("checkpoint_2.pth.tar" if k == 3 else "interrupted.pth.tar")
    assert "checkpoint_3.pth.tar is damaged (" in capsys.readouterr().out
    for name in names(folder):
        if name != "model_best.pth.tar":
            os.remove(folder / name)
    (folder / "checkpoint_9.pth.tar.part").write_bytes(b"half")
    assert newest() == "model_best.pth.tar"
    os.remove(folder / "model_best.pth.tar")
    assert newest() == "none"
    assert newest_whole(folder / "no_folder") is None


def test_rotation(folder):
    ckpt.save(place(4, 2), str(folder), "interrupted.pth.tar")
    others = ["interrupted.pth.tar", "model_best.pth.tar"]
    rotate(folder, 0)
    rotate(folder, 4)
    assert len(names(folder)) == 6
    ckpt.save(place(5), str(folder), "checkpoint_4.pth.tar", keep=2)
    assert names(folder) == ["checkpoint_3.pth.tar", "checkpoint_4.pth.tar", *others]
    # A run that goes on from an earlier epoch: what it has just written stays.
    ckpt.save(place(2), str(folder), "checkpoint_1.pth.tar", keep=1)
    assert names(folder) == ["checkpoint_1.pth.tar", "checkpoint_4.pth.tar", *others]
    for name in names(folder)[:2]:
        flip(folder / name, 5000)
    shutil.copy(folder / "model_best.pth.tar", folder / "checkpoint_0.pth.tar")
    os.utime(folder / "checkpoint_0.pth.tar", (0, 0))
    rotate(folder, 1)  # the last whole one
    assert "checkpoint_0.pth.tar" in names(folder)


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(folder, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    monkeypatch.setattr(checkpoint_files.os, "remove", refuse)
    ckpt.save(place(5), str(folder), "checkpoint_4.pth.tar", keep=1)
    said = "an old checkpoint could not be removed (Operation not permitted)"
    assert f"warning: {folder}: {said}" in capsys.readouterr().out
    assert newest_whole(folder) == str(folder / "checkpoint_4.pth.tar")


@pytest.fixture
def small_disk():
    """A function that bounds the files that this process may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk(folder, small_disk):
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    state = place(5) | {"more": [torch.zeros(10**6)]}
    for size in (0, 2000, 10**6, 4 * 10**6):
        small_disk(size)
        with pytest.raises(ckpt.SaveError) as error:
            ckpt.save(state, str(folder), "checkpoint_4.pth.tar", is_best=True, keep=1)
        said = str(error.value)
        assert said.startswith(f"{folder}/checkpoint_4.pth.tar: not saved (File too large)")
        assert "it needs 8.0 MB, " in said and "MB are free; " in said
        assert said.endswith(f"{folder}/checkpoint_3.pth.tar is whole") and said.isprintable()
        assert {name: (folder / name).read_bytes() for name in names(folder)} == before


@pytest.mark.parametrize("call", ["fsync", "replace", "copyfile"])
def test_a_disk_that_fails_at_any_step(folder, monkeypatch, call):
    def fails(*args):
        raise OSError(5, "Input/output error")

    module = shutil if call == "copyfile" else os
    monkeypatch.setattr(module, call, fails)
    with pytest.raises(ckpt.SaveError, match="checkpoint_4.pth.tar: not saved .Input/output error"):
        ckpt.save(place(5), str(folder), "checkpoint_4.pth.tar", is_best=True)
    assert len(names(folder)) == 5


def test_a_folder_that_is_gone_and_an_error_of_another_kind(tmp_path):
    with pytest.raises(ckpt.SaveError, match=r"not saved \(No such file .* is gone"):
        ckpt.save(place(1), str(tmp_path / "no"), "checkpoint_0.pth.tar")
    with pytest.raises(ckpt.SaveError, match="no checkpoint is there yet"):
        (tmp_path / "checkpoint_0.pth.tar.part").mkdir()
        ckpt.save(place(1), str(tmp_path), "checkpoint_0.pth.tar")
    with pytest.raises(AttributeError):  # a fault of the program keeps its traceback
        ckpt.save({"x": lambda: 1}, str(tmp_path), "checkpoint_1.pth.tar")


def test_half_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "checkpoint_3.pth.tar.part").write_bytes(b"half")
    (tmp_path / "notes.part").write_bytes(b"of the user")
    ckpt.prepare(str(tmp_path))
    assert names(tmp_path) == ["notes.part"]


# --resume auto and --keep


def test_resume_auto(tiny, capsys):
    """One command line, in a scheduler's script: begins, goes on, skips damage, has ended."""
    auto = {"resume": "auto", "num_epochs": 3, "quiet": True}
    train.main(train_args(num_epochs=3, model_name="whole", logger_name="whole", quiet=True))
    train.main(train_args(**auto | {"num_epochs": 2}))
    said = capsys.readouterr().out
    assert "notice: --resume auto: no checkpoint in run, so a new run starts" in said
    flip(tiny / "run" / "checkpoint_1.pth.tar", 8 * 3000)
    (tiny / "run" / "checkpoint_2.pth.tar.part").write_bytes(b"half")
    train.main(train_args(**auto))
    said = capsys.readouterr().out
    assert "notice: run/checkpoint_1.pth.tar is damaged (" in said
    # The best may be a copy of the damaged one.
    assert re.search("going on from run/(model_best|checkpoint_0).pth.tar", said)
    assert "changed options" not in said and not os.path.exists("run/earlier_1")
    assert same_weights("whole/checkpoint_2.pth.tar", "run/checkpoint_2.pth.tar")
    assert not os.path.exists("run/checkpoint_2.pth.tar.part")
    train.main(train_args(**auto))
    assert "nothing to do: 3 epochs are done" in capsys.readouterr().out
    files = names(tiny / "run")
    for name in files:
        if name.endswith(".pth.tar"):
            (tiny / "run" / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="--resume auto: no checkpoint in run is whole; copy one"):
        train.main(train_args(**auto))
    assert names(tiny / "run") == files  # nothing is moved or begun
    with pytest.raises(InputError, match="--resume auto goes on with a run, and"):
        train.main(train_args(**auto, reset_start_epoch=True))


def test_resume_auto_after_a_kill_before_the_first_checkpoint(tiny):
    os.makedirs("run")
    (tiny / "run" / "log.jsonl").write_text('{"epoch": 0}\n')
    opt, resumed = run_state.read_options(train_args(resume="auto"))
    assert resumed is None and opt.resume == "" and opt.img_dim == 12
    assert isinstance(opt, argparse.Namespace)


def test_keep(tiny):
    train.main(train_args(num_epochs=3, keep=1))
    files = [name for name in names(tiny / "run") if name.endswith(".pth.tar")]
    assert files == ["checkpoint_2.pth.tar", "model_best.pth.tar"]


def test_a_hostile_name_in_a_refusal_is_cut(tmp_path):
    class Evil:
        def __reduce__(self):
            return seal, ("x",)

    said = refusal(tmp_path, lambda state: state.update(x=Evil()), ckpt.load)
    assert "refused, it would run code or load objects" in said
