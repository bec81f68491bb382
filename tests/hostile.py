"""Checkpoints of a tiny model that are changed, and the line with which they are refused."""

import copy
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import checkpoint as ckpt
import options
import run_state
import systems
from tests.conftest import train_args
from tests.reader_arrays import VOCABULARY
from util.cli import InputError

HUGE = 10**12
CAPTIONS = 20  # in the training set


@functools.cache
def trained(**flags) -> dict:
    """A checkpoint after one step with other options."""
    opt = options.parse(train_args(img_dim=4, word_dim=3, embed_size=8, **flags))
    system = systems.of(opt)
    words = system.vocabulary(copy.deepcopy(VOCABULARY), opt)
    torch.manual_seed(0)
    model, criterion = ckpt.build_model(opt, len(words)), system.criterion(opt)
    optimizer = system.optimizer(model, criterion, opt)
    step(model, optimizer)
    where = run_state.RunState(epoch=1, Eiters=1, best_rsum=100.0)
    run = run_state.state_dict(where, optimizer, criterion, torch.device("cpu"), CAPTIONS)
    state = {"epoch": 0, "best_rsum": 100.0, "opt": opt, "Eiters": 1, "run": run}
    return state | {"model": ckpt.state_dicts(model, opt), "vocab": words.state_dict()}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients of ones."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def go_on(path: str) -> torch.optim.Optimizer:
    """Go on with a run by a step, as train.py does."""
    opt, resumed = run_state.read_options(["--resume", path])
    model = ckpt.build_model(opt, len(ckpt.find_vocab(resumed, path)))
    criterion = systems.of(opt).criterion(opt)
    optimizer = systems.of(opt).optimizer(model, criterion, opt)
    run_state.load_weights(model, resumed, opt)
    run_state.restore(resumed, run_state.RunState(), optimizer, criterion, opt, CAPTIONS)
    step(model, optimizer)
    return optimizer


def refusal(
    folder: Path,
    change: Callable[[dict], object],
    read: Callable[[str], object] = go_on,
    **flags,
) -> str:
    """The line with which a changed checkpoint of a run with these flags is refused."""
    state, path = copy.deepcopy(trained(**flags)), str(folder / "x.pth.tar")
    change(state)
    torch.save(state, path)
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        read(path)
    assert time.monotonic() - start < 10
    line = str(error.value)
    assert path in line and len(line) < 1500 and line.isprintable(), line
    return line


def odd_tensors(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the shape of x that are no ordinary tensors."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        sparse = {"sparse": x.to_sparse(), "sparse_csr": x.reshape(len(x), -1).to_sparse_csr()}
    return sparse | {
        "meta": x.to("meta"),
        "complex": x.to(torch.complex64),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "expanded": x.reshape(-1)[:1].expand(x.shape),
        "overlapping": torch.zeros(x.numel() - 1).as_strided(x.shape, (1,) * x.ndim),
        "virtual": torch.zeros(1).expand(HUGE),
        "nan": torch.full_like(x, math.nan),
        "inf": torch.full_like(x, -math.inf),
    }
