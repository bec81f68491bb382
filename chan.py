"""CHAN: each word goes to the one region that fits it best, and what is left is pooled.

Pan et al., Fine-Grained Image-Text Matching by Cross-Modal Hard Aligning Network, CVPR 2023.
Letters: I images, C captions, R regions, W words, D joint dimension; in a score i images and n
captions, or p pairs; K what is pooled (words or regions).

Regions and words have unit length, so their dots s are cosines. Coding leaves a number a row: hard
assignment takes the best region of each word (VHA) or the best word of each region (THA); soft
assignment compares each region with a mean of the words, weights softmax of s / alpha (VSA).
Pooling makes one score of the rows. Names of parts and weights are those of the published code.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import (
    EPS,
    Encoders,
    EncoderText,
    choose,
    l2norm,
    restore_faint,
    without_dropped,
)
from pairs import blocks, pair_scores

HEADS = 8


class Coding(NamedTuple):
    """What decides a score; see options.py for the names."""

    coding_type: str = "VHACoding"
    pooling_type: str = "LSEPooling"
    alpha: float = 0.1
    belta: float = 0.1


def visual_hard(s: Tensor, words: Tensor, regions: Tensor, alpha: float) -> Tensor:
    """Of each word the region that fits best: (n, i, W)."""
    return s.max(-1).values.movedim(1, -1)  # (n, i, W)


def textual_hard(s: Tensor, words: Tensor, regions: Tensor, alpha: float) -> Tensor:
    """Of each region the word that fits best: (n, i, R)."""
    return s.max(1).values  # (n, i, R)


def visual_soft(s: Tensor, words: Tensor, regions: Tensor, alpha: float) -> Tensor:
    """Each region v with c = sum_w a_w word_w, a = softmax_w(s / alpha): v.c / (|c| + 1e-8).

    c is not built: v.c = sum_w a_w s_w, and |c|^2 = a' G a, G the dots among the words.
    """

    def over_length(dot: Tensor, square: Tensor, region_length: Tensor | None) -> Tensor:
        return dot / (square.clamp_min(EPS**2).sqrt() + EPS)

    a = (s / alpha).softmax(1)  # (n, W, i, R)
    gram = words @ words.mT  # (n, W, W)
    square = ((gram @ a.flatten(2)).view(s.shape) * a).sum(1)  # (n, i, R)
    x = over_length((s * a).sum(1), square, None)  # (n, i, R)

    def gather(n: Tensor, *at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, r = (n, *at)[-2:]  # of pairs, their row is both
        return a.movedim(1, -1)[n, *at], regions[image, r], words[n]

    bound = gram.diagonal(dim1=1, dim2=2).amax(1).view(-1, *[1] * (x.dim() - 1))  # (n, 1, 1)
    return restore_faint(x, square, bound, gather, over_length)  # (n, i, R)


# Dots s (n, W, i, R), or (p, W, R) of pairs, to what is pooled, (n, i, K) or (p, K).
CODING: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "VHACoding": visual_hard,
    "THACoding": textual_hard,
    "VSACoding": visual_soft,
}

# What is pooled, x (..., K), to one score; rows that are missing are -inf. LSE lacks the factor
# belta, as published: the ranks do not change with it, but the margin is in its unit.
POOLING: dict[str, Callable[[Tensor, float], Tensor]] = {
    "LSEPooling": lambda x, belta: (x / belta).logsumexp(-1),
    "MeanPooling": lambda x, belta: present(x).sum(-1) / (~x.isneginf()).sum(-1),
    "MaxPooling": lambda x, belta: x.max(-1).values,
    "SumPooling": lambda x, belta: present(x).sum(-1),
    "SoftmaxPooling": lambda x, belta: ((x / belta).softmax(-1) * present(x)).sum(-1),
}


def present(x: Tensor) -> Tensor:
    """x with 0 for the rows that are missing."""
    return x.masked_fill(x.isneginf(), 0)  # like x


def code_and_pool(
    s: Tensor, words: Tensor, regions: Tensor, inside: Tensor | None, how: Coding
) -> Tensor:
    """Scores (n, i) of dots s (n, W, i, R), or (p,) of dots (p, W, R).

    words (n, W, D) and regions (i, R, D) are what they are the dots of. `inside` (i, R) or (p, R)
    says which regions there are; None: all.
    """
    coding = choose(CODING, how.coding_type, "coding_type")
    pooling = choose(POOLING, how.pooling_type, "pooling_type")
    if inside is not None and how.coding_type == "VHACoding":  # regions are chosen from
        mask = inside[:, None] if s.dim() == 3 else inside  # (p, 1, R) or (i, R)
        x = coding(s.masked_fill(~mask, -torch.inf), words, regions, how.alpha)  # (n, i, K)
        return pooling(x, how.belta)  # (n, i)
    x = coding(s, words, regions, how.alpha)  # (n, i, K)
    if inside is not None:  # regions are pooled
        x = x.masked_fill(~inside, -torch.inf)  # (n, i, K)
    return pooling(x, how.belta)  # (n, i)


def score_some(
    images: tuple[Tensor, ...], captions: tuple[Tensor], paired: bool, how: Coding
) -> Tensor:
    """Scores of captions of one length and some images; see pair_scores.

    Of images: regions (i, R, D) and, if some are missing, which there are (i, R).
    """
    (regions, *inside), (words,) = images, captions
    if paired:
        s = words @ regions.mT  # (p, W, R)
    else:
        s = words.flatten(0, 1) @ regions.flatten(0, 1).mT  # (n W, i R)
        s = s.view(*words.shape[:2], len(regions), -1)  # (n, W, i, R)
    return code_and_pool(s, words, regions, inside[0] if inside else None, how)  # (n, i) or (p,)


def score_all(
    images: tuple[Tensor, ...], captions: tuple[Tensor], cap_lens: Tensor, how: Coding
) -> Tensor:
    """Scores (I, C) of all pairs, no graph kept."""
    regions, words = images[0], captions[0]
    scores = regions.new_empty(len(regions), len(words))  # (I, C)
    for length, caption, image in blocks(cap_lens, regions, 2, 64):
        some = tuple(x[image] for x in images), (words[caption, :length],)
        part = score_some(*some, False, how)  # (n, i)
        scores[image, caption] = part.mT
    return scores


def compile_scores() -> None:
    """Let torch.compile fuse the passes of CHAN's score, for the rest of this process."""
    global code_and_pool
    code_and_pool = torch.compile(code_and_pool, dynamic=True)


