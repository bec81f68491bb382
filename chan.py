"""CHAN: each word goes to the region that fits it best, and the cosines that are left are pooled.

Pan et al., Fine-Grained Image-Text Matching by Cross-Modal Hard Aligning Network, CVPR 2023.
Shapes: I images, C captions, R regions, W words, D joint dimension; in a score i images and n
captions, or p pairs (the two layouts of attention.py); K numbers that are pooled (words or
regions).

Regions and words have unit length, so their dots s are cosines. Coding leaves one number per word
or per region: hard assignment takes the best region of each word (VHA) or the best word of each
region (THA); soft assignment compares each region with a mean of the words, whose weights are the
softmax of s / alpha (VSA). Pooling makes one score of these numbers. The parts and the weights have
the names of the published code.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import WORDS, restore_i2t
from losses import InfoNCELoss, make_criterion  # noqa: F401  (people import the first from here)
from model import Encoders, EncoderText, beyond_widest, without_dropped
from pairs import Encoding, PairScore, block_dots, pair_dots, pair_scores
from system import System, encoder_options
from util.arguments import POSITIVE
from util.cli import choose
from util.kept import keep
from util.norms import EPS, l2norm
from vocab import UNICODE

HEADS = 8
UNUSED = ("embedding_warmup_epochs", int, 2), ("input_scale_factor", float, 1.0)


class CodingConfig(NamedTuple):
    """The options of a score; `add_options` below explains them."""

    coding_type: str = "VHACoding"
    pooling_type: str = "LSEPooling"
    alpha: float = 0.1
    belta: float = 0.1


def visual_hard(s: Tensor, words: Tensor, regions: Tensor, alpha: float) -> Tensor:
    """For each word the region that fits it best: (n, i, W)."""
    best = s.max(-1)  # (n, W, i)
    keep(t2i=lambda: F.one_hot(best.indices, s.size(-1)).float())  # (n, W, i, R)
    keep(word_scores=best.values)
    return best.values.movedim(WORDS, -1)  # (n, i, W)


def textual_hard(s: Tensor, words: Tensor, regions: Tensor, alpha: float) -> Tensor:
    """For each region the word that fits it best: (n, i, R)."""
    best = s.max(WORDS)  # (n, i, R)
    keep(i2t=lambda: F.one_hot(best.indices, s.size(WORDS)).float().movedim(-1, WORDS))
    keep(region_scores=best.values)
    return best.values  # (n, i, R)


def visual_soft(s: Tensor, words: Tensor, regions: Tensor, alpha: float) -> Tensor:
    """Each region v with c = sum_w a_w word_w, a = softmax_w(s / alpha): v.c / (|c| + 1e-8).

    c is not built: v.c = sum_w a_w s_w, and |c|^2 = a' G a, where G holds the dots among the words.
    """

    def over_length(dot: Tensor, square: Tensor, region_length: Tensor | None) -> Tensor:
        return dot / (square.clamp_min(EPS**2).sqrt() + EPS)

    a = (s / alpha).softmax(WORDS)  # (n, W, i, R)
    gram = words @ words.mT  # (n, W, W)
    square = ((gram @ a.flatten(2)).view(s.shape) * a).sum(WORDS)  # (n, i, R)
    x = over_length((s * a).sum(WORDS), square, None)  # (n, i, R)
    x = restore_i2t(x, square, a, words, regions, gram, cosine=over_length)  # (n, i, R)
    keep(i2t=a, region_scores=x)
    return x


# From the dots s (n, W, i, R), or (p, W, R) of pairs, to the numbers to pool, (n, i, K) or (p, K).
CODING: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "VHACoding": visual_hard,
    "THACoding": textual_hard,
    "VSACoding": visual_soft,
}

# From the numbers x (..., K) to one score; those of missing regions are -inf. LSE lacks the factor
# belta, as published (Q23): the ranks stay the same, but the margin is in its unit.
POOLING: dict[str, Callable[[Tensor, float], Tensor]] = {
    "LSEPooling": lambda x, belta: (x / belta).logsumexp(-1),
    "MeanPooling": lambda x, belta: present(x).sum(-1) / (~x.isneginf()).sum(-1),
    "MaxPooling": lambda x, belta: x.max(-1).values,
    "SumPooling": lambda x, belta: present(x).sum(-1),
    "SoftmaxPooling": lambda x, belta: ((x / belta).softmax(-1) * present(x)).sum(-1),
}


def present(x: Tensor) -> Tensor:
    """x with 0 for the regions that are missing.  # Q11"""
    return x.masked_fill(x.isneginf(), 0)  # like x


