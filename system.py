"""The seam between a paper and the programs: all that the shared programs must know of a paper.

`System` holds SCAN's answers. A new paper derives a class from it in its own file, overrides only
what differs, and is listed in systems.py. docs/adding_a_model.md shows a whole one.

Shapes: R regions, F numbers per region, W words.
"""

import argparse
import os
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bert import PIECES, infer_config
from data import PrecompDataset
from losses import make_criterion
from model import SCAN
from pairs import Encoding
from util.arguments import POSITIVE
from util.folders import find_folder
from vocab import Vocabulary

States = list[dict[str, Tensor]]  # a checkpoint's list of state dicts


class ServedImage(NamedTuple):
    """An image as a client of serve.py sends it."""

    features: Tensor  # (R, F)
    boxes: Tensor  # (R, 4) in pixels: left, top, right, bottom
    size: tuple[float, float]  # width and height in pixels
    whole: Tensor | None  # (F,), the vector of the whole image, if the system reads it


class System:
    """What the shared programs know of a paper; the defaults are SCAN's."""

    name = "scan"  # of --model
    title = "SCAN"
    # The model's parts whose state dicts make up a checkpoint, in the published order.
    parts = ("img_enc", "txt_enc")
    defaults: dict = {}  # options with other defaults than SCAN's
    adam = torch.optim.Adam
    # The values of `cross_attn` that the model's similarity() takes; none if a score has no
    # direction.
    directions = ("t2i", "i2t")
    # Whether encodings hold regions and words only, or one vector each ('image', 'sentence'), so
    # that each can take the other's place: then extended.py compares images with images, and
    # captions with captions.
    interchangeable = True
    reads_whole = False  # whether serve.py needs a vector of the whole image
    # 'epoch' of a published checkpoint: the number of the last epoch, or how many are finished.
    counts_epochs = False
    # For scripts/compare.py: the name and the flags of its row there. None: it has none.
    compared: tuple[str, str] | None = ("SCAN t-i AVG", "--agg_func Mean --lambda_softmax 9")
    # For scripts/benchmark.py: the flags of each way to measure, and the batch size.
    benchmarks = {
        "t2i": "--bi_gru --cross_attn t2i --lambda_softmax 9 --lambda_lse 6",
        "i2t": "--bi_gru --cross_attn i2t --lambda_softmax 4 --lambda_lse 5",
    }
    benchmark_batch = 128

    # Options and the model

    def add_options(self, group) -> None:
        """Add the paper's own flags; `group` is used as an argparse group.

        Several systems may have one flag; then they must give it the same default, type and help.
        """
        group.add_argument(
            "--cross_attn", default="t2i", help="t2i (words attend to regions) | i2t"
        )
        group.add_argument(
            "--raw_feature_norm",
            default="clipped_l2norm",
            help="clipped_l2norm | l2norm | clipped_l1norm | l1norm | clipped | no_norm | softmax",
        )
        group.add_argument("--agg_func", default="LogSumExp", help="LogSumExp | Mean | Max | Sum")
        group.add_argument(
            "--lambda_lse", default=6.0, type=POSITIVE, help="LogSumExp inverse temperature"
        )
        add_lambda_softmax(group)

    def check_options(self, opt: argparse.Namespace) -> None:
        """Raise InputError if options do not go together."""

    def build(
        self, opt: argparse.Namespace, vocab_size: int, text_encoder: nn.Module | None = None
    ) -> nn.Module:
        """The model, freshly initialised; `text_encoder` takes the place of the GRU (BERT)."""
        return SCAN(
            vocab_size, **encoder_options(opt), **score_options(opt), text_encoder=text_encoder
        )

    # Data

    def data_folders(self, data_path: str, data_name: str) -> list[str]:
        """Where a dataset may lie, seen from the current folder or the project's."""
        return [os.path.join(data_path, data_name)]

    def find_data(self, data_path: str, data_name: str) -> str:
        """The folder of a dataset. Raises FileNotFoundError."""
        here = os.path.dirname(os.path.abspath(__file__))
        folders = self.data_folders(os.path.expanduser(data_path), data_name.rstrip(os.sep))
        places = [os.path.join(root, folder) for root in ("", here) for folder in folders]
        return find_folder(data_path, data_name, places)

    def dataset(
        self, folder: str, split: str, vocab: Vocabulary, opt: argparse.Namespace
    ) -> PrecompDataset:
        """One split. It gives all keys of a batch that the model reads (see data.py)."""
        return PrecompDataset(folder, split, vocab, opt.img_dim, **self.split_options(opt))

    def split_options(self, opt: argparse.Namespace) -> dict:
        """The arguments that every dataset takes; systems.open_split sets `images_only`."""
        images_only = getattr(opt, "images_only", False)
        return {"keep_empty_regions": opt.keep_empty_regions, "images_only": images_only}

    # Like dataset(..., fold5), a split as the published evaluation reads it, if that differs.
    published_dataset = None

    def prepare_split(self, stem: str) -> None:
        """Make or look for the files `{stem}_*` that a split needs beside features and captions.

        scripts/compare.py and scripts/benchmark.py call it. Raises InputError.
        """

    def vocab_file(self, folder: str, data_name: str) -> str:
        """The vocabulary file of a dataset, in a folder of vocabularies."""
        return os.path.join(folder, f"{data_name}_vocab.json")

    def vocabulary(self, vocab: Vocabulary, opt: argparse.Namespace) -> Vocabulary:
        """The vocabulary as the system reads it: special words, unknown words."""
        if opt.drop:
            vocab.add_word(vocab.mask)
        return vocab

    # Published checkpoints; ours say which system wrote them

    def detect(self, states: States) -> bool:
        """Whether these are the weights of a published checkpoint of this system."""
        others = {"position_embedding.weight", "gpool.linear.weight"}  # PFAN, VSE-infinity
        return len(states) == 2 and not others & states[0].keys()

    def rename(self, states: States) -> States:
        """The state dicts with the names of weights that the model has."""
        return states

    def architecture(self, states: States) -> dict:
        """The options that names and shapes of the weights tell."""
        return image_architecture(states[0]) | text_architecture(states[1])

    # Training

    def optimizer(
        self, model: nn.Module, criterion: nn.Module, opt: argparse.Namespace
    ) -> torch.optim.Optimizer:
        """The optimizer of model and criterion. A group's `scale` is its part of the learning rate.

        Adam, or the paper's own. With BERT AdamW for all systems, as published for CHAN: weight
        decay 1e-4, and BERT's own weights learn at a tenth of the rate.
        """
        parameters = [*model.parameters(), *criterion.parameters()]
        groups = [{"params": parameters, "scale": 1.0}]
        if opt.optim == "sgd":
            return torch.optim.SGD(groups, lr=opt.learning_rate, momentum=0.9, fused=True)
        if opt.text_enc_type == "bert":
            bert = list(model.txt_enc.bert.parameters())
            own = {id(p) for p in bert}
            others = [p for p in parameters if id(p) not in own]
            groups = [{"params": others, "scale": 1.0}, {"params": bert, "scale": 0.1}]
            return torch.optim.AdamW(groups, lr=opt.learning_rate, weight_decay=1e-4, fused=True)
        return self.adam(groups, lr=opt.learning_rate, fused=True)

    def criterion(self, opt: argparse.Namespace) -> nn.Module:
        """The loss, built once per run; the training loop sets its `epoch`."""
        return make_criterion(
            opt.criterion,
            opt.margin,
            opt.max_violation,
            opt.vse_mean_warmup_epochs,
            opt.temperature,
        )

    def start_words(self, embedding: Tensor) -> None:
        """Set the word embedding before word vectors are filled in; here it stays as it is."""

    # serve.py

    def last_region_is_image(self, opt: argparse.Namespace) -> bool:
        """Whether the last region of an image stands for the whole image."""
        return False

    def request_image(self, image: ServedImage, opt: argparse.Namespace) -> Encoding:
        """What the dataset's image_item gives, from a request. Raises InputError."""
        return {"images": image.features}

    def request_caption(
        self, words: list[int], dependencies: list | None, opt: argparse.Namespace
    ) -> Encoding:
        """What the dataset's caption_item gives, from a request. Raises InputError."""
        return {"captions": torch.tensor(words)}  # (W,)


