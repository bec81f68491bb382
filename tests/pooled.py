"""Pooled: one vector per image, one per caption, and their dot product.

Shapes: I images, C captions, R regions, D joint dimension.
"""

import torch
from torch import Tensor, nn

from model import EncoderImage, Encoders, EncoderText
from pairs import Encoding
from system import System
from util.cli import choose
from util.norms import l2norm

POOLING = {  # regions (I, R, D), and which of them are scored (I, R, 1) -> (I, D)
    "mean": lambda x, mask: (x * mask).sum(1) / mask.sum(1),
    "max": lambda x, mask: x.masked_fill(~mask, -torch.inf).amax(1),
}


class Pooled(Encoders):
    """The pooled regions, and the final state of the GRU."""

    def __init__(self, vocab_size, img_dim, word_dim, embed_size, bi_gru, pooling="mean"):
        super().__init__()
        self.img_enc = EncoderImage(img_dim, embed_size)
        self.txt_enc = EncoderText(vocab_size, word_dim, embed_size, use_bi_gru=bi_gru)
        self.pool = choose(POOLING, pooling, "pooling")

    def encode_images(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['images'] (I, R, F) -> {'image': (I, D)}."""
        regions = self.img_enc(batch["images"])  # (I, R, D)
        mask = batch.get("region_mask", regions.new_ones(regions.shape[:2], dtype=torch.bool))
        return {"image": l2norm(self.pool(regions, mask[..., None]), dim=-1)}

    def encode_captions(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['captions'] (C, W), 'lengths' (C,) -> {'sentence': (C, D)}."""
        _, sentence = self.txt_enc.words_and_sentence(batch["captions"], batch["lengths"])
        return {"sentence": l2norm(sentence, dim=-1)}

    def similarity(self, images: Encoding, captions: Encoding) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption."""
        return images["image"] @ captions["sentence"].mT  # (I, C)


class PooledSystem(System):
    """What the shared programs know of it; the rest is as for SCAN."""

    name, title = "pooled", "Pooled"
    directions = ()  # similarity() takes no cross_attn
    compared = ("Pooled, maximum", "--pooling max")
    benchmarks = {"mean": "--bi_gru"}

    def add_options(self, group) -> None:
        group.add_argument("--pooling", default="mean", help="mean | max of the regions")

    def build(self, opt, vocab_size: int, text_encoder=None) -> nn.Module:
        sizes = opt.img_dim, opt.word_dim, opt.embed_size
        return Pooled(vocab_size, *sizes, opt.bi_gru, opt.pooling)
