"""PFAN: regions that know where they are, and the whole image beside them.

Wang et al., Position Focused Attention Network for Image-Text Matching, IJCAI 2019
(arXiv:1907.09748). Letters: I images, C captions, R regions, W words, D joint dimension, F numbers
a region; K blocks a region, G x G blocks an image, P numbers a block.

An image is split into G x G blocks. A region comes with the K blocks that it overlaps most, and how
much of the overlap each has (util/positions.py). Blocks are embedded; a region's position is a mean
of its blocks' embeddings, and its vector is a projection of [region, position]. The weights of that
mean come from attention of the region to its blocks (PFAN-A), or are the overlap itself (PFAN-P).
The score is SCAN's; t2i adds half the aggregate of each word's largest attention weight.

The whole-image variant, for news photos (Tencent-News), uses the overlap, adds that half in both
directions, and the cosine of the projected whole image with the final state of the GRU.
"""

from functools import partial

import torch
from torch import Tensor, nn

from model import SCAN, EncoderImage, choose, cosine, without_dropped


class PositionEncoder(EncoderImage):
    """Regions and their positions to the joint space."""

    def __init__(
        self,
        img_dim: int,
        embed_size: int,
        precomp_enc_type: str = "basic",
        no_imgnorm: bool = False,
        position: str = "attention",
        split_size: int = 16,
        position_embed_size: int = 200,
    ):
        super().__init__(img_dim + position_embed_size, embed_size, precomp_enc_type, no_imgnorm)
        attends = choose({"attention": True, "only": False}, position, "position")
        if attends:
            self.fc_att = nn.Linear(img_dim, position_embed_size)
        # The last row is for no block: a small region has less than K.
        self.position_embedding = nn.Embedding(split_size**2 + 1, position_embed_size)
        self.attends = attends

    def positions(self, images: Tensor, blocks: Tensor, overlap: Tensor) -> Tensor:
        """Position vectors (I, R, P) of images (I, R, F), from blocks and overlap (I, R, K).

        With w the overlap, v the region and e the embeddings, the weights of the mean are
        softmax_k(w_k softmax_k(tanh((A v + b) . e_k))), blocks that are none included; or w itself.
        """
        table = self.position_embedding.weight  # (G G + 1, P)
        weights = overlap.to(table.dtype)  # (I, R, K)
        if self.attends:
            dots = self.fc_att(images.to(table.dtype)) @ table.mT  # (I, R, G G + 1)
            focus = dots.float().gather(2, blocks).tanh().softmax(2)  # (I, R, K)
            weights = (weights * focus).softmax(2)  # (I, R, K)
        # A sum over K rows of the table, as a product with all of it: gathered rows would be many
        # times larger than the regions, and so would their gradient. Only "no block" may be there
        # twice, with one and the same weight: the order in which it adds up does not matter.
        spread = weights.new_zeros(*blocks.shape[:2], len(table))  # (I, R, G G + 1)
        return spread.scatter_add(2, blocks, weights) @ table  # (I, R, P)

    def forward(self, images: Tensor, blocks: Tensor, overlap: Tensor) -> Tensor:
        """images (I, R, F), blocks (I, R, K) ids from 0 to G G, overlap (I, R, K) -> (I, R, D)."""
        position = self.positions(images, blocks, overlap)  # (I, R, P)
        return super().forward(torch.cat((images.to(position.dtype), position), 2))  # (I, R, D)


