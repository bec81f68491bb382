"""Train an image-text matching model on precomputed region features.

    python train.py --data_path data --data_name f30k_precomp --vocab_path vocab \\
        --model_name runs/f30k/checkpoint --logger_name runs/f30k/log --max_violation --bi_gru

Writes checkpoint_{epoch}.pth.tar and model_best.pth.tar to --model_name; TensorBoard events and one
JSON line per epoch (log.jsonl) to --logger_name. Ctrl-C or SIGTERM saves interrupted.pth.tar first.
`--dry_run` tries all this and writes nothing. docs/training.md explains what is printed.
`torchrun --nproc_per_node=N train.py ...` splits each batch over N GPUs or processes.

Shapes: B pairs of a batch, b pairs of a process's share of it.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.data import DataLoader

import banner
import checkpoint as ckpt
import run_log
import run_state
import systems
from batches import get_train_loader
from bert import WordPieces
from data import Drop, PrecompDataset
from evaluation import encode_data, rank_by, score_matrix
from metrics import METRICS, numbers, retrieval_metrics
from run_log import RunLog
from run_state import RunState
from text_setup import check_words, read_vocab, set_text_encoder, start_from_vectors
from util import cli, distributed
from util.checkpoint_files import INTERRUPTED
from util.cli import InputError, progress, say
from util.data_watch import DataWatch
from util.devices import pick_device, to_device
from util.log import sign_of_life
from util.memory import peak_mib
from util.signals import Stop, StopSignal
from util.tracker import NoTracker, load_tracker, open_tracker
from util.worker_limits import explain
from vocab import Vocabulary


@dataclasses.dataclass
class Run:
    """What a run works with."""

    opt: argparse.Namespace
    device: torch.device
    vocab: Vocabulary | WordPieces
    loader: DataLoader
    dev_set: PrecompDataset
    model: nn.Module
    encoder: nn.Module  # the model, or its wrapper that averages gradients over the processes
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    state: RunState
    watch: DataWatch = dataclasses.field(default_factory=DataWatch)  # of the files it reads
    tracker: NoTracker | None = None  # on process 0
    grad_norm: Tensor | None = None  # () of the last step's gradient, before clipping


def main(argv: list[str] | None = None) -> None:
    opt, resumed = run_state.read_options(argv)
    device = pick_device(opt.device)
    with distributed.process_group(device, opt.rank_timeout):
        run_state.check_agreed(opt)
        job = dry_run if opt.dry_run else train
        job(set_up(opt, device, resumed))


# The loop


def train(run: Run) -> None:
    """Epochs of steps; after each epoch a validation and a checkpoint."""
    opt, state, stop = run.opt, run.state, StopSignal()
    if state.epoch >= opt.num_epochs:
        print(f"nothing to do: {state.epoch} epochs are done, --num_epochs is {opt.num_epochs}")
    writer = run_log.open_writer(opt, state, run.tracker)
    # The end of a loader process is raised wherever the loop is, while the log is closed too.
    with run.watch.explaining(), RunLog(opt, state, run.criterion, run.dev_set, writer) as log:
        try:
            while state.epoch < opt.num_epochs:
                start, lr = time.time(), start_epoch(run)
                batches = state.batch + len(run.loader)
                steps = log.epoch_begins(batches)
                validate_if_due(run, log, stop)
                steps.restart()
                for batch in progress(
                    batches_of(run, stop), f"epoch {state.epoch}", len(run.loader)
                ):
                    steps.batch_is_there()
                    size = size_of_batch(run)
                    loss = train_step(run, batch, size)
                    state.batch, state.Eiters = state.batch + 1, state.Eiters + 1
                    where = state.epoch, state.batch, batches, state.Eiters
                    steps.step_is_done(loss, run.grad_norm, size, *where, lr)
                    state.loss_sum, state.loss_count = steps.loss.total, steps.loss.count
                    due = opt.val_step and state.Eiters % opt.val_step == 0
                    state.val_due = bool(due and state.batch < batches)  # not at the epoch's end
                    stop.check()
                    validate_if_due(run, log, stop)
                    steps.restart()
                metrics = validate(run.model, run.dev_set, state.Eiters, log, stop)
                finish_epoch(run, metrics, start, log)
                stop.check()
        except Stop:
            save(run, INTERRUPTED)
            path = os.path.join(opt.model_name, INTERRUPTED)
            print(
                f"saved epoch {state.epoch}, batch {state.batch}: go on with --resume "
                f"{shlex.quote(path)}"
            )
            raise SystemExit(128 + (stop.received or signal.SIGTERM)) from None
        finally:
            stop.restore()
    if not opt.quiet:
        say(banner.summary(opt, os.path.dirname(run.dev_set.path), log))


def dry_run(run: Run) -> None:
    """Take two steps, validate, read all data, and say what a run needs. Nothing is written."""
    opt, state, stop, ends = run.opt, run.state, StopSignal(), [time.time()]
    start_epoch(run)
    steps, before = state.batch + len(run.loader), dataclasses.replace(state)
    if state.batch:  # of the epoch under way perhaps no batch is left
        state.epoch, state.batch = state.epoch + 1, 0
        start_epoch(run)
    try:
        for batch in itertools.islice(batches_of(run, stop), 2):
            train_step(run, batch, size_of_batch(run))
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            ends.append(time.time())
            stop.check()
            state.batch += 1
            run.criterion.epoch = opt.num_epochs - 1  # most epochs are like the last one
        with contextlib.suppress(Stop), stop, sign_of_life("dry run", opt.quiet):
            validation = banner.time_validation(run.model, run.dev_set)
            memory = peak_mib(run.device)  # of mapped files, what a run has in use
            start = time.time()
            banner.read_all(run.loader.dataset, "train")
            banner.read_all(run.dev_set, "dev")
        stop.check()
    except Stop:
        raise SystemExit(128 + (stop.received or signal.SIGTERM)) from None
    finally:
        stop.restore()
    seconds = {
        "step": ends[-1] - ends[-2],
        "validation": validation,
        "reading": time.time() - start,
    }
    say(banner.estimate(opt, before, steps, seconds, memory, run.device))


def batches_of(run: Run, stop: StopSignal) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of an epoch that are left. A signal ends the wait for one.

    Several processes stop together, at the check behind a step.
    """
    alone = distributed.world_size() == 1
    try:
        loader = iter(run.loader)
        while True:
            with stop if alone else contextlib.nullcontext():
                batch = next(loader, None)
            if batch is None:
                return
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        said = explain(error)
        if said is None:
            raise
        raise InputError(said) from None


