"""Train an image-text matching model on precomputed region features.

    python train.py --data_path data --data_name f30k_precomp --vocab_path vocab \\
        --model_name runs/f30k/checkpoint --logger_name runs/f30k/log --max_violation --bi_gru

Writes checkpoint_{epoch}.pth.tar and model_best.pth.tar to --model_name; TensorBoard events and one
JSON line an epoch (log.jsonl) to --logger_name. Ctrl-C or SIGTERM saves interrupted.pth.tar first.
`torchrun --nproc_per_node=N train.py ...` splits each batch over N GPUs or processes.
"""

import argparse
import contextlib
import json
import os
import signal
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import checkpoint as ckpt
import options
from bert import WordPieces, read_config
from chan import InfoNCELoss
from data import Drop, PrecompDataset, get_train_loader, open_split
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
from util import distributed
from util.cli import InputError, progress, replacing, run, say
from util.memory import peak_mib
from util.word_vectors import read_vectors
from vocab import Vocabulary, deserialize_vocab

INTERRUPTED = "interrupted.pth.tar"


class Stop(BaseException):
    """Raised between two steps after Ctrl-C or SIGTERM."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a Stop at the next `check`, or at once inside `with`.

    An optimizer step must not be torn; a validation, which changes nothing, may be left anywhere,
    for the check that follows it. Of several processes all stop at the same check. A second signal
    falls through to Python's own handling, but not under torchrun, which passes on Ctrl-C again.
    """

    def __init__(self):
        self.received: int | None = None
        self.at_once = False
        self.before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _handle(self, number, frame):
        if distributed.world() > 1:
            for either in self.before:
                signal.signal(either, signal.SIG_IGN)
        else:
            signal.signal(number, signal.default_int_handler)
        self.received = number
        print(f"\n{signal.Signals(number).name}: stopping after this step ...", flush=True)
        if self.at_once:
            raise Stop

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        self.at_once = False
        if distributed.any_of(self.received is not None):
            raise Stop

    def __enter__(self):
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


