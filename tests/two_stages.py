"""What the tests of searches share: checkpoints with random weights, and all of their scores."""

import os
from pathlib import Path

import numpy as np
import torch

import checkpoint as ckpt
import evaluation
import options
import systems
from searcher import Searcher
from tests.conftest import train_args
from vocab import deserialize_vocab

FOLDER = "data/tiny_precomp"
GSMN = {"model": "gsmn", "num_block": 4, "feat_dim": 4}
SYSTEMS = [
    {"cross_attn": "t2i"},
    {"cross_attn": "i2t", "no_imgnorm": True, "no_txtnorm": True},
    GSMN,
    {"model": "pfan"},
    {"model": "pfan_whole", "lambda_whole": 2},
    {"model": "pfan_whole", "need_box_whole": True},
    {"model": "chan", "precomp_enc_type": "selfattention"},
    {"model": "vse"},
]
# Regions of each image of the test split of `fewer_regions`.
COUNTS = [4, 2, 3, 4, 1, 2, 3, 4, 4, 2, 2, 3, 4, 1, 4]


def write_model(path: str = "model.pth.tar", seed: int = 0, **flags) -> str:
    """Write a checkpoint of a model with random weights, and return its path."""
    opt = options.parse(train_args(**flags))
    words = systems.of(opt).vocabulary(deserialize_vocab("vocab/tiny_precomp_vocab.json"), opt)
    torch.manual_seed(seed)
    model = ckpt.build_model(opt, len(words))
    state = {"epoch": 0, "model": ckpt.state_dicts(model, opt), "opt": opt}
    torch.save(state | {"vocab": words.state_dict()}, path)
    return path


def matrix(path: str, split: str = "test") -> np.ndarray:
    """The scores (N, M) of a split, as evaluation.py computes them."""
    model, words, opt = ckpt.load_model(path)
    data = systems.open_split(FOLDER, split, words, opt)
    return evaluation.score_matrix(model, *evaluation.encode_data(model, data))


def captions(split: str = "test") -> list[str]:
    return Path(f"{FOLDER}/{split}_caps.txt").read_text().splitlines()


def fewer_regions() -> None:
    """Let the images of the tiny test split have different numbers of regions."""
    images = np.load(f"{FOLDER}/test_ims.npy")
    for image, count in enumerate(COUNTS):
        images[image, count:] = 0
    np.save(f"{FOLDER}/test_ims.npy", images)
    np.save(f"{FOLDER}/test_num_boxes.npy", np.array(COUNTS))


def remove_captions(split: str = "test") -> None:
    for name in ("caps.txt", "precaps_stan.txt", "caps.json"):
        path = f"{FOLDER}/{split}_{name}"
        if os.path.exists(path):
            os.remove(path)


def searcher(path: str = "model.pth.tar", **more) -> Searcher:
    return Searcher(path, "data", "tiny_precomp", **{"device": "cpu"} | more)