class PFAN(SCAN):
    """SCAN with positions: `position` is attention (PFAN-A) or only (PFAN-P)."""

    FOCUS = {"t2i": 0.5, "i2t": 0.0}

    def __init__(
        self,
        vocab_size: int,
        position: str = "attention",
        split_size: int = 16,
        position_embed_size: int = 200,
        **scan,
    ):
        encoder = partial(
            PositionEncoder,
            position=position,
            split_size=split_size,
            position_embed_size=position_embed_size,
        )
        super().__init__(vocab_size, image_encoder=encoder, **scan)

    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch['images'] (I, R, F), 'blocks', 'overlap' (I, R, K) -> {'regions': (I, R, D)}."""
        regions = self.img_enc(batch["images"], batch["blocks"], batch["overlap"])
        return without_dropped(regions, batch)


class WholeEncoder(PositionEncoder):
    """Regions as PositionEncoder has them, by their overlap; and a whole image's own projection.

    With `need_box_whole` the last region is the whole image: it overlaps all blocks, so its
    position is the mean of the table.
    """

    def __init__(
        self,
        img_dim: int,
        embed_size: int,
        precomp_enc_type: str = "basic",
        no_imgnorm: bool = False,
        need_box_whole: bool = False,
        **position,
    ):
        super().__init__(
            img_dim, embed_size, precomp_enc_type, no_imgnorm, position="only", **position
        )
        self.fc_whole = nn.Linear(img_dim, embed_size)
        nn.init.xavier_uniform_(self.fc_whole.weight)
        nn.init.zeros_(self.fc_whole.bias)
        self.need_box_whole = need_box_whole

    def positions(self, images: Tensor, blocks: Tensor, overlap: Tensor) -> Tensor:
        """As PositionEncoder; with `need_box_whole` blocks and overlap are (I, R - 1, K)."""
        position = super().positions(images, blocks, overlap)  # (I, R, P)
        if not self.need_box_whole:
            return position
        mean = self.position_embedding.weight.mean(0).to(position.dtype)  # (P,)
        return torch.cat((position, mean.expand(len(position), 1, -1)), 1)  # (I, R, P)

    def whole(self, images: Tensor) -> Tensor:
        """Whole images (I, F) -> (I, D), of any length: only cosines are taken of them."""
        return self.fc_whole(images.to(self.fc_whole.bias.dtype)).float()  # (I, D)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine (I, C) of each x (I, D) with each y (C, D)."""
    return cosine(x @ y.mT, y.square().sum(1), x.norm(dim=1)[:, None])


class PFANWhole(SCAN):
    """The whole-image variant: its score adds lambda_whole * cos(whole image, sentence).

    With `need_box_whole` the last region stands for the whole image. t2i then compares it with the
    sentence, which counts half, instead of with the words; in i2t it is a region like the others.
    """

    FOCUS = {"t2i": 0.5, "i2t": 0.5}

    def __init__(
        self,
        vocab_size: int,
        lambda_whole: float = 1.0,
        need_box_whole: bool = False,
        split_size: int = 16,
        position_embed_size: int = 200,
        **scan,
    ):
        encoder = partial(
            WholeEncoder,
            need_box_whole=need_box_whole,
            split_size=split_size,
            position_embed_size=position_embed_size,
        )
        super().__init__(vocab_size, image_encoder=encoder, **scan)
        self.lambda_whole, self.need_box_whole = lambda_whole, need_box_whole

    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As PFAN, and batch['whole'] (I, F) -> {'regions': (I, R, D), 'whole': (I, D)}."""
        regions = self.img_enc(batch["images"], batch["blocks"], batch["overlap"])
        return without_dropped(regions, batch) | {"whole": self.img_enc.whole(batch["whole"])}

    def encode_captions(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As SCAN, and 'sentence' (C, D): the final state of the GRU."""
        words, sentence = self.txt_enc.words_and_sentence(batch["captions"], batch["lengths"])
        return {"words": words, "lengths": batch["lengths"], "sentence": sentence}

    def similarity(
        self,
        images: dict[str, Tensor],
        captions: dict[str, Tensor],
        cross_attn: str | None = None,
    ) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption; see SCAN."""
        sentence, regions = captions["sentence"], images["regions"]
        scores = self.lambda_whole * cosines(images["whole"], sentence)  # (I, C)
        words_query = self.how.words_query if cross_attn is None else cross_attn == "t2i"
        if self.need_box_whole and words_query:
            scores = scores + 0.5 * cosines(regions[:, -1], sentence)  # (I, C)
            names = images.keys() & {"regions", "inside"}
            images = images | {name: images[name][:, :-1] for name in names}
        return scores + super().similarity(images, captions, cross_attn)  # (I, C)