def code_and_pool(
    s: Tensor, words: Tensor, regions: Tensor, region_mask: Tensor | None, config: CodingConfig
) -> Tensor:
    """Scores (n, i) of dots s (n, W, i, R), or (p,) of dots (p, W, R).

    s holds the dots of words (n, W, D) and regions (i, R, D). region_mask (i, R) or (p, R): the
    regions that are there; None: all.
    """
    coding = choose(CODING, config.coding_type, "coding_type")
    pooling = choose(POOLING, config.pooling_type, "pooling_type")
    if region_mask is not None and config.coding_type == "VHACoding":  # chooses among regions
        mask = region_mask[:, None] if s.dim() == 3 else region_mask  # (p, 1, R) or (i, R)
        x = coding(s.masked_fill(~mask, -torch.inf), words, regions, config.alpha)  # (n, i, K)
        return pooling(x, config.belta)  # (n, i)
    x = coding(s, words, regions, config.alpha)  # (n, i, K)
    if region_mask is not None:  # pools over regions
        x = x.masked_fill(~region_mask, -torch.inf)  # (n, i, K)
    return pooling(x, config.belta)  # (n, i)


class CodingScore(PairScore):
    """Coding and pooling, as pairs.py calls them. images: 'regions' and, optionally, their mask."""

    dots_size = 2

    def __init__(self, config: CodingConfig):
        self.config = config

    def block(self, images: Encoding, captions: Encoding) -> Tensor:
        words, regions = captions["words"], images["regions"]
        s = block_dots(regions, words)  # (n, W, i, R)
        return code_and_pool(s, words, regions, images.get("region_mask"), self.config)  # (n, i)

    def pairs(self, images: Encoding, captions: Encoding) -> Tensor:
        words, regions = captions["words"], images["regions"]
        s = pair_dots(regions, words)  # (p, W, R)
        return code_and_pool(s, words, regions, images.get("region_mask"), self.config)  # (p,)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """x + MHA(LN(x)): regions attend to the regions of their image."""

    def __init__(self, embed_size: int):
        super().__init__()
        self.ln = nn.LayerNorm(embed_size)
        self.attn = nn.MultiheadAttention(embed_size, HEADS, batch_first=True)

    def forward(self, x: Tensor, ignored: Tensor | None) -> Tensor:
        """x (I, R, D), regions that are not attended to (I, R) or None -> (I, R, D)."""
        y = self.ln(x)  # (I, R, D)
        return x + self.attn(y, y, y, ignored, need_weights=False)[0]  # (I, R, D)


