"""Tiny data sets on which the real programs run."""

import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import vocab
from util import positions

os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is imported: no test uses the network

WORDS = "red green blue tall small dog cat man bird car runs sits flies stands".split()
GOLDEN = sorted((Path(__file__).parent / "golden").iterdir())


def pytest_collection_finish() -> None:
    """Keep the collector from what is imported: to look at it again and again takes a tenth."""
    gc.collect()
    gc.freeze()


def write_split(
    folder: Path, split: str, n: int, k: int = 5, regions: int = 4, dim: int = 12, repeat: int = 1
) -> None:
    """Write n images whose regions are vectors of words, and k captions of those words for each."""
    table = np.random.default_rng(0).normal(size=(len(WORDS), dim))
    rng = np.random.default_rng([n, k, *split.encode()])
    images = np.zeros((n, regions, dim), np.float32)
    captions = []
    for i in range(n):
        words = rng.choice(len(WORDS), regions, replace=False)
        images[i] = table[words] + 0.05 * rng.normal(size=(regions, dim))
        for _ in range(k):
            some = rng.permutation(words)[: rng.integers(2, regions + 1)]
            captions.append("A " + " ".join(WORDS[w] for w in some) + " .")
    np.save(folder / f"{split}_ims.npy", np.repeat(images, repeat, 0))
    (folder / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions))


def write_graphs(folder: Path, split: str, words: vocab.Vocabulary) -> None:
    """Write what GSMN also reads: boxes, image sizes, word ids, one chain of words per caption."""
    n, regions, _ = np.load(folder / f"{split}_ims.npy", mmap_mode="r").shape
    rng = np.random.default_rng(n)
    sizes = rng.integers(200, 600, (n, 2))
    corners = np.sort(rng.random((n, regions, 2, 2)), axis=2) * sizes[:, None, None]
    boxes = corners.reshape(n, regions, 4)  # left, top, right, bottom
    np.save(folder / f"{split}_ims_bbx.npy", boxes.astype(np.float32))
    kind = [("image_w", "<i8"), ("image_h", "<i8")]
    np.save(folder / f"{split}_ims_size.npy", np.array([tuple(s) for s in sizes], kind))
    ids = [words.encode(c) for c in (folder / f"{split}_caps.txt").read_text().splitlines()]
    lines = [",".join(map(str, row)) for row in ids]
    (folder / f"{split}_precaps_stan.txt").write_text("".join(f"{x}\n" for x in lines))
    chains = [[[i, i + 1] for i in range(len(row) - 2)] for row in ids]
    (folder / f"{split}_caps.json").write_text(json.dumps(chains))


def write_positions(folder: Path, split: str, dim: int = 12, with_area: bool = False) -> None:
    """Write what PFAN also reads: blocks of regions, and vectors of whole images."""
    positions.convert(str(folder / split), with_area=with_area)
    n = len(np.load(folder / f"{split}_ims.npy", mmap_mode="r"))
    whole = np.random.default_rng(n).normal(size=(n, dim)).astype(np.float32)
    np.save(folder / f"{split}_who_ims.npy", whole)


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """The folders that tiny, tiny_graphs and tiny_positions copy: to write them takes longer."""
    plain, graphs, whole = (tmp_path_factory.mktemp(x) for x in ("plain", "graphs", "whole"))
    name, splits = Path("data", "tiny_precomp"), {"train": 20, "dev": 10, "test": 15}
    (plain / name).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(plain)
        for split, n in splits.items():
            write_split(name, split, n)
        vocab.main(["--data_path", "data", "--data_name", "tiny_precomp"])
        words = vocab.deserialize_vocab("vocab/tiny_precomp_vocab.json")
    shutil.copytree(plain, graphs, dirs_exist_ok=True)
    for split in splits:
        write_graphs(graphs / name, split, words)
    shutil.copytree(graphs, whole, dirs_exist_ok=True)
    for split in splits:
        write_positions(whole / name, split)
    return plain, graphs, whole