def train_step(run: Run, batch: dict[str, torch.Tensor], size: int) -> float:
    """One step on a batch of pairs, `size` over all processes: its loss."""
    opt, world_size = run.opt, distributed.world_size()
    run.model.train()
    if world_size > 1:
        # Dropout (BERT's) draws anew for each process and step: of the random states of the
        # processes, a checkpoint holds only that of the first.
        step = run.state.Eiters * world_size + distributed.rank()
        torch.manual_seed((opt.seed * 1_000_003 + step) % 2**63)
    if "widest" in batch:  # of this process's share
        batch["widest"][:] = distributed.all_reduce_max(batch["widest"][:1])
    batch = to_device(batch, run.device)
    run.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=opt.amp):  # Q36
        images, captions = run.encoder(batch)
    shared = world_size > 1 and run.loader.batch_sampler.shared(size)
    if shared:  # the images of this process, the captions of all
        captions = {name: distributed.gather_rows(x) for name, x in captions.items()}
    scores = run.model.similarity(images, captions)  # (b, B)
    del images, captions  # the graph holds the tensors that its backward pass reads
    image_index = batch["image_index"] if opt.no_false_negatives else None  # (b,)
    if shared:
        scores = distributed.gather_rows(scores, sum_gradients=False)  # (B, B)
        image_index = None if image_index is None else distributed.gather_rows(image_index)  # (B,)
    loss = run.criterion(scores, image_index)  # ()

    value = loss.item()
    if not math.isfinite(value):
        raise InputError(
            f"the loss is {value} at epoch {run.state.epoch}, batch {run.state.batch}: training "
            f"stopped, the checkpoints in {opt.model_name} are whole; try a lower "
            "--learning_rate, --grad_clip, or no --amp"
        )
    # The gradients of the encoders are averaged over the processes. If each process has a part of
    # them, their sum is wanted. Of the criterion each process has the whole gradient.
    (loss * world_size if shared else loss).backward()
    of_criterion = [p for p in run.criterion.parameters() if p.grad is not None]
    for p in of_criterion if shared else ():
        p.grad /= world_size
    learnt = [*run.model.parameters(), *of_criterion]
    if opt.grad_clip > 0:
        run.grad_norm = clip_grad_norm_(learnt, opt.grad_clip)
    else:
        run.grad_norm = get_total_norm([p.grad for p in learnt if p.grad is not None])
    run.optimizer.step()
    return value


