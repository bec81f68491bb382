"""VSE-infinity: the regions of an image and the words of a caption become one vector each.

Chen et al., Learning the Best Pooling Strategy for Visual Semantic Embedding, CVPR 2021
(arXiv:2011.04305).
Shapes: I images, C captions, N of either, R regions, W words, K of either, D joint dimension, F
numbers per region, H hidden units of the MLP, L distinct lengths, P numbers per position.

The score of a pair is the dot product of the two vectors, so a search may compute all vectors of a
collection beforehand. The generalized pooling operator (GPO, section 3) sorts each dimension over
the regions, or over the words, and takes a weighted sum from the largest number to the smallest.
The weights are learnt; they depend only on how many numbers there are. The mean and the maximum
are special cases. The parts and the weights have the names of the published code.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from chan import UNUSED, CHANSystem
from model import Encoders, EncoderText
from pairs import Encoding
from system import encoder_options
from util.cli import choose
from util.distributed import gather_rows
from util.norms import l2norm
from vocab import UNICODE

POSITION = 32  # numbers per position, and units of the GRU that reads them
TEMPERATURE = 0.1  # of the softmax over the positions
# Published for raw images; with region features nothing reads them.
OF_BACKBONES = (
    ("backbone_path", str, ""),
    ("backbone_source", str, "detector"),
    ("backbone_warmup_epochs", int, 5),
    ("backbone_lr_factor", float, 0.01),
)


# Pooling: numbers x (N, K, D), which of the K rows are there (N, K), and how many of them, if the
# host knows it, (N,) -> (N, D)


class MeanPool(nn.Module):
    """The mean over the rows that are there."""

    def forward(self, x: Tensor, there: Tensor, lengths: Tensor | None = None) -> Tensor:
        return x.masked_fill(~there[..., None], 0).sum(1) / there.sum(1, keepdim=True)  # (N, D)


class MaxPool(nn.Module):
    """The largest number of each dimension, as in VSE++."""

    def forward(self, x: Tensor, there: Tensor, lengths: Tensor | None = None) -> Tensor:
        return x.masked_fill(~there[..., None], -torch.inf).amax(1)  # (N, D)


class GPO(nn.Module):
    """The generalized pooling operator: a weighted sum of sorted numbers (section 3)."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(POSITION, POSITION, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(POSITION, 1, bias=False)

    def weights(self, lengths: Tensor, room: int) -> Tensor:
        """Weights (L, room) of the sorted numbers for descending lengths (L,), on the host.

        Beyond each length they are 0.
        """
        weight = self.linear.weight
        x = positions(room, weight).expand(len(lengths), -1, -1)  # (L, K, P)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        h, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=room)
        ahead, behind = h.to(x.dtype).chunk(2, -1)  # (L, K, P)
        score = self.linear((ahead + behind) / 2).squeeze(-1).to(x.dtype)  # (L, K)
        there = torch.arange(room) < lengths[:, None]  # (L, K)
        score = score.masked_fill(~there.to(score.device), -torch.inf)  # (L, K)
        return (score / TEMPERATURE).softmax(-1)  # (L, K)

    def forward(self, x: Tensor, there: Tensor, lengths: Tensor | None = None) -> Tensor:
        room = x.size(1)
        counts = there.sum(1)  # (N,)
        if lengths is None:  # to look at the counts would make the device wait: take all lengths
            distinct, which = torch.arange(room, 0, -1), room - counts  # (L,), (N,)
        else:
            distinct, which = lengths.unique(return_inverse=True)  # (L,), (N,)
            distinct, which = distinct.flip(0), len(distinct) - 1 - which.to(x.device)
        weights = self.weights(distinct, room)[which]  # (N, K)
        x = x.masked_fill(~there[..., None], -torch.inf).mT.contiguous()  # (N, D, K)
        x = x.sort(-1, descending=True).values  # (N, D, K); faster than along K where it stood
        # Those that are missing stand at the end now: 0 times infinity would be NaN.
        behind = torch.arange(room, device=x.device) >= counts[:, None]  # (N, K)
        return (x.masked_fill(behind[:, None], 0) * weights[:, None]).sum(-1)  # (N, D)