class NoWriter:
    """What processes other than the first log to."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, *_):
        pass


def main(argv: list[str] | None = None) -> None:
    opt = options.parse(argv)
    device = pick_device(opt.device)
    with distributed.joined(device):
        fit(opt, device)


def fit(opt: argparse.Namespace, device: torch.device) -> None:
    """The whole run: set up, epochs, validation, checkpoints."""
    print(opt)
    torch.manual_seed(opt.seed)
    rank, world = distributed.rank(), distributed.world()

    resumed = ckpt.load(opt.resume) if opt.resume else None
    if resumed and resumed["opt"].text_enc_type != opt.text_enc_type:
        kind = resumed["opt"].text_enc_type
        raise InputError(f"{opt.resume}: give --text_enc_type {kind}, as it was trained with")
    if opt.text_enc_type == "bert":  # kept in the checkpoints, which then need no folder of BERT's
        opt.bert_config = (
            ckpt.find_bert_config(resumed, opt.resume, opt.bert_path)
            if resumed
            else read_config(opt.bert_path)
        )
    vocab = read_vocab(opt, resumed)
    opt.vocab_size = len(vocab)
    folder = find_data(opt.data_path, opt.data_name, opt.model)
    train_set = open_split(folder, "train", vocab, opt)
    opt.n_blocks = getattr(train_set, "n_blocks", opt.n_blocks)  # serve.py makes as many
    if opt.drop:
        train_set.drop = Drop(opt.obj_drop_rate, opt.seed, vocab, opt.need_box_whole)
    dev_set = open_split(folder, "dev", vocab, opt)
    pin = device.type == "cuda"
    loader = get_train_loader(
        train_set, opt.batch_size, opt.workers, opt.seed, pin_memory=pin, rank=rank, world=world
    )

    model = ckpt.build_model(opt, len(vocab)).to(device)
    model.grad_checkpointing = opt.grad_checkpointing
    if opt.compile:
        model.compile_scores()
    optimizer = make_optimizer(model, opt)
    # Where the run stands: epoch under way, batches of it done, their losses, steps in all, whether
    # a validation is due before the next one, best score.
    at = {"epoch": 0, "batch": 0, "loss_sum": 0.0, "loss_count": 0}
    at |= {"Eiters": 0, "val_due": False, "best_rsum": -1.0}
    if resumed:
        ckpt.load_weights(model, resumed, opt.resume)
        if not opt.reset_start_epoch:
            restore(resumed, optimizer, at, opt, len(train_set))
        print(f"=> loaded {opt.resume}: epoch {at['epoch']}, best rsum {at['best_rsum']:.1f}")
    elif opt.wemb_type or opt.wemb_path:
        start_from_vectors(model, vocab, opt)
    elif opt.text_enc_type == "bert":
        model.txt_enc.start_from(opt.bert_path)
    fresh = resumed is None or opt.reset_start_epoch
    del resumed
    encoder = DistributedDataParallel(model) if world > 1 else model
    distributed.barrier()  # all have read what process 0 may move aside now
    log_path = os.path.join(opt.logger_name, "log.jsonl")
    if rank == 0:
        weights, logs = ("*.pth.tar",), ("log.jsonl", "events.out.tfevents.*")
        if os.path.realpath(opt.model_name) == os.path.realpath(opt.logger_name):
            ckpt.prepare(opt.model_name, weights + logs if fresh else ())
        else:
            ckpt.prepare(opt.model_name, weights if fresh else ())
            ckpt.prepare(opt.logger_name, logs if fresh else ())
        forget_epochs_from(at["epoch"], log_path)

    def save(name: str, is_best: bool = False) -> None:
        if rank > 0:
            return
        state = {
            # The published meaning: the last epoch finished.
            "epoch": at["epoch"] - 1,
            "model": ckpt.state_dicts(model, opt.model),
            "best_rsum": at["best_rsum"],
            "opt": opt,
            "Eiters": at["Eiters"],
            "vocab": vocab.state_dict(),
            "run": at
            | {
                "n_captions": len(train_set),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
            },
        }
        ckpt.save(state, opt.model_name, name, is_best)

    if at["epoch"] >= opt.num_epochs:
        print(f"nothing to do: {at['epoch']} epochs are done, --num_epochs is {opt.num_epochs}")
    stop = StopSignal()
    writer = (
        SummaryWriter(opt.logger_name, purge_step=at["Eiters"] + 1, flush_secs=5)
        if rank == 0
        else NoWriter()
    )
    with writer as tb:
        try:
            while at["epoch"] < opt.num_epochs:
                start = time.time()
                train_epoch(model, encoder, optimizer, loader, dev_set, at, opt, device, tb, stop)
                metrics = validate(model, dev_set, at["Eiters"], tb, stop)
                is_best = metrics["rsum"] > at["best_rsum"]
                at["best_rsum"] = max(metrics["rsum"], at["best_rsum"])
                record = {
                    "epoch": at["epoch"],
                    "Eit": at["Eiters"],
                    "lr": optimizer.param_groups[0]["lr"],
                    "Le": at["loss_sum"] / max(at["loss_count"], 1),
                    "seconds": round(time.time() - start, 1),
                    "peak_mib": peak_mib(device),
                    **metrics,
                    "best_rsum": at["best_rsum"],
                }
                if rank == 0:
                    with open(log_path, "a") as log:
                        log.write(json.dumps(record) + "\n")
                name = f"checkpoint_{at['epoch']}.pth.tar"
                at.update(epoch=at["epoch"] + 1, batch=0, loss_sum=0.0, loss_count=0)
                save(name, is_best)
                stop.check()
        except Stop:
            save(INTERRUPTED)
            path = os.path.join(opt.model_name, INTERRUPTED)
            print(f"saved epoch {at['epoch']}, batch {at['batch']}: go on with --resume {path}")
            raise SystemExit(128 + (stop.received or signal.SIGTERM)) from None
        finally:
            stop.restore()


def make_optimizer(model: nn.Module, opt: argparse.Namespace) -> torch.optim.Optimizer:
    """Adam; for CHAN, and for all with BERT, AdamW, as published for CHAN.

    CHAN's weights decay by AdamW's default, 0.01, those of a model with BERT by 1e-4. A group's
    `scale` is its part of the learning rate: BERT's own weights learn at a tenth of it.
    """
    if opt.optim == "sgd":
        groups = [{"params": list(model.parameters()), "scale": 1.0}]
        return torch.optim.SGD(groups, lr=opt.learning_rate, momentum=0.9, fused=True)
    if opt.text_enc_type == "bert":
        bert = list(model.txt_enc.bert.parameters())
        among = {id(p) for p in bert}
        others = [p for p in model.parameters() if id(p) not in among]
        groups = [{"params": others, "scale": 1.0}, {"params": bert, "scale": 0.1}]
        return torch.optim.AdamW(groups, lr=opt.learning_rate, weight_decay=1e-4, fused=True)
    groups = [{"params": list(model.parameters()), "scale": 1.0}]
    kind = torch.optim.AdamW if opt.model == "chan" else torch.optim.Adam
    return kind(groups, lr=opt.learning_rate, fused=True)


def train_epoch(
    model: nn.Module,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    dev_set: PrecompDataset,
    at: dict,
    opt: argparse.Namespace,
    device: torch.device,
    tb: SummaryWriter,
    stop: StopSignal,
) -> None:
    """Run the rest of epoch at['epoch'], from batch at['batch'] on; keeps `at` up to date.

    `encoder` is the model, or what wraps it to average gradients over the processes.
    """
    epoch = at["epoch"]
    lr = opt.learning_rate * 0.1 ** (epoch // opt.lr_update)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)  # a checkpoint of before has none
    hardest = opt.max_violation or opt.model == "chan"
    criterion = ContrastiveLoss(opt.margin, hardest and epoch >= opt.vse_mean_warmup_epochs)
    if opt.criterion == "InfoNCELoss":
        criterion = InfoNCELoss(opt.temperature, opt.margin)
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, at["batch"]
    loader.dataset.epoch = epoch
    steps = at["batch"] + len(loader)

    def validate_if_due() -> None:
        if at["val_due"]:
            validate(model, dev_set, at["Eiters"], tb, stop)  # left by a signal, it stays due
            at["val_due"] = False

    validate_if_due()
    loss_log, batch_time, data_time = (
        Average(at["loss_sum"], at["loss_count"]),
        Average(),
        Average(),
    )
    end = time.time()
    for batch in progress(loader, f"epoch {epoch}"):
        data_time.update(time.time() - end)
        model.train()
        if distributed.world() > 1:
            # Dropout (BERT's) draws for each process and step anew: of the states that the
            # processes come to, a checkpoint has that of the first only.
            step = at["Eiters"] * distributed.world() + distributed.rank()
            torch.manual_seed((opt.seed * 1_000_003 + step) % 2**63)
        batch = to_device(batch, device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=opt.amp):
            images, captions = encoder(batch)
        size = min(opt.batch_size, len(loader.dataset) - opt.batch_size * at["batch"])
        shared = distributed.world() > 1 and loader.batch_sampler.shared(size)
        if shared:  # this process's images, everyone's captions
            captions = {name: distributed.gather(x) for name, x in captions.items()}
        scores = model.similarity(images, captions)  # (b, B)
        del images, captions  # the graph holds what its backward pass reads
        image_index = batch["image_index"] if opt.no_false_negatives else None
        if shared:
            scores = distributed.gather(scores, sum_gradients=False)  # (B, B)
            image_index = None if image_index is None else distributed.gather(image_index)  # (B,)
        loss = criterion(scores, image_index)  # ()

        value = loss.item()
        if value != value or abs(value) == float("inf"):
            raise InputError(
                f"the loss is {value} at epoch {epoch}, batch {at['batch']}: training stopped, the "
                f"checkpoints in {opt.model_name} are whole; try a lower --learning_rate, "
                "--grad_clip, or no --amp"
            )
        # The processes' gradients are averaged; where each has a part of one, their sum is wanted.
        (loss * distributed.world() if shared else loss).backward()
        if opt.grad_clip > 0:
            clip_grad_norm_(model.parameters(), opt.grad_clip)
        optimizer.step()

        loss_log.update(value, size)
        at.update(batch=at["batch"] + 1, Eiters=at["Eiters"] + 1)
        at.update(loss_sum=loss_log.total, loss_count=loss_log.count)
        due = opt.val_step and at["Eiters"] % opt.val_step == 0
        at["val_due"] = bool(due and at["batch"] < steps)  # an epoch's end has its own
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
        validate_if_due()
        end = time.time()


def validate(
    model: nn.Module, dev_set: PrecompDataset, step: int, tb: SummaryWriter, stop: StopSignal
) -> dict:
    """Metrics on dev under their published TensorBoard tags (`r1` ... `meanri`, `rsum`)."""
    start = time.time()
    stop.check()
    with contextlib.suppress(Stop), stop:  # left for the check, where all processes meet
        scores = score_matrix(model, *encode_data(model, dev_set), n_captions=dev_set.n_captions)
    stop.check()
    distributed.add_up(torch.from_numpy(scores))
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


def read_vocab(opt: argparse.Namespace, resumed: dict | None) -> Vocabulary | WordPieces:
    """The vocabulary file of the options, or BERT's; a resumed checkpoint must agree with it."""
    if opt.text_enc_type == "bert":
        if resumed:
            published = resumed.get("vocab") is None
            return ckpt.find_vocab(resumed, opt.resume, opt.bert_path if published else None)
        rows = opt.bert_config["vocab_size"]
        return WordPieces.read(opt.bert_path).check_rows(rows, opt.bert_path)
    path = ckpt.vocab_file(opt, opt.vocab_path)
    if resumed is None:
        return ckpt.as_read(deserialize_vocab(path), opt)
    given = path if os.path.isfile(path) or resumed.get("vocab") is None else None
    return ckpt.find_vocab(resumed, opt.resume, given)


