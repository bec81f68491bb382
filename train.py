"""Train an image-text matching model on precomputed region features.

    python train.py --data_path data --data_name f30k_precomp --vocab_path vocab \\
        --model_name runs/f30k/checkpoint --logger_name runs/f30k/log --max_violation --bi_gru

Writes checkpoint_{epoch}.pth.tar and model_best.pth.tar to --model_name; TensorBoard events and one
JSON line an epoch (log.jsonl) to --logger_name. Ctrl-C or SIGTERM saves interrupted.pth.tar first.
"""

import argparse
import json
import os
import signal
import time

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import checkpoint as ckpt
import options
from data import PrecompDataset, get_train_loader
from evaluation import (
    METRICS,
    encode_data,
    find_data,
    numbers,
    pick_device,
    retrieval_metrics,
    score_matrix,
    to_device,
)
from model import ContrastiveLoss
from util.cli import InputError, progress, run, say
from vocab import Vocabulary, deserialize_vocab

INTERRUPTED = "interrupted.pth.tar"


class Stop(BaseException):
    """Raised between two steps after Ctrl-C or SIGTERM."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a Stop at the next `check`, or at once inside `with`.

    An optimizer step must not be torn; a validation, which changes nothing, may be left anywhere. A
    second signal falls through to Python's own handling.
    """

    def __init__(self):
        self.received: int | None = None
        self.at_once = False
        self.before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number, frame):
        signal.signal(number, signal.default_int_handler)
        self.received = number
        print(f"\n{signal.Signals(number).name}: saving and stopping ...", flush=True)
        if self.at_once:
            raise Stop

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self.received is not None:
            raise Stop

    def __enter__(self):
        self.check()
        self.at_once = True

    def __exit__(self, *_):
        self.at_once = False


class Average:
    """A value, and its mean over an epoch weighted by batch size."""

    def __init__(self, total: float = 0.0, count: int = 0):
        self.val, self.total, self.count = 0.0, total, count

    def update(self, val: float, n: int = 1) -> None:
        self.val = val
        self.total += val * n
        self.count += n

    @property
    def avg(self) -> float:
        return self.total / max(self.count, 1)

    def __str__(self) -> str:
        return f"{self.val:.4f} ({self.avg:.4f})"