def positions(n: int, like: Tensor) -> Tensor:
    """Sinusoidal positions (n, P) from 0 on, of the type and on the device of `like`.

    Vaswani et al., Attention Is All You Need, section 3.5.
    """
    where = {"dtype": like.dtype, "device": like.device}
    step = torch.arange(0, POSITION, 2, **where) * (-math.log(10000) / POSITION)  # (P / 2,)
    angle = torch.arange(n, **where)[:, None] * step.exp()  # (n, P / 2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)  # (n, P)


POOLS = {"gpo": GPO, "mean": MeanPool, "max": MaxPool}


# The image encoder


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the regions that are there, in the batches of all processes together.

    The published program also counts the zeros that stand in place of dropped regions (Q47).
    """

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """x (I, R, H), and which regions are there (I, R); None: all -> (I, R, H)."""
        x = x.to(self.weight.dtype)  # under autocast too
        mean, variance = self.running_mean, self.running_var  # (H,)
        if self.training:
            mean, variance = self.statistics(x, there)  # (H,)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias  # (I, R, H)

    def statistics(self, x: Tensor, there: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance (H,) of the batch; the running ones move towards them."""

        def total(x: Tensor) -> Tensor:
            x = x.sum((0, 1))  # (H,)
            return gather_rows(x[None]).sum(0)  # (H,)

        one = x.new_ones(*x.shape[:2], 1) if there is None else there[..., None].to(x.dtype)
        n = total(one)  # (1,)
        mean = total(x * one) / n  # (H,)
        variance = total((x - mean).square() * one) / n  # (H,)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            # A single region has no variance: its own is counted as 0.
            self.running_var.lerp_(variance * (n / (n - 1).clamp_min(1)), self.momentum)
            self.num_batches_tracked += 1
        return mean, variance


class MLP(nn.Module):
    """Two linear layers, with batch norm and ReLU between them."""

    def __init__(self, img_dim: int, hidden: int, embed_size: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(img_dim, hidden), nn.Linear(hidden, embed_size)])
        self.bns = nn.ModuleList([BatchNorm(hidden), BatchNorm(embed_size)])
        self.bns[1].requires_grad_(False)  # published checkpoints hold it; nothing reads it  # Q48
        # Batch norm takes a constant away again: its gradient is rounding noise  # Q49
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """x (I, R, F), and which regions are there (I, R); None: all -> (I, R, D)."""
        x = self.bns[0](self.layers[0](x), there).relu()  # (I, R, H)
        return self.layers[1](x)  # (I, R, D)


