"""Where a training run stands: in memory, in a checkpoint, and back.  # Q4"""

import argparse
import dataclasses
import os

import torch
from torch import nn

import checkpoint as ckpt
import options
from util.cli import InputError

# Options that do not change what a resumed run computes.
FREE = {"data_path", "vocab_path", "workers", "device", "model_name", "logger_name", "log_step"}
FREE |= {"val_step", "resume", "reset_start_epoch", "num_epochs", "model", "vocab_size"}
FREE |= {"wemb_type", "wemb_path", "bert_path", "bert_config", "allow_unknown"}
FREE |= {"quiet", "dry_run", "log_images", "tracker"}
# Options that a resumed run does not take from its checkpoint.
NOT_TAKEN = {"device", "workers", "model_name", "logger_name", "resume", "reset_start_epoch"}


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


def in_words(state: RunState) -> str:
    """How far a run is, and its best score; for a printed line."""
    done = f"{state.epoch} epoch{'' if state.epoch == 1 else 's'}"
    if state.batch:
        done += f" and {state.batch} step{'' if state.batch == 1 else 's'}"
    best = f"{state.best_rsum:.1f}" if state.best_rsum >= 0 else "none yet"
    return f"{done} done, best rsum {best}"


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The options of a run, and the checkpoint that it goes on from, if any.

    A resumed run takes its options from the checkpoint, except for those that the command line
    gives, and goes on in the folders of that checkpoint. With --reset_start_epoch it is a new run:
    it takes the options of the model only.
    """
    first = options.build_parser()[0].parse_known_args(argv)[0]
    names = options.given(argv)
    if not first.resume:
        opt = options.parse(argv)
        if "img_dim" not in names:
            opt.img_dim = None  # the features decide
        return opt, None
    resumed = ckpt.load(first.resume)
    then = vars(resumed["opt"])
    taken = options.model_options() if first.reset_start_epoch else then.keys() - NOT_TAKEN
    # Folders of another machine are not taken.
    gone = {x for x in ("data_path", "vocab_path") if not os.path.exists(str(then.get(x)))}
    opt = options.parse(argv, {name: then[name] for name in taken - gone if name in then})
    if "model_name" not in names and not opt.reset_start_epoch:
        opt.model_name = os.path.dirname(first.resume) or "."
    if "logger_name" not in names and not opt.reset_start_epoch:
        # Where that run logged, seen from its checkpoints.
        apart = os.path.relpath(then["logger_name"], then["model_name"])
        logs = os.path.normpath(os.path.join(opt.model_name, apart))
        opt.logger_name = logs if os.path.isdir(logs) else opt.model_name
    resumed["vocab_given"] = "vocab_path" in names  # else the checkpoint's own counts
    return opt, resumed


def load_weights(model: nn.Module, resumed: dict, opt: argparse.Namespace) -> None:
    """Load the weights of --resume; an InputError names the options that they cannot follow."""
    try:
        ckpt.load_weights(model, resumed, opt.resume)
    except InputError:
        then, now = vars(resumed["opt"]), vars(opt)
        names = sorted(x for x in options.model_options() if then.get(x) != now.get(x))
        if not names:
            raise
        said = "; ".join(f"--{x} {now.get(x)}, the checkpoint has {then.get(x)}" for x in names)
        raise InputError(f"{opt.resume}: its weights cannot follow: {said}") from None


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
