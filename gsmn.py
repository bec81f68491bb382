"""GSMN: node-level and structure-level matching of a textual and a visual graph.

Liu et al., Graph Structured Network for Image-Text Matching, CVPR 2020 (arXiv:2004.00277). Section
3.2, node level: each node attends to the nodes of the other modality; its vector holds the cosines,
block by block, with what it attends to. Structure level, in gsmn_graphs.py: a graph convolution
makes a score of these vectors. The score of a pair is the sum of both graphs' scores.

Shapes: I or M images, C or N captions, R regions, W words, D joint dimension, P pairs; B blocks of
D / B dimensions; F numbers of a key in a block. Comments give the shapes of a block of N captions
with M images; in the layout of pairs P stands for both (see attention.py).
"""

import re
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention import (
    REGIONS,
    WORDS,
    AttentionConfig,
    attention_weights,
    cosine,
    multiply,
    restore_faint,
)
from gsmn_data import GraphDataset, adjacency, check_boxes_are_there
from gsmn_graphs import KERNELS, TextualGraph, VisualGraph, structure_score, textual_edges
from model import EncoderImage, Encoders, EncoderText
from pairs import Encoding, PairScore, pair_scores
from system import ServedImage, System, add_lambda_softmax, encoder_options
from util.arguments import COUNT
from util.cli import InputError
from util.kept import keep

# The graph convolutions under the names of a later revision of the published code.
RENAMED = {"vGNN.": "graph_convolution_1.", "tGNN.": "graph_convolution_3."}


class MatchingConfig(NamedTuple):
    """The options of a score; `add_options` below explains them."""

    num_block: int = 16
    lambda_softmax: float = 20.0
    neighbours: bool = False


def in_blocks(images: Encoding, captions: Encoding, num_block: int) -> tuple[Tensor, Tensor]:
    """Words (N, W, B, D / B) and regions (M, R, B, D / B)."""
    size = num_block, -1
    return captions["words"].unflatten(2, size), images["regions"].unflatten(2, size)


def block_keys(x: Tensor, num_block: int) -> Tensor:
    """What the length of an attended vector sum_k alpha_k x_k needs, block by block: (N, V, B F).

    x (N, V, D) itself, if the attended vector's blocks of F = D / B numbers are built; or, if there
    are fewer keys than that, the blocks' Gram matrices, F = V: row k holds the dots of block b of
    x_k with that of each x_l.
    """
    part = x.unflatten(2, (num_block, -1)).transpose(1, 2)  # (N, B, V, D / B)
    if x.size(1) >= part.size(3):
        return x
    return (part @ part.mT).transpose(1, 2).flatten(2)  # (N, V, B V)


def block_norms(x: Tensor, num_block: int) -> Tensor:
    """Length of each block of x (N, V, D): (N, V, B); no gradient at 0."""
    square = x.square().unflatten(2, (num_block, -1)).sum(3)  # (N, V, B)
    return square.masked_fill(square == 0, 1).sqrt().masked_fill(square == 0, 0)  # (N, V, B)


