"""Several processes: the same loss, gradient, metrics and files as one."""

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
import train
from data import Drop, EpochSampler, get_train_loader, open_split
from tests.conftest import read_log, train_args
from util import distributed
from vocab import deserialize_vocab

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


GSMN = {"model": "gsmn", "num_block": 4, "feat_dim": 4, "hid_dim": 16}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Keep(torch.optim.SGD):
    """Keeps the gradients of each step and leaves the weights as they are."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model.parameters())
        self.model, self.steps = model, []

    def step(self):
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.steps.append({name: p.grad.clone() for name, p in parameters.items()})


def gradients_of_an_epoch(flags: list[str], out: str) -> None:
    """Writes the gradient of each batch, and the epoch's loss."""
    opt = options.parse(flags)
    device = torch.device("cpu")
    with distributed.joined(device):
        rank, world = distributed.rank(), distributed.world()
        vocab = ckpt.as_read(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
        dataset = open_split("data/tiny_precomp", "train", vocab, opt)
        dataset.drop = Drop(0.2, 0, vocab) if opt.drop else None
        torch.manual_seed(0)
        model = ckpt.build_model(opt, len(vocab))
        model.grad_checkpointing = opt.grad_checkpointing
        encoder = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
        optimizer = Keep(model)
        at = {"epoch": 0, "batch": 0, "loss_sum": 0.0, "loss_count": 0, "Eiters": 0}
        at["val_due"] = False
        loader = get_train_loader(dataset, opt.batch_size, 0, 0, rank=rank, world=world)
        stop = train.StopSignal()
        train.train_epoch(
            model, encoder, optimizer, loader, None, at, opt, device, train.NoWriter(), stop
        )
        stop.restore()
        torch.save({"steps": optimizer.steps, "at": at}, f"{out}_{rank}.pt")
        ring = [encoder]  # holds the group, until the garbage collector is called
        ring.append(ring)
        del encoder, ring


def stopped(flags: list[str], out: str, where: str) -> None:
    """A run whose process 1 alone gets a signal, and what it exits with, written."""
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


def process(rank: int, world: int, port: int, job, flags: list[str], out: str) -> None:
    """What torchrun sets for its process `rank`, and the job, which must let go of the group."""
    torch.set_num_threads(1)
    gc.disable()  # what is left in cycles stays until it is called for
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    destroy = torch.distributed.destroy_process_group

    def destroy_process_group():
        destroy()
        threads = [x.read_text() for x in Path("/proc/self/task").glob("*/comm")]  # on Linux
        assert not any("gloo" in name for name in threads), "something holds the process group"

    torch.distributed.destroy_process_group = destroy_process_group
    job(flags, out)


@pytest.mark.parametrize(
    ("world", "batch_size", "options"),
    [
        (2, 33, {"cross_attn": "t2i", "vse_mean_warmup_epochs": 0}),
        (2, 33, {"cross_attn": "i2t", "vse_mean_warmup_epochs": 0, "no_false_negatives": True}),
        (3, 49, {"cross_attn": "t2i", "vse_mean_warmup_epochs": 1}),
        (2, 33, GSMN | {"is_sparse": True, "vse_mean_warmup_epochs": 0}),
        (2, 33, GSMN | {"is_sparse": True, "neighbours": True}),
        (2, 33, {"model": "chan", "max_violation": None, "vse_mean_warmup_epochs": 0}),
        (2, 33, {"model": "chan", "criterion": "InfoNCELoss", "precomp_enc_type": "selfattention"}),
        (2, 33, {"model": "pfan", "vse_mean_warmup_epochs": 0}),
        (2, 33, {"cross_attn": "i2t", "drop": True, "vse_mean_warmup_epochs": 0}),
        (2, 33, {"model": "pfan_whole", "cross_attn": "i2t", "vse_mean_warmup_epochs": 0}),
        (2, 33, {"model": "pfan_whole", "grad_checkpointing": 3}),
    ],
)
def test_loss_and_gradient_are_those_of_one_process(tiny_positions, world, batch_size, options):
    """100 pairs: odd shares, and a last batch of one pair for two processes, of two for three."""
    flags = train_args(batch_size=batch_size, grad_clip=0, **options)
    gradients_of_an_epoch(flags, "one")
    mp.spawn(process, (world, free_port(), gradients_of_an_epoch, flags, "many"), nprocs=world)
    one, *many = (torch.load(f) for f in ("one_0.pt", *(f"many_{k}.pt" for k in range(world))))
    assert len(one["steps"]) == -(-100 // batch_size)
    for other in many:
        assert other["at"]["loss_count"] == 100
        assert other["at"]["loss_sum"] == pytest.approx(one["at"]["loss_sum"], rel=1e-5)
        for want, got in zip(one["steps"], other["steps"], strict=True):
            step = max(gradient.abs().max() for gradient in want.values())
            for name, gradient in want.items():
                # A graph's gradient sums up terms of both signs, all but cancelling (a constant in
                # all scores cancels altogether): they are rounded at the size of the whole.
                largest = step if "graph" in name else gradient.abs().max()
                assert (got[name] - gradient).abs().max() <= 1e-5 * largest, name
    first = one["steps"][0].items()
    assert all(g.abs().max() > 0 for name, g in first if not name.endswith("out_2.bias"))


@pytest.mark.parametrize("where", ["clip_grad_norm_", "encode_data"])
def test_all_stop_when_one_is_told_to(tiny, where):
    flags = train_args(num_epochs=2)
    job = functools.partial(stopped, where=where)
    mp.spawn(process, (2, free_port(), job, flags, "code"), nprocs=2)
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


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *map(str, command)], capture_output=True, text=True, env=ENVIRONMENT
    )


