"""Where a training run stands: in memory, in a checkpoint, and back.  # Q4"""

import argparse
import dataclasses

import torch
from torch import nn

from util.cli import InputError

# Options that do not change what a resumed run computes.
FREE = {"data_path", "vocab_path", "workers", "device", "model_name", "logger_name", "log_step"}
FREE |= {"val_step", "resume", "reset_start_epoch", "num_epochs", "model", "vocab_size"}
FREE |= {"wemb_type", "wemb_path", "bert_path", "bert_config"}


@dataclasses.dataclass
class RunState:
    """Where a run stands. Checkpoints hold it, under 'run'."""

    epoch: int = 0  # the epoch under way
    batch: int = 0  # how many of its batches are done
    loss_sum: float = 0.0  # their losses, times their sizes
    loss_count: int = 0  # their pairs
    Eiters: int = 0  # steps in all
    val_due: bool = False  # whether a validation is due before the next batch
    best_rsum: float = -1.0


def state_dict(
    state: RunState,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    device: torch.device,
    n_captions: int,
) -> dict:
    """What an exact resume needs besides the published keys of a checkpoint."""
    return dataclasses.asdict(state) | {
        "n_captions": n_captions,
        "optimizer": optimizer.state_dict(),
        "criterion": criterion.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
    }


def restore(
    resumed: dict,
    state: RunState,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    opt: argparse.Namespace,
    n_captions: int,
) -> None:
    """Bring counters, optimizer, criterion and random state to where the checkpoint left them.

    Raises InputError if the options or the training set of n_captions do not allow it.
    """
    state.epoch = resumed.get("epoch", -1) + 1
    state.Eiters = int(resumed.get("Eiters") or 0)
    state.best_rsum = float(resumed.get("best_rsum") or -1)
    then, now = vars(resumed["opt"]), vars(opt)
    changed = [name for name in now if name not in FREE and then.get(name) != now[name]]
    if changed:
        changes = ", ".join(f"--{name} {then.get(name)} -> {now[name]}" for name in changed)
        print(f"notice: resuming with changed options: {changes}")
    if "run" not in resumed:
        print(
            "notice: a published checkpoint holds no optimizer or random state: both start afresh"
        )
        return
    if "optim" in changed:
        raise InputError(f"{opt.resume}: --optim cannot change on the way; --reset_start_epoch may")
    saved = resumed["run"]
    moved = {"batch_size", "seed"} & set(changed) or saved.get("n_captions") != n_captions
    if saved.get("batch") and moved:
        raise InputError(
            f"{opt.resume}: written inside an epoch, at batch {saved['batch']}, with another "
            "batch size, seed or training set; give those, or resume from the end of an epoch"
        )
    try:
        for field in dataclasses.fields(state):
            setattr(state, field.name, saved[field.name])
        optimizer.load_state_dict(saved["optimizer"])
        criterion.load_state_dict(saved.get("criterion", {}))  # older checkpoints have none
        torch.set_rng_state(saved["rng"])
        if torch.cuda.is_available() and saved["cuda_rng"]:
            torch.cuda.set_rng_state_all(saved["cuda_rng"][: torch.cuda.device_count()])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{opt.resume}: its run state does not fit ({type(error).__name__}: {error}); "
            "--reset_start_epoch takes only its weights"
        ) from None