class InfoNCELoss(nn.Module):
    """z_ij = (s_ij - s_ii + margin) / temperature off the diagonal and 0 on it; log sum_j exp z_ij
    for each row, the same for each column with s_jj, and the sum of their two means."""

    def __init__(self, temperature: float = 0.01, margin: float = 0.0):
        super().__init__()
        self.temperature, self.margin = temperature, margin

    def forward(self, scores: Tensor, image_index: Tensor | None = None) -> Tensor:
        """scores (B, B), matched pairs on the diagonal -> loss (). See ContrastiveLoss."""
        matched = scores.diagonal()  # (B,)
        diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)  # (B, B)
        own = diagonal
        if image_index is not None:
            own = image_index[:, None] == image_index[None, :]  # (B, B)
        total = scores.new_zeros(())
        for dim, to in ((1, matched[:, None]), (0, matched[None, :])):
            z = (scores - to + self.margin) / self.temperature  # (B, B)
            z = z.masked_fill(own, -torch.inf).masked_fill(diagonal, 0)  # (B, B)
            total = total + z.logsumexp(dim).mean()
        return total


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

    def forward(self, x: Tensor, outside: Tensor | None) -> Tensor:
        """x (I, R, D), regions that are not attended to (I, R) or None -> (I, R, D)."""
        y = self.ln(x)  # (I, R, D)
        return x + self.attn(y, y, y, outside, need_weights=False)[0]  # (I, R, D)


class Transformer(nn.Module):
    """x + MHA(LN_1(x)), then x + MLP(LN_2(x))."""

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

    def forward(self, x: Tensor, outside: Tensor | None) -> Tensor:
        """As SelfAttention."""
        y = self.ln_1(x)  # (I, R, D)
        x = x + self.attn(y, y, y, outside, need_weights=False)[0]  # (I, R, D)
        return x + self.mlp(self.ln_2(x))  # (I, R, D)


class Basic(nn.Module):
    """Regions as they are."""

    def __init__(self, embed_size: int):
        super().__init__()

    def forward(self, x: Tensor, outside: Tensor | None) -> Tensor:
        return x


FEEDFORWARD = {"basic": Basic, "selfattention": SelfAttention, "transformer": Transformer}


class AttendingImages(nn.Module):
    """Regions to the joint space: a linear layer, what `precomp_enc_type` says, unit length."""

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

    def forward(self, images: Tensor, outside: Tensor | None = None) -> Tensor:
        """images (I, R, img_dim), regions that are not attended to (I, R) -> (I, R, D), float32."""
        x = self.fc(images.to(self.fc.bias.dtype))  # (I, R, D)
        x = self.feedforward(x, outside).float()  # (I, R, D)
        return x if self.no_imgnorm else l2norm(x, dim=-1)


class CHAN(Encoders):
    """Region and word encoders, and the coding and pooling of their cosines."""

    compile_scores = staticmethod(compile_scores)

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
            # In the published checkpoints, and read by nothing.
            text_encoder.fc = nn.Linear(embed_size, embed_size).requires_grad_(False)
        self.txt_enc = text_encoder
        self.sim_enc = self.criterion = nn.Identity()
        self.how = Coding(coding_type, pooling_type, alpha, belta)
        self.mask_dropped = mask_dropped

    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch['images'] (I, R, img_dim) -> {'regions': (I, R, D)}.

        With batch['inside'] (I, R), which regions --drop left, also 'inside'. The dropped ones are
        zeros in 'images' and never scored, but the others attend to them, as published, unless
        `mask_dropped`.
        """
        inside = batch.get("inside")
        outside = ~inside if self.mask_dropped and inside is not None else None
        return without_dropped(self.img_enc(batch["images"], outside), batch)

    def similarity(self, images: dict[str, Tensor], captions: dict[str, Tensor]) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption."""
        return pair_scores(
            partial(score_all, how=self.how),
            partial(score_some, how=self.how),
            tuple(images[name] for name in ("regions", "inside") if name in images),
            (captions["words"],),
            torch.as_tensor(captions["lengths"]).cpu(),
            per_dot=2,
        )
