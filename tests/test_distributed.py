"""Several processes give the same loss, gradient, metrics and files as one process."""

import functools
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import checkpoint as ckpt
import evaluation
import options
import systems
import train
from data import Drop, EpochSampler, get_train_loader
from run_state import RunState
from tests.conftest import read_log, train_args
from util import distributed
from util.cli import InputError
from vocab import deserialize_vocab

ROOT = Path(__file__).parent.parent
GSMN = {"model": "gsmn", "num_block": 4, "feat_dim": 4, "hid_dim": 16}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Keep(torch.optim.SGD):
    """Keeps the gradients of each step and leaves the weights as they are."""

    def __init__(self, *modules: torch.nn.Module):
        parameters = [item for module in modules for item in module.named_parameters()]
        super().__init__([p for _, p in parameters])
        self.parameters, self.steps = dict(parameters), []

    def step(self):
        parameters = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.steps.append({name: p.grad.clone() for name, p in parameters.items()})


class Scaled(torch.nn.Module):
    """A criterion with a parameter of its own."""

    def __init__(self, criterion: torch.nn.Module):
        super().__init__()
        self.criterion, self.scale = criterion, torch.nn.Parameter(torch.ones(()))

    def forward(self, scores, image_index):
        self.criterion.epoch = self.epoch
        return self.criterion(scores * self.scale, image_index)


def gradients_of_epochs(jobs: list[tuple[list[str], int]], out: str) -> None:
    """gradients_of_an_epoch for several flags, each with the port of its own group."""
    for number, (flags, port) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port)
        gradients_of_an_epoch(flags, f"{out}_{number}")


