"""The readers of checkpoints; see tests/reader_cases.py."""

from pathlib import Path

import torch
from torch import nn

import checkpoint as ckpt
import options
import run_state
import systems
from tests.conftest import train_args
from tests.reader_arrays import VOCABULARY
from tests.reader_cases import Reader

CAPTIONS = 20  # in the training set


def training(opt) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A model, its criterion and its optimizer, as train.py makes them."""
    system, model = systems.of(opt), ckpt.build_model(opt, len(VOCABULARY))
    criterion = system.criterion(opt)
    return model, criterion, system.optimizer(model, criterion, opt)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients of ones."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def state() -> dict:
    """A checkpoint after one step."""
    torch.manual_seed(0)
    opt = options.parse(train_args(cross_attn="t2i", img_dim=4, word_dim=3, embed_size=4))
    model, criterion, optimizer = training(opt)
    step(model, optimizer)
    where = run_state.RunState(epoch=1, Eiters=1, best_rsum=100.0)
    return {
        "epoch": 0,
        "model": ckpt.state_dicts(model, opt),
        "best_rsum": 100.0,
        "opt": opt,
        "Eiters": 1,
        "vocab": VOCABULARY.state_dict(),
        "run": run_state.state_dict(where, optimizer, criterion, torch.device("cpu"), CAPTIONS),
    }


def make_zip(folder: Path) -> Path:
    ckpt.save(state(), str(folder), "checkpoint_0.pth.tar")
    return folder / "checkpoint_0.pth.tar"


def make_legacy(folder: Path) -> Path:
    torch.save(state(), folder / "old.pth.tar", _use_new_zipfile_serialization=False)
    return folder / "old.pth.tar"


def read_checkpoint(path: Path) -> list:
    """Go on with a run, by a step; the weights, the optimizer's state, and where it stands."""
    opt, resumed = run_state.read_options(["--resume", str(path)])
    model, criterion, optimizer = training(opt)
    run_state.load_weights(model, resumed, opt)
    where = run_state.RunState()
    run_state.restore(resumed, where, optimizer, criterion, opt, CAPTIONS)
    ckpt.find_vocab(resumed, str(path))
    step(model, optimizer)
    return [model.state_dict(), optimizer.state_dict(), vars(where), vars(opt)]


READERS = [
    Reader("checkpoint (zip)", make_zip, read_checkpoint, checked=True),
    Reader("checkpoint (legacy)", make_legacy, read_checkpoint),
]