class Transformer(nn.Module):
    """x + MHA(LN_1(x)), then x + MLP(LN_2(x)); over the regions of an image (Q10)."""

    def __init__(self, embed_size: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(embed_size, HEADS, batch_first=True)
        self.ln_1 = nn.LayerNorm(embed_size)
        layers = [
            ("c_fc", nn.Linear(embed_size, 4 * embed_size)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * embed_size, embed_size)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(embed_size)

    def forward(self, x: Tensor, ignored: Tensor | None) -> Tensor:
        """As SelfAttention."""
        y = self.ln_1(x)  # (I, R, D)
        x = x + self.attn(y, y, y, ignored, need_weights=False)[0]  # (I, R, D)
        return x + self.mlp(self.ln_2(x))  # (I, R, D)


class Basic(nn.Module):
    """Regions as they are."""

    def __init__(self, embed_size: int):
        super().__init__()

    def forward(self, x: Tensor, ignored: Tensor | None) -> Tensor:
        return x


FEEDFORWARD = {"basic": Basic, "selfattention": SelfAttention, "transformer": Transformer}


class AttendingImages(nn.Module):
    """Regions to the joint space: a linear layer, the layer of `precomp_enc_type`, unit length."""

    def __init__(self, img_dim: int, embed_size: int, precomp_enc_type: str, no_imgnorm: bool):
        super().__init__()
        kind = choose(FEEDFORWARD, precomp_enc_type, "precomp_enc_type")
        if precomp_enc_type != "basic" and embed_size % HEADS:
            raise ValueError(f"embed_size {embed_size}: expected a multiple of the {HEADS} heads")
        self.fc = nn.Linear(img_dim, embed_size)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.feedforward = kind(embed_size)
        self.no_imgnorm = no_imgnorm

    def forward(self, images: Tensor, ignored: Tensor | None = None) -> Tensor:
        """images (I, R, img_dim), regions that are not attended to (I, R) -> (I, R, D), float32."""
        x = self.fc(images.to(self.fc.bias.dtype))  # (I, R, D)
        x = self.feedforward(x, ignored).float()  # (I, R, D)
        return x if self.no_imgnorm else l2norm(x, dim=-1)


class CHAN(Encoders):
    """Region and word encoders, and the coding and pooling of their cosines."""

    def __init__(
        self,
        vocab_size: int,
        img_dim: int = 2048,
        word_dim: int = 300,
        embed_size: int = 1024,
        num_layers: int = 1,
        precomp_enc_type: str = "basic",
        no_imgnorm: bool = False,
        no_txtnorm: bool = False,
        coding_type: str = "VHACoding",
        pooling_type: str = "LSEPooling",
        alpha: float = 0.1,
        belta: float = 0.1,
        mask_dropped: bool = False,
        drop_in_place: bool = False,
        text_encoder: nn.Module | None = None,
    ):
        super().__init__()
        choose(CODING, coding_type, "coding_type")
        choose(POOLING, pooling_type, "pooling_type")
        self.img_enc = AttendingImages(img_dim, embed_size, precomp_enc_type, no_imgnorm)
        if text_encoder is None:
            sizes = vocab_size, word_dim, embed_size, num_layers
            text_encoder = EncoderText(*sizes, True, no_txtnorm)
            nn.init.xavier_uniform_(text_encoder.embed.weight)
            # It is in the published checkpoints; nothing reads it.
            text_encoder.fc = nn.Linear(embed_size, embed_size).requires_grad_(False)
        self.txt_enc = text_encoder
        # Two more parts of the published checkpoints; they hold no weights.
        self.sim_enc = self.criterion = nn.Identity()
        self.config = CodingConfig(coding_type, pooling_type, alpha, belta)
        self.mask_dropped, self.drop_in_place = mask_dropped, drop_in_place

    def encode_images(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['images'] (I, R, img_dim) -> {'regions': (I, R, D)}.

        With batch['region_mask'] (I, R), the regions that are scored, also 'region_mask'. Those
        that --drop has dropped are zeros in 'images'. The others attend to as many zeros as in the
        published program; with `drop_in_place` to all of them, with `mask_dropped` to none (Q13).
        Nothing attends to batch['filling'] (I, R).
        """
        ignored, mask = batch.get("filling"), batch.get("region_mask")  # (I, R)
        if self.mask_dropped and mask is not None:
            ignored = ~mask  # (I, R)
        elif "widest" in batch and not self.drop_in_place:
            ignored = beyond_widest(mask, ignored, batch["widest"])  # (I, R)
        return without_dropped(self.img_enc(batch["images"], ignored), batch)

    def similarity(self, images: Encoding, captions: Encoding) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption."""
        of_images = {name: images[name] for name in ("regions", "region_mask") if name in images}
        of_captions = {"words": captions["words"]}
        return pair_scores(CodingScore(self.config), of_images, of_captions, captions["lengths"])

    def beside_score(self, batch: dict, images: Encoding, captions: Encoding) -> dict:
        """For explain.py: the side that the coding does not read, as the best fits of one pair.

        With VHACoding the word that fits each region best, 'i2t'; otherwise the region that fits
        each word best, 't2i'; both (W, R).
        """
        s = pair_dots(images["regions"], captions["words"])[0]  # (W, R)
        by_words = self.config.coding_type == "VHACoding"
        dim = 0 if by_words else 1
        best = torch.zeros_like(s).scatter_(dim, s.argmax(dim, keepdim=True), 1)  # (W, R)
        scored, other = ("words", "regions") if by_words else ("regions", "words")
        note = f"The score pools numbers of the {scored}; what the {other} choose is not in it."
        return {"i2t" if by_words else "t2i": best, "notes": [note]}


class CHANSystem(System):
    """What the shared programs know of CHAN."""

    name, title = "chan", "CHAN"
    parts = ("img_enc", "txt_enc", "sim_enc", "criterion")
    defaults = {"margin": 0.05}
    adam = torch.optim.AdamW  # with its default weight decay, 0.01, as published
    directions = ()
    counts_epochs = True
    compared = ("CHAN VHA LSE", "--precomp_enc_type selfattention --margin 0.05")
    benchmarks = {"VHA": "--precomp_enc_type selfattention"}
    benchmark_batch = 384  # as published

    def add_options(self, group) -> None:
        group.add_argument(
            "--coding_type",
            default="VHACoding",
            help="VHACoding (the best region of each word) | THACoding (the best word of each "
            "region) | VSACoding (a mean of the words for each region)",
        )
        group.add_argument("--pooling_type", default="LSEPooling", help=" | ".join(POOLING))
        group.add_argument("--alpha", default=0.1, type=POSITIVE, help="temperature of VSACoding")
        group.add_argument(
            "--belta",
            default=0.1,
            type=POSITIVE,
            help="temperature of LSEPooling and SoftmaxPooling",
        )
        for name, kind, default in UNUSED:
            group.add_argument(
                f"--{name}", default=default, type=kind, help="published, but nothing reads it"
            )
        group.add_argument(
            "--mask_dropped",
            action="store_true",
            help="regions do not attend to dropped ones (in the published code they attend to "
            "zeros)",
        )
        group.add_argument(
            "--drop_in_place",
            action="store_true",
            help="regions attend to the zeros of all dropped ones (in the published code to those "
            "that fill its image up to the widest of the batch)",
        )

    def build(self, opt, vocab_size, text_encoder=None) -> CHAN:
        options = encoder_options(opt)
        del options["bi_gru"]  # always
        return CHAN(
            vocab_size,
            **options,
            coding_type=opt.coding_type,
            pooling_type=opt.pooling_type,
            alpha=opt.alpha,
            belta=opt.belta,
            mask_dropped=opt.mask_dropped,
            drop_in_place=opt.drop_in_place,
            text_encoder=text_encoder,
        )

    def data_folders(self, data_path: str, data_name: str) -> list[str]:
        """SCAN's, and CHAN's own layout.

        There `data_path` is itself the folder of the dataset, has the name `data_name` and holds
        precomp/, or a folder `data_path`_precomp stands beside it.
        """
        folders = [os.path.join(data_path, name) for name in (data_name, f"{data_name}_precomp")]
        bare = os.path.normpath(data_path)
        if os.path.basename(bare) == data_name:
            folders += [os.path.join(bare, "precomp"), f"{bare}_precomp"]
        return folders

    def vocab_file(self, folder: str, data_name: str) -> str:
        """{data_name}_vocab.json, or else coco_precomp_vocab.json or f30k_precomp_vocab.json."""
        path = super().vocab_file(folder, data_name)
        kind = "coco" if "coco" in data_name else "f30k"
        shared = super().vocab_file(folder, f"{kind}_precomp")
        return shared if os.path.isfile(shared) and not os.path.isfile(path) else path

    def vocabulary(self, vocab, opt):
        """It has a word more, <mask>. CHAN is a program for Python 3, which lowers all letters."""
        if vocab.tokenizer is None:  # a published file  # Q25
            vocab.lower = UNICODE
        vocab.add_word(vocab.mask)
        return vocab

    def detect(self, states) -> bool:
        return len(states) == 4  # GSMN, which also has four, is asked first

    def architecture(self, states) -> dict:
        known = super().architecture(states) | {"precomp_enc_type": "basic"}
        known.pop("bi_gru", None)
        if any(name.startswith("feedforward.") for name in states[0]):
            mlp = "feedforward.mlp.c_fc.weight" in states[0]
            known["precomp_enc_type"] = "transformer" if mlp else "selfattention"
        return known

    def criterion(self, opt) -> nn.Module:
        """After the warm-up the hinge is that of the hardest negatives, without a flag."""
        warmup = opt.vse_mean_warmup_epochs
        return make_criterion(opt.criterion, opt.margin, True, warmup, opt.temperature)

    def start_words(self, embedding: Tensor) -> None:
        """Words without a vector start from normal random numbers, as published."""
        embedding.normal_()
