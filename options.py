"""Every flag of train.py once, with its published name and default."""

import argparse
import os

import systems
from losses import CRITERIA
from util.arguments import COUNT, FOLDER, FROM_0, NOT_NEGATIVE, POSITIVE, Parser, fraction
from util.cli import InputError
from util.distributed import TIMEOUT

# A switch that a resumed run can also turn off: --no-drop.
SWITCH = argparse.BooleanOptionalAction


def add_data_options(group) -> None:
    group.add_argument(
        "--data_path", default="./data/", type=FOLDER, help="folder that holds DATA_NAME/"
    )
    group.add_argument(
        "--data_name", default="precomp", type=FOLDER, help="e.g. f30k_precomp, coco_precomp"
    )
    group.add_argument(
        "--vocab_path",
        default="./vocab/",
        type=FOLDER,
        help="folder of {data_name}_vocab.json, or a vocabulary file",
    )
    group.add_argument(
        "--allow_unknown",
        action=SWITCH,
        default=False,
        help="train even if more than 30 %% of the words of train are not in the vocabulary",
    )
    group.add_argument(
        "--max_words",
        default=0,
        type=FROM_0,
        metavar="N",
        help="cut captions to their first N words (BERT: pieces of words), also in evaluation and "
        "search with the checkpoint; 0: no limit",
    )
    group.add_argument(
        "--keep_empty_regions",
        action=SWITCH,
        default=False,
        help="train and score with the regions that only fill up an image, as published",
    )
    group.add_argument(
        "--workers", default=10, type=FROM_0, help="loader processes (never more than cores)"
    )


def add_run_options(group) -> None:
    group.add_argument(
        "--model", default="scan", choices=sorted(systems.SYSTEMS), help="the system"
    )
    group.add_argument(
        "--device", default="auto", help="auto (cuda if there is one), cpu, cuda:1, ..."
    )
    group.add_argument("--seed", default=0, type=FROM_0, help="decides everything random")
    group.add_argument(
        "--model_name",
        default="./runs/runX/checkpoint",
        type=FOLDER,
        help="checkpoints go here; with --resume: the folder of that checkpoint",
    )
    group.add_argument(
        "--val_step",
        default=500,
        type=FROM_0,
        help="steps between validations (GSMN: 15000); 0: after each epoch only",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="read all data, take two steps, validate, say how long the run would take and how "
        "much memory; write nothing",
    )
    group.add_argument(
        "--resume",
        default="",
        metavar="PATH",
        type=os.path.expanduser,
        help="checkpoint to continue from; its options count, except those given; exact if ours; "
        "auto: the newest whole one in --model_name, or a new run if there is none",
    )
    group.add_argument(
        "--keep",
        default=0,
        type=FROM_0,
        metavar="N",
        help="keep the checkpoints of the newest N epochs, and the best one; 0: of all epochs",
    )
    group.add_argument(
        "--on_save_error",
        default="stop",
        choices=["stop", "continue"],
        help="what a full disk does when an epoch is saved: end the run, or warn, go on, and save "
        "again after the next epoch",
    )
    group.add_argument(
        "--rank_timeout",
        default=TIMEOUT,
        type=COUNT,
        metavar="SECONDS",
        help="under torchrun, end the run if a process does not answer for so long",
    )
    group.add_argument(
        "--reset_start_epoch",
        action="store_true",
        help="take only the weights of --resume: epoch, optimizer and best score start afresh",
    )


def add_log_options(group) -> None:
    group.add_argument(
        "--logger_name",
        default="./runs/runX/log",
        type=FOLDER,
        help="TensorBoard, log.jsonl; with --resume: where that run logged",
    )
    group.add_argument(
        "--log_step", default=10, type=COUNT, help="steps between printed lines (GSMN: 100)"
    )
    group.add_argument(
        "--quiet",
        action=SWITCH,
        default=False,
        help="print the published lines and warnings only",
    )
    group.add_argument(
        "--log_images",
        action=SWITCH,
        default=False,
        help="after each epoch draw the attention of four dev pairs into TensorBoard (pip install "
        "matplotlib)",
    )
    group.add_argument(
        "--tracker",
        default="none",
        choices=["none", "wandb", "trackio"],
        help="send what TensorBoard gets there too (pip install wandb, or trackio)",
    )


