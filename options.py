"""Every flag once, with its published name and default."""

import argparse
from collections.abc import Callable

# A paper's own defaults where they differ from SCAN's; filled in when a checkpoint lacks an option.
PAPER_DEFAULTS: dict[str, dict] = {
    "scan": {},
    "gsmn": {"log_step": 100, "val_step": 15000},
    "pfan": {},
    "pfan_whole": {"embed_size": 512},
    "chan": {"margin": 0.05},
}


def number(kind: type, low: float, strict: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of at least `low`, or above it if `strict`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (value > low if strict else value >= low) or value == float("inf"):
            bound = f"above {low}" if strict else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text}: expected a number {bound}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it in its own messages
    return parse


# Options that not all systems have.
OWN = {
    ("scan", "pfan", "pfan_whole"): ("cross_attn", "raw_feature_norm", "agg_func", "lambda_lse"),
    ("scan", "gsmn", "pfan", "pfan_whole"): ("lambda_softmax",),
    ("gsmn",): ("is_sparse", "num_block", "feat_dim", "hid_dim", "out_dim", "neighbours"),
    ("pfan", "pfan_whole"): ("split_size", "n_blocks", "position_embed_size"),
    ("pfan",): ("position",),
    ("chan",): (
        *("coding_type", "pooling_type", "alpha", "belta", "criterion", "temperature"),
        *("embedding_warmup_epochs", "input_scale_factor", "mask_dropped"),
    ),
    ("pfan_whole",): ("lambda_whole", "need_box_whole"),
}


