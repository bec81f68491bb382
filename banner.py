"""What train.py prints before its first epoch and after its last one.

docs/training.md explains each line.
"""

import argparse
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import checkpoint as ckpt
import options
import systems
from bert import WordPieces
from data import PrecompDataset
from run_log import RunLog
from run_state import RunState
from scoring import encode_data, score_matrix
from text_setup import kind_of_captions
from util import distributed
from util.cli import counted, progress
from util.fingerprint import fingerprint
from util.git import commit_of
from util.log import duration
from vocab import Vocabulary

HERE = Path(__file__).resolve().parent
INDENT = " " * 14  # of what has a name before it


def banner(
    opt: argparse.Namespace,
    device: torch.device,
    vocab: Vocabulary | WordPieces,
    train_set: PrecompDataset,
    dev_set: PrecompDataset,
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader,
) -> str:
    """What a run works with, in lines with a name each."""
    steps = loader.batch_sampler.batches
    title = systems.of(opt).title
    facts = {
        "train": split_counts(train_set),
        "dev": split_counts(dev_set),
        "fingerprint": captions_mark(train_set),
        "vocabulary": vocabulary(opt, vocab, train_set),
        "parameters": parameters(opt, model, criterion),
        "device": f"{device_name(device)}; {loaders(loader.num_workers)}",
        "seed": f"{opt.seed}",
        "versions": versions(),
        "code": code(),
        "writes": folders(opt),
        "options": f"other than {title}'s defaults:",
    }
    lines = [
        f"{title}: {counted(opt.num_epochs, 'epoch')} of {counted(steps, 'step')}, "
        f"{counted(opt.batch_size, 'pair')} a step",
        *(f"  {name:<12}{fact}" for name, fact in facts.items() if fact),
    ]
    return "\n".join([*lines, *broken(changed_flags(opt), INDENT)])


def split_counts(dataset: PrecompDataset) -> str:
    _, regions, numbers = dataset.images.shape
    most = "up to " if dataset.num_boxes is not None else ""
    counts = dataset.image_of.bincount()
    least, largest = int(counts.min()), int(counts.max())
    each = f"{least}" if least == largest else f"{least} to {largest}"
    return (
        f"{dataset.n_images:,} images x {most}{regions} regions x {numbers:,} numbers; "
        f"{dataset.n_captions:,} captions, {each} an image"
    )


def captions_mark(train_set: PrecompDataset) -> str | None:
    """The fingerprint of the captions of train and dev: another one means other captions."""
    folder = os.path.dirname(train_set.path)
    found = fingerprint(folder, kind_of_captions(train_set))
    if not found:
        return None
    return f"{found['sha256'][:8]}, SHA-256 of the {found['lines']:,} captions of {folder}"


def vocabulary(
    opt: argparse.Namespace, vocab: Vocabulary | WordPieces, train_set: PrecompDataset
) -> str:
    kind, path = "words", opt.resume or ckpt.vocab_file(opt.vocab_path, opt)
    if vocab.pieces:
        kind, path = "pieces of words", opt.resume or opt.bert_path
    share = 100 * train_set.n_unknown / max(train_set.n_words, 1)
    return f"{path}: {len(vocab):,} {kind}; {share:.2f} % of train's words are unknown"