def add_training_options(group) -> None:
    group.add_argument("--num_epochs", default=30, type=COUNT, help="epochs in all")
    group.add_argument(
        "--batch_size", default=128, type=COUNT, help="pairs per step, over all processes"
    )
    group.add_argument(
        "--learning_rate",
        default=0.0002,
        type=NOT_NEGATIVE,
        help="of Adam; CHAN, VSE: AdamW; with BERT: AdamW, and BERT's own weights at a tenth of it",
    )
    group.add_argument(
        "--optim",
        default="adam",
        choices=["adam", "sgd"],
        help="a published flag of CHAN; sgd has momentum 0.9 and one rate",
    )
    group.add_argument(
        "--lr_update", default=15, type=COUNT, help="epochs after which the rate falls ten times"
    )
    group.add_argument(
        "--grad_clip", default=2.0, type=NOT_NEGATIVE, help="gradient norm; 0: no clipping"
    )
    group.add_argument(
        "--amp",
        action=SWITCH,
        default=False,
        help="bfloat16 encoders; scores and loss stay float32",
    )
    group.add_argument(
        "--grad_checkpointing",
        default=0,
        type=FROM_0,
        metavar="PARTS",
        help="encode the images of a batch in up to this many parts, its captions in half as many, "
        "and encode each part again in the backward pass: less memory, a longer step; 12 for "
        "batches of 384; 0: off",
    )


def add_loss_options(group) -> None:
    group.add_argument(
        "--criterion",
        default="ContrastiveLoss",
        choices=CRITERIA,
        help="the hinge ranking loss, or InfoNCE; for CHAN and VSE it is that of the hardest "
        "negatives after --vse_mean_warmup_epochs, with or without --max_violation",
    )
    group.add_argument(
        "--margin", default=0.2, type=NOT_NEGATIVE, help="of the ranking loss (CHAN: 0.05)"
    )
    group.add_argument(
        "--max_violation",
        action=SWITCH,
        default=False,
        help="hardest negatives instead of their sum",
    )
    group.add_argument("--temperature", default=0.01, type=POSITIVE, help="of InfoNCELoss")
    group.add_argument(
        "--vse_mean_warmup_epochs",
        default=0,
        type=FROM_0,
        help="epochs of the summed hinge before --max_violation takes effect; with hardest "
        "negatives from the first step the loss can sit at twice the margin for epochs, and then "
        "1 is a good value",
    )
    group.add_argument(
        "--no_false_negatives",
        action=SWITCH,
        default=False,
        help="two captions of one image in a batch are no negatives of each other's image (in the "
        "published code they are)",
    )
    group.add_argument(
        "--drop",
        action=SWITCH,
        default=False,
        help="drop some regions and words in training (published for CHAN; any system here)",
    )
    group.add_argument(
        "--obj_drop_rate", default=0.2, type=fraction, help="part of the regions that --drop drops"
    )
    group.add_argument(
        "--keep_short_batch",
        action=SWITCH,
        default=False,
        help="with --drop the last batch of an epoch is left out if it is short, as published for "
        "CHAN; this trains on it too",
    )


def add_encoder_options(group) -> None:
    group.add_argument(
        "--img_dim",
        default=2048,
        type=COUNT,
        help="numbers per region; if it is not given, training takes that of the features",
    )
    group.add_argument("--word_dim", default=300, type=COUNT, help="word embedding size")
    group.add_argument(
        "--embed_size", default=1024, type=COUNT, help="joint space size (pfan_whole: 512)"
    )
    group.add_argument("--num_layers", default=1, type=COUNT, help="GRU layers")
    group.add_argument("--bi_gru", action="store_true", help="GRU in both directions")
    group.add_argument(
        "--precomp_enc_type",
        default="basic",
        help="basic | weight_norm; CHAN: basic | selfattention | transformer",
    )
    group.add_argument(
        "--text_enc_type",
        default="bigru",
        choices=["bigru", "bert"],
        help="bigru (a GRU, of one direction without --bi_gru; CHAN and VSE: of both) | bert (pip "
        "install transformers)",
    )
    group.add_argument(
        "--bert_path",
        default="bert-base-uncased",
        metavar="PATH",
        help="folder of a pretrained BERT, or its name, to be downloaded",
    )
    group.add_argument(
        "--wemb_type",
        default="",
        help="glove | fasttext: start from the word vectors of --wemb_path",
    )
    group.add_argument("--wemb_path", default="", metavar="PATH", help="text file of word vectors")
    group.add_argument("--no_imgnorm", action="store_true", help="do not normalise regions")
    group.add_argument("--no_txtnorm", action="store_true", help="do not normalise words")


