"""Where a training run stands: in memory, in a checkpoint, and back.  # Q4"""

import argparse
import contextlib
import dataclasses
import math
import os
import zlib
from collections.abc import Iterator

import torch
from torch import nn

import checkpoint as ckpt
import options
from bert import CONFIG
from util import distributed
from util.checkpoint_files import newest_first, newest_whole
from util.cli import InputError
from util.json_file import fault_of
from util.state_checks import (
    PLACE,
    PUBLISHED_PLACE,
    STEPS,
    Range,
    check_like,
    check_values,
    module_state,
    optimizer_state,
    shown,
)
from util.stored_options import check_stored

# Options that do not change what a resumed run computes.
FREE = {"data_path", "vocab_path", "workers", "device", "model_name", "logger_name", "log_step"}
FREE |= {"val_step", "resume", "reset_start_epoch", "num_epochs", "model", "vocab_size"}
FREE |= {"wemb_type", "wemb_path", "bert_path", "bert_config", "allow_unknown"}
FREE |= {"quiet", "dry_run", "log_images", "tracker", "keep", "on_save_error", "rank_timeout"}
# Options that a resumed run does not take from its checkpoint.
NOT_TAKEN = {"device", "workers", "model_name", "logger_name", "resume", "reset_start_epoch"}
AUTO = "auto"  # a value of --resume
CUDA_RNG = 16  # bytes of a random state of CUDA


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
    it takes the options of the model only. Raises InputError if the checkpoint cannot be used.
    """
    first = options.build_parser()[0].parse_known_args(argv)[0]
    names = options.given(argv)
    path = newest(first) if first.resume == AUTO else first.resume
    if not path:
        opt = options.parse(argv)
        opt.resume = ""
        if "img_dim" not in names:
            opt.img_dim = None  # the features decide
        return opt, None
    resumed = ckpt.load(path)
    then = vars(resumed["opt"])
    taken = options.model_options() if first.reset_start_epoch else then.keys() - NOT_TAKEN
    # Folders of another machine are not taken.
    folders = {"data_path", "vocab_path"} - resumed["unfit"].keys()
    taken -= {x for x in folders if not os.path.exists(str(then.get(x)))}
    stored = {name: then[name] for name in taken if name in then}
    read = {name: x for name, x in (stored | resumed["unfit"]).items() if name in taken - names}
    check_stored(options.build_parser()[0], read, path)
    check_before_start(resumed, path, first.reset_start_epoch)
    opt = options.parse(argv, stored)
    opt.resume = path
    if "model_name" not in names and not opt.reset_start_epoch:
        opt.model_name = os.path.dirname(path) or "."
    if "logger_name" not in names and not opt.reset_start_epoch:
        # Where that run logged, seen from its checkpoints.
        apart = os.path.relpath(then["logger_name"], then["model_name"])
        logs = os.path.normpath(os.path.join(opt.model_name, apart))
        opt.logger_name = logs if os.path.isdir(logs) else opt.model_name
    resumed["vocab_given"] = "vocab_path" in names  # else the checkpoint's own counts
    resumed["bert_given"] = "bert_path" in names
    return opt, resumed


def newest(opt: argparse.Namespace) -> str | None:
    """The checkpoint that --resume auto means; None, with a notice: there is none.

    Damaged ones alone are an error: a new run would leave what is left of them behind.
    """
    folder = opt.model_name
    if opt.reset_start_epoch:
        raise InputError(
            "--resume auto goes on with a run, and --reset_start_epoch begins one: name the "
            "checkpoint"
        )
    path = newest_whole(folder)
    if path is None and newest_first(folder):
        raise InputError(
            f"--resume auto: no checkpoint in {folder} is whole; copy one there again, or move "
            "them all away, and the run starts anew"
        )
    if path is None:
        print(f"notice: --resume auto: no checkpoint in {folder}, so a new run starts")
    else:
        print(f"notice: --resume auto: going on from {path}")
    return path


def check_before_start(resumed: dict, path: str, only_weights: bool) -> None:
    """Raise InputError if a checkpoint cannot be what a run goes on from.

    What its weights need is compared with its options before a model is built, and the place of the
    run with what it can be.
    """
    opt, rows = resumed["opt"], ckpt.word_rows(resumed)
    whole = opt.text_enc_type != "bert" or opt.bert_config.keys() == set(CONFIG)
    if rows is not None and whole:
        ckpt.check_sizes(resumed, path, rows)
    if not only_weights:
        with naming(path):
            check_place(resumed)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the file, and what to do, around an error of what it holds."""
    try:
        yield
    except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
        said = str(error) if isinstance(error, InputError) else fault_of(error)
        raise InputError(
            f"{path}: its run state does not fit ({said}); --reset_start_epoch takes only its "
            "weights"
        ) from None


def check_place(resumed: dict) -> None:
    """Raise InputError unless the place of a run is one that a run can come to."""
    published = {
        name: x for name, x in resumed.items() if name in PUBLISHED_PLACE and x is not None
    }
    check_values(published, PUBLISHED_PLACE, optional=True)
    if "run" not in resumed:
        return
    saved = resumed["run"]
    if not isinstance(saved, dict):
        raise InputError(f"run is {shown(saved)}, expected a dict")
    check_values(saved, PLACE)
    check_values(saved, {"n_captions": STEPS}, optional=True)
    missing = {"optimizer", "rng", "cuda_rng"} - saved.keys()
    if missing:
        raise InputError(f"no {', '.join(sorted(missing))}")


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
    batches = math.ceil(n_captions / opt.batch_size)
    with naming(opt.resume):
        check_values(saved, {"batch": Range(int, 0, batches)})
        of_optimizer = optimizer_state(saved["optimizer"], optimizer)
        # Older checkpoints have none.
        of_criterion = module_state(saved.get("criterion", {}), criterion, "criterion")
        check_random_states(saved)
        for field in dataclasses.fields(state):
            setattr(state, field.name, saved[field.name])
        optimizer.load_state_dict(of_optimizer)
        criterion.load_state_dict(of_criterion)
        torch.set_rng_state(saved["rng"])
        if torch.cuda.is_available() and saved["cuda_rng"]:
            torch.cuda.set_rng_state_all(saved["cuda_rng"][: torch.cuda.device_count()])


def check_random_states(saved: dict) -> None:
    """Raise InputError unless the random states of a checkpoint have the form of such states."""
    check_like(saved["rng"], torch.get_rng_state(), "rng")
    if not isinstance(saved["cuda_rng"], (list, tuple)):
        raise InputError(f"cuda_rng is {shown(saved['cuda_rng'])}, expected a list")
    for x in saved["cuda_rng"]:
        check_like(x, torch.zeros(CUDA_RNG, dtype=torch.uint8), "cuda_rng")


def check_agreed(opt: argparse.Namespace) -> None:
    """Raise InputError on all processes of a run unless they go on from the same checkpoint.

    Process 0 alone writes checkpoints: another machine may not see its folder.
    """
    own = torch.tensor(zlib.crc32(os.path.basename(opt.resume).encode()))
    if int(distributed.all_reduce_sum(own.clone())) != int(own) * distributed.world_size():
        raise InputError(
            f"the processes of this run do not go on from the same checkpoint, this one from "
            f"{opt.resume or 'none'}: --model_name must be a folder that all machines share"
        )
