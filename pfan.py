"""PFAN: regions that know where they are, and the whole image beside them.

Wang et al., Position Focused Attention Network for Image-Text Matching, IJCAI 2019
(arXiv:1907.09748). Shapes: I images, C captions, R regions, W words, D joint dimension, F numbers
per region; K blocks per region, G x G blocks per image, P numbers per block.

An image is split into G x G blocks. A region comes with the K blocks that it overlaps most, and
with each block's part of the overlap (util/positions.py). Blocks are embedded. The position of a
region is a mean of the embeddings of its blocks, and its vector is a projection of [region,
position]. The weights of that mean come from attention of the region to its blocks (PFAN-A), or
they are the overlap itself (PFAN-P). The score is SCAN's; t2i adds a bonus term, half the aggregate
of each word's maximum attention weight.

The whole-image variant, for news photos (Tencent-News), uses the overlap and the bonus term in both
directions. It adds the cosine of the projected whole image with the final state of the GRU.
"""

import math
import os
from functools import partial

import torch
from torch import Tensor, nn

from attention import aggregate, cosine
from model import SCAN, EncoderImage, without_dropped
from pairs import Encoding
from pfan_data import PositionDataset, WholeDataset
from system import ServedImage, System, encoder_options, image_architecture, score_options
from util import positions
from util.arguments import COUNT, NOT_NEGATIVE
from util.cli import InputError, choose
from util.kept import keeping
from vocab import existing_file


class PositionEncoder(EncoderImage):
    """Regions and their positions to the joint space, with weight_norm too (Q30)."""

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
        # The last row stands for "no block": a small region overlaps fewer than K.
        self.position_embedding = nn.Embedding(split_size**2 + 1, position_embed_size)
        self.attends = attends

    def positions(self, images: Tensor, blocks: Tensor, overlap: Tensor) -> Tensor:
        """Position vectors (I, R, P) of images (I, R, F), from blocks and overlap (I, R, K).

        With w the overlap, v the region and e the embeddings, the weights of the mean are
        softmax_k(w_k softmax_k(tanh((A v + b) . e_k))), "no block" included (Q29); or w itself.
        """
        table = self.position_embedding.weight  # (G G + 1, P)
        weights = overlap.to(table.dtype)  # (I, R, K)
        if self.attends:
            dots = self.fc_att(images.to(table.dtype)) @ table.mT  # (I, R, G G + 1)
            focus = dots.float().gather(2, blocks).tanh().softmax(2)  # (I, R, K)
            weights = (weights * focus).softmax(2)  # (I, R, K)
        # The sum over K rows of the table, as a product with the whole table: gathered rows, and
        # their gradient, would be many times larger than the regions. Only "no block" can occur
        # twice, always with the same weight, so the order of the additions does not matter.
        spread = weights.new_zeros(*blocks.shape[:2], len(table))  # (I, R, G G + 1)
        return spread.scatter_add(2, blocks, weights) @ table  # (I, R, P)

    def forward(self, images: Tensor, blocks: Tensor, overlap: Tensor, **more: Tensor) -> Tensor:
        """images (I, R, F), blocks (I, R, K) ids from 0 to G G, overlap (I, R, K) -> (I, R, D).

        `more` is what `positions` of a variant reads besides.
        """
        position = self.positions(images, blocks, overlap, **more)  # (I, R, P)
        return super().forward(torch.cat((images.to(position.dtype), position), 2))  # (I, R, D)