def main(argv: list[str] | None = None) -> None:
    opt = options.parse(argv)
    print(opt)
    torch.manual_seed(opt.seed)
    device = pick_device(opt.device)

    resumed = ckpt.load(opt.resume) if opt.resume else None
    vocab = read_vocab(opt, resumed)
    opt.vocab_size = len(vocab)
    folder = find_data(opt.data_path, opt.data_name)
    train_set = PrecompDataset(folder, "train", vocab, opt.img_dim)
    dev_set = PrecompDataset(folder, "dev", vocab, opt.img_dim)
    loader = get_train_loader(
        train_set, opt.batch_size, opt.workers, opt.seed, pin_memory=device.type == "cuda"
    )

    model = ckpt.build_model(opt, len(vocab)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=opt.learning_rate)
    # Where the run stands: epoch under way, batches of it done, their losses, steps in all, best.
    at = {"epoch": 0, "batch": 0, "loss_sum": 0.0, "loss_count": 0, "Eiters": 0, "best_rsum": -1.0}
    if resumed:
        ckpt.load_weights(model, resumed, opt.resume)
        if not opt.reset_start_epoch:
            restore(resumed, optimizer, at, opt)
        print(f"=> loaded {opt.resume}: epoch {at['epoch']}, best rsum {at['best_rsum']:.1f}")
        del resumed

    def state() -> dict:
        return {
            # The published meaning: the last epoch finished.
            "epoch": at["epoch"] - 1,
            "model": ckpt.state_dicts(model, opt.model),
            "best_rsum": at["best_rsum"],
            "opt": opt,
            "Eiters": at["Eiters"],
            "vocab": vocab.state_dict(),
            "run": at
            | {
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
            },
        }

    if at["epoch"] >= opt.num_epochs:
        print(f"nothing to do: {at['epoch']} epochs are done, --num_epochs is {opt.num_epochs}")
    stop = StopSignal()
    with SummaryWriter(opt.logger_name, purge_step=at["Eiters"] + 1, flush_secs=5) as tb:
        try:
            while at["epoch"] < opt.num_epochs:
                start = time.time()
                train_epoch(model, optimizer, loader, dev_set, at, opt, device, tb, stop)
                with stop:
                    metrics = validate(model, dev_set, at["Eiters"], tb)
                is_best = metrics["rsum"] > at["best_rsum"]
                at["best_rsum"] = max(metrics["rsum"], at["best_rsum"])
                record = {
                    "epoch": at["epoch"],
                    "Eit": at["Eiters"],
                    "lr": optimizer.param_groups[0]["lr"],
                    "Le": at["loss_sum"] / max(at["loss_count"], 1),
                    "seconds": round(time.time() - start, 1),
                    **metrics,
                    "best_rsum": at["best_rsum"],
                }
                with open(os.path.join(opt.logger_name, "log.jsonl"), "a") as log:
                    log.write(json.dumps(record) + "\n")
                name = f"checkpoint_{at['epoch']}.pth.tar"
                at.update(epoch=at["epoch"] + 1, batch=0, loss_sum=0.0, loss_count=0)
                ckpt.save(state(), opt.model_name, name, is_best)
                stop.check()
        except Stop:
            ckpt.save(state(), opt.model_name, INTERRUPTED)
            path = os.path.join(opt.model_name, INTERRUPTED)
            print(f"saved epoch {at['epoch']}, batch {at['batch']}: go on with --resume {path}")
            raise SystemExit(128 + stop.received) from None
        finally:
            stop.restore()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    dev_set: PrecompDataset,
    at: dict,
    opt: argparse.Namespace,
    device: torch.device,
    tb: SummaryWriter,
    stop: StopSignal,
) -> None:
    """Run the rest of epoch at['epoch'], from batch at['batch'] on; keeps `at` up to date."""
    epoch = at["epoch"]
    lr = opt.learning_rate * 0.1 ** (epoch // opt.lr_update)
    for group in optimizer.param_groups:
        group["lr"] = lr
    hardest = opt.max_violation and epoch >= opt.vse_mean_warmup_epochs
    criterion = ContrastiveLoss(opt.margin, hardest)
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, at["batch"]
    steps = at["batch"] + len(loader)

    loss_log, batch_time, data_time = (
        Average(at["loss_sum"], at["loss_count"]),
        Average(),
        Average(),
    )
    end = time.time()
    for batch in progress(loader, f"epoch {epoch}"):
        data_time.update(time.time() - end)
        model.train()
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=opt.amp):
            images, captions = model.encode_images(batch), model.encode_captions(batch)
        same_image = batch["image_index"] if opt.no_false_negatives else None
        loss = criterion(model.similarity(images, captions), same_image)  # ()

        value = loss.item()
        if value != value or abs(value) == float("inf"):
            raise InputError(
                f"the loss is {value} at epoch {epoch}, batch {at['batch']}: training stopped, the "
                f"checkpoints in {opt.model_name} are whole; try a lower --learning_rate, "
                "--grad_clip, or no --amp"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if opt.grad_clip > 0:
            clip_grad_norm_(model.parameters(), opt.grad_clip)
        optimizer.step()

        loss_log.update(value, len(batch["index"]))
        at.update(batch=at["batch"] + 1, Eiters=at["Eiters"] + 1)
        at.update(loss_sum=loss_log.total, loss_count=loss_log.count)
        batch_time.update(time.time() - end)
        end = time.time()

        step = at["Eiters"]
        if step % opt.log_step == 0:
            say(
                f"Epoch: [{epoch}][{at['batch']}/{steps}]  Eit {step}  lr {lr:g}  Le {loss_log}  "
                f"Time {batch_time}  Data {data_time}"
            )
        values = {"epoch": epoch, "step": at["batch"] - 1, "Eit": step, "lr": lr, "Le": value}
        values |= {"batch_time": batch_time.val, "data_time": data_time.val}
        for tag, number in values.items():
            tb.add_scalar(tag, number, step)
        stop.check()
        if opt.val_step and step % opt.val_step == 0 and at["batch"] < steps:
            with stop:
                validate(model, dev_set, step, tb)
            end = time.time()


def validate(model: nn.Module, dev_set: PrecompDataset, step: int, tb: SummaryWriter) -> dict:
    """Metrics on dev under their published TensorBoard tags (`r1` ... `meanri`, `rsum`)."""
    start = time.time()
    scores = score_matrix(model, *encode_data(model, dev_set))
    metrics = retrieval_metrics(scores)
    say(f"Image to text: {numbers(metrics['i2t'], ', ')}")
    say(f"Text to image: {numbers(metrics['t2i'], ', ')}")
    say(f"rsum: {metrics['rsum']:.1f} (step {step}, {time.time() - start:.1f} s)")
    tags = {name: metrics["i2t"][name] for name in METRICS}
    tags |= {f"{name}i": metrics["t2i"][name] for name in METRICS}
    tags["rsum"] = metrics["rsum"]
    for tag, number in tags.items():
        tb.add_scalar(tag, number, step)
    return tags


def read_vocab(opt: argparse.Namespace, resumed: dict | None) -> Vocabulary:
    """The vocabulary file of the options; a resumed checkpoint must agree with it."""
    path = os.path.join(opt.vocab_path, f"{opt.data_name}_vocab.json")
    if resumed is None:
        return deserialize_vocab(path)
    inside = resumed.get("vocab")
    if inside is None:
        return ckpt.find_vocab(resumed, opt.resume, path)
    vocab = ckpt.find_vocab(resumed, opt.resume)
    if os.path.isfile(path) and deserialize_vocab(path).word2idx != vocab.word2idx:
        raise InputError(
            f"{path}: not the vocabulary that {opt.resume} was trained with, whose word ids "
            "differ; give --vocab_path its folder, or move this file away to use the checkpoint's"
        )
    return vocab


def restore(
    resumed: dict, optimizer: torch.optim.Optimizer, at: dict, opt: argparse.Namespace
) -> None:
    """Bring optimizer, counters and random state to where the checkpoint was written."""
    progress_made = resumed.get("run")
    at["epoch"] = resumed.get("epoch", -1) + 1
    at["Eiters"] = int(resumed.get("Eiters", 0))
    at["best_rsum"] = float(resumed.get("best_rsum", -1))
    if progress_made is None:
        print(
            "notice: a published checkpoint holds no optimizer or random state: both start afresh"
        )
        return
    saved, now = vars(resumed["opt"]), vars(opt)
    changed = [
        f"--{name} {saved.get(name)} -> {now[name]}"
        for name in ("seed", "batch_size", "data_name", "learning_rate", "lr_update", "margin")
        if saved.get(name) != now[name]
    ]
    if changed:
        print(f"notice: resuming with changed options: {', '.join(changed)}")
    at.update({name: progress_made[name] for name in at})
    optimizer.load_state_dict(progress_made["optimizer"])
    torch.set_rng_state(progress_made["rng"])
    if torch.cuda.is_available() and progress_made["cuda_rng"]:
        torch.cuda.set_rng_state_all(progress_made["cuda_rng"])


if __name__ == "__main__":
    run(main)