def parameters(opt: argparse.Namespace, model: nn.Module, criterion: nn.Module) -> str:
    """How many numbers are learnt, in all and by part."""

    def sizes_of(module: nn.Module) -> tuple[int, int]:
        sizes = [(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()]
        return tuple(map(sum, zip(*sizes, strict=True))) if sizes else (0, 0)

    def said(total: int, learnt: int) -> str:
        return f"{total:,}" if total == learnt else f"{total:,} ({learnt:,} trained)"

    parts = {name: getattr(model, name) for name in systems.of(opt).parts}
    parts |= {"loss": criterion}
    counts = {name: sizes_of(part) for name, part in parts.items()}
    in_all = [a + b for a, b in zip(sizes_of(model), counts["loss"], strict=True)]
    each = [f"{name} {said(*n)}," for name, n in counts.items() if n[0]]
    return "\n".join(broken([f"{said(*in_all)}:", *each], INDENT)).strip(" ,")


def device_name(device: torch.device) -> str:
    n = distributed.world_size()
    if device.type == "cuda":
        name = f"{device}, {torch.cuda.get_device_name(device)}"
    else:
        threads = torch.get_num_threads()
        name = f"{device}, {processor()}, {counted(threads, 'thread')}"
    return f"{n} processes, the first on {name}" if n > 1 else name


def loaders(workers: int) -> str:
    """Where batches are loaded."""
    return f"loading: {counted(workers, 'more process')}" if workers else "loading in this process"


def processor() -> str:
    """The name of the CPU; on Linux the platform module knows only its kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> str:
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"Python {platform.python_version()}, PyTorch {torch.__version__}{cuda}"


def code() -> str | None:
    """The commit of the code; None where it is no clone, or there is no git."""
    found = commit_of(HERE)
    if found is None:
        return None
    changed = ", and changes that are not committed" if found.endswith("-dirty") else ""
    return f"git commit {found[:7]}{changed}"


def folders(opt: argparse.Namespace) -> str:
    if opt.dry_run:
        return "nothing (--dry_run)"
    if os.path.realpath(opt.model_name) == os.path.realpath(opt.logger_name):
        return f"{opt.model_name}: checkpoints, TensorBoard's events, log.jsonl"
    return f"{opt.model_name}: checkpoints; {opt.logger_name}: TensorBoard's events, log.jsonl"


def changed_flags(opt: argparse.Namespace) -> list[str]:
    """The flags that give these options, without those that are the system's defaults."""
    flags = []
    for name, default in options.defaults(opt.model).items():
        value = getattr(opt, name)
        if value == default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name} {shlex.quote(str(value))}")
    return flags


def broken(items: list[str], indent: str) -> list[str]:
    """Items in lines of at most 80 letters, if no single one is longer."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 1 + len(item) <= 80:
            lines[-1] += f" {item}"
        else:
            lines.append(indent + item)
    return lines


# After the last epoch


def evaluation_command(opt: argparse.Namespace, folder: str, path: str) -> str:
    """The command that evaluates a checkpoint, for a shell in the current folder."""
    splits = [x for x in ("test", "testall") if os.path.isfile(f"{folder}/{x}_ims.npy")]
    script = "evaluation.py" if HERE == Path.cwd() else str(HERE / "evaluation.py")
    command = [python(), script, path, "--data_path", opt.data_path]
    command += ["--data_name", opt.data_name, "--split", (splits or ["dev"])[0]]
    command += [] if opt.device == "auto" else ["--device", opt.device]
    return shlex.join(command)


def python() -> str:
    """How this Python is called in a shell."""
    if shutil.which("python") == sys.executable:
        return "python"
    here = os.path.relpath(sys.executable)
    return sys.executable if here.startswith("..") else here


def summary(opt: argparse.Namespace, folder: str, log: RunLog) -> str:
    """What was done, the best epoch, where it is, and how to evaluate it; `folder`: the data's."""
    lines = [done] if (done := log.what_was_done()) else []
    own = log.saved_here or not opt.resume  # else the best is where --resume found it
    where = opt.model_name if own else os.path.dirname(opt.resume) or "."
    path, rsum = os.path.join(where, "model_best.pth.tar"), log.state.best_rsum
    there = os.path.isfile(path)
    if rsum >= 0:
        epoch = "" if log.best_epoch is None else f" after epoch {log.best_epoch}"
        said = f"saved in {path}" if there else f"but there is no {path}"
        if os.path.realpath(where) != os.path.realpath(opt.model_name):
            found = path if there else f"but there is no {path}"
            said = f"of the run before ({found}); this one has found nothing better"
        lines.append(f"best: rsum {rsum:.1f}{epoch}, {said}")
    lines.append(
        f"to evaluate it: {evaluation_command(opt, folder, path if there else opt.resume)}"
    )
    return "\n".join(lines)


