"""Loader processes on the machines that people have: spawned, short of memory or of files."""

import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import options
import systems
import train
from batches import get_train_loader
from data import Drop, PrecompDataset
from tests.conftest import train_args, write_split
from util import worker_limits
from util.cli import InputError
from vocab import deserialize_vocab

ROOT = Path(train.__file__).parent
FOLDER = Path("data/tiny_precomp")


@pytest.mark.parametrize("system", ["scan", "gsmn", "pfan", "pfan_whole"])
def test_a_dataset_is_pickled_without_its_arrays(tiny_positions, system):
    """A spawned worker opens the files again; the set here is made larger than any pickle."""
    for name in ("ims", "ims_bbx", "boxes", "ims_size", "who_ims"):
        rows = np.load(FOLDER / f"train_{name}.npy")
        rows = np.repeat(rows, 16, -1) if name in ("ims", "who_ims") else rows
        np.save(FOLDER / f"train_{name}.npy", np.repeat(rows, 40, 0))
    (FOLDER / "train_precaps_stan.txt").unlink()
    lines = (FOLDER / "train_caps.txt").read_text().splitlines()
    (FOLDER / "train_caps.txt").write_text("\n".join(lines * 40))
    opt = options.parse(["--model", system, "--img_dim", "192"])
    words = systems.of(opt).vocabulary(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
    data = systems.open_split(str(FOLDER), "train", words, opt)
    size = len(pickle.dumps(data))
    own = sum(x.nbytes for x in vars(data).values() if isinstance(x, torch.Tensor))
    sizes = data.sizes.nbytes if system == "gsmn" else 0
    assert size < own + sizes + 20_000 < data.images.nbytes
    again = pickle.loads(pickle.dumps(data))
    for caption in (0, 7, 3999):
        for name, x in data[caption].items():
            np.testing.assert_array_equal(again[caption][name], x)


def test_spawned_workers_give_the_same_batches(tiny):
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    words.add_word(words.mask)
    batches = {}
    for how, workers in (("spawn", 1), (None, 0)):
        data = PrecompDataset(str(FOLDER), "train", words)
        data.drop = Drop(0.3, 0, words)
        loader = get_train_loader(data, 16, workers, seed=1, multiprocessing_context=how)
        batches[how] = list(loader)
    for a, b in zip(batches["spawn"], batches[None], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_with_spawned_workers(tiny):
    """As on macOS, on Windows, and on Linux from Python 3.14."""
    code = (
        "import sys, torch\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.set_start_method('spawn')\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        "    import train\n"
        f"    train.main({train_args(num_epochs=1, workers=1)!r})\n"
    )
    Path("spawned.py").write_text(code)
    done = subprocess.run([sys.executable, "spawned.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.path.isfile("run/checkpoint_0.pth.tar")


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("mib", "batch", "workers"),
    [
        (64, 128 * 36 * 2048 * 4, 0),  # Docker's default, and the published sizes
        (256, 128 * 36 * 2048 * 4, 3),
        (64, 128 * 36 * 256 * 2, 4),
        (0, 1000, 0),
    ],
)
def test_workers_fit_into_shared_memory(monkeypatch, capsys, mib, batch, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(worker_limits, "SHARED", "/")
    free = Usage(0, 0, mib * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert worker_limits.workers_that_fit(10, batch) == workers
    out = capsys.readouterr().out
    assert ("--shm-size" in out) == (workers < 4)
    assert ("batches are loaded in this process instead of 4" in out) == (workers == 0)


@pytest.mark.parametrize(("files", "workers"), [(30, 0), (80, 1), (100, 2), (5000, 3)])
def test_workers_fit_into_the_file_handles(monkeypatch, capsys, files, workers):
    limits = [min(files, 64), files]
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.__setitem__(0, new[0]))
    assert worker_limits.workers_that_fit(10, 1) == workers
    out = capsys.readouterr().out
    assert (f"this process may open {files} files" in out) == (workers < 3)
    assert limits[0] <= files and (workers == 0 or limits[0] >= 64 + 16 * workers)


@pytest.mark.parametrize("files", [24, 40, 90])
def test_training_with_few_files(tiny, starts_at_once, files):
    """It ends; once it hung, or died of a traceback."""
    command = [sys.executable, str(ROOT / "train.py"), *train_args(num_epochs=1, workers=2)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    assert done.returncode == 0, done.stderr
    assert f"this process may open {files} files" in done.stdout or files == 90
    assert os.path.isfile("run/checkpoint_0.pth.tar")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", "--shm-size"),
        ("unable to write to file </torch_7_1>: No space left on device (28)", "--workers 0"),
        ("Too many open files. Communication with the workers is no longer", "ulimit -n"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "fewer --workers"),
    ],
)
def test_the_end_of_a_worker_is_explained(tiny, monkeypatch, said, message):
    class Broken:
        batch_sampler = dataset = None

        def __len__(self):
            return 1

        def __iter__(self):
            raise RuntimeError(said)

    run = train.argparse.Namespace(loader=Broken())
    with pytest.raises(InputError, match=message):
        next(train.batches_of(run, train.StopSignal()))
    said = "an error of the model"
    with pytest.raises(RuntimeError, match=said):
        next(train.batches_of(train.argparse.Namespace(loader=Broken()), train.StopSignal()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_wait_for_a_batch(tiny, monkeypatch, workers):
    """The loader hangs in the second batch; the first SIGTERM saves the run and ends it."""
    write_split(FOLDER, "train", 20)
    real = PrecompDataset.caption_item
    reads = []

    def slow(self, caption):
        reads.append(caption)
        if len(reads) > 17:
            time.sleep(60)
        return real(self, caption)

    monkeypatch.setattr(PrecompDataset, "caption_item", slow)
    threading.Timer(4, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.time()
    with pytest.raises(SystemExit) as end:
        train.main(train_args(num_epochs=1, workers=workers))
    assert end.value.code == 128 + signal.SIGTERM and time.time() - start < 40
    saved = torch.load("run/interrupted.pth.tar", weights_only=False)
    assert saved["run"]["batch"] <= 1
    monkeypatch.undo()
    os.chdir(tiny)
    train.main(train_args(num_epochs=1, resume="run/interrupted.pth.tar"))
    train.main(train_args(num_epochs=1, model_name="whole", logger_name="whole"))
    a, b = (torch.load(f"{x}/checkpoint_0.pth.tar", weights_only=False) for x in ("run", "whole"))
    for one, other in zip(a["model"], b["model"], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