def word_nodes(
    s: Tensor, dots: Tensor, images: Encoding, captions: Encoding, config: MatchingConfig
) -> Tensor:
    """Vectors (M, N, W, B) of the textual nodes, or (P, W, B): each word attends to the regions.

    s (B, N, W, M, R) holds the dots block by block, `dots` their sum over the blocks. images and
    captions hold their vectors, 'keys' and 'norms': see block_keys and block_norms.
    """
    weights = AttentionConfig("t2i", lambda_softmax=config.lambda_softmax)
    a = attention_weights(dots, WORDS, REGIONS, weights, images.get("region_mask"))
    keep(t2i=a)
    words, regions = in_blocks(images, captions, config.num_block)
    paired = a.dim() == 3
    by_image = a if paired else a.movedim(2, 0)  # (M, N, W, R)
    rows = by_image.reshape(len(regions), -1, a.size(-1))  # (M, N W, R)
    c = (rows @ images["keys"]).view(*by_image.shape[:-1], config.num_block, -1)  # (M, N, W, B, F)
    norms = captions["norms"]  # (N, W, B)
    if c.size(-1) == words.size(3):  # the blocks of the attended vectors
        return cosine((c * words).sum(-1), c.square().sum(-1), norms)  # (M, N, W, B)
    # As products of (B, R) and (R, 1): these are not written down before they are summed.
    column = a.reshape(-1, a.size(-1), 1)  # (N W M, R, 1)
    dot = s.flatten(1, -2).transpose(0, 1).bmm(column).view(*a.shape[:-1], -1)  # (N, W, M, B)
    dot = dot if paired else dot.movedim(2, 0)  # (M, N, W, B)
    square = c.flatten(0, -3).bmm(rows.reshape(-1, a.size(-1), 1)).view(dot.shape)  # (M, N, W, B)

    def faint_rows(at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        m, n, w, b = at[0], *at[-3:]  # of pairs m is n
        return by_image[at[:-1]], words[n, w, b], regions[m, :, b]

    bound = images["norms"].amax(1).square()  # (M, B)
    bound = bound.view(len(bound), *[1] * (dot.dim() - 2), -1)  # (M, 1, 1, B)
    return restore_faint(cosine(dot, square, norms), square, bound, faint_rows)  # (M, N, W, B)


def region_nodes(
    s: Tensor, dots: Tensor, images: Encoding, captions: Encoding, config: MatchingConfig
) -> Tensor:
    """Vectors (N, M, R, B) of the visual nodes, or (P, R, B): each region attends to the words.

    As word_nodes. Overwrites s where no graph is kept.
    """
    weights = AttentionConfig("i2t", lambda_softmax=config.lambda_softmax)
    a = attention_weights(dots, REGIONS, WORDS, weights)  # (N, W, M, R)
    keep(i2t=a)
    words, regions = in_blocks(images, captions, config.num_block)
    paired = a.dim() == 3
    c = captions["keys"].mT @ a.flatten(2)  # (N, B F, M R)
    c = c.view(len(a), config.num_block, -1, *a.shape[2:])  # (N, B, F, M, R)
    norms = images["norms"].movedim(-1, 1 if paired else 0)  # (B, M, R)
    if c.size(2) == words.size(3):  # the blocks of the attended vectors
        queries = regions.permute((0, 2, 3, 1) if paired else (2, 3, 0, 1))  # (B, F, M, R)
        x = cosine((c * queries).sum(2), c.square().sum(2), norms)  # (N, B, M, R)
        return x.movedim(1, -1)  # (N, M, R, B)
    dot = multiply(s, a).sum(2).transpose(0, 1)  # (N, B, M, R)
    square = multiply(c, a[:, None]).sum(2)  # (N, B, M, R)
    by_region = a.movedim(WORDS, -1)  # (N, M, R, W)

    def faint_rows(at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        n, b, place = at[0], at[1], (at[0], *at[2:])  # without the block: (n, m, r) or (p, r)
        m, r = place[-2:]
        return by_region[place], regions[m, r, b], words[n, :, b]

    bound = captions["norms"].amax(1).square()  # (N, B)
    bound = bound.view(*bound.shape, *[1] * (dot.dim() - 2))  # (N, B, 1, 1)
    x = restore_faint(cosine(dot, square, norms), square, bound, faint_rows)  # (N, B, M, R)
    return x.movedim(1, -1)  # (N, M, R, B)


class GraphMatching(PairScore):
    """The score of both graphs, as pairs.py calls it.

    images: 'regions', their 'keys', 'norms' and visual 'edges', and 'region_mask' if some are
    missing. captions: 'words' and, if the graph has any, textual 'edges' (N, W) or (N, W, all W).
    """

    captions_per_block = 16

    def __init__(self, config: MatchingConfig):
        self.config = config
        # The dots block by block, and the attended vectors.
        self.dots_size = 2 * config.num_block

    def block(self, images: Encoding, captions: Encoding, *weights: Tensor) -> Tensor:
        words, regions = in_blocks(images, captions, self.config.num_block)
        s = words.flatten(0, 1).transpose(0, 1) @ regions.flatten(0, 1).permute(1, 2, 0)
        s = s.view(len(s), *words.shape[:2], *regions.shape[:2])  # (B, n, W, i, R)
        return self.score(s, images, captions, *weights)  # (n, i)

    def pairs(self, images: Encoding, captions: Encoding, *weights: Tensor) -> Tensor:
        words, regions = in_blocks(images, captions, self.config.num_block)
        s = words.permute(2, 0, 1, 3) @ regions.permute(2, 0, 3, 1)  # (B, p, W, R)
        return self.score(s, images, captions, *weights)  # (p,)

    def score(self, s: Tensor, images: Encoding, captions: Encoding, *weights: Tensor) -> Tensor:
        """Scores (n, i), or (p,), of the dots s block by block."""
        config, words, paired = self.config, captions["words"], s.dim() == 4
        more = {"keys": block_keys(words, config.num_block)}
        more["norms"] = block_norms(words, config.num_block)
        dots = s.sum(0)  # (n, W, i, R)
        x = word_nodes(s, dots, images, captions | more, config)  # (i, n, W, B)
        y = region_nodes(s, dots, images, captions | more, config)  # (n, i, R, B)
        edges = captions.get("edges")
        if edges is not None and config.neighbours:
            edges = edges[:, None, :, : words.size(1)]  # (n, 1, W, W)
        elif edges is not None:
            edges = edges[..., None]  # (n, W, 1)
        how = {"neighbours": config.neighbours, "kept_as": "word_scores"}
        textual = structure_score(x, edges, *weights[:6], **how)  # (i, n)
        edges, mask = images["edges"], images.get("region_mask")
        how |= {"kept_as": "region_scores", "mask": mask}
        visual = structure_score(y, edges, *weights[6:], **how)  # (n, i)
        return visual + (textual if paired else textual.mT)  # (n, i) or (p,)


class GSMN(Encoders):
    """Region and word encoders, and the matching of their two graphs.

    Raises ValueError on sizes that do not fit.
    """

    caption_keys = ("captions", "lengths", "adjacency")

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
        lambda_softmax: float = 9.0,
        feat_dim: int = 16,
        num_block: int = 16,
        hid_dim: int = 32,
        out_dim: int = 1,
        is_sparse: bool = False,
        neighbours: bool = False,
        text_encoder: nn.Module | None = None,
    ):
        super().__init__()
        if embed_size % num_block:  # Q28
            raise ValueError(
                f"num_block {num_block}: expected a divisor of embed_size {embed_size}"
            )
        if feat_dim != num_block:
            raise ValueError(
                f"feat_dim {feat_dim}: the vector of a node has one number per block, so expected "
                f"as many as num_block, {num_block}"
            )
        if hid_dim % KERNELS:
            raise ValueError(f"hid_dim {hid_dim}: expected a multiple of the {KERNELS} kernels")
        self.img_enc = EncoderImage(img_dim, embed_size, precomp_enc_type, no_imgnorm)
        self.txt_enc = text_encoder or EncoderText(
            vocab_size, word_dim, embed_size, num_layers, bi_gru, no_txtnorm
        )
        self.visual_graph = VisualGraph(feat_dim, hid_dim, out_dim)
        self.textual_graph = TextualGraph(feat_dim, hid_dim, out_dim)
        self.config = MatchingConfig(num_block, lambda_softmax, neighbours)
        self.is_sparse = is_sparse

    def encode_images(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['images'] (I, R, img_dim), 'boxes' (I, R, 4) -> {'regions': (I, R, D), 'edges'}.

        Boxes are (left, top, right, bottom) in parts of the image's width and height.
        """
        kernels, mask = self.visual_graph.graph_convolution_1, batch.get("region_mask")
        edges = kernels(batch["boxes"], self.config.neighbours, mask)
        encoded = super().encode_images(batch) | {"edges": edges}
        # Once per evaluation, not at each call of similarity. They depend on the filling.
        once = not self.training and mask is None
        return encoded | self._keys(encoded["regions"]) if once else encoded

    def _keys(self, regions: Tensor) -> Encoding:
        """What a score needs of the regions besides."""
        b = self.config.num_block
        return {"keys": block_keys(regions, b), "norms": block_norms(regions, b)}

    def encode_captions(self, batch: dict[str, Tensor]) -> Encoding:
        """As Encoders; for the sparse graph batch['adjacency'] (C, W, W) is passed on."""
        encoded = super().encode_captions(batch)
        return encoded | ({"adjacency": batch["adjacency"]} if self.is_sparse else {})

    def similarity(self, images: Encoding, captions: Encoding) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption."""
        config, words = self.config, captions["words"]
        lengths = torch.as_tensor(captions["lengths"]).cpu()
        of_captions = {"words": words}
        if self.is_sparse or config.neighbours:  # otherwise they would be 1: see textual_edges
            graph = captions.get("adjacency"), config.lambda_softmax, config.neighbours
            of_captions["edges"] = textual_edges(words, lengths, *graph)
        if "keys" not in images or "region_mask" in images:
            images = images | self._keys(images["regions"])
        read = ("regions", "keys", "norms", "edges", "region_mask")
        of_images = {name: images[name] for name in read if name in images}
        weights = (*self.textual_graph.weights(), *self.visual_graph.weights())
        return pair_scores(GraphMatching(config), of_images, of_captions, lengths, weights)

    def beside_score(self, batch: dict, images: Encoding, captions: Encoding) -> dict:
        """For explain.py: the edges of one pair's graphs, as the paper defines them.

        'text_edges' (1, W, W); 'visual_edges' (1, R, R), the mean over the kernels.
        """
        graph = captions.get("adjacency"), self.config.lambda_softmax, True
        kernels = self.visual_graph.graph_convolution_1(batch["boxes"], True)  # (1, K, R, R)
        note = "Over these edges a node takes up the vectors of its neighbours."
        if not self.config.neighbours:
            note = (
                "The edges are drawn as the paper defines them, but no vector passes along them: "
                "as in the published code, each word and each region takes up its own vector only "
                "(Q18 in docs/quirks.md); --neighbours trains a model that follows the paper."
            )
        return {
            "text_edges": textual_edges(captions["words"], captions["lengths"], *graph),
            "visual_edges": kernels.mean(1),
            "notes": ["The score is the mean over the words plus the mean over the regions.", note],
        }


class GSMNSystem(System):
    """What the shared programs know of GSMN."""

    name, title = "gsmn", "GSMN"
    parts = ("img_enc", "txt_enc", "visual_graph", "textual_graph")
    defaults = {"log_step": 100, "val_step": 15000}
    directions = ()
    interchangeable = False
    counts_epochs = True
    compared = ("GSMN dense", "--lambda_softmax 20")
    benchmarks = {"dense": "--bi_gru --lambda_softmax 20"}
    benchmark_batch = 64  # as published

    def add_options(self, group) -> None:
        add_lambda_softmax(group)
        group.add_argument(
            "--is_sparse",
            action="store_true",
            help="textual graph of dependencies instead of the dense one",
        )
        group.add_argument("--num_block", default=16, type=COUNT, help="blocks of the joint space")
        group.add_argument(
            "--feat_dim", default=16, type=COUNT, help="numbers in a node's vector: as num_block"
        )
        group.add_argument(
            "--hid_dim", default=32, type=COUNT, help="numbers per node inside the graph"
        )
        group.add_argument("--out_dim", default=1, type=COUNT, help="outputs per node, averaged")
        group.add_argument(
            "--neighbours",
            action="store_true",
            help="a node takes up the vectors of its neighbours, as the paper says; in the "
            "published code it sees only its own",
        )

    def check_options(self, opt) -> None:
        if opt.is_sparse and opt.text_enc_type == "bert":
            raise InputError(
                "--is_sparse: its pairs are of words, but BERT reads captions as pieces of words"
            )
        if opt.is_sparse and opt.max_words:
            raise InputError("--is_sparse: its pairs are of whole captions, --max_words cuts them")

    def build(self, opt, vocab_size, text_encoder=None) -> GSMN:
        return GSMN(
            vocab_size,
            **encoder_options(opt),
            lambda_softmax=opt.lambda_softmax,
            feat_dim=opt.feat_dim,
            num_block=opt.num_block,
            hid_dim=opt.hid_dim,
            out_dim=opt.out_dim,
            is_sparse=opt.is_sparse,
            neighbours=opt.neighbours,
            text_encoder=text_encoder,
        )

    def dataset(self, folder, split, vocab, opt) -> GraphDataset:
        more = self.split_options(opt)
        return GraphDataset(folder, split, vocab, opt.img_dim, opt.is_sparse, **more)

    def published_dataset(self, folder, split, vocab, opt, fold5: bool) -> GraphDataset:
        """A split with the boxes of the published evaluation.  # Q9"""
        published = {"published_batch": opt.batch_size, "published_folds": fold5}
        return GraphDataset(folder, split, vocab, opt.img_dim, opt.is_sparse, **published)

    def prepare_split(self, stem: str) -> None:
        check_boxes_are_there(stem)

    def detect(self, states) -> bool:
        names = ("graph_", *RENAMED)
        return len(states) == 4 and any(key.startswith(names) for key in states[2])

    def rename(self, states):
        old = re.compile("|".join(f"^{re.escape(name)}" for name in RENAMED))
        return [
            OrderedDict((old.sub(lambda x: RENAMED[x[0]], key), w) for key, w in state.items())
            for state in states
        ]

    def architecture(self, states) -> dict:
        feat_dim = states[3]["graph_convolution_3.conv_weights.0.weight"].shape[1]
        out_dim, hid_dim = states[3]["out_2.weight_v"].shape
        known = {"feat_dim": feat_dim, "num_block": feat_dim, "out_dim": out_dim}
        return super().architecture(states) | known | {"hid_dim": hid_dim}

    def request_image(self, image: ServedImage, opt) -> Encoding:
        size = torch.tensor(image.size * 2)  # (4,)
        return {"images": image.features, "boxes": image.boxes / size}

    def request_caption(self, words, dependencies, opt) -> Encoding:
        item = super().request_caption(words, dependencies, opt)
        if not opt.is_sparse:
            return item
        if dependencies is None or not all(
            0 <= x < len(words) for pair in dependencies for x in pair
        ):
            raise InputError(
                "dependencies: this model needs them, [governor, dependent] from 0 (<start>) to "
                f"{len(words) - 1} (<end>), the root's first"
            )
        pairs = torch.tensor(dependencies[1:], dtype=torch.long).view(-1, 2)
        return item | {"adjacency": adjacency(len(words), pairs)}  # (W, W)
