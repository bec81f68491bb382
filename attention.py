"""Stacked cross attention: SCAN's two scores as the paper writes them, and what makes them fast.

Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018 (arXiv:1803.08024), section
3.1. Read `t2i` and `i2t` first: they are the equations, in the paper's order. They take the dots of
words and regions in one of two layouts, and do the same in both:

    a block: all N captions of one length W with M images,     dots (N, W, M, R)
    pairs:   each of P captions with the image of its own row, dots (P, W, R)

In both layouts the words are dimension 1 and the regions are the last one. Below these two come the
steps that they share, then the route to all pairs. Comments give the shapes of a block.

Shapes: M or I images, N or C captions, R regions, W words, D joint dimension, P pairs. The queries
attend to the keys: in t2i words query regions, in i2t regions query words.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pairs import Encoding, PairScore, block_dots, block_size, pair_dots, pair_scores
from util.cli import choose
from util.kept import keep
from util.norms import EPS, inverse_l2, l1norm, l2norm

FAINT = 2**-7  # an attended vector is faint below this part of the largest squared key length
WORDS, REGIONS = 1, -1  # their dimensions in the dots, in both layouts


class AttentionConfig(NamedTuple):
    """The options of a stacked cross attention score; options.py explains them."""

    cross_attn: str = "t2i"
    raw_feature_norm: str = "clipped_l2norm"
    agg_func: str = "LogSumExp"
    lambda_softmax: float = 9.0
    lambda_lse: float = 6.0
    bonus: float = 0.0  # PFAN: weight of the bonus term, the aggregated maximum attention weight


# The equations


def t2i(s: Tensor, images: Encoding, captions: Encoding, config: AttentionConfig) -> Tensor:
    """Text-image score: every word e_j attends to the regions v_i (section 3.1, Text-Image).

    s holds the dots s_ij of a block or of pairs (`block_dots`, `pair_dots` of pairs.py); of words
    and regions of unit length they are the cosines of eq. (1). images: 'regions' (M, R, D), their
    Gram matrices 'gram' (M, R, R) and, if some regions are missing, 'region_mask' (M, R). captions:
    'words' (N, W, D) and their 'norms' (N, W). Returns (N, M) of a block, (P,) of pairs. Without
    autograd s is used as scratch: do not read it afterwards.
    """
    words, regions, gram = captions["words"], images["regions"], images["gram"]
    a = attention_weights(s, WORDS, REGIONS, config, images.get("region_mask"))  # (3): (N, W, M, R)
    # The attended vector a_j = sum_i alpha_ij v_i, eq. (2), is not built: see `cosine`.
    dot = multiply(s, a).sum(REGIONS)  # e_j . a_j = sum_i alpha_ij s_ij: (N, W, M)
    square = multiply(times_gram(a, gram), a).sum(REGIONS)  # |a_j|^2 = alpha' G alpha: (N, W, M)
    x = cosine(dot, square, per_caption(captions["norms"], dot))  # R(e_j, a_j), (4): (N, W, M)
    x = restore_t2i(x, square, a, words, regions, gram)  # where rounding matters: (N, W, M)
    keep(t2i=a, word_scores=x)
    scores = aggregate(x, WORDS, config)  # S(I, T), (5) or (6): (N, M)
    if config.bonus:  # PFAN; max, not amax: of equal weights one gets the gradient, as published
        scores = scores + config.bonus * aggregate(a.max(REGIONS).values, WORDS, config)  # (N, M)
    return scores


def i2t(s: Tensor, images: Encoding, captions: Encoding, config: AttentionConfig) -> Tensor:
    """Image-text score: every region v_i attends to the words e_j (section 3.1, Image-Text).

    As t2i, but it reads the 'norms' (M, R) of the images, and only the 'words' of the captions.
    """
    words, regions, mask = captions["words"], images["regions"], images.get("region_mask")
    a = attention_weights(s, REGIONS, WORDS, config, mask)  # alpha_ij, eq. (3): (N, W, M, R)
    # The attended vector a_i = sum_j alpha_ij e_j, eq. (2), is not built: see `cosine`.
    gram = words @ words.mT  # G: (N, W, W)
    dot = multiply(s, a).sum(WORDS)  # v_i . a_i = sum_j alpha_ij s_ij: (N, M, R)
    g = (gram @ a.flatten(2)).view(a.shape)  # G alpha: (N, W, M, R)
    square = multiply(g, a).sum(WORDS)  # |a_i|^2 = alpha' G alpha: (N, M, R)
    x = cosine(dot, square, images["norms"])  # R(v_i, a_i), eq. (4): (N, M, R)
    x = restore_i2t(x, square, a, words, regions, gram)  # where rounding matters: (N, M, R)
    keep(i2t=a, region_scores=x)
    scores = aggregate(x, REGIONS, config, mask)  # S(I, T), eq. (5) or (6): (N, M)
    if config.bonus:
        largest = a.max(WORDS).values  # (N, M, R)
        scores = scores + config.bonus * aggregate(largest, REGIONS, config, mask)  # (N, M)
    return scores


# Their steps


def attention_weights(
    s: Tensor, query: int, key: int, config: AttentionConfig, mask: Tensor | None = None
) -> Tensor:
    """Attention weights alpha of each query over the keys, eq. (3), like the dots s.

    `query` and `key` are their dimensions in s. First the dots are clipped and normalised over the
    queries of each key, as `raw_feature_norm` says, and multiplied with lambda_softmax (lambda_1 of
    the paper). clipped_l2norm is the formula below eq. (1), except that a negative dot is clipped
    to a tenth of itself, not to 0: so the published code has it (Q42). mask (M, R): the regions
    that are there.
    """
    normalise = choose(RAW_FEATURE_NORM, config.raw_feature_norm, "raw_feature_norm")
    missing = None if mask is None else ~per_image(mask, s)
    if missing is not None and key == WORDS and config.raw_feature_norm == "softmax":
        s = s.masked_fill(missing, -torch.inf)  # like s; the other norms add up zeros
    s = normalise(s, query, config.lambda_softmax)  # like s
    if missing is not None and key == REGIONS:
        s = s.masked_fill(missing, -torch.inf)  # like s
    return s.softmax(key)  # like s


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x * y; written into x where no graph is kept.

    A second buffer of a block would push others out of the cache: 1 to 6 % of scoring.
    """
    return x * y if x.requires_grad or y.requires_grad else x.mul_(y)


