"""SCAN: two encoders, stacked cross attention, and the ranking loss that its successors share.

Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018 (arXiv:1803.08024).
Letters: I images, C captions, R regions, W words, T words in all, D joint dimension, P pairs; in
attention M images, N captions of W words, queries Q and keys K (t2i: words query regions; i2t:
regions, words).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from pairs import block_size, pair_scores

EPS = 1e-8
FAINT = 2**-7  # an attended vector is faint below this part of the largest squared length of a key
TEXT = ("captions", "lengths", "adjacency")  # what encode_captions reads of a batch


def _over_l1(x: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """scale / (sum |x| + 1e-8) along `dim`, kept with size 1."""
    return scale / (x.abs().sum(dim, keepdim=True) + EPS)


def _over_l2(x: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """scale / (|x| + 1e-8) along `dim`, kept with size 1."""
    square = (x * x).sum(dim, keepdim=True)
    if not x.requires_grad:
        return scale / (square.sqrt_() + EPS)
    # The root's gradient at 0 is infinite, and the quotient's 1e8 times what comes in: clipping
    # would then spend the whole step on an empty region.
    empty = square == 0
    return (scale / (square.masked_fill(empty, 1).sqrt() + EPS)).masked_fill(empty, 0)


def l1norm(x: Tensor, dim: int) -> Tensor:
    """x / (sum |x| + 1e-8) along `dim`."""
    return x * _over_l1(x, dim)


def l2norm(x: Tensor, dim: int) -> Tensor:
    """x / (|x| + 1e-8) along `dim`; a zero vector stays zero and passes no gradient."""
    return x * _over_l2(x, dim)


class FeatureNorm(NamedTuple):
    """How the dots s of one query item and one key row are normalised over the item's Q rows."""

    before: Callable[[Tensor, int], Tensor]  # (s, dim of the queries) -> a new tensor like s
    over: Callable[[Tensor, int, float], Tensor] | None  # its factor; none: lambda_softmax alone


def _clip(s: Tensor, dim: int) -> Tensor:
    return F.leaky_relu(s, 0.1)


def _copy(s: Tensor, dim: int) -> Tensor:
    return s.clone()


RAW_FEATURE_NORM = {
    "softmax": FeatureNorm(torch.softmax, None),
    "l2norm": FeatureNorm(_copy, _over_l2),
    "l1norm": FeatureNorm(_copy, _over_l1),
    "clipped": FeatureNorm(_clip, None),
    "clipped_l2norm": FeatureNorm(_clip, _over_l2),
    "clipped_l1norm": FeatureNorm(_clip, _over_l1),
    "no_norm": FeatureNorm(_copy, None),
}


def _log_sum_exp(x: Tensor, dim: int, lambda_lse: float) -> Tensor:
    if lambda_lse > 80:  # exp would overflow
        return torch.logsumexp(lambda_lse * x, dim) / lambda_lse
    return (lambda_lse * x).exp().sum(dim).log() / lambda_lse


# How the cosines of the Q rows become one score (section 3.1; Max and Sum are in the code only).
AGG_FUNC: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "LogSumExp": _log_sum_exp,
    "Mean": lambda x, dim, lambda_lse: x.mean(dim),
    "Max": lambda x, dim, lambda_lse: x.max(dim).values,
    "Sum": lambda x, dim, lambda_lse: x.sum(dim),
}


def choose(table: dict, name: str, flag: str):
    """The entry `name` of a table of variants, or a ValueError that lists them."""
    if name not in table:
        raise ValueError(f"unknown {flag} {name!r}: expected one of {', '.join(table)}")
    return table[name]