def fraction(text: str) -> float:
    """An argparse type: a number from 0 on, below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 on, below 1")
    return value


UNUSED = ("embedding_warmup_epochs", int, 2), ("input_scale_factor", float, 1.0)
COUNT, FROM_0 = number(int, 1), number(int, 0)
POSITIVE, NOT_NEGATIVE = number(float, 0, strict=True), number(float, 0)


def build_parser() -> argparse.ArgumentParser:
    """The parser of train.py. Abbreviated flags are errors, as misspelt ones are."""
    parser = argparse.ArgumentParser(
        description="Train an image-text matching model on precomputed region features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", default="./data/", help="folder that holds DATA_NAME/")
    data.add_argument("--data_name", default="precomp", help="e.g. f30k_precomp, coco_precomp")
    data.add_argument("--vocab_path", default="./vocab/", help="folder of {data_name}_vocab.json")
    data.add_argument(
        "--workers", default=10, type=FROM_0, help="loader processes (never more than cores)"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--model", default="scan", choices=sorted(PAPER_DEFAULTS), help="the system")
    run.add_argument(
        "--device", default="auto", help="auto (cuda if there is one), cpu, cuda:1, ..."
    )
    run.add_argument("--seed", default=0, type=FROM_0, help="decides everything random")
    run.add_argument("--model_name", default="./runs/runX/checkpoint", help="checkpoints go here")
    run.add_argument("--logger_name", default="./runs/runX/log", help="TensorBoard, log.jsonl")
    run.add_argument(
        "--log_step", default=10, type=COUNT, help="steps between printed lines (GSMN: 100)"
    )
    run.add_argument(
        "--val_step",
        default=500,
        type=FROM_0,
        help="steps between validations (GSMN: 15000); 0: each epoch only",
    )
    run.add_argument(
        "--resume", default="", metavar="PATH", help="checkpoint to go on from, exactly if ours"
    )
    run.add_argument(
        "--reset_start_epoch",
        action="store_true",
        help="take only the weights of --resume: epoch, optimizer and best score start afresh",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--num_epochs", default=30, type=COUNT, help="epochs in all")
    training.add_argument(
        "--batch_size", default=128, type=COUNT, help="pairs a step, over all processes"
    )
    training.add_argument(
        "--learning_rate",
        default=0.0002,
        type=NOT_NEGATIVE,
        help="of Adam; CHAN: AdamW; with BERT: AdamW, BERT's own weights at a tenth of the rate",
    )
    training.add_argument(
        "--optim",
        default="adam",
        choices=["adam", "sgd"],
        help="CHAN's published flag; sgd has momentum 0.9 and one rate",
    )
    training.add_argument(
        "--lr_update", default=15, type=COUNT, help="epochs after which the rate falls ten times"
    )
    training.add_argument(
        "--grad_clip", default=2.0, type=NOT_NEGATIVE, help="gradient norm; 0: no clipping"
    )
    training.add_argument(
        "--margin", default=0.2, type=NOT_NEGATIVE, help="of the hinge ranking loss"
    )
    training.add_argument(
        "--max_violation", action="store_true", help="hardest negatives instead of their sum"
    )
    training.add_argument(
        "--vse_mean_warmup_epochs",
        default=0,
        type=FROM_0,
        help="epochs of the summed hinge before --max_violation takes effect; hardest negatives "
        "from the first step can sit at twice the margin for epochs, 1 is a good value then",
    )
    training.add_argument(
        "--no_false_negatives",
        action="store_true",
        help="two captions of one image in a batch are no negatives of each other's image "
        "(published: they are)",
    )
    training.add_argument(
        "--drop",
        action="store_true",
        help="drop some regions and words in training (published for CHAN; any system here)",
    )
    training.add_argument(
        "--obj_drop_rate", default=0.2, type=fraction, help="part of the regions that --drop drops"
    )
    training.add_argument(
        "--amp", action="store_true", help="bfloat16 encoders; scores and loss stay float32"
    )
    training.add_argument(
        "--grad_checkpointing",
        default=0,
        type=FROM_0,
        metavar="PARTS",
        help="encode a batch's images in at most so many parts, its captions in half as many, and "
        "each again in the backward pass, so that only what goes in and comes out is kept: less "
        "memory, a longer step; 12 for batches of 384; 0: off",
    )
    training.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the attention between its matrix products; for GPUs, no gain on a CPU",
    )

    model = parser.add_argument_group("encoders")
    model.add_argument("--img_dim", default=2048, type=COUNT, help="numbers a region")
    model.add_argument("--word_dim", default=300, type=COUNT, help="word embedding size")
    model.add_argument(
        "--embed_size", default=1024, type=COUNT, help="joint space size (pfan_whole: 512)"
    )
    model.add_argument("--num_layers", default=1, type=COUNT, help="GRU layers")
    model.add_argument("--bi_gru", action="store_true", help="GRU in both directions")
    model.add_argument(
        "--precomp_enc_type",
        default="basic",
        help="basic | weight_norm; CHAN: basic | selfattention | transformer",
    )
    model.add_argument(
        "--text_enc_type",
        default="bigru",
        choices=["bigru", "bert"],
        help="bigru (the GRU of --bi_gru; CHAN's has two directions always) | bert (pip install "
        "transformers)",
    )
    model.add_argument(
        "--bert_path",
        default="bert-base-uncased",
        metavar="PATH",
        help="folder of a pretrained BERT, or its name, to be downloaded",
    )
    model.add_argument(
        "--wemb_type",
        default="",
        help="glove | fasttext: start from the word vectors of --wemb_path",
    )
    model.add_argument("--wemb_path", default="", metavar="PATH", help="text file of word vectors")
    model.add_argument("--no_imgnorm", action="store_true", help="do not normalise regions")
    model.add_argument("--no_txtnorm", action="store_true", help="do not normalise words")

    scan = parser.add_argument_group("SCAN and PFAN")
    scan.add_argument("--cross_attn", default="t2i", help="t2i (words attend to regions) | i2t")
    scan.add_argument(
        "--raw_feature_norm",
        default="clipped_l2norm",
        help="clipped_l2norm | l2norm | clipped_l1norm | l1norm | clipped | no_norm | softmax",
    )
    scan.add_argument("--agg_func", default="LogSumExp", help="LogSumExp | Mean | Max | Sum")
    scan.add_argument(
        "--lambda_lse", default=6.0, type=POSITIVE, help="LogSumExp inverse temperature"
    )
    scan.add_argument(
        "--lambda_softmax",
        default=9.0,
        type=POSITIVE,
        help="attention inverse temperature; GSMN too (20 for its Flickr30K rows, 10 for COCO's)",
    )

    gsmn = parser.add_argument_group("GSMN")
    gsmn.add_argument(
        "--is_sparse", action="store_true", help="textual graph of dependencies instead of dense"
    )
    gsmn.add_argument("--num_block", default=16, type=COUNT, help="blocks of the joint space")
    gsmn.add_argument(
        "--feat_dim", default=16, type=COUNT, help="numbers in a node's vector: as num_block"
    )
    gsmn.add_argument("--hid_dim", default=32, type=COUNT, help="numbers a node in the graph")
    gsmn.add_argument("--out_dim", default=1, type=COUNT, help="outputs a node, averaged")
    gsmn.add_argument(
        "--neighbours",
        action="store_true",
        help="nodes take up their neighbours' vectors, as the paper says; in the published code "
        "each sees its own only",
    )

    pfan = parser.add_argument_group("PFAN")
    pfan.add_argument(
        "--position",
        default="attention",
        help="attention (PFAN-A: regions attend to their blocks) | only (PFAN-P: their overlap)",
    )
    pfan.add_argument(
        "--split_size", default=16, type=COUNT, help="blocks along a side of the image"
    )
    pfan.add_argument(
        "--n_blocks",
        default=15,
        type=COUNT,
        help="blocks that serve.py gives a region; training takes as many as their file holds",
    )
    pfan.add_argument("--position_embed_size", default=200, type=COUNT, help="numbers a block")
    pfan.add_argument(
        "--lambda_whole", default=1.0, type=NOT_NEGATIVE, help="weight of the whole image's cosine"
    )
    pfan.add_argument(
        "--need_box_whole", action="store_true", help="the last region is the whole image"
    )

    chan = parser.add_argument_group("CHAN")
    chan.add_argument(
        "--coding_type",
        default="VHACoding",
        help="VHACoding (the best region of each word) | THACoding (the best word of each region) "
        "| VSACoding (a mean of the words for each region)",
    )
    chan.add_argument(
        "--pooling_type",
        default="LSEPooling",
        help="LSEPooling | MeanPooling | MaxPooling | SumPooling | SoftmaxPooling",
    )
    chan.add_argument("--alpha", default=0.1, type=POSITIVE, help="VSACoding's temperature")
    chan.add_argument(
        "--belta", default=0.1, type=POSITIVE, help="temperature of LSEPooling and SoftmaxPooling"
    )
    chan.add_argument(
        "--criterion",
        default="ContrastiveLoss",
        choices=["ContrastiveLoss", "InfoNCELoss"],
        help="hinge, summed in the first --vse_mean_warmup_epochs and then of hardest negatives, "
        "with or without --max_violation; or InfoNCE",
    )
    chan.add_argument("--temperature", default=0.01, type=POSITIVE, help="of InfoNCELoss")
    for name, kind, default in UNUSED:
        chan.add_argument(
            f"--{name}", default=default, type=kind, help="published, and read by nothing there too"
        )
    chan.add_argument(
        "--mask_dropped",
        action="store_true",
        help="regions do not attend to dropped ones (published: they do, to zeros)",
    )
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of a run; what the chosen paper sets otherwise becomes the default."""
    parser = build_parser()
    system = parser.parse_known_args(argv)[0].model
    parser.set_defaults(**PAPER_DEFAULTS[system])
    opt = parser.parse_args(argv)
    for owners, names in OWN.items():
        for name in names:
            if system not in owners and getattr(opt, name) != parser.get_default(name):
                parser.error(f"--{name} is for --model {' | '.join(owners)}, not {system}")
    if opt.obj_drop_rate != parser.get_default("obj_drop_rate") and not opt.drop:
        parser.error("--obj_drop_rate is for --drop")
    if opt.bert_path != parser.get_default("bert_path") and opt.text_enc_type != "bert":
        parser.error("--bert_path is for --text_enc_type bert")
    if opt.text_enc_type == "bert":
        if opt.is_sparse:
            parser.error("--is_sparse: its pairs are of words, BERT's captions are pieces of words")
        if opt.wemb_type or opt.wemb_path:
            parser.error("--wemb_type and --wemb_path are for the words of a GRU, not for BERT's")
    return opt


def defaults(system: str) -> dict:
    """All options of a system at their defaults."""
    return vars(parse(["--model", system]))