def start_from_vectors(model: nn.Module, vocab: Vocabulary, opt: argparse.Namespace) -> None:
    """Fill the word embedding with the vectors of --wemb_path; they go on learning."""
    if opt.wemb_type not in ("glove", "fasttext") or not opt.wemb_path:
        raise InputError(
            f"--wemb_type {opt.wemb_type!r} --wemb_path {opt.wemb_path!r}: expected glove or "
            "fasttext, and the file of vectors"
        )
    ids, vectors = read_vectors(opt.wemb_path, vocab, opt.word_dim)
    weight = model.txt_enc.embed.weight
    with torch.no_grad():
        if opt.model == "chan":
            weight.normal_()  # of the words without a vector, as published
        weight[torch.tensor(ids)] = vectors.to(weight.device)
    missing = len(vocab) - len(ids)
    print(f"Words: {len(ids)}/{len(vocab)} found in vocabulary; {missing} words missing")


def forget_epochs_from(epoch: int, path: str) -> None:
    """Drop the lines of a log that a run resumed at `epoch` will write again."""
    if not os.path.isfile(path):
        return
    with open(path) as log:
        lines = log.readlines()
    kept = [line for line in lines if json.loads(line)["epoch"] < epoch]
    if len(kept) < len(lines):
        with replacing(path) as part, open(part, "w") as log:
            log.writelines(kept)