def start_epoch(run: Run) -> float:
    """Tell all parts which epoch it is; returns its learning rate."""
    opt, state = run.opt, run.state
    lr = opt.learning_rate * 0.1 ** (state.epoch // opt.lr_update)  # Q23
    run.watch.check()
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)  # older checkpoints have no scale
    run.loader.batch_sampler.epoch, run.loader.batch_sampler.first = state.epoch, state.batch
    run.loader.dataset.epoch = run.criterion.epoch = state.epoch
    return lr


def size_of_batch(run: Run) -> int:
    """Pairs of the next batch, over all processes; the last one of an epoch may be short (Q27)."""
    batch_size = run.opt.batch_size
    return min(batch_size, len(run.loader.dataset) - batch_size * run.state.batch)


def validate_if_due(run: Run, log: RunLog, stop: StopSignal) -> None:
    if run.state.val_due:
        # Left by a signal, it stays due.
        validate(run.model, run.dev_set, run.state.Eiters, log, stop)
        run.state.val_due = False


def validate(
    model: nn.Module, dev_set: PrecompDataset, step: int, log: RunLog, stop: StopSignal
) -> dict:
    """Metrics on dev under their published TensorBoard tags (`r1` ... `meanri`, `rsum`).  # Q7"""
    start = time.time()
    stop.check()
    with contextlib.suppress(Stop), stop, log.working("validation"):  # all meet at the check
        encoded = encode_data(model, dev_set)
        scores = score_matrix(model, *encoded, n_captions=dev_set.n_captions)
    stop.check()
    distributed.all_reduce_sum(torch.from_numpy(scores))
    metrics = retrieval_metrics(scores, image_of=rank_by(dev_set))
    say(f"Image to text: {numbers(metrics['i2t'], ', ')}")
    say(f"Text to image: {numbers(metrics['t2i'], ', ')}")
    seconds = time.time() - start
    say(f"rsum: {metrics['rsum']:.1f} (step {step}, {seconds:.1f} s)")
    tags = {name: metrics["i2t"][name] for name in METRICS}
    tags |= {f"{name}i": metrics["t2i"][name] for name in METRICS}
    tags["rsum"] = metrics["rsum"]
    for tag, number in tags.items():
        log.add_scalar(tag, number, step)
    log.validation_is_done(metrics, scores, seconds)
    return tags


def finish_epoch(run: Run, metrics: dict, start: float, log: RunLog) -> None:
    """Log an epoch that began at `start`, and save it."""
    opt, state, best = run.opt, run.state, run.state.best_rsum
    state.best_rsum = max(metrics["rsum"], best)
    lr, seconds = run.optimizer.param_groups[0]["lr"], time.time() - start
    log.epoch_is_done(lr, seconds, peak_mib(run.device), metrics)
    name = f"checkpoint_{state.epoch}.pth.tar"
    state.epoch, state.batch, state.loss_sum, state.loss_count = state.epoch + 1, 0, 0.0, 0
    try:
        save(run, name, is_best=state.best_rsum > best)
    except ckpt.SaveError as error:
        if opt.on_save_error == "stop" or state.epoch == opt.num_epochs:  # no epoch follows
            raise
        say(f"warning: {error}; the run goes on, and saves again after the next epoch")
        state.best_rsum = best  # that of model_best.pth.tar, so that an epoch above it is saved
    else:
        log.epoch_is_saved(is_best=state.best_rsum > best)
    if opt.log_images and distributed.rank() == 0:
        run_log.draw_pairs(run.model, run.dev_set, run.vocab, log.writer, state.Eiters)