def times_gram(a: Tensor, gram: Tensor) -> Tensor:
    """G alpha, like a (N, W, M, R), with the Gram matrix gram (M, R, R) of each image's regions."""
    if a.dim() == 3:  # pairs
        return a @ gram  # (P, W, R)
    rows = a.flatten(0, 1).transpose(0, 1)  # (M, N W, R)
    return (rows @ gram).transpose(0, 1).view(a.shape)  # (N, W, M, R)


def cosine(dot: Tensor, square: Tensor, query_norm: Tensor) -> Tensor:
    """Cosine of a query q and its attended vector c, from q.c, |c|^2 and |q|: all like dot.

    The Gram identity: c = sum_k alpha_k k itself is not needed, only q.c = sum_k alpha_k (q.k) and
    |c|^2 = alpha' G alpha, where G holds the dots among the keys. A query then costs K^2 products
    instead of K D (K keys). Building c takes 5 (t2i) and 15 times (i2t) as long at D = 1024.

    As published, |q| |c| counts as at least 1e-8. A vanished c passes no gradient, as in l2norm:
    it would outweigh all others (Q26).
    """
    # Rounding can make the square negative; restore_faint computes such rows anew.
    length = (square.clamp_min(1e-30).sqrt() * query_norm).clamp_min(EPS)  # like dot
    x = dot / length  # like dot
    if not x.requires_grad:
        return x
    return torch.where((square <= EPS**2) | (query_norm == 0), x.detach(), x)  # like dot


def aggregate(x: Tensor, dim: int, config: AttentionConfig, mask: Tensor | None = None) -> Tensor:
    """One score of the queries' numbers x, along `dim`, by `agg_func`: eq. (5), (6).

    mask: the queries that are there, (M, R) of a block, (P, R) of pairs. None: all.
    """
    function = choose(AGG_FUNC, config.agg_func, "agg_func")
    if mask is None:
        return function(x, dim, config.lambda_lse)
    adds = config.agg_func in ("Mean", "Sum")
    x = x.masked_fill(~mask, 0 if adds else -torch.inf)  # like x
    if config.agg_func == "Mean":
        return x.sum(dim) / mask.sum(dim)
    return function(x, dim, config.lambda_lse)


# Variants by name


def _clip(s: Tensor) -> Tensor:
    return F.leaky_relu(s, 0.1)  # Q42


def _clipped_l2norm(s: Tensor, dim: int, scale: float) -> Tensor:
    x = _clip(s)
    return multiply(x, inverse_l2(x, dim, scale))


# From dots s to lambda_softmax times the normalised dots; `dim` is that of the queries.
RAW_FEATURE_NORM: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "softmax": lambda s, dim, scale: s.softmax(dim) * scale,
    "l2norm": l2norm,
    "l1norm": l1norm,  # Q5
    "clipped": lambda s, dim, scale: _clip(s) * scale,
    "clipped_l2norm": _clipped_l2norm,
    "clipped_l1norm": lambda s, dim, scale: l1norm(_clip(s), dim, scale),  # Q5
    "no_norm": lambda s, dim, scale: s * scale,
}