def add_lambda_softmax(group) -> None:
    """The flag that all systems with SCAN's attention have."""
    group.add_argument(
        "--lambda_softmax",
        default=9.0,
        type=POSITIVE,
        help="attention inverse temperature; GSMN too (20 for its Flickr30K rows, 10 for COCO's)",
    )


def encoder_options(opt: argparse.Namespace) -> dict:
    """The arguments of a model's encoders."""
    return {
        "img_dim": opt.img_dim,
        "word_dim": opt.word_dim,
        "embed_size": opt.embed_size,
        "num_layers": opt.num_layers,
        "bi_gru": opt.bi_gru,
        "precomp_enc_type": opt.precomp_enc_type,
        "no_imgnorm": opt.no_imgnorm,
        "no_txtnorm": opt.no_txtnorm,
    }


def score_options(opt: argparse.Namespace) -> dict:
    """The arguments of a stacked cross attention score."""
    return {
        "cross_attn": opt.cross_attn,
        "raw_feature_norm": opt.raw_feature_norm,
        "agg_func": opt.agg_func,
        "lambda_softmax": opt.lambda_softmax,
        "lambda_lse": opt.lambda_lse,
    }


def image_architecture(image: dict[str, Tensor]) -> dict:
    """The options that the weights of an image encoder with a layer `fc` tell."""
    weight = image["fc.weight"] if "fc.weight" in image else image["fc.weight_v"]
    return {
        "img_dim": weight.shape[1],
        "embed_size": weight.shape[0],
        "precomp_enc_type": "weight_norm" if "fc.weight_v" in image else "basic",
    }


def text_architecture(text: dict[str, Tensor]) -> dict:
    """The options that the weights of a text encoder tell, a GRU or BERT."""
    if PIECES in text:
        return {"text_enc_type": "bert", "bert_config": infer_config(text)}
    layers = [key for key in text if key.startswith("rnn.weight_ih") and "reverse" not in key]
    return {
        "word_dim": text["embed.weight"].shape[1],
        "num_layers": len(layers),
        "bi_gru": "rnn.weight_ih_l0_reverse" in text,
        "text_enc_type": "bigru",
    }