# Options that do not change what a resumed run computes.
FREE = {"data_path", "vocab_path", "workers", "device", "model_name", "logger_name", "log_step"}
FREE |= {"val_step", "resume", "reset_start_epoch", "num_epochs", "model", "vocab_size", "compile"}
FREE |= {"wemb_type", "wemb_path", "bert_path", "bert_config"}


def restore(
    resumed: dict,
    optimizer: torch.optim.Optimizer,
    at: dict,
    opt: argparse.Namespace,
    n_captions: int,
) -> None:
    """Bring optimizer, counters and random state to where the checkpoint was written."""
    at["epoch"] = resumed.get("epoch", -1) + 1
    at["Eiters"] = int(resumed.get("Eiters") or 0)
    at["best_rsum"] = float(resumed.get("best_rsum") or -1)
    saved, now = vars(resumed["opt"]), vars(opt)
    changed = [name for name in now if name not in FREE and saved.get(name) != now[name]]
    if changed:
        changes = ", ".join(f"--{name} {saved.get(name)} -> {now[name]}" for name in changed)
        print(f"notice: resuming with changed options: {changes}")
    if "run" not in resumed:
        print(
            "notice: a published checkpoint holds no optimizer or random state: both start afresh"
        )
        return
    if "optim" in changed:
        raise InputError(f"{opt.resume}: --optim cannot change on the way; --reset_start_epoch may")
    run_state = resumed["run"]
    moved = {"batch_size", "seed"} & set(changed) or run_state.get("n_captions") != n_captions
    if run_state.get("batch") and moved:
        raise InputError(
            f"{opt.resume}: written inside an epoch, at batch {run_state['batch']}, with another "
            "batch size, seed or training set; give those, or resume from the end of an epoch"
        )
    try:
        at.update({name: run_state[name] for name in at})
        optimizer.load_state_dict(run_state["optimizer"])
        torch.set_rng_state(run_state["rng"])
        if torch.cuda.is_available() and run_state["cuda_rng"]:
            torch.cuda.set_rng_state_all(run_state["cuda_rng"][: torch.cuda.device_count()])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{opt.resume}: its run state does not fit ({type(error).__name__}: {error}); "
            "--reset_start_epoch takes only its weights"
        ) from None


if __name__ == "__main__":
    run(main)