class PFAN(SCAN):
    """SCAN with positions: `position` is attention (PFAN-A) or only (PFAN-P)."""

    BONUS = {"t2i": 0.5, "i2t": 0.0}

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

    def encode_images(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['images'] (I, R, F), 'blocks', 'overlap' (I, R, K) -> {'regions': (I, R, D)}."""
        regions = self.img_enc(batch["images"], batch["blocks"], batch["overlap"])
        return without_dropped(regions, batch)

    def beside_score(self, batch: dict, images: Encoding, captions: Encoding) -> dict:
        """For explain.py: the part of one pair's score that no word has."""
        return {"notes": bonus_notes(self, images, captions)}


def bonus_notes(model: SCAN, images: Encoding, captions: Encoding) -> list[str]:
    """What the bonus term adds to the score of one pair, in a sentence; nothing without one."""
    config = model.config
    if not config.bonus:
        return []
    with keeping() as kept:
        model.similarity(images, captions)
    by_words = config.cross_attn == "t2i"
    weights = kept[config.cross_attn].reshape(captions["words"].size(1), -1)  # (W, R)
    adds = config.bonus * aggregate(weights.max(1 if by_words else 0).values, 0, config).item()
    whose, one = ("words'", "word") if by_words else ("regions'", "region")
    how = config.agg_func if config.agg_func == "LogSumExp" else config.agg_func.lower()
    return [
        f"Half of the {how} of the {whose} largest weights adds {adds:.4f} to the score; no {one} "
        "shows it as its own."
    ]


class WholeEncoder(PositionEncoder):
    """Regions with positions by their overlap, and a projection of the whole image.

    With `need_box_whole` the last region is the whole image: it overlaps all blocks, so its
    position is the mean of the table (Q15).
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

    def positions(
        self, images: Tensor, blocks: Tensor, overlap: Tensor, filling: Tensor | None = None
    ) -> Tensor:
        """As PositionEncoder; with `need_box_whole` blocks and overlap are (I, R - 1, K).

        filling (I, R): what stands behind the regions of an image; None: nothing.
        """
        position = super().positions(images, blocks, overlap)  # (I, R, P)
        if not self.need_box_whole:
            return position
        mean = self.position_embedding.weight.mean(0).to(position.dtype)  # (P,)
        position = torch.cat((position, mean.expand(len(position), 1, -1)), 1)  # (I, R, P)
        if filling is None:
            return position
        return position.where(~last_region(~filling)[..., None], mean)  # (I, R, P)

    def whole(self, images: Tensor) -> Tensor:
        """Whole images (I, F) -> (I, D), not normalised: only cosines are taken of them."""
        return self.fc_whole(images.to(self.fc_whole.bias.dtype)).float()  # (I, D)


def last_region(mask: Tensor) -> Tensor:
    """True for the last region of each image (I, R), of those that mask (I, R) says are there."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # (I, R)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine (I, C) of each x (I, D) with each y (C, D)."""
    return cosine(x @ y.mT, y.square().sum(1), x.norm(dim=1)[:, None])


class PFANWhole(SCAN):
    """The whole-image variant: its score adds lambda_whole * cos(whole image, sentence).  # Q33

    With `need_box_whole` the last region stands for the whole image. t2i then compares it with the
    sentence, which counts half, instead of with the words; in i2t it is a region like the others.
    """

    BONUS = {"t2i": 0.5, "i2t": 0.5}

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

    def encode_images(self, batch: dict[str, Tensor]) -> Encoding:
        """As PFAN, and batch['whole'] (I, F) -> {'regions': (I, R, D), 'whole': (I, D)}."""
        more = {"filling": batch.get("filling")}
        regions = self.img_enc(batch["images"], batch["blocks"], batch["overlap"], **more)
        return without_dropped(regions, batch) | {"whole": self.img_enc.whole(batch["whole"])}

    def encode_captions(self, batch: dict[str, Tensor]) -> Encoding:
        """As SCAN, and 'sentence' (C, D): the final state of the GRU.  # Q22"""
        words, sentence = self.txt_enc.words_and_sentence(batch["captions"], batch["lengths"])
        return {"words": words, "lengths": batch["lengths"], "sentence": sentence}

    def similarity(
        self, images: Encoding, captions: Encoding, cross_attn: str | None = None
    ) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption; see SCAN."""
        sentence, regions = captions["sentence"], images["regions"]
        scores = self.lambda_whole * cosines(images["whole"], sentence)  # (I, C)
        if self.need_box_whole and (cross_attn or self.config.cross_attn) == "t2i":
            mask = images.get("region_mask")  # (I, R)
            if mask is None:
                last, images = regions[:, -1], images | {"regions": regions[:, :-1]}
            else:
                at = last_region(mask)  # (I, R)
                last, mask = regions[at], mask & ~at  # (I, D), (I, R)
                regions = regions.masked_fill(at[..., None], 0)  # (I, R, D)
                images = images | {"regions": regions, "region_mask": mask}
            scores = scores + 0.5 * cosines(last, sentence)  # (I, C)
        return scores + super().similarity(images, captions, cross_attn)  # (I, C)

    def beside_score(self, batch: dict, images: Encoding, captions: Encoding) -> dict:
        """For explain.py: the parts of one pair's score that no word or region has."""
        sentence = captions["sentence"]
        whole = self.lambda_whole * cosines(images["whole"], sentence).item()
        notes = [f"The whole image with the sentence adds {whole:.4f} to the score."]
        if self.need_box_whole and self.config.cross_attn == "t2i":
            last = 0.5 * cosines(images["regions"][:, -1], sentence).item()
            notes.append(
                "The last region is the whole image: no word looks at it. With the sentence it "
                f"adds {last:.4f} to the score."
            )
        return {"notes": notes + bonus_notes(self, images, captions)}


class PFANSystem(System):
    """What the shared programs know of PFAN."""

    name, title = "pfan", "PFAN"
    counts_epochs = True
    compared = ("PFAN-A t-i AVG", "--agg_func Mean --lambda_softmax 9")
    benchmarks = {"t2i": "--bi_gru --agg_func Mean --lambda_softmax 9"}

    def add_options(self, group) -> None:
        super().add_options(group)
        group.add_argument(
            "--split_size", default=16, type=COUNT, help="blocks along a side of the image"
        )
        group.add_argument(
            "--n_blocks",
            default=15,
            type=COUNT,
            help="blocks that serve.py gives a region; training takes as many as the file holds",
        )
        group.add_argument(
            "--position_embed_size", default=200, type=COUNT, help="numbers per block"
        )
        self.add_own_options(group)

    def add_own_options(self, group) -> None:
        """The flags that the whole-image variant does not share."""
        group.add_argument(
            "--position",
            default="attention",
            help="attention (PFAN-A: regions attend to their blocks) | only (PFAN-P: the overlap)",
        )

    def build(self, opt, vocab_size, text_encoder=None) -> PFAN:
        return PFAN(
            vocab_size,
            position=opt.position,
            split_size=opt.split_size,
            position_embed_size=opt.position_embed_size,
            **encoder_options(opt),
            **score_options(opt),
            text_encoder=text_encoder,
        )

    def dataset(self, folder, split, vocab, opt) -> PositionDataset:
        where = folder, split, vocab, opt.img_dim, opt.split_size
        return PositionDataset(*where, **self.split_options(opt))

    def prepare_split(self, stem: str) -> None:
        if not os.path.isfile(f"{stem}_boxes.npy"):
            positions.convert(stem)

    def detect(self, states) -> bool:
        return "position_embedding.weight" in states[0] and "fc_whole.weight" not in states[0]

    def architecture(self, states) -> dict:
        position = "attention" if "fc_att.weight" in states[0] else "only"
        return self.position_architecture(states) | {"position": position}

    def position_architecture(self, states) -> dict:
        """What the weights tell of either variant."""
        rows, size = states[0]["position_embedding.weight"].shape
        img_dim = image_architecture(states[0])["img_dim"] - size
        known = {"img_dim": img_dim, "split_size": math.isqrt(rows - 1)}
        return super().architecture(states) | known | {"position_embed_size": size}

    def request_image(self, image: ServedImage, opt) -> Encoding:
        boxes, n = image.boxes[None].numpy(), opt.n_blocks
        table = positions.find_blocks(boxes, [image.size], opt.split_size, n)[0]  # (R, 2 K)
        ids, overlap = torch.from_numpy(table).chunk(2, 1)  # (R, K)
        item = {"images": image.features, "blocks": ids.long()}
        return item | {"overlap": overlap.contiguous()}


class PFANWholeSystem(PFANSystem):
    """What the shared programs know of PFAN's whole-image variant."""

    name, title = "pfan_whole", "PFAN with whole images"
    defaults = {"embed_size": 512}
    interchangeable = False
    reads_whole = True
    compared = None  # it needs vectors of whole images
    benchmarks = {}

    def add_own_options(self, group) -> None:
        group.add_argument(
            "--lambda_whole",
            default=1.0,
            type=NOT_NEGATIVE,
            help="weight of the whole image's cosine",
        )
        group.add_argument(
            "--need_box_whole", action="store_true", help="the last region is the whole image"
        )

    def build(self, opt, vocab_size, text_encoder=None) -> PFANWhole:
        return PFANWhole(
            vocab_size,
            lambda_whole=opt.lambda_whole,
            need_box_whole=opt.need_box_whole,
            split_size=opt.split_size,
            position_embed_size=opt.position_embed_size,
            **encoder_options(opt),
            **score_options(opt),
            text_encoder=text_encoder,
        )

    def dataset(self, folder, split, vocab, opt) -> WholeDataset:
        where = folder, split, vocab, opt.img_dim, opt.split_size
        return WholeDataset(*where, need_box_whole=opt.need_box_whole, **self.split_options(opt))

    def vocab_file(self, folder: str, data_name: str) -> str:
        """{data_name}_sent_vocab.json or .pkl, unless only the other models' file exists."""
        path = super().vocab_file(folder, data_name)
        sent = os.path.join(folder, f"{data_name}_sent_vocab.json")
        own, other = (os.path.isfile(existing_file(x)) for x in (sent, path))
        return sent if own or not other else path

    def vocabulary(self, vocab, opt):
        """Unknown words have the id of <pad>, as published.  # Q22b"""
        vocab = super().vocabulary(vocab, opt)
        vocab.unknown = "<pad>"
        return vocab

    def detect(self, states) -> bool:
        return "fc_whole.weight" in states[0]

    def architecture(self, states) -> dict:
        return self.position_architecture(states)

    def last_region_is_image(self, opt) -> bool:
        return opt.need_box_whole

    def request_image(self, image: ServedImage, opt) -> Encoding:
        regions = image
        if opt.need_box_whole:  # the last region is the whole image, which has no blocks
            regions = image._replace(boxes=image.boxes[:-1])
            if not len(regions.boxes):
                raise InputError("one region; the last one is the whole image")
        item = super().request_image(regions, opt)
        return item | {"whole": image.whole}