def save(run: Run, name: str, is_best: bool = False) -> None:
    """Write a checkpoint, on process 0; none of what was learned from data that has changed."""
    if distributed.rank() > 0:
        return
    run.watch.check()
    state = {
        "epoch": run.state.epoch - 1,  # the published meaning: the last epoch that is finished
        "model": ckpt.state_dicts(run.model, run.opt),
        "best_rsum": run.state.best_rsum,
        "opt": run.opt,
        "Eiters": run.state.Eiters,
        "vocab": run.vocab.state_dict(),
        "run": run_state.state_dict(
            run.state, run.optimizer, run.criterion, run.device, len(run.loader.dataset)
        ),
        "data": run.watch.marks,
    }
    ckpt.save(state, run.opt.model_name, name, is_best, keep=run.opt.keep)


# Setting up


def set_up(opt: argparse.Namespace, device: torch.device, resumed: dict | None = None) -> Run:
    """All that a run works with, from its options: fresh, or as a checkpoint left it."""
    torch.manual_seed(opt.seed)
    load_tracker(opt.tracker)  # if its package is missing, say so before the data is read
    system = systems.of(opt)
    folder = system.find_data(opt.data_path, opt.data_name)
    if not opt.quiet:
        say(f"reading {folder}")
    set_text_encoder(opt, resumed)
    vocab = read_vocab(opt, resumed)
    opt.vocab_size = len(vocab)
    train_set = systems.open_split(folder, "train", vocab, opt)
    vars(opt).update(train_set.options_of_data)
    check_words(opt, vocab, train_set)
    if opt.drop:
        keep_last = train_set.last_region_is_image
        train_set.drop = Drop(opt.obj_drop_rate, opt.seed, vocab, keep_last)
    dev_set = systems.open_split(folder, "dev", vocab, opt)
    processes = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    pin = device.type == "cuda"
    cut = opt.drop and not opt.keep_short_batch  # Q27
    loading = train_set, opt.batch_size, opt.workers, opt.seed
    loader = get_train_loader(*loading, pin_memory=pin, drop_last=cut, **processes)

    model = ckpt.build_model(opt, len(vocab)).to(device)
    model.grad_checkpointing = opt.grad_checkpointing
    criterion = system.criterion(opt).to(device)
    optimizer = system.optimizer(model, criterion, opt)
    if not opt.quiet:
        sets = train_set, dev_set
        say(banner.banner(opt, device, vocab, *sets, model, criterion, loader))
    parts = vocab, loader, dev_set, model, model, criterion, optimizer
    run = Run(opt, device, *parts, RunState(), DataWatch(train_set, dev_set))
    fresh = resumed is None or opt.reset_start_epoch
    if resumed:
        run_state.load_weights(model, resumed, opt)
        if not fresh:
            run_state.restore(
                resumed, run.state, optimizer, criterion, opt, n_captions=len(train_set)
            )
            run.watch.compare(resumed.get("data"), opt.resume)
        what = "its weights" if fresh else run_state.in_words(run.state)
        print(f"=> loaded {opt.resume}: {what}")
    elif opt.wemb_type or opt.wemb_path:
        start_from_vectors(model, vocab, opt)
    elif opt.text_enc_type == "bert":
        model.txt_enc.start_from(opt.bert_path)
    if distributed.world_size() > 1:
        run.encoder = DistributedDataParallel(model)
    if opt.log_images:
        run_log.check_pictures(model, dev_set, vocab)
    distributed.barrier()  # all have read the files that process 0 may move aside now
    if distributed.rank() == 0 and not opt.dry_run:
        run.tracker = open_tracker(opt.tracker, opt.model_name, vars(opt))
        run_log.prepare_folders(opt, run.state, fresh)
    return run


if __name__ == "__main__":
    cli.run(main)