class SharedGroup:
    """An argument group that takes each flag once, and notes which systems have it."""

    def __init__(self, group, system: str, owners: dict[str, list[str]], seen: dict[str, dict]):
        self.group, self.system, self.owners, self.seen = group, system, owners, seen

    def add_argument(self, flag: str, **settings) -> None:
        if flag not in self.seen:
            self.group.add_argument(flag, **settings)
        elif self.seen[flag] != settings:
            first = self.owners[flag][0]
            raise ValueError(f"{self.system}: {flag} is a flag of {first} with other settings")
        self.seen[flag] = settings
        self.owners.setdefault(flag, []).append(self.system)


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, list[str]]]:
    """The parser of train.py, and for each flag that not all systems have, the systems that do.

    Abbreviated flags are errors, like misspelt ones.
    """
    parser = Parser(
        description="Train an image-text matching model on precomputed region features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_options(parser.add_argument_group("data"))
    add_run_options(parser.add_argument_group("run"))
    add_log_options(parser.add_argument_group("log"))
    add_training_options(parser.add_argument_group("training"))
    add_loss_options(parser.add_argument_group("loss and augmentation"))
    add_encoder_options(parser.add_argument_group("encoders"))
    owners: dict[str, list[str]] = {}
    seen: dict[str, dict] = {}
    for system in systems.SYSTEMS.values():
        group = parser.add_argument_group(system.title)
        system.add_options(SharedGroup(group, system.name, owners, seen))
    return parser, owners


def parse(argv: list[str] | None = None, stored: dict | None = None) -> argparse.Namespace:
    """The options of a run. The defaults are SCAN's, except where the chosen paper has its own.

    `stored` are other defaults: the options of the checkpoint that a run goes on from.
    """
    parser, owners = build_parser()
    system = systems.of(parser.parse_known_args(argv)[0])
    stored = stored or {}
    if stored.get("model", system.name) != system.name:
        if "model" in given(argv):
            found = stored["model"]
            parser.error(f"--model {system.name}: the checkpoint of --resume is of {found}")
        system = systems.SYSTEMS[stored["model"]]
    parser.set_defaults(**system.defaults)
    parser.set_defaults(**{name: stored[name] for name in stored if name in known(parser)})
    opt = parser.parse_args(argv)
    for flag, names in owners.items():
        name = flag.removeprefix("--")
        if system.name not in names and getattr(opt, name) != parser.get_default(name):
            parser.error(f"{flag} is for --model {' | '.join(names)}, not {system.name}")
    if opt.seed >= 2**63:
        parser.error("--seed: expected a number below 2^63")
    if opt.obj_drop_rate != parser.get_default("obj_drop_rate") and not opt.drop:
        parser.error("--obj_drop_rate is for --drop")
    if opt.keep_short_batch and not opt.drop:
        parser.error("--keep_short_batch is for --drop: without it, all batches are trained on")
    if opt.bert_path != parser.get_default("bert_path") and opt.text_enc_type != "bert":
        parser.error("--bert_path is for --text_enc_type bert")
    if opt.text_enc_type == "bert" and (opt.wemb_type or opt.wemb_path):
        parser.error("--wemb_type and --wemb_path are for the words of a GRU, not for BERT's")
    try:
        system.check_options(opt)
    except InputError as error:
        parser.error(str(error))
    return opt


def model_options() -> set[str]:
    """The names of the options that a model is built from."""
    parser = Parser()
    add_encoder_options(parser)
    _, owners = build_parser()
    return {"model"} | known(parser) | {flag.removeprefix("--") for flag in owners}


def known(parser: argparse.ArgumentParser) -> set[str]:
    """The names of a parser's options."""
    return {action.dest for action in parser._actions}


def given(argv: list[str] | None = None) -> set[str]:
    """The names of the options that a command line names."""
    parser, _ = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(argv)[0]))


def defaults(system: str) -> dict:
    """All options of a system at their defaults."""
    return vars(parse(["--model", system]))