class WeightNormLinear(nn.Module):
    """A linear layer whose weight is g v / |v|: one g for the whole matrix, or one `per_row`."""

    def __init__(self, in_features: int, out_features: int, per_row: bool = False):
        super().__init__()
        plain = nn.Linear(in_features, out_features)
        self.per_row = per_row
        self.bias = plain.bias
        self.weight_g = nn.Parameter(self._norm(plain.weight.detach()))
        self.weight_v = plain.weight

    def _norm(self, v: Tensor) -> Tensor:
        return v.norm(dim=1, keepdim=True) if self.per_row else v.norm()  # (out, 1) or ()

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self._norm(self.weight_v))  # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class EncoderImage(nn.Module):
    """Region features to the joint space: one linear layer, then unit length (section 3.3)."""

    def __init__(
        self,
        img_dim: int,
        embed_size: int,
        precomp_enc_type: str = "basic",
        no_imgnorm: bool = False,
    ):
        super().__init__()
        layers = {"basic": nn.Linear, "weight_norm": WeightNormLinear}
        self.fc = choose(layers, precomp_enc_type, "precomp_enc_type")(img_dim, embed_size)
        if precomp_enc_type == "basic":
            nn.init.xavier_uniform_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)
        self.no_imgnorm = no_imgnorm

    def forward(self, images: Tensor) -> Tensor:
        """images (I, R, F), float16 or float32 -> regions (I, R, D), float32."""
        regions = self.fc(images.to(self.fc.bias.dtype)).float()  # (I, R, D)
        return regions if self.no_imgnorm else l2norm(regions, dim=-1)


def packed_gru(rnn: nn.GRU, packed: PackedSequence) -> Tensor:
    """Outputs of `rnn` (with biases, no dropout) for packed captions: (T, D); both ways (T, 2 D).

    On a CPU the library's backward pass makes a gradient of all T words for each step, zeros but
    there (cf. pytorch issue 149194). So a graph on a CPU is made here, by the equations of nn.GRU's
    documentation: what the steps read is split once, and its gradients are put together once.
    """
    if packed.data.device.type != "cpu" or not torch.is_grad_enabled():
        return rnn(packed)[0].data
    x, sizes = packed.data, packed.batch_sizes.tolist()  # captions that reach each step
    sides = (False, True) if rnn.bidirectional else (False,)
    weights = iter(rnn.all_weights)
    for _ in range(rnn.num_layers):
        outputs = []
        for backwards in sides:
            of_input, of_state, input_bias, state_bias = next(weights)
            steps = F.linear(x, of_input, input_bias).split(sizes)  # of (n, 3 D)
            h, states = x.new_zeros(0, rnn.hidden_size), []
            for step in reversed(steps) if backwards else steps:
                begin = len(step) - len(h)  # captions that do so here; below 0: that ended
                h = F.pad(h, (0, 0, 0, begin)) if begin > 0 else h[: len(step)]  # (n, D)
                reset, update, new = F.linear(h, of_state, state_bias).chunk(3, 1)  # (n, D)
                x_reset, x_update, x_new = step.chunk(3, 1)  # (n, D)
                new = (x_new + (x_reset + reset).sigmoid() * new).tanh()  # (n, D)
                h = new + (x_update + update).sigmoid() * (h - new)  # (n, D)
                states.append(h)
            outputs.append(torch.cat(states[::-1] if backwards else states))  # (T, D)
        x = torch.cat(outputs, 1)  # (T, D) or (T, 2 D)
    return x


