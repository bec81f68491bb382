"""Scores and losses as plain loops, straight from the papers.

The tests compare the project's fast routes with them. tests/reference_systems.py puts encoders in
front of the scores.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def normalise(s: Tensor, norm: str, dim: int = 0) -> Tensor:
    """Dots s (Q, K), normalised over the Q queries (dimension `dim`) of each key."""
    if norm.startswith("clipped"):
        s = torch.where(s > 0, s, 0.1 * s)
    if norm.endswith("l2norm"):
        length = s.norm(dim=dim, keepdim=True)
        # The dots with an empty region are zeros. They pass no gradient, which would be 1e8 times
        # too large.
        return torch.where(length == 0, 0, s / (length.masked_fill(length == 0, 1) + 1e-8))
    if norm.endswith("l1norm"):
        return s / (s.abs().sum(dim, keepdim=True) + 1e-8)
    if norm == "softmax":
        return s.softmax(dim)
    return s


def aggregate(x: Tensor, agg: str, lambda_lse: float) -> Tensor:
    """x (Q,) aggregated to one number."""
    return {
        "LogSumExp": lambda: (lambda_lse * x).logsumexp(0) / lambda_lse,
        "Mean": lambda: x.sum() / len(x),
        "Max": lambda: max(x),
        "Sum": lambda: x.sum(),
    }[agg]()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of two vectors; a vector that is almost zero passes no gradient."""
    length = (x.norm() * y.norm()).clamp_min(1e-8)
    cos = x @ y / length
    return cos if x.any() and y.norm() > 1e-8 else cos.detach() + 0 * x.sum()


def pair_score(
    queries: Tensor,
    keys: Tensor,
    norm: str,
    agg: str,
    lambda_softmax: float,
    lambda_lse: float,
    bonus: float = 0.0,
) -> Tensor:
    """Score of one pair: queries (Q, D) attend to keys (K, D), one query at a time."""
    weights = normalise(queries @ keys.T, norm)  # (Q, K)
    cosines, largest = [], []
    for query, row in zip(queries, weights, strict=True):
        attention = torch.softmax(lambda_softmax * row, 0)  # (K,)
        attended = (attention[:, None] * keys).sum(0)  # (D,)
        cosines.append(cosine(query, attended))
        largest.append(max(attention))
    score = aggregate(torch.stack(cosines), agg, lambda_lse)
    return score + bonus * aggregate(torch.stack(largest), agg, lambda_lse) if bonus else score


def xattn_score(
    direction: str,
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    norm: str = "clipped_l2norm",
    agg: str = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
    bonus: float = 0.0,
) -> Tensor:
    """All pairs, one after the other: (I, C)."""
    scores = []
    for image in images:
        for caption, length in zip(captions, cap_lens, strict=True):
            words = caption[:length]
            q, k = (words, image) if direction == "t2i" else (image, words)
            scores.append(pair_score(q, k, norm, agg, lambda_softmax, lambda_lse, bonus))
    return torch.stack(scores).view(len(images), len(captions))


def caption_loop(
    direction: str,
    images: Tensor,
    captions: Tensor,
    cap_lens: Tensor,
    norm: str = "clipped_l2norm",
    agg: str = "LogSumExp",
    lambda_softmax: float = 9.0,
    lambda_lse: float = 6.0,
) -> Tensor:
    """All images at once, one caption after the other: (I, C). The benchmark compares with it.

    The order of operations is that of the published programs: the caption is copied for every
    image, the dots are normalised with one row per key and copied to a new layout for the softmax
    over the keys, and the attended vectors are columns.
    """
    scores = []
    for caption, length in zip(captions, cap_lens, strict=True):
        words = caption[:length].repeat(len(images), 1, 1)  # (I, W, D)
        queries, keys = (words, images) if direction == "t2i" else (images, words)
        weights = normalise(keys @ queries.mT, norm, 2).mT.contiguous()  # (I, Q, K)
        attention = torch.softmax(lambda_softmax * weights, 2).mT.contiguous()  # (I, K, Q)
        attended = (keys.mT @ attention).mT  # (I, Q, D)
        lengths = queries.norm(dim=2) * attended.norm(dim=2)  # (I, Q)
        x = (queries * attended).sum(2) / lengths.clamp_min(1e-8)  # (I, Q)
        if agg == "LogSumExp":
            scores.append(torch.logsumexp(lambda_lse * x, 1) / lambda_lse)
        else:
            scores.append({"Mean": x.mean, "Sum": x.sum, "Max": x.amax}[agg](1))
    return torch.stack(scores, 1)