class PooledImages(nn.Module):
    """Regions to the joint space, by a linear layer plus an MLP, and their pooling."""

    def __init__(self, img_dim: int, embed_size: int, precomp_enc_type: str, pool: str):
        super().__init__()
        if embed_size < 2:
            raise ValueError(f"embed_size {embed_size}: expected at least 2, the MLP halves it")
        self.fc = nn.Linear(img_dim, embed_size)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        mlp = choose({"basic": MLP}, precomp_enc_type, "precomp_enc_type")
        self.mlp = mlp(img_dim, embed_size // 2, embed_size)
        self.gpool = choose(POOLS, pool, "pool")()

    def forward(self, images: Tensor, there: Tensor | None = None) -> Tensor:
        """images (I, R, F), and which regions are there (I, R); None: all -> (I, D), float32."""
        x = images.to(self.fc.bias.dtype)  # (I, R, F)
        x = (self.fc(x) + self.mlp(x, there)).float()  # (I, R, D)
        if there is not None:
            return self.gpool(x, there)  # (I, D)
        n, regions = x.shape[:2]
        there = torch.ones(n, regions, dtype=torch.bool, device=x.device)  # (I, R)
        return self.gpool(x, there, torch.full((n,), regions))  # (I, D)


# The model


class VSE(Encoders):
    """One vector per image, one per caption, and their dot product.

    `pool` makes them of the regions and of the words: gpo, mean or max.
    """

    images_in_parts = False  # batch norm needs all of them

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
        pool: str = "gpo",
        text_encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.img_enc = PooledImages(img_dim, embed_size, precomp_enc_type, pool)
        if text_encoder is None:
            text_encoder = EncoderText(vocab_size, word_dim, embed_size, num_layers, True)
        self.txt_enc = text_encoder
        self.txt_enc.no_txtnorm = True  # the sentence is normalised, not its words
        self.txt_enc.gpool = choose(POOLS, pool, "pool")()
        self.no_imgnorm, self.no_txtnorm = no_imgnorm, no_txtnorm

    def encode_images(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['images'] (I, R, F) -> {'image': (I, D)}.

        With batch['region_mask'] (I, R), only these regions count, in batch norm too.
        """
        x = self.img_enc(batch["images"], batch.get("region_mask"))  # (I, D)
        return {"image": x if self.no_imgnorm else l2norm(x, dim=-1)}

    def encode_captions(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['captions'] (C, W), batch['lengths'] (C,) -> {'sentence': (C, D), 'lengths'}."""
        lengths = batch["lengths"].cpu()  # (C,)
        words = self.txt_enc(batch["captions"], lengths)  # (C, W, D)
        there = torch.arange(words.size(1)) < lengths[:, None]  # (C, W)
        x = self.txt_enc.gpool(words, there.to(words.device), lengths)  # (C, D)
        x = x if self.no_txtnorm else l2norm(x, dim=-1)  # (C, D)
        return {"sentence": x, "lengths": batch["lengths"]}

    def similarity(self, images: Encoding, captions: Encoding) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption."""
        return images["image"] @ captions["sentence"].mT  # (I, C)


class VSESystem(CHANSystem):
    """What the shared programs know of VSE-infinity.

    CHAN's program was made from that of VSE-infinity: folders, vocabularies, the warm-up of the
    hinge and the optimizer's kind are the same.
    """

    name, title = "vse", "VSE-infinity"
    parts = ("img_enc", "txt_enc")
    defaults = {"learning_rate": 5e-4, "num_epochs": 25, "vse_mean_warmup_epochs": 1}
    adam = staticmethod(partial(torch.optim.AdamW, weight_decay=1e-4))
    compared = ("VSE-infinity", "--pool gpo")
    benchmarks = {"GPO": "--pool gpo"}
    benchmark_batch = 128

    def add_options(self, group) -> None:
        group.add_argument(
            "--pool",
            default="gpo",
            help="gpo (a learnt weighted sum of the sorted numbers) | mean | max (VSE++'s)",
        )
        for name, kind, default in (*UNUSED, *OF_BACKBONES):
            group.add_argument(
                f"--{name}", default=default, type=kind, help="published, but nothing reads it"
            )

    def build(self, opt, vocab_size, text_encoder=None) -> VSE:
        options = encoder_options(opt)
        del options["bi_gru"]  # always
        return VSE(vocab_size, **options, pool=opt.pool, text_encoder=text_encoder)

    def vocabulary(self, vocab, opt):
        """CHAN's, with <mask>, unless the checkpoint was trained without this word."""
        if vocab.tokenizer is None:  # a published file  # Q25
            vocab.lower = UNICODE
        if getattr(opt, "vocab_size", None) != len(vocab):
            vocab.add_word(vocab.mask)
        return vocab

    def start_words(self, embedding: Tensor) -> None:
        """Words without a vector keep the small random numbers that they have."""

    def detect(self, states) -> bool:
        return len(states) == 2 and "gpool.linear.weight" in states[0]

    def architecture(self, states) -> dict:
        image, text = states
        known = super().architecture(states) | {"pool": "gpo"}
        if "embed.weight" in text:
            known["vocab_size"] = len(text["embed.weight"])
        if "mlp.layers.0.weight" not in image or "gpool.linear.weight" not in text:
            raise KeyError("mlp.layers.0.weight or gpool.linear.weight")
        return known