class EncoderText(nn.Module):
    """Word ids to one vector a word: embedding, GRU, mean of its directions (section 3.4)."""

    def __init__(
        self,
        vocab_size: int,
        word_dim: int,
        embed_size: int,
        num_layers: int = 1,
        use_bi_gru: bool = False,
        no_txtnorm: bool = False,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.rnn = nn.GRU(
            word_dim, embed_size, num_layers, batch_first=True, bidirectional=use_bi_gru
        )
        self.no_txtnorm = no_txtnorm

    def forward(self, captions: Tensor, lengths: Tensor) -> Tensor:
        """captions (C, W) word ids, lengths (C,) -> words (C, W, D), zero beyond each length."""
        return self.words_and_sentence(captions, lengths)[0]

    def words_and_sentence(self, captions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The words (C, W, D), and the last layer's final state (C, D), mean of its directions."""
        # Sorted here, from lengths on the host: packing would fetch the order back from the device.
        lengths, order = lengths.cpu().sort(descending=True, stable=True)
        back = order.argsort().to(captions.device)
        x = self.embed(captions[order.to(captions.device)])  # (C, W, word_dim)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        # Rows of each caption's last word; sent first, for the device would have to finish the GRU.
        starts = packed.batch_sizes.cumsum(0) - packed.batch_sizes  # (W,) of each step in T
        last = (starts[lengths - 1] + torch.arange(len(lengths))).to(x.device)  # (C,)
        # Padded last: until then there are the words T only.
        x = packed_gru(self.rnn, packed).float()  # (T, D) or (T, 2 D); float32 under autocast too
        # A caption's final states: ahead at its last word, behind at its first.
        if self.rnn.bidirectional:
            ahead, behind = x.chunk(2, dim=-1)
            x = (ahead + behind) / 2  # (T, D)
            sentence = (ahead[last] + behind[: len(last)]) / 2  # (C, D)
        else:
            sentence = x[last]  # (C, D)
        x = x if self.no_txtnorm else l2norm(x, dim=-1)  # (T, D)
        packed = packed._replace(data=x)
        x, _ = pad_packed_sequence(packed, batch_first=True, total_length=captions.size(1))
        return x[back], sentence[back]  # (C, W, D), (C, D)


class CrossAttention(NamedTuple):
    """What decides a stacked cross attention score; see options.py for the names."""

    words_query: bool  # t2i: words attend to regions; else i2t: regions attend to words
    raw_feature_norm: str = "clipped_l2norm"
    agg_func: str = "LogSumExp"
    lambda_softmax: float = 9.0
    lambda_lse: float = 6.0
    focus: float = 0.0  # PFAN: what the aggregate of each query's largest weight counts


def attention(s: Tensor, how: CrossAttention, inside: Tensor | None = None) -> Tensor:
    """Attention of each query to the keys, which sums to 1, from dots s (N, W, M, R): like s.

    Leaves s as it is. See attend for `inside`.
    """
    query, key = (1, 3) if how.words_query else (3, 1)  # their dimensions in s
    norm = choose(RAW_FEATURE_NORM, how.raw_feature_norm, "raw_feature_norm")
    # Without a graph a pass writes over its input: a second buffer would leave the cache.
    mul = Tensor.mul if s.requires_grad else Tensor.mul_
    if inside is not None and not how.words_query and how.raw_feature_norm == "softmax":
        s = s.masked_fill(~inside[:, None], -torch.inf)  # the other norms add up zeros
    a = norm.before(s, query)  # like s
    scale = how.lambda_softmax
    a = mul(a, norm.over(a, query, scale) if norm.over else scale)
    if inside is not None and how.words_query:
        a = a.masked_fill(~inside[:, None], -torch.inf)  # like s
    return a.softmax(key)


def cosine(dot: Tensor, square: Tensor, query_length: Tensor) -> Tensor:
    """dot / (query_length * sqrt(square)): of a query and what it attends to, of that square.

    As published the two lengths' product counts as 1e-8 at least. A vanished vector passes no
    gradient, as in l2norm; it would outweigh all others. Overwrites dot where no graph is kept.
    """
    # A Gram form may come out below 0; see restore_faint for the rows where it does.
    length = square.clamp_min(1e-30).sqrt() * query_length  # like square
    if not (dot.requires_grad or length.requires_grad):
        return dot.div_(length.clamp_min_(EPS))
    x = dot / length.clamp_min(EPS)  # like square
    return torch.where((square <= EPS**2) | (query_length == 0), x.detach(), x)  # like square


def restore_faint(
    x: Tensor,
    square: Tensor,
    bound: Tensor,
    gather: Callable[..., tuple[Tensor, Tensor, Tensor]],
    cosine: Callable[[Tensor, Tensor, Tensor], Tensor] = cosine,
) -> Tensor:
    """Cosines x with those of faint attended vectors computed anew, from the vectors themselves.

    The Gram form takes a length |c|^2 = a' G a from terms as large as `bound`, the largest |k|^2 of
    the keys: where they cancel, the cosine is off by some 2e-8 / |c|^2 in keys of unit length, and
    by 2e-8 / |c| only if c is built. Trained models lie above |c| = 0.5; few rows are faint.
    `gather(*indices in x)` gives (P,) rows' attention (P, K), queries (P, D) and keys (P, K, D).
    """
    rows = (square < FAINT * bound).nonzero()  # (P, dimensions of x)
    if not len(rows):
        return x
    with_size = gather(*rows[:1].unbind(1))[2].numel()
    for some in rows.split(max(1, block_size(x.device) // with_size)):
        a, queries, keys = gather(*some.unbind(1))
        c = (a[:, None] @ keys)[:, 0]  # (P, D)
        lengths = queries.norm(dim=1)  # (P,)
        new = cosine((queries * c).sum(1), c.square().sum(1), lengths)  # (P,)
        x = x.index_put(some.unbind(1), new)
    return x


def aggregate(x: Tensor, dim: int, how: CrossAttention, inside: Tensor | None) -> Tensor:
    """One number for the queries of each pair, along `dim` of x, of those that are inside."""
    function = choose(AGG_FUNC, how.agg_func, "agg_func")
    if inside is None:
        return function(x, dim, how.lambda_lse)
    adds = how.agg_func in ("Mean", "Sum")
    x = x.masked_fill(~inside, 0 if adds else -torch.inf)  # like x
    if how.agg_func == "Mean":
        return x.sum(dim) / inside.sum(dim)
    return function(x, dim, how.lambda_lse)


def attend(
    s: Tensor,
    gram: Tensor,
    query_length: Tensor,
    how: CrossAttention,
    vectors: tuple[Tensor, Tensor],
    inside: Tensor | None = None,
) -> Tensor:
    """Scores (N, M) of N captions of W words and M images, from their dots s (N, W, M, R).

    gram holds the dots among the keys: t2i (M, R, R) among each image's regions, i2t (N, W, W)
    among each caption's words. query_length holds the norms of the query rows: t2i (N, W, 1), i2t
    (M, R), or with an N or M more where a caption meets one image only. `vectors` are the words (N,
    W, D) and regions (M, R, D) themselves, for the few rows that need them; where pairs pose as one
    caption (N = 1) or one image, those of each pair. `inside` (1, M, R) or (N, 1, R) says which
    regions there are, the others being zeros; None: all. Overwrites s where no graph is kept.

    The attended vector c = sum_k a_k k is not built: q.c = sum_k a_k s_k, and |c|^2 = a' G a.
    Both directions of section 3.1 are this function, i-t with regions as queries, t-i with words.
    """
    key = 3 if how.words_query else 1
    over = 1 if how.words_query else 2
    mul = Tensor.mul if s.requires_grad else Tensor.mul_
    a = attention(s, how, inside)  # like s
    if how.words_query:
        rows = a.flatten(0, 1).transpose(0, 1)  # (M, N W, R)
        g = (rows @ gram).transpose(0, 1).view(s.shape)  # (N, W, M, R)
    else:
        g = (gram @ a.flatten(2)).view(s.shape)  # (N, W, M, R)
    square = mul(g, a).sum(key)  # (N, W, M) or (N, M, R)
    dot = mul(s, a).sum(key)  # like square
    x = cosine(dot, square, query_length)  # like square

    words, regions = vectors
    n_captions, n_images = s.size(0), s.size(2)

    def gather(n: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, m, r = (second, third, None) if how.words_query else (None, second, third)
        caption = n if len(words) == n_captions else m
        image = m if len(regions) == n_images else n
        if how.words_query:
            return a[n, w, m], words[caption, w], regions[image]
        return a.transpose(1, 3)[n, r, m], regions[image, r], words[caption]

    bound = gram.diagonal(dim1=1, dim2=2).amax(1)  # (M,) or (N,)
    bound = bound if how.words_query else bound[:, None, None]
    x = restore_faint(x, square, bound, gather)  # like square

    rows = None if how.words_query else inside  # of the queries
    scores = aggregate(x, over, how, rows)  # (N, M)
    if how.focus:
        # max().values, not amax(): ties pass their gradient to one key, as published.
        scores = scores + how.focus * aggregate(a.max(key).values, over, how, rows)  # (N, M)
    return scores


def compile_scores() -> None:
    """Let torch.compile fuse the passes of SCAN's score, for the rest of this process."""
    global attend
    attend = torch.compile(attend, dynamic=True)


def packed_words(
    words: Tensor, norms: Tensor | None, cap_lens: Tensor, size: int
) -> tuple[list[tuple[Tensor, list]], Tensor]:
    """Chunks of about `size` words without padding, and the order (C,) of their captions.

    A chunk is (words (T, D), groups): one after the other, captions of W words (n, W, D) and what
    attend needs of them, their norms (n, W, 1) or, without `norms` (C, W), dots (n, W, W).
    """
    lengths, order = cap_lens.sort(stable=True)
    at = torch.arange(words.size(1))
    rows = (order[:, None] * words.size(1) + at)[at < lengths[:, None]].to(words.device)
    words = words.flatten(0, 1).index_select(0, rows)  # (all T, D)
    norms = None if norms is None else norms.flatten().index_select(0, rows)  # (all T,)
    number = (lengths.cumsum(0) - 1) // size  # (C,) the chunk of each caption
    runs, counts = torch.stack((number, lengths)).unique_consecutive(dim=1, return_counts=True)
    groups, start = {}, 0
    for chunk, w, n in zip(*runs.tolist(), counts.tolist(), strict=True):
        some = slice(start, start + n * w)
        start += n * w
        part = words[some].view(n, w, -1)  # (n, W, D)
        need = part @ part.mT if norms is None else norms[some].view(n, w, 1)
        groups.setdefault(chunk, []).append((part, need))
    sizes = [sum(part[..., 0].numel() for part, _ in group) for group in groups.values()]
    return list(zip(words.split(sizes), groups.values(), strict=True)), order


def score_all(
    images: tuple[Tensor, ...],
    captions: tuple[Tensor, ...],
    cap_lens: Tensor,
    how: CrossAttention,
) -> Tensor:
    """Scores (I, C) of all images and captions, no graph kept; see xattn_score for the tuples."""
    regions, of_images, *inside = images
    block, regions_of = block_size(regions.device), regions.size(1)
    images_of = max(1, min(len(regions), 64, block // regions_of))
    # Twice a block: the product gains by it, and what follows takes one length of captions at once.
    size = max(1, 2 * block // (images_of * regions_of))
    vectors, norms = captions if how.words_query else (*captions, None)
    chunks, order = packed_words(vectors, norms, cap_lens, size)
    scores = []
    for start in range(0, len(regions), images_of):
        some = slice(start, start + images_of)
        columns = regions[some].flatten(0, 1).mT  # (D, i R)
        need = of_images[some]  # (i, R, R) or (i, R)
        mask = inside[0][None, some] if inside else None  # (1, i, R)
        parts = []
        for words, groups in chunks:
            s = words @ columns  # (T, i R)
            sizes = [part[..., 0].numel() for part, _ in groups]
            for (part, of_words), dots in zip(groups, s.split(sizes), strict=True):
                dots = dots.view(*part.shape[:2], -1, regions_of)  # (n, W, i, R)
                pair = (need, of_words) if how.words_query else (of_words, need)
                vectors = part, regions[some]
                parts.append(attend(dots, *pair, how, vectors, mask))  # (n, i)
        scores.append(torch.cat(parts))  # (C, i)
    back = order.argsort().to(regions.device)
    return torch.cat(scores, 1)[back].mT  # (I, C)


def score_some(
    images: tuple[Tensor, ...],
    captions: tuple[Tensor, ...],
    paired: bool,
    how: CrossAttention,
) -> Tensor:
    """Scores, with a graph, of captions of one length and some images; see pair_scores."""
    (regions, need, *inside), (words, *norms) = images, captions
    gram = need if how.words_query else words @ words.mT  # (i, R, R) or (n, W, W)
    lengths = norms[0] if how.words_query else need  # (n, W) or (i, R)
    if paired:
        s = words @ regions.mT  # (p, W, R)
        # t2i takes the pairs for images that all meet one "caption", i2t for captions that meet one
        # "image": the Gram matrices are then one a pair.
        s = s.transpose(0, 1)[None] if how.words_query else s[:, :, None]
        lengths = lengths.mT[None] if how.words_query else lengths[:, None]
        inside = [x[None] if how.words_query else x[:, None] for x in inside]
    else:
        s = (words.flatten(0, 1) @ regions.flatten(0, 1).mT).view(
            *words.shape[:2], len(regions), -1
        )
        lengths = lengths[..., None] if how.words_query else lengths
        inside = [x[None] for x in inside]
    # s is (n, W, i, R); paired (1, W, p, R) or (p, W, 1, R).
    scores = attend(s, gram, lengths, how, (words, regions), *inside)
    return scores.flatten() if paired else scores  # (p,) or (n, i)


def xattn_score(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    how: CrossAttention,
    inside: Tensor | None = None,
) -> Tensor:
    """Scores (I, C) of all pairs, with the sparse backward where a gradient is wanted.

    `inside` (I, R) says which regions there are, the others being zeros; None: all.
    """
    cap_lens = torch.as_tensor(cap_lens).cpu()
    # What the score reads beside the vectors, once a step: of keys that are regions the dots among
    # them (those among words are made where they are read), of queries their norms.
    if how.words_query:
        images = images, images @ images.mT  # (I, R, D), (I, R, R)
        captions = captions, captions.norm(dim=2)  # (C, W, D), (C, W)
    else:
        images, captions = (images, images.norm(dim=2)), (captions,)  # (I, R, D), (I, R); (C, W, D)
    images = images if inside is None else (*images, inside)
    every, some = partial(score_all, how=how), partial(score_some, how=how)
    return pair_scores(every, some, images, captions, cap_lens)


def xattn_score_t2i(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    raw_feature_norm: str = "clipped_l2norm",
    agg_func: str = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
) -> Tensor:
    """Text-to-image score (words attend to regions) of all pairs: (I, C).

    images (I, R, D); captions (C, W, D), of which the first cap_lens (C,) words of each are read.
    Captions of one length are scored together, so that no padding enters, in blocks of dots that
    fit the cache; their size does not change the result. Raises ValueError on an unknown name.
    """
    how = CrossAttention(True, raw_feature_norm, agg_func, lambda_softmax, lambda_lse)
    return xattn_score(images, captions, cap_lens, how)


def xattn_score_i2t(
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    raw_feature_norm: str = "clipped_l2norm",
    agg_func: str = "LogSumExp",
    lambda_softmax: float = 4.0,
    lambda_lse: float = 5.0,
) -> Tensor:
    """Image-to-text score (regions attend to words) of all pairs: (I, C); see xattn_score_t2i."""
    how = CrossAttention(False, raw_feature_norm, agg_func, lambda_softmax, lambda_lse)
    return xattn_score(images, captions, cap_lens, how)


class ContrastiveLoss(nn.Module):
    """Hinge ranking loss over a batch of matched pairs, both directions, summed (section 3.2).

    With `max_violation` each image counts its hardest caption and each caption its hardest image
    only (VSE++); else every negative counts.
    """

    def __init__(self, margin: float = 0.2, max_violation: bool = False):
        super().__init__()
        self.margin, self.max_violation = margin, max_violation

    def forward(self, scores: Tensor, image_index: Tensor | None = None) -> Tensor:
        """scores (B, B), images by captions, matched pairs on the diagonal -> loss ().

        With image_index (B,), which image each pair shows, another caption of the same image is
        no negative; without it, as published, it is.
        """
        matched = scores.diagonal()  # (B,)
        if image_index is None:
            image_index = torch.arange(len(scores), device=scores.device)  # (B,)
        own = image_index[:, None] == image_index[None, :]  # (B, B)
        caption_cost = (self.margin + scores - matched[:, None]).clamp(min=0)  # (B, B)
        image_cost = (self.margin + scores - matched[None, :]).clamp(min=0)  # (B, B)
        caption_cost = caption_cost.masked_fill(own, 0)
        image_cost = image_cost.masked_fill(own, 0)
        if self.max_violation:
            caption_cost = caption_cost.max(1).values  # (B,)
            image_cost = image_cost.max(0).values  # (B,)
        return caption_cost.sum() + image_cost.sum()


def without_dropped(regions: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoded regions (I, R, D), and 'inside' (I, R) if --drop left not all: the rest are zeros."""
    if "inside" not in batch:
        return {"regions": regions}
    inside = batch["inside"]
    return {"regions": regions.masked_fill(~inside[..., None], 0), "inside": inside}


def encode_in_parts(
    encode: Callable[[dict[str, Tensor]], dict[str, Tensor]], batch: dict[str, Tensor], parts: int
) -> dict[str, Tensor]:
    """encode(batch), part by part; the backward pass encodes each again, and nothing else is kept.

    Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
    """
    chunks = zip(*(x.chunk(parts) for x in batch.values()), strict=True)
    encoded = [
        checkpoint(encode, dict(zip(batch, part, strict=True)), use_reentrant=False)
        for part in chunks
    ]
    return {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}


class Encoders(nn.Module):
    """What all models share: `img_enc`, `txt_enc`, and the call that wraps both."""

    grad_checkpointing = 0  # parts in which a batch's images are encoded; 0: whole, all is kept

    def forward(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both encodings of a batch of pairs: the call that DistributedDataParallel wraps."""
        parts = self.grad_checkpointing
        if not (parts and torch.is_grad_enabled()):
            return self.encode_images(batch), self.encode_captions(batch)
        text = {name: batch[name] for name in TEXT if name in batch}
        images = {name: x for name, x in batch.items() if name not in TEXT}
        # A GRU's steps are dear where few captions share one: captions of like length together, in
        # half as many parts.
        order = batch["lengths"].argsort(stable=True)
        text = {name: x[order.to(x.device)] for name, x in text.items()}
        images = encode_in_parts(self.encode_images, images, parts)
        captions = encode_in_parts(self.encode_captions, text, (parts + 1) // 2)
        back = order.argsort()
        return images, {name: x[back.to(x.device)] for name, x in captions.items()}

    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch['images'] (I, R, F) -> {'regions': (I, R, D)}.

        With batch['inside'] (I, R), which regions --drop left, also 'inside'.
        """
        return without_dropped(self.img_enc(batch["images"]), batch)

    def encode_captions(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch['captions'] (C, W), batch['lengths'] (C,) -> {'words': (C, W, D), 'lengths'}."""
        words = self.txt_enc(batch["captions"], batch["lengths"])
        return {"words": words, "lengths": batch["lengths"]}


class SCAN(Encoders):
    """Region and word encoders, and their stacked cross attention score.

    `text_encoder` is one made already, such as BERT's, in place of the GRU.
    """

    compile_scores = staticmethod(compile_scores)
    FOCUS = {"t2i": 0.0, "i2t": 0.0}  # of CrossAttention, for each direction

    def __init__(
        self,
        vocab_size: int,
        img_dim: int = 2048,
        word_dim: int = 300,
        embed_size: int = 1024,
        num_layers: int = 1,
        bi_gru: bool = False,
        precomp_enc_type: str = "basic",
        no_imgnorm: bool = False,
        no_txtnorm: bool = False,
        cross_attn: str = "t2i",
        raw_feature_norm: str = "clipped_l2norm",
        agg_func: str = "LogSumExp",
        lambda_softmax: float = 9.0,
        lambda_lse: float = 6.0,
        image_encoder: Callable[..., nn.Module] = EncoderImage,
        text_encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.img_enc = image_encoder(img_dim, embed_size, precomp_enc_type, no_imgnorm)
        self.txt_enc = text_encoder or EncoderText(
            vocab_size, word_dim, embed_size, num_layers, bi_gru, no_txtnorm
        )
        words_query = choose({"t2i": True, "i2t": False}, cross_attn, "cross_attn")
        choose(RAW_FEATURE_NORM, raw_feature_norm, "raw_feature_norm")
        choose(AGG_FUNC, agg_func, "agg_func")
        self.how = CrossAttention(
            words_query,
            raw_feature_norm,
            agg_func,
            lambda_softmax,
            lambda_lse,
            self.FOCUS[cross_attn],
        )

    def similarity(
        self,
        images: dict[str, Tensor],
        captions: dict[str, Tensor],
        cross_attn: str | None = None,
    ) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption.

        `cross_attn` (t2i or i2t) is a direction other than the one that the model was made for.
        """
        how = self.how
        if cross_attn is not None:
            how = how._replace(words_query=cross_attn == "t2i", focus=self.FOCUS[cross_attn])
        words, lengths = captions["words"], captions["lengths"]
        return xattn_score(images["regions"], words, lengths, how, images.get("inside"))