def positions(encoder: torch.nn.Module, regions: Tensor, blocks: Tensor, overlap: Tensor) -> Tensor:
    """PFAN's position vectors (R, P) of one image, region by region and block by block."""
    table, vectors = encoder.position_embedding.weight, []
    for region, ids, weights in zip(regions, blocks.tolist(), overlap, strict=True):
        embedded = [table[k] for k in ids]
        if encoder.attends:
            query = encoder.fc_att.weight @ region + encoder.fc_att.bias  # (P,)
            dots = torch.stack([torch.tanh(query @ e) for e in embedded])  # (K,)
            weights = torch.softmax(weights * torch.softmax(dots, 0), 0)  # (K,)
        vectors.append(sum(w * e for w, e in zip(weights, embedded, strict=True)))
    return torch.stack(vectors)


def chan_pair(
    image: Tensor, words: Tensor, coding: str, pooling: str, alpha: float, belta: float
) -> Tensor:
    """CHAN's score of one pair: regions (R, D), words (W, D), row by row."""
    if coding == "VHACoding":
        x = [max(region @ word for region in image) for word in words]
    elif coding == "THACoding":
        x = [max(region @ word for word in words) for region in image]
    else:
        x = []
        for region in image:
            mean = torch.softmax(words @ region / alpha, 0) @ words  # (D,)
            x.append(region @ mean / (mean.norm() + 1e-8))
    x = torch.stack(x)  # (K,)
    return {
        "LSEPooling": lambda: (x / belta).logsumexp(0),
        "MeanPooling": lambda: x.sum() / len(x),
        "MaxPooling": lambda: max(x),
        "SumPooling": lambda: x.sum(),
        "SoftmaxPooling": lambda: ((x / belta).softmax(0) * x).sum(),
    }[pooling]()


def chan_plain(regions: Tensor, words: Tensor, lengths: Tensor, belta: float) -> Tensor:
    """CHAN's VHA with LSE, all pairs at once (I, C). The benchmark compares with it.

    As in the published program, all dots are in memory at once and the padding is filled with -1.
    The mask of the padding has as many numbers: it is a product over regions and words. The
    padding of the maxima is -inf.
    """
    s = regions.flatten(0, 1) @ words.flatten(0, 1).mT  # (I R, C W)
    s = s.view(*regions.shape[:2], *words.shape[:2]).permute(0, 2, 1, 3)  # (I, C, R, W)
    word_mask = torch.arange(words.size(1)) < lengths[:, None]  # (C, W)
    word_mask = word_mask.to(regions.device)
    mask = s.new_ones(len(regions) * regions.size(1), 1) @ word_mask.to(s).view(1, -1)  # (I R, C W)
    mask = mask.view(*regions.shape[:2], *word_mask.shape).permute(0, 2, 1, 3)  # (I, C, R, W)
    s = s.masked_fill(mask == 0, -1)  # (I, C, R, W)
    best = s.max(2).values  # (I, C, W)
    return (best.masked_fill(~word_mask, -torch.inf) / belta).logsumexp(2)  # (I, C)


def info_nce(
    scores: Tensor, temperature: float, margin: float, image_index: Tensor | None = None
) -> Tensor:
    """InfoNCE of matched pairs on the diagonal, row by row and column by column.

    With image_index (B,), another caption of the same image is not a negative.
    """
    n, total = len(scores), 0.0
    index = list(range(n)) if image_index is None else image_index.tolist()
    for s in (scores, scores.T):
        for i in range(n):
            z = [0 * s[i, i]]
            z += [
                (s[i, j] - s[i, i] + margin) / temperature for j in range(n) if index[j] != index[i]
            ]
            total = total + torch.stack(z).logsumexp(0) / n
    return total


def hinge(
    scores: Tensor, margin: float, max_violation: bool, image_index: Tensor | None = None
) -> Tensor:
    """The ranking loss, one negative at a time; see info_nce for image_index."""
    n = len(scores)
    index = list(range(n)) if image_index is None else image_index.tolist()
    total = 0 * scores.sum()
    for i in range(n):
        others = [j for j in range(n) if index[j] != index[i]]
        caption_costs = [F.relu(margin + scores[i, j] - scores[i, i]) for j in others]
        image_costs = [F.relu(margin + scores[j, i] - scores[i, i]) for j in others]
        for costs in (caption_costs, image_costs):
            if costs:
                total = total + (max(costs) if max_violation else sum(costs))
    return total