def gradients_of_an_epoch(flags: list[str], out: str) -> None:
    """Writes the gradient of each batch, and the epoch's loss."""
    opt = options.parse(flags)
    device = torch.device("cpu")
    with distributed.process_group(device):
        rank, world = distributed.rank(), distributed.world_size()
        vocab = systems.of(opt).vocabulary(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
        dataset = systems.open_split("data/tiny_precomp", "train", vocab, opt)
        dataset.drop = Drop(opt.obj_drop_rate, 0, vocab) if opt.drop else None
        torch.manual_seed(0)
        model = ckpt.build_model(opt, len(vocab))
        model.grad_checkpointing = opt.grad_checkpointing
        encoder = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        loader = get_train_loader(dataset, opt.batch_size, 0, 0, rank=rank, world_size=world)
        criterion = Scaled(systems.of(opt).criterion(opt))
        optimizer = Keep(model, criterion)
        parts = loader, None, model, encoder, criterion, optimizer
        run, losses = train.Run(opt, device, vocab, *parts, RunState()), []
        train.start_epoch(run)
        for batch in loader:
            size = train.size_of_batch(run)
            losses.append(size * train.train_step(run, batch, size))
            run.state.batch += 1
        loss = sum(losses) / len(dataset)
        torch.save({"steps": optimizer.steps, "loss": loss}, f"{out}_{rank}.pt")
        del run, parts
        ring = [encoder]  # it holds the group until the garbage collector is called
        ring.append(ring)
        del encoder, ring


def stopped(flags: list[str], out: str, where: str) -> None:
    """Run training, where only process 1 gets a signal, and write the exit status."""
    if os.environ["RANK"] == "1":
        job = getattr(train, where)

        def signalled(*args, **more):
            signal.raise_signal(signal.SIGTERM)
            assert where != "encode_data", "validation went on"
            return job(*args, **more)

        setattr(train, where, signalled)
    try:
        train.main(flags)
    except SystemExit as stop:
        Path(f"{out}_{os.environ['RANK']}").write_text(str(stop.code))


def start(function, args: tuple, world: int) -> None:
    """Call function(rank, *args) in `world` processes, and wait for them.

    They are forked from a process that has imported what takes long, and has done nothing else.
    """
    slow = ["torch._dynamo", "torch.utils.tensorboard", "scipy.stats", "nltk"]
    mp.get_context("forkserver").set_forkserver_preload(slow)
    mp.start_processes(function, args, world, start_method="forkserver")


def process(rank: int, world: int, port: int, job, flags: list[str], out: str) -> None:
    """Set what torchrun sets for process `rank` and run the job, which must release the group."""
    torch.set_num_threads(1)
    gc.disable()  # objects in cycles stay until they are collected
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    destroy = torch.distributed.destroy_process_group

    def destroy_process_group():
        destroy()
        threads = [x.read_text() for x in Path("/proc/self/task").glob("*/comm")]  # on Linux
        assert not any("gloo" in name for name in threads), "something holds the process group"

    torch.distributed.destroy_process_group = destroy_process_group
    job(flags, out)


VSE = {"model": "vse", "max_violation": None, "vse_mean_warmup_epochs": 0}
CHAN_INFO_NCE = {"model": "chan", "criterion": "InfoNCELoss", "precomp_enc_type": "selfattention"}


@pytest.mark.parametrize(
    ("world", "batch_size", "cases"),
    [
        (3, 49, [{"cross_attn": "t2i", "vse_mean_warmup_epochs": 1}, VSE]),
        (
            2,
            33,
            [
                {"cross_attn": "t2i", "vse_mean_warmup_epochs": 0},
                {"cross_attn": "i2t", "vse_mean_warmup_epochs": 0, "no_false_negatives": True},
                GSMN | {"is_sparse": True, "vse_mean_warmup_epochs": 0},
                GSMN | {"is_sparse": True, "neighbours": True},
                {"model": "chan", "max_violation": None, "vse_mean_warmup_epochs": 0},
                # So that the widest images of two processes differ.
                CHAN_INFO_NCE | {"drop": True, "obj_drop_rate": 0.8},
                {"model": "pfan", "vse_mean_warmup_epochs": 0},
                {"cross_attn": "i2t", "drop": True, "vse_mean_warmup_epochs": 0},
                {"model": "pfan_whole", "cross_attn": "i2t", "vse_mean_warmup_epochs": 0},
                {"model": "pfan_whole", "grad_checkpointing": 3},
                VSE | {"drop": True},  # batch norm counts the regions of all processes
            ],
        ),
    ],
)
def test_loss_and_gradient_are_those_of_one_process(tiny_positions, world, batch_size, cases):
    """100 pairs give odd shares, and a last batch of one pair (2 processes) or two (3)."""
    flags = [train_args(batch_size=batch_size, grad_clip=0, **options) for options in cases]
    jobs = [(flag, free_port()) for flag in flags]
    gradients_of_epochs(jobs, "one")
    start(process, (world, 0, gradients_of_epochs, jobs, "many"), world)
    for number, case in enumerate(cases):
        files = f"one_{number}_0.pt", *(f"many_{number}_{k}.pt" for k in range(world))
        compare_gradients(*map(torch.load, files), -(-100 // batch_size), case)


def compare_gradients(one: dict, *others: dict) -> None:
    """Of one process, of each of several ones; then the number of steps, and what was trained."""
    *many, steps, case = others
    assert len(one["steps"]) == steps, case
    for other in many:
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), case
        for want, got in zip(one["steps"], other["steps"], strict=True):
            step = max(gradient.abs().max() for gradient in want.values())
            for name, gradient in want.items():
                # The gradient of a graph adds terms of both signs that almost cancel (a constant in
                # all scores cancels altogether): they are rounded at the size of the whole.
                largest = step if "graph" in name else gradient.abs().max()
                assert (got[name] - gradient).abs().max() <= 1e-5 * largest, (case, name)
    first = one["steps"][0].items()
    assert all(g.abs().max() > 0 for name, g in first if not name.endswith("out_2.bias")), case


@pytest.mark.parametrize("where", ["clip_grad_norm_", "encode_data"])
def test_all_stop_when_one_is_told_to(tiny, where):
    flags = train_args(num_epochs=2)
    job = functools.partial(stopped, where=where)
    start(process, (2, free_port(), job, flags, "code"), 2)
    assert [Path(f"code_{k}").read_text() for k in (0, 1)] == [str(128 + signal.SIGTERM)] * 2
    train.main(train_args(num_epochs=1, resume="run/interrupted.pth.tar"))
    assert len(read_log("run")) == 1


def test_batches_are_shared_out():
    for n, size, world in ((20, 8, 3), (17, 8, 2), (9, 4, 4)):
        whole = list(EpochSampler(n, size, seed=1))
        parts = [list(EpochSampler(n, size, 1, rank, world)) for rank in range(world)]
        for batch, *shares in zip(whole, *parts, strict=True):
            if len(batch) >= world:
                assert sorted(sum(shares, [])) == sorted(batch)
                assert max(map(len, shares)) - min(map(len, shares)) <= 1
            else:
                assert all(share == batch for share in shares)


def test_torchrun_trains_resumes_and_evaluates(tiny, torchrun):
    flags = train_args(num_epochs=3, val_step=5, no_false_negatives=True)
    done = torchrun(ROOT / "train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SCAN: 3 epochs") == 1 and len(read_log("run")) == 3
    assert sorted(name for name in os.listdir("run") if name.endswith(".tar")) == [
        *(f"checkpoint_{k}.pth.tar" for k in range(3)),
        "model_best.pth.tar",
    ]
    options = {"num_epochs": 3, "val_step": 5, "no_false_negatives": True}
    options |= {"resume": "run/checkpoint_1.pth.tar"}
    done = torchrun(ROOT / "train.py", *train_args(model_name="two", logger_name="two", **options))
    assert done.returncode == 0, done.stderr
    whole, resumed = (ckpt.load(f"{name}/checkpoint_2.pth.tar") for name in ("run", "two"))
    for state, again in zip(whole["model"], resumed["model"], strict=True):
        assert all(torch.equal(state[name], again[name]) for name in state)
    train.main(train_args(model_name="one", logger_name="one", **options))  # one process resumes it
    assert read_log("one")[-1]["Le"] == pytest.approx(read_log("run")[-1]["Le"], rel=0.1)

    metrics = evaluation.evalrank("run/checkpoint_2.pth.tar", split="dev")
    assert metrics["rsum"] == pytest.approx(read_log("run")[-1]["rsum"])

    path = "run/model_best.pth.tar"
    done = torchrun(ROOT / "evaluation.py", path, "--split", "test", "--save_path", "two.npy")
    assert done.returncode == 0, done.stderr
    metrics = evaluation.evalrank(path, split="test", save_path="one.npy")
    assert done.stdout.count(f"rsum: {metrics['rsum']:.1f}") == 1
    np.testing.assert_allclose(np.load("two.npy"), np.load("one.npy"), rtol=0, atol=1e-6)


def start_run(*flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"ended without {text}")


def test_a_process_that_dies_ends_the_run(tiny):
    """They end with a message and without a half-written checkpoint."""
    running = start_run(*train_args(num_epochs=10000, log_step=1))
    wait_for(running, "Epoch: [1]")
    os.kill(max(ranks_of(running)), signal.SIGKILL)
    out = running.communicate(timeout=300)[0]
    assert running.returncode != 0
    assert "lost another process of the run" in out and "SIGABRT" not in out
    check_what_is_left()


def test_a_process_that_stops_ends_the_run(tiny):
    """It goes on when the others have waited long enough, and ends like them."""
    running = start_run(*train_args(num_epochs=10000, log_step=1, rank_timeout=6))
    wait_for(running, "Epoch: [1]")
    stopped = max(ranks_of(running))
    os.kill(stopped, signal.SIGSTOP)
    wait_for(running, "error: process 0 of 2: another process of the run did not answer for 6 s")
    os.kill(stopped, signal.SIGCONT)
    out = running.communicate(timeout=300)[0]
    assert running.returncode != 0 and "SIGABRT" not in out
    check_what_is_left()


def ranks_of(running: subprocess.Popen) -> list[int]:
    """The processes of a run."""
    found = [int(x) for x in os.listdir("/proc") if x.isdigit() and parent_of(x) == running.pid]
    assert len(found) == 2
    return found


def check_what_is_left() -> None:
    assert not list(Path("run").glob("*.part")) and not Path("run/interrupted.pth.tar").exists()
    for path in Path("run").glob("*.pth.tar"):
        ckpt.load(str(path))


def parent_of(pid: str) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # the process has ended
        return None


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_signal_saves_first(tiny, whole_group):
    """Ctrl-C reaches torchrun and its processes; the SIGTERM of a scheduler only torchrun."""
    running = start_run(*train_args(num_epochs=10000, log_step=1))
    wait_for(running, "Epoch: [1]")
    time.sleep(0.5)
    if whole_group:
        os.killpg(running.pid, signal.SIGINT)
    else:
        os.kill(running.pid, signal.SIGTERM)
    out = running.communicate(timeout=300)[0]
    assert running.returncode != 0 and "saved epoch" in out, out
    epoch = ckpt.load("run/interrupted.pth.tar")["epoch"]
    train.main(train_args(num_epochs=epoch + 2, resume="run/interrupted.pth.tar"))


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("Application timeout caused pair closure", "did not answer for 7 s"),
        ("[pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer", "lost another"),
    ],
)
def test_what_gloo_says_becomes_one_line(monkeypatch, said, means):
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.raises(InputError, match=f"process 0 of 1: .*{means}"),
            distributed.process_group(torch.device("cpu"), 7),
        ):
            raise RuntimeError(said)
    finally:
        signal.signal(signal.SIGTERM, before)
