"""What a run prints while it trains, beside the published lines, and what it warns of.

docs/training.md explains each line. Shapes: N images, M captions.
"""

import argparse
import contextlib
import os
import time

import numpy as np
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import checkpoint as ckpt
from bert import WordPieces
from data import PrecompDataset
from losses import ContrastiveLoss, InfoNCELoss
from metrics import METRICS
from run_state import RunState
from run_warnings import (
    at_chance,
    at_twice_the_margin,
    chances,
    fell_back,
    find_shift,
    out_of_step,
    what_to_change,
    worse_than,
)
from scoring import rank_by
from util import distributed
from util.cli import InputError, say
from util.log import (
    Average,
    NoWriter,
    Phase,
    StepLog,
    Writers,
    append_json,
    duration,
    forget_epochs_from,
    read_json_lines,
    room,
    sign_of_life,
)
from vocab import Vocabulary

PICTURES = 4  # dev pairs that --log_images draws
SOME_STEPS = 100  # with fewer steps, a run is judged at its end only


class RunLog:
    """Prints what --quiet leaves out, warns, and passes numbers on to TensorBoard.

    Each warning is printed once. train.py prints the published lines of a validation itself.
    """

    def __init__(
        self,
        opt: argparse.Namespace,
        state: RunState,
        criterion: nn.Module,
        dev_set: PrecompDataset,
        writer,
    ):
        self.opt, self.state, self.criterion, self.writer = opt, state, criterion, writer
        self.dev_set, self.image_of = dev_set, rank_by(dev_set)
        self.start, self.first_step = time.monotonic(), state.Eiters
        self.validation: float | None = None  # seconds
        self.steps: StepLog | None = None  # of the epoch under way
        self.saved_here = False  # whether this process has saved the best so far
        self.path, self.unwritten = os.path.join(opt.logger_name, "log.jsonl"), []
        log = read_json_lines(self.path)  # of a resumed run
        self.best_epoch = next((x["epoch"] for x in log if x.get("rsum") == state.best_rsum), None)
        self.said: set[str] = set()  # kinds of warnings

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.steps:
            self.steps.write()
        self.writer.close()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.writer.add_scalar(tag, value, step)

    def epoch_begins(self, batches: int) -> StepLog:
        """The log of the steps of an epoch of `batches` steps, which may be under way."""
        opt, state = self.opt, self.state
        phase = None
        if not opt.quiet:
            name, summed = phase_of(self.criterion, state.epoch)
            phase = Phase(name, summed, opt.num_epochs - state.epoch - 1, opt.val_step)
            phase.validation = self.validation
        loss = Average(state.loss_sum, state.loss_count)
        self.batches = batches
        self.steps = StepLog(self.writer, opt.log_step, loss, phase)
        return self.steps

    def working(self, what: str) -> contextlib.AbstractContextManager:
        """For a long piece of work between two steps."""
        if self.steps:
            self.steps.write()  # trackers want the values of earlier steps first
        return sign_of_life(what, self.opt.quiet)

    def validation_is_done(self, metrics: dict, scores: np.ndarray, seconds: float) -> None:
        """Print the table of a validation with scores (N, M), and look for what may be wrong.

        `metrics` are those of retrieval_metrics.
        """
        state = self.state
        self.validation = seconds
        if self.steps and self.steps.phase:
            self.steps.phase.validation, self.steps.said = seconds, time.monotonic()
        at_end = state.batch == self.batches
        if not self.opt.quiet:
            shape = scores.shape if self.image_of is not None else None
            say(table(metrics, f"dev, epoch {state.epoch}", shape))
            say(f"  {self._beside_the_best(metrics['rsum'], at_end)}")
        if self.image_of is None:
            return
        shift = find_shift(scores, self.image_of.numpy())
        if shift:
            self.warn("shift", out_of_step(self.dev_set, shift))
        elif at_end and "shift" not in self.said and self.is_old_enough(state.epoch):
            self._look_whether_it_learns(metrics, *scores.shape)

    def _look_whether_it_learns(self, metrics: dict, n: int, m: int) -> None:
        """Warn, at the end of an epoch, of its loss or else of recalls at chance: in one line."""
        epoch, losses = self.state.epoch, self.steps.losses
        whole = len(losses) == self.batches and only_hardest(self.criterion, epoch)
        behind = worse_than(0.25, metrics, n)
        if whole and behind and at_twice_the_margin(self.criterion, losses):
            margin, warmup = self.criterion.margin, self.criterion.warmup_epochs
            self.warn(
                "plateau",
                f"the loss sat at twice the margin, {2 * margin:g} a pair, for epoch {epoch}, and "
                "images are hardly told apart: probably all scores are alike; start again with "
                f"--vse_mean_warmup_epochs {warmup + 1}, or a lower --learning_rate; if that does "
                "not help, see whether the captions of train stand beside their images",
            )
        elif fell_back(metrics["rsum"], self.state.best_rsum, n):
            which = "" if self.best_epoch is None else f" (epoch {self.best_epoch})"
            cause = " with hardest negatives" if only_hardest(self.criterion, epoch) else ""
            self.warn(
                "back",
                f"the sum of the six recalls fell from {self.state.best_rsum:.1f}{which} to "
                f"{metrics['rsum']:.1f} after epoch {epoch}{cause}; if the next epoch does not win "
                f"it back, start again with {what_to_change(self.criterion, 'a lower')}",
            )
        elif "plateau" not in self.said and at_chance(metrics, n, m):
            self.warn(
                "chance",
                f"R@1 on dev is at chance after {self.state.Eiters:,} steps "
                f"({metrics['i2t']['r1']:.1f} and {metrics['t2i']['r1']:.1f} %, chance "
                f"{100 / n:.2g} %): see whether the captions of train stand beside their images, "
                f"then try {what_to_change(self.criterion, 'another')}",
            )

    def _beside_the_best(self, rsum: float, at_end: bool) -> str:
        said, best = f"sum of the six recalls {rsum:.1f}", self.state.best_rsum
        which = "" if self.best_epoch is None else f", epoch {self.best_epoch}"
        if not at_end:
            said += f" inside epoch {self.state.epoch}"
        if best < 0:
            return said
        if rsum > best and at_end:
            return f"{said}: better than the best before it ({best:.1f}{which})"
        return f"{said}; the best epoch so far: {best:.1f}{which}"

    def epoch_is_done(self, lr: float, seconds: float, mib: int | None, metrics: dict) -> None:
        """Write an epoch to log.jsonl, on process 0; `mib` is the peak of its memory."""
        if distributed.rank() > 0:
            return
        state = self.state
        where = {"epoch": state.epoch, "Eit": state.Eiters, "lr": lr}
        where["Le"] = state.loss_sum / max(state.loss_count, 1)
        record = where | {"seconds": round(seconds, 1), "peak_mib": mib} | metrics
        self.unwritten.append(record | {"best_rsum": state.best_rsum})
        if append_json(self.path, self.unwritten):
            self.unwritten = []

    def epoch_is_saved(self, is_best: bool) -> None:
        """Call this when the checkpoint of an epoch is written and the next epoch is due."""
        if is_best:
            self.best_epoch, self.saved_here = self.state.epoch - 1, True
            if not self.opt.quiet:
                say(f"new best: saved {os.path.join(self.opt.model_name, 'model_best.pth.tar')}")

    def is_old_enough(self, epoch: int) -> bool:
        """Whether the model should have learned something at the end of an epoch."""
        return self.state.Eiters >= SOME_STEPS or epoch == self.opt.num_epochs - 1

    def warn(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            say(f"warning: {text}")

    def what_was_done(self) -> str:
        """One line on the work of this process; empty if it had nothing to do."""
        steps = self.state.Eiters - self.first_step
        if not steps:
            return ""
        took = duration(time.monotonic() - self.start)
        return f"done: epoch {self.state.epoch - 1}, the last; {steps:,} steps took {took}"


def open_writer(opt: argparse.Namespace, state: RunState, tracker) -> Writers | NoWriter:
    """TensorBoard's writer together with the tracker's, on process 0."""
    if distributed.rank() > 0:
        return NoWriter()
    try:
        tb = SummaryWriter(opt.logger_name, purge_step=state.Eiters + 1, flush_secs=5)
    except OSError as error:
        raise InputError(
            f"{opt.logger_name}: TensorBoard's events cannot be written "
            f"({error.strerror or error}, {room(opt.logger_name)}); make room, or give another "
            "--logger_name"
        ) from None
    return Writers(tb, tracker)


def prepare_folders(opt: argparse.Namespace, state: RunState, fresh: bool) -> None:
    """Make the output folders; a fresh run moves the files of an earlier one aside."""
    weights, logs = ("*.pth.tar",), ("log.jsonl", "events.out.tfevents.*")
    if os.path.realpath(opt.model_name) == os.path.realpath(opt.logger_name):
        ckpt.prepare(opt.model_name, weights + logs if fresh else ())
    else:
        ckpt.prepare(opt.model_name, weights if fresh else ())
        ckpt.prepare(opt.logger_name, logs if fresh else ())
    forget_epochs_from(state.epoch, os.path.join(opt.logger_name, "log.jsonl"))


def phase_of(criterion: nn.Module, epoch: int) -> tuple[str, bool]:
    """What the loss of an epoch is, in words, and whether it is a sum over the batch."""
    if isinstance(criterion, ContrastiveLoss):
        return "hardest negatives" if only_hardest(criterion, epoch) else "summed hinge", True
    return "InfoNCE" if isinstance(criterion, InfoNCELoss) else type(criterion).__name__, False


def only_hardest(criterion: nn.Module, epoch: int) -> bool:
    """Whether the loss of an epoch is the hinge of the hardest negatives."""
    hinge = isinstance(criterion, ContrastiveLoss) and criterion.max_violation
    return hinge and epoch >= criterion.warmup_epochs


def table(metrics: dict, head: str, shape: tuple[int, int] | None) -> str:
    """The metrics of a validation with their names; `shape` (N, M) gives the row of chance."""
    lines = [f"  {head:<14}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median':>8}{'mean':>8}"]
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        r1, r5, r10, medr, meanr = (metrics[way][x] for x in METRICS)
        lines.append(f"  {name:<14}{r1:>7.1f}{r5:>7.1f}{r10:>7.1f}{medr:>8.0f}{meanr:>8.1f}")
    if shape:
        recalls = "".join(f"{x:>7.1f}" for x in chances(shape[0]))
        lines.append(f"  {'by chance':<14}{recalls}")
    return "\n".join(lines)


# Pictures


def draw_pairs(
    model: nn.Module, dev_set: PrecompDataset, vocab: Vocabulary | WordPieces, writer, step: int
) -> None:
    """Draw the attention of four pairs spread over dev, always the same, as figures of a step."""
    from explain import explain_pair, region_boxes  # matplotlib is needed for pictures only
    from util.attention_figure import draw

    captions = np.linspace(0, dev_set.n_captions - 1, PICTURES).astype(int)
    for caption in np.unique(captions).tolist():
        shown = explain_pair(model, dev_set, caption, vocab)
        boxes, size = region_boxes(dev_set, int(dev_set.image_of[caption]))
        writer.add_figure(f"attention/caption_{caption}", draw(shown, boxes, size), step)


def check_pictures(
    model: nn.Module, dev_set: PrecompDataset, vocab: Vocabulary | WordPieces
) -> None:
    """Raise InputError, before training, if pairs of this model cannot be drawn."""

    class Nowhere:
        def add_figure(self, *_):
            pass

    try:
        draw_pairs(model, dev_set, vocab, Nowhere(), 0)
    except InputError as error:
        raise InputError(f"--log_images: {error}") from None