def _log_sum_exp(x: Tensor, dim: int, lambda_lse: float) -> Tensor:
    if lambda_lse > 80:  # exp would overflow
        return torch.logsumexp(lambda_lse * x, dim) / lambda_lse
    return (lambda_lse * x).exp().sum(dim).log() / lambda_lse


# From the queries' cosines to one score. Max and Sum are in the published code only.
AGG_FUNC: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "LogSumExp": _log_sum_exp,  # eq. (5)
    "Mean": lambda x, dim, lambda_lse: x.mean(dim),  # eq. (6)
    "Max": lambda x, dim, lambda_lse: x.max(dim).values,
    "Sum": lambda x, dim, lambda_lse: x.sum(dim),
}


# The digits that the Gram identity loses


def restore_faint(
    x: Tensor,
    square: Tensor,
    bound: Tensor,
    rows: Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor, Tensor]],
    cosine: Callable[[Tensor, Tensor, Tensor], Tensor] = cosine,
) -> Tensor:
    """The cosines x, those of faint attended vectors computed anew from the vectors themselves.

    |c|^2 = alpha' G alpha is a sum of terms as large as `bound`, the largest |k|^2 of the keys. If
    they cancel, the cosine is off by some 2e-8 / |c|^2 (keys of unit length), but only by 2e-8 /
    |c| if c is built. Few rows are faint: in trained models |c| is above 0.5. `rows(at)` gives, for
    the places `at` in x, the rows' weights (P, K), queries (P, D) and keys (P, K, D).
    """
    faint = (square < FAINT * bound).nonzero()  # (P, dimensions of x)
    if not len(faint):
        return x
    one = rows(faint[:1].unbind(1))[2].numel()
    for part in faint.split(max(1, block_size(x.device) // one)):
        at = part.unbind(1)
        a, queries, keys = rows(at)
        c = (a[:, None] @ keys)[:, 0]  # (P, D)
        new = cosine((queries * c).sum(1), c.square().sum(1), queries.norm(dim=1))  # (P,)
        x = x.index_put(at, new)  # like x
    return x


def restore_t2i(
    x: Tensor, square: Tensor, a: Tensor, words: Tensor, regions: Tensor, gram: Tensor
) -> Tensor:
    """restore_faint of words that attend to regions: x (N, W, M) of a block, (P, W) of pairs."""

    def rows(at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        n, w, m = (*at, at[0])[:3]  # of pairs n is m
        return a[at], words[n, w], regions[m]

    bound = gram.diagonal(dim1=1, dim2=2).amax(1)  # (M,)
    return restore_faint(x, square, per_image(bound, a), rows)  # like x


def restore_i2t(
    x: Tensor, square: Tensor, a: Tensor, words: Tensor, regions: Tensor, gram: Tensor, **more
) -> Tensor:
    """restore_faint of regions that attend to words: x (N, M, R) of a block, (P, R) of pairs."""

    def rows(at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        n, (m, r) = at[0], at[-2:]  # of pairs n is m
        return a.movedim(WORDS, -1)[at], regions[m, r], words[n]

    bound = gram.diagonal(dim1=1, dim2=2).amax(1)  # (N,)
    return restore_faint(x, square, per_caption(bound, x), rows, **more)  # like x


def per_image(x: Tensor, s: Tensor) -> Tensor:
    """x (M, ...) of a block or (P, ...) of pairs so that it broadcasts with the dots s."""
    return x if s.dim() == 4 else x[:, None]


def per_caption(x: Tensor, like: Tensor) -> Tensor:
    """x (N, ...) with as many dimensions as `like`, so that it broadcasts with it."""
    return x.view(*x.shape, *[1] * (like.dim() - x.dim()))


# All pairs


class CrossAttention(PairScore):
    """Stacked cross attention as pairs.py calls it."""

    def __init__(self, config: AttentionConfig):
        self.config = config
        self.attend = choose({"t2i": t2i, "i2t": i2t}, config.cross_attn, "cross_attn")

    def block(self, images: Encoding, captions: Encoding) -> Tensor:
        s = block_dots(images["regions"], captions["words"])  # (n, W, i, R)
        return self.attend(s, images, captions, self.config)  # (n, i)

    def pairs(self, images: Encoding, captions: Encoding) -> Tensor:
        s = pair_dots(images["regions"], captions["words"])  # (p, W, R)
        return self.attend(s, images, captions, self.config)  # (p,)

    def score_all(self, images: Encoding, captions: Encoding, cap_lens: Tensor) -> Tensor:
        """As PairScore, but with the words of all lengths in one matrix product.

        In a batch of 128 captions each length has few captions, and the many small products of
        PairScore.score_all take a quarter longer.
        """
        regions = images["regions"]
        block, regions_of = block_size(regions.device), regions.size(1)
        images_of = max(1, min(len(regions), 64, block // regions_of))
        # Two blocks: the product gains by it, and the rest takes one length of captions at once.
        chunks, order = packed_words(
            captions, cap_lens, max(1, 2 * block // (images_of * regions_of))
        )
        scores = []
        for start in range(0, len(regions), images_of):
            block_images = {name: x[start : start + images_of] for name, x in images.items()}
            columns = block_images["regions"].flatten(0, 1).mT  # (D, i R)
            parts = []
            for words, groups in chunks:
                sizes = [len(group["words"].flatten(0, 1)) for group in groups]
                for group, s in zip(groups, (words @ columns).split(sizes), strict=True):
                    s = s.view(*group["words"].shape[:2], -1, regions_of)  # (n, W, i, R)
                    parts.append(self.attend(s, block_images, group, self.config))  # (n, i)
            scores.append(torch.cat(parts))  # (C, i)
        return torch.cat(scores, 1)[order.argsort().to(regions.device)].mT  # (I, C)


def packed_words(
    captions: Encoding, cap_lens: Tensor, size: int
) -> tuple[list[tuple[Tensor, list[Encoding]]], Tensor]:
    """Chunks of about `size` words without padding, and the order (C,) of their captions.

    A chunk holds its words (T, D), and its captions in groups of one length, in the same order.
    """
    lengths, order = cap_lens.sort(stable=True)
    position = torch.arange(captions["words"].size(1))
    rows = (order[:, None] * len(position) + position)[position < lengths[:, None]]
    rows = rows.to(captions["words"].device)
    packed = {name: x.flatten(0, 1).index_select(0, rows) for name, x in captions.items()}
    number = (lengths.cumsum(0) - 1) // size  # (C,) the chunk of each caption
    runs, counts = torch.stack((number, lengths)).unique_consecutive(dim=1, return_counts=True)
    chunks, start = {}, 0
    for chunk, w, n in zip(*runs.tolist(), counts.tolist(), strict=True):
        rows_of = slice(start, start + n * w)
        start += n * w
        group = {name: x[rows_of].unflatten(0, (n, w)) for name, x in packed.items()}
        chunks.setdefault(chunk, []).append(group)
    sizes = [
        sum(len(group["words"].flatten(0, 1)) for group in groups) for groups in chunks.values()
    ]
    return list(zip(packed["words"].split(sizes), chunks.values(), strict=True)), order


def xattn_score(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    config: AttentionConfig,
    region_mask: Tensor | None = None,
) -> Tensor:
    """Scores (I, C) of regions (I, R, D) and words (C, W, D), of which cap_lens (C,) count.

    region_mask (I, R): the regions that are there, the others being zeros; None: all. A gradient
    comes by the sparse backward pass of pairs.py.
    """
    of_images, of_captions = {"regions": images}, {"words": captions}
    # Once a step: the Gram matrices of keys that are regions, or the norms of the queries. (Those
    # of words are computed where they are read, without padding.)
    if config.cross_attn == "t2i":
        of_images["gram"] = images @ images.mT  # (I, R, R)
        of_captions["norms"] = captions.norm(dim=2)  # (C, W)
    else:
        of_images["norms"] = images.norm(dim=2)  # (I, R)
    if region_mask is not None:
        of_images["region_mask"] = region_mask
    return pair_scores(CrossAttention(config), of_images, of_captions, cap_lens)


def xattn_score_t2i(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    raw_feature_norm: str = "clipped_l2norm",
    agg_func: str = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
) -> Tensor:
    """Text-image score of all pairs: (I, C).

    images (I, R, D); captions (C, W, D), of which the first cap_lens (C,) words of each count.
    Captions of one length are scored together, so no padding enters, in blocks that fit the cache;
    the size of a block does not change the result. Raises ValueError on an unknown name.
    """
    config = AttentionConfig("t2i", raw_feature_norm, agg_func, lambda_softmax, lambda_lse)
    return xattn_score(images, captions, cap_lens, config)


def xattn_score_i2t(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    raw_feature_norm: str = "clipped_l2norm",
    agg_func: str = "LogSumExp",
    lambda_softmax: float = 4.0,
    lambda_lse: float = 5.0,
) -> Tensor:
    """Image-text score of all pairs: (I, C); see xattn_score_t2i."""
    config = AttentionConfig("i2t", raw_feature_norm, agg_func, lambda_softmax, lambda_lse)
    return xattn_score(images, captions, cap_lens, config)