# A dry run


@torch.inference_mode()
def time_validation(model: nn.Module, dev_set: PrecompDataset, seconds: float = 20.0) -> float:
    """How long a validation takes; scoring is cut off after some seconds, and extrapolated."""
    start = time.monotonic()
    images, captions = encode_data(model, dev_set)
    encoded = time.monotonic()
    words = done = 0
    for group in captions:
        words += int(dev_set.lengths[group["index"]].sum())
    for group in captions:
        score_matrix(model, images, [group], n_captions=dev_set.n_captions)
        done += int(dev_set.lengths[group["index"]].sum())
        if time.monotonic() - encoded > seconds:
            break
    scoring = time.monotonic() - encoded
    return encoded - start + scoring * words / max(done, 1)


def read_all(dataset: PrecompDataset, name: str) -> None:
    """Read each image and each caption of a split once, divided between the processes."""
    ranks = distributed.rank(), distributed.world_size()
    for image in progress(range(ranks[0], dataset.n_images, ranks[1]), f"reading {name}"):
        dataset.image_item(image)
    for caption in range(ranks[0], dataset.n_captions, ranks[1]):
        dataset.caption_item(caption)


def estimate(
    opt: argparse.Namespace,
    state: RunState,
    steps: int,
    seconds: dict[str, float],
    memory: int | None,
    device: torch.device,
) -> str:
    """What a dry run says of a run that stands at `state`, with epochs of `steps` steps.

    `seconds` are those of a 'step', of a 'validation' and of 'reading' all data; `memory` is in
    MiB.
    """
    validations = 1 + ((steps - 1) // opt.val_step if opt.val_step else 0)
    epoch = steps * seconds["step"] + validations * seconds["validation"]
    each = counted(validations, "validation")
    what, steps_left, validations = what_is_left(opt, state, steps)
    run = steps_left * seconds["step"] + validations * seconds["validation"]
    work = f"{counted(steps_left, 'step')}, {counted(validations, 'validation')}"
    facts = {
        "step": f"{duration(seconds['step'])} for {opt.batch_size} pairs",
        "validation": duration(seconds["validation"]),
        "epoch": f"about {duration(epoch)}: {counted(steps, 'step')}, {each}",
        "run": f"about {duration(run)}: {what}, {work}" if validations else what,
        "memory": memory_line(memory, device),
        "reading": f"{duration(seconds['reading'])} for all images and captions of train and dev",
    }
    lines = [f"  {name:<12}{fact}" for name, fact in facts.items()]
    return "\n".join(["dry run: all data was read, nothing was written", *lines])


def what_is_left(opt: argparse.Namespace, state: RunState, steps: int) -> tuple[str, int, int]:
    """What a run still has to do: its epochs in words, and the numbers of steps and validations."""
    after = opt.num_epochs - state.epoch - 1  # epochs behind the one under way
    if after < 0:
        done = f"{counted(state.epoch, 'epoch')} {'is' if state.epoch == 1 else 'are'} done"
        return f"nothing is left: {done}, --num_epochs is {opt.num_epochs}", 0, 0
    now, rest = state.Eiters, steps - state.batch
    ends = range(now + rest, now + rest + after * steps + 1, steps)  # of the epochs, in steps
    validations = len(ends) + state.val_due
    if opt.val_step:  # those inside the epochs
        validations += ends[-1] // opt.val_step - now // opt.val_step
        validations -= sum(end > now and end % opt.val_step == 0 for end in ends)
    what = counted(after + 1, "epoch")
    if state.batch:
        what = f"the {'rest' if rest else 'validation'} of epoch {state.epoch}"
        what += f" and {counted(after, 'epoch')} after it" if after else ""
    return what, rest + after * steps, validations


def memory_line(mib: int | None, device: torch.device) -> str:
    if mib is None:
        return "unknown on this system"
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / 2**20
        return f"{mib:,} MiB of the GPU's {there:,.0f} MiB at the peak"
    return f"{mib:,} MiB at the peak of this process, parts of mapped feature files included"