def test_torchrun_trains_resumes_and_evaluates(tiny):
    flags = train_args(num_epochs=3, val_step=5, no_false_negatives=True)
    done = run(ROOT / "train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Namespace(") == 1 and len(read_log("run")) == 3
    assert sorted(name for name in os.listdir("run") if name.endswith(".tar")) == [
        *(f"checkpoint_{k}.pth.tar" for k in range(3)),
        "model_best.pth.tar",
    ]
    options = {"num_epochs": 3, "val_step": 5, "no_false_negatives": True}
    options |= {"resume": "run/checkpoint_1.pth.tar"}
    done = run(ROOT / "train.py", *train_args(model_name="two", logger_name="two", **options))
    assert done.returncode == 0, done.stderr
    whole, resumed = (ckpt.load(f"{name}/checkpoint_2.pth.tar") for name in ("run", "two"))
    for state, again in zip(whole["model"], resumed["model"], strict=True):
        assert all(torch.equal(state[name], again[name]) for name in state)
    train.main(train_args(model_name="one", logger_name="one", **options))  # goes on alone
    assert read_log("one")[-1]["Le"] == pytest.approx(read_log("run")[-1]["Le"], rel=0.1)

    metrics = evaluation.evalrank("run/checkpoint_2.pth.tar", split="dev")
    assert metrics["rsum"] == pytest.approx(read_log("run")[-1]["rsum"])

    path = "run/model_best.pth.tar"
    done = run(ROOT / "evaluation.py", path, "--split", "test", "--save_path", "two.npy")
    assert done.returncode == 0, done.stderr
    metrics = evaluation.evalrank(path, split="test", save_path="one.npy")
    assert done.stdout.count(f"rsum: {metrics['rsum']:.1f}") == 1
    np.testing.assert_allclose(np.load("two.npy"), np.load("one.npy"), rtol=0, atol=1e-6)


def start(*flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*TORCHRUN, str(ROOT / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"ended without {text}")


def test_a_process_that_dies_ends_the_run(tiny):
    """With a message, and no half-written checkpoint."""
    running = start(*train_args(num_epochs=10000, log_step=1))
    wait_for(running, "Epoch: [1]")
    ranks = [
        int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent_of(pid) == running.pid
    ]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    out = running.communicate(timeout=60)[0]
    assert running.returncode != 0
    assert "lost another process of the run" in out and "SIGABRT" not in out
    assert not list(Path("run").glob("*.part")) and not Path("run/interrupted.pth.tar").exists()
    for path in Path("run").glob("*.pth.tar"):
        ckpt.load(str(path))


def parent_of(pid: str) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return None


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_signal_saves_first(tiny, whole_group):
    """Ctrl-C reaches torchrun and its processes, a scheduler's SIGTERM torchrun alone."""
    running = start(*train_args(num_epochs=10000, log_step=1))
    wait_for(running, "Epoch: [1]")
    time.sleep(0.5)
    if whole_group:
        os.killpg(running.pid, signal.SIGINT)
    else:
        os.kill(running.pid, signal.SIGTERM)
    out = running.communicate(timeout=60)[0]
    assert running.returncode != 0 and "saved epoch" in out, out
    epoch = ckpt.load("run/interrupted.pth.tar")["epoch"]
    train.main(train_args(num_epochs=epoch + 2, resume="run/interrupted.pth.tar"))