def ranks(scores: np.ndarray) -> tuple[list[int], list[int]]:
    """0-based ranks in both directions, counted; a tie with a wrong candidate costs one rank."""
    n, m = scores.shape
    k = m // n
    i2t, t2i = [], []
    for i in range(n):
        own = range(k * i, k * i + k)
        best = max(scores[i, j] for j in own)
        i2t.append(sum(scores[i, j] >= best for j in range(m) if j not in own))
    for j in range(m):
        t2i.append(sum(scores[i, j] >= scores[j // k, j] for i in range(n) if i != j // k))
    return i2t, t2i


def block_cosines(q: Tensor, c: Tensor, num_block: int) -> Tensor:
    """Cosines (..., B) of q and c (..., D), block by block; see cosine."""
    q, c = (x.unflatten(-1, (num_block, -1)) for x in (q, c))  # (..., B, D / B)
    x = (q * c).sum(-1) / (q.norm(dim=-1) * c.norm(dim=-1)).clamp_min(1e-8)
    return torch.where((q != 0).any(-1) & (c.norm(dim=-1) > 1e-8), x, x.detach())


def gsmn_nodes(queries: Tensor, keys: Tensor, scale: float, num_block: int) -> Tensor:
    """Node vectors (Q, B) of one pair: queries (Q, D) attend to keys (K, D)."""
    attention = torch.softmax(scale * normalise(queries @ keys.T, "clipped_l2norm"), 1)  # (Q, K)
    return block_cosines(queries, attention @ keys, num_block)


def log_gaussians(kernels: torch.nn.Module, boxes: Tensor) -> Tensor:
    """log w_ijk (R, R, K) of one image's boxes (R, 4), not normalised.

    They are logarithms because all w of narrow kernels may be too small for a number. The divisor
    would then be 0; the softmax of the logarithms is the same quotient without it.
    """
    mu, nu, s, t = (
        getattr(kernels, name)[:, 0]  # (K,)
        for name in ("mean_rho", "mean_theta", "precision_rho", "precision_theta")
    )
    rows = []
    for one in boxes:
        for other in boxes:
            dx, dy = (one[:2] + one[2:]) / 2 - (other[:2] + other[2:]) / 2
            rho, theta = (dx**2 + dy**2).sqrt(), torch.atan2(dx, dy)
            d = (theta - nu).abs()  # (K,)
            d = torch.minimum(d, (2 * np.pi - d).abs())
            rho_part = (rho - mu) ** 2 / (2 * (1e-14 + s**2))
            rows.append(-rho_part - d**2 / (2 * (1e-14 + t**2)))
    return torch.stack(rows).view(len(boxes), len(boxes), -1)


def graph_score(
    nodes: Tensor, w: Tensor, a: Tensor, graph: torch.nn.Module, neighbours: bool
) -> Tensor:
    """One graph's score: nodes (V, B), kernel weights w (V, V, K), a (V, V); sums written out."""
    convolution = next(iter(graph.children()))
    total = 0
    for i in range(len(nodes)):
        parts = []
        for k, linear in enumerate(convolution.conv_weights):
            weights = w[i, :, k] * a[i]  # (V,), of each neighbour j
            vector = weights @ nodes if neighbours else weights.sum() * nodes[i]
            parts.append(linear(vector))
        h = torch.cat(parts)
        h = h.tanh() if neighbours else h
        total = total + graph.out_2(graph.out_1(h).tanh()).mean()
    return total / len(nodes)


def gsmn_pair(
    model: torch.nn.Module, image: Tensor, boxes: Tensor, words: Tensor, pairs: list | None
) -> Tensor:
    """GSMN's score of one pair: regions (R, D), boxes (R, 4), words (W, D), dependencies.

    `pairs` are [governor, dependent], the root's first; None is the dense graph.
    """
    num_block, scale, neighbours = model.config
    # Textual graph. Words outside a neighbourhood have e_ij = 0, and rows are normalised after it.
    # A softmax over the neighbourhood is the same; it does not underflow where others are strong.
    dots, a = scale * words @ words.T, torch.ones(len(words), len(words)).to(words)  # (W, W)
    if pairs is not None:
        a = torch.zeros_like(dots)
        for governor, dependent in pairs[1:]:
            if max(governor, dependent) < len(words):
                a[governor, dependent] = a[dependent, governor] = 1
        a = a + torch.eye(len(words), dtype=a.dtype)
        a = a.clamp(max=1) if neighbours else a
    e = a * torch.softmax(torch.where(a > 0, dots, -torch.inf), 1)  # (W, W)
    if pairs is not None:
        e = e / (e.norm(dim=1, keepdim=True) + 1e-8)
    if neighbours:
        w, a = e[:, :, None].expand(-1, -1, 8), torch.ones_like(e)
    else:
        w = e[:, :, None] * model.textual_graph.graph_convolution_3.params[:, 0]  # (W, W, K)
        w = w / w.sum(1, keepdim=True)
    nodes = gsmn_nodes(words, image, scale, num_block)
    score = graph_score(nodes, w, a, model.textual_graph, neighbours)
    # Visual graph.
    w = log_gaussians(model.visual_graph.graph_convolution_1, boxes)  # (R, R, K)
    w = w.softmax(1 if neighbours else 2)  # (R, R, K)
    nodes = gsmn_nodes(image, words, scale, num_block)
    return score + graph_score(nodes, w, w.new_ones(w.shape[:2]), model.visual_graph, neighbours)


def gsmn_caption_loop(
    model: torch.nn.Module, images: dict[str, Tensor], captions: dict[str, Tensor], boxes: Tensor
) -> Tensor:
    """Dense GSMN, all images at once, one caption after the other: (I, C); for the benchmark.

    The order of operations is that of the published program: the caption is copied for every
    image, attended vectors are built in both directions, each node's vector is copied once per
    neighbour, and the kernels' weights, computed once per caption, sum up the copies.
    """
    regions = images["regions"]
    num_block, scale, _ = model.config
    visual = model.visual_graph.graph_convolution_1
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2  # (I, R, 2)
    dx, dy = (centre[:, :, None] - centre[:, None]).unbind(-1)  # (I, R, R)
    rho, theta = (dx**2 + dy**2).sqrt(), torch.atan2(dx, dy)

    def nodes(queries: Tensor, keys: Tensor) -> Tensor:
        weights = normalise(keys @ queries.mT, "clipped_l2norm", 2).mT.contiguous()  # (I, Q, K)
        attention = torch.softmax(scale * weights, 2)  # (I, Q, K)
        attended = (keys.mT.contiguous() @ attention.mT.contiguous()).mT  # (I, Q, D)
        return block_cosines(queries, attended, num_block)  # (I, Q, B)

    def structure(x: Tensor, w: Tensor, graph: torch.nn.Module) -> Tensor:
        convolution = next(iter(graph.children()))
        n, v, _ = x.shape
        copies = x[:, :, None].repeat(1, 1, v, 1).flatten(0, 1)  # (I V, V, B)
        sums = w.mT @ copies  # (I V, K, B)
        parts = [linear(sums[:, k]) for k, linear in enumerate(convolution.conv_weights)]
        h = graph.out_2(graph.out_1(torch.cat(parts, 1)).tanh())  # (I V, 1)
        return h.view(n, -1).mean(1)  # (I,)

    scores = []
    for caption, length in zip(captions["words"], captions["lengths"].tolist(), strict=True):
        words = caption[:length].repeat(len(regions), 1, 1)  # (I, W, D)
        e = torch.softmax(scale * words[:1] @ words[:1].mT, 2)  # (1, W, W)
        e = e.repeat(len(regions), 1, 1).flatten(0, 1)[:, :, None]  # (I W, W, 1)
        w = e * model.textual_graph.graph_convolution_3.params[:, 0]  # (I W, W, K)
        w = w / w.sum(1, keepdim=True)
        score = structure(nodes(words, regions), w, model.textual_graph)  # (I,)

        d = (theta.reshape(-1, 1) - visual.mean_theta[:, 0]).abs()  # (I R R, K)
        d = torch.minimum(d, (2 * np.pi - d).abs())
        g = (rho.reshape(-1, 1) - visual.mean_rho[:, 0]) ** 2
        g = torch.exp(-0.5 * g / (1e-14 + visual.precision_rho[:, 0] ** 2))
        g = g * torch.exp(-0.5 * d**2 / (1e-14 + visual.precision_theta[:, 0] ** 2))
        g = (g / g.sum(1, keepdim=True)).view(-1, regions.size(1), g.size(1))  # (I R, R, K)
        scores.append(score + structure(nodes(regions, words), g, model.visual_graph))
    return torch.stack(scores, 1)
