"""The systems, one line per paper. To add one: docs/adding_a_model.md."""

import argparse
import pkgutil

from data import PrecompDataset
from system import System
from util.cli import InputError
from vocab import Vocabulary

# File and class. Asked in this order whether a published checkpoint is theirs.
PAPERS = (
    "system:System",  # SCAN, ECCV 2018
    "gsmn:GSMNSystem",  # CVPR 2020
    "pfan:PFANSystem",  # IJCAI 2019
    "pfan:PFANWholeSystem",  # its variant for news photos
    "chan:CHANSystem",  # CVPR 2023
    "vse:VSESystem",  # VSE-infinity, CVPR 2021
)
SYSTEMS: dict[str, System] = {
    system.name: system for system in (pkgutil.resolve_name(paper)() for paper in PAPERS)
}


def of(opt: argparse.Namespace) -> System:
    """The system that the options name. Raises InputError on an unknown one."""
    system = SYSTEMS.get(str(opt.model))
    if system is None:
        raise InputError(f"unknown system {opt.model!r}: expected one of {', '.join(SYSTEMS)}")
    return system


def open_split(
    folder: str,
    split: str,
    vocab: Vocabulary,
    opt: argparse.Namespace,
    published: dict | None = None,
    images_only: bool = False,
) -> PrecompDataset:
    """A split as the system of the options reads it.

    `published`, the arguments of System.published_dataset, asks for the split as the published
    evaluation reads it. With `images_only` the split may lack captions, of some images or of all,
    as one that is only searched.
    """
    system = of(opt)
    opt = argparse.Namespace(**vars(opt) | {"images_only": images_only})
    if published is None:
        dataset = system.dataset(folder, split, vocab, opt)
    else:
        dataset = system.published_dataset(folder, split, vocab, opt, **published)
    if opt.text_enc_type == "bert" and dataset.n_captions:
        longest, room = int(dataset.lengths.max()), opt.bert_config["max_position_embeddings"]
        if longest > room:
            line = int(dataset.lengths.argmax()) + 1
            raise InputError(
                f"{folder}: caption {line} of {split} has {longest} pieces, but this BERT reads at "
                f"most {room}; shorten it, or train with --max_words"
            )
    return dataset