@pytest.fixture
def tiny(tmp_path, monkeypatch, originals):
    """A working directory with data/tiny_precomp (train, dev, test) and its vocabulary."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(originals[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def tiny_graphs(tiny, originals):
    """The directory of tiny, with boxes and graphs."""
    shutil.copytree(originals[1], tiny, dirs_exist_ok=True)
    return tiny


@pytest.fixture
def tiny_positions(tiny_graphs, originals):
    """The directory of tiny_graphs, with blocks and whole images."""
    shutil.copytree(originals[2], tiny_graphs, dirs_exist_ok=True)
    return tiny_graphs


@pytest.fixture(scope="session")
def warm():
    """A command that is python, but starts at once: see warm.py."""
    program = Path(__file__).with_name("warm.py")
    with tempfile.TemporaryDirectory() as folder:  # the name of a socket must be short
        command, line = Path(folder, "python"), Path(folder, "socket")
        python = shlex.join([sys.executable, "-I", "-S", str(program), "call", str(line)])
        command.write_text(f'#!/bin/sh\nexec {python} "$@"\n')
        command.chmod(0o755)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, program, "serve", line], **pipes) as process:
            assert process.stdout.readline() == b"ready\n"
            yield str(command)


@pytest.fixture
def starts_at_once(warm, monkeypatch):
    """Programs that a test calls with sys.executable, and processes of torchrun, start at once."""
    monkeypatch.setattr(sys, "executable", warm)
    monkeypatch.setenv("PYTHON_EXEC", warm)


@pytest.fixture
def torchrun(starts_at_once):
    """A function that runs a program in two processes, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(program: str | os.PathLike, *flags: str, **more) -> subprocess.CompletedProcess:
        words = [*command, str(program), *map(str, flags)]
        return subprocess.run(words, capture_output=True, text=True, env=env, **more)

    return run


@pytest.fixture
def server(tiny_positions, starts_at_once):
    """serve.py with a checkpoint of PFAN's whole-image variant, in a process of its own."""
    from tests.serving import WHOLE, Server, write_checkpoint

    server = Server(write_checkpoint(WHOLE))
    yield server
    server.process.kill()
    server.process.communicate()


@pytest.fixture
def little(tmp_path):
    """The folder of a small random BERT, and its model."""
    from tests.small_bert import write_bert

    folder = tmp_path / "bert"
    folder.mkdir()
    return folder, write_bert(folder)


@pytest.fixture
def untrained(tiny):
    """model.pth.tar with random weights, for the set of tiny."""
    import checkpoint as ckpt
    import options

    torch.manual_seed(0)
    opt = options.parse(train_args(cross_attn="i2t"))
    opt.word2idx = {str(k): k for k in range(200)}  # as CHAN's have it: no setting, but data
    words = vocab.deserialize_vocab("vocab/tiny_precomp_vocab.json")
    state = {"epoch": 3, "opt": opt, "vocab": words.state_dict()}
    state["model"] = ckpt.state_dicts(ckpt.build_model(opt, len(words)), opt)
    torch.save(state, "model.pth.tar")
    return tiny


TRAIN = (
    "--data_path data --data_name tiny_precomp --vocab_path vocab --img_dim 12 --embed_size 16 "
    "--word_dim 8 --batch_size 16 --learning_rate 0.01 --workers 0 --val_step 0 --bi_gru "
    "--max_violation --vse_mean_warmup_epochs 1 --model_name run --logger_name run"
).split()


def train_args(**options) -> list[str]:
    """The command line of the tiny run, with some options changed or (value None) removed."""
    args = list(TRAIN)
    for name, value in options.items():
        flag = f"--{name}"
        if flag in args:
            at = args.index(flag)
            del args[at : at + (1 if at + 1 == len(args) or args[at + 1][:2] == "--" else 2)]
        if value is True:
            args.append(flag)
        elif value is not None:
            args += [flag, str(value)]
    return args


def hear_sigint() -> None:
    """A preexec_fn: in the background of a shell, SIGINT is ignored from the start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_log(folder: str | os.PathLike) -> list[dict]:
    with open(os.path.join(folder, "log.jsonl")) as lines:
        return [json.loads(line) for line in lines]


def weights(path: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of SCAN."""
    image, text = torch.load(path, weights_only=False)["model"]
    return dict(image) | dict(text)


def same_weights(a: str, b: str) -> bool:
    """Whether two checkpoints of SCAN hold equal weights."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
