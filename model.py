"""SCAN: an image encoder, a text encoder, and the stacked cross attention of attention.py.

Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018 (arXiv:1803.08024).
Shapes: I images, C captions, R regions, W words, T words of all captions, D joint dimension, F
numbers per region.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from attention import (  # noqa: F401  (people import the last ones from here)
    AGG_FUNC,
    RAW_FEATURE_NORM,
    AttentionConfig,
    xattn_score,
    xattn_score_i2t,
    xattn_score_t2i,
)
from losses import ContrastiveLoss, InfoNCELoss  # noqa: F401  (likewise)
from pairs import Encoding
from util.cli import choose
from util.norms import l1norm, l2norm  # noqa: F401  (likewise)


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
        return regions if self.no_imgnorm else l2norm(regions, dim=-1)  # (I, R, D)


class EncoderText(nn.Module):
    """Word ids to one vector per word: embedding, GRU, mean of its directions (section 3.4)."""

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
        # Sorted here, by lengths on the host: packing would fetch the order back from the device.
        lengths, order = lengths.cpu().sort(descending=True, stable=True)
        back = order.argsort().to(captions.device)
        x = self.embed(captions[order.to(captions.device)])  # (C, W, word_dim)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        # The row of each caption's last word. Sent to the device before the GRU is started: later,
        # the copy would wait until the GRU has finished.
        starts = packed.batch_sizes.cumsum(0) - packed.batch_sizes  # (W,) of each step in T
        last = (starts[lengths - 1] + torch.arange(len(lengths))).to(x.device)  # (C,)
        # Padded at the end only: until then there are no rows but the words T.
        x = self.rnn(packed)[0].data.float()  # (T, D) or (T, 2 D); float32 under autocast too
        # A caption's final states: that of the forward direction stands at its last word, that of
        # the backward direction at its first (Q22).
        if self.rnn.bidirectional:
            ahead, behind = x.chunk(2, dim=-1)  # (T, D)
            x = (ahead + behind) / 2  # (T, D)
            sentence = (ahead[last] + behind[: len(last)]) / 2  # (C, D)
        else:
            sentence = x[last]  # (C, D)
        x = x if self.no_txtnorm else l2norm(x, dim=-1)  # (T, D)
        packed = packed._replace(data=x)
        x, _ = pad_packed_sequence(packed, batch_first=True, total_length=captions.size(1))
        return x[back], sentence[back]  # (C, W, D), (C, D)


def without_dropped(regions: Tensor, batch: dict[str, Tensor]) -> Encoding:
    """The encoding of regions (I, R, D); with 'region_mask' (I, R) the missing ones are zeros."""
    if "region_mask" not in batch:
        return {"regions": regions}
    mask = batch["region_mask"]
    return {"regions": regions.masked_fill(~mask[..., None], 0), "region_mask": mask}


def beyond_widest(mask: Tensor, filling: Tensor | None, widest: Tensor) -> Tensor:
    """Places (I, R) that an image would not have if dropped regions were cut out: filling too.

    mask (I, R): the regions that are left. The published CHAN packs them to the front, and a batch
    is as wide as its widest image, `widest` (I,); the places up to there hold zeros. Where a zero
    stands makes no difference to attention, so here the first dropped places are those.
    """
    dropped = ~mask if filling is None else ~(mask | filling)  # (I, R)
    beyond = dropped & (dropped.cumsum(1) > (widest - mask.sum(1))[:, None])  # (I, R)
    return beyond if filling is None else filling | beyond  # (I, R)


def encode_in_parts(
    encode: Callable[[dict[str, Tensor]], Encoding], batch: dict[str, Tensor], parts: int
) -> Encoding:
    """encode(batch), part by part; the backward pass encodes each part again.

    Only what goes in and comes out is kept. Chen et al., Training Deep Nets with Sublinear Memory
    Cost, arXiv:1604.06174.
    """
    chunks = zip(*(x.chunk(parts) for x in batch.values()), strict=True)
    encoded = [
        checkpoint(encode, dict(zip(batch, part, strict=True)), use_reentrant=False)
        for part in chunks
    ]
    return {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}


class Encoders(nn.Module):
    """What all models share: `img_enc`, `txt_enc`, and one call for both of them.

    The keys of batches and encodings are in the table at the head of data.py.
    """

    caption_keys = ("captions", "lengths")  # what encode_captions reads of a batch
    grad_checkpointing = 0  # parts in which a batch's images are encoded; 0: whole, all is kept
    images_in_parts = True  # False: an image's encoding depends on its batch, so only captions are

    def forward(self, batch: dict[str, Tensor]) -> tuple[Encoding, Encoding]:
        """Both encodings of a batch of pairs: the call that DistributedDataParallel wraps."""
        parts = self.grad_checkpointing
        if not (parts and torch.is_grad_enabled()):
            return self.encode_images(batch), self.encode_captions(batch)
        text = {name: batch[name] for name in self.caption_keys if name in batch}
        images = {name: x for name, x in batch.items() if name not in text}
        # The steps of a GRU are inefficient on small batches: so captions of similar length go
        # together, in half as many parts as the images.
        order = batch["lengths"].argsort(stable=True)
        text = {name: x[order.to(x.device)] for name, x in text.items()}
        if self.images_in_parts:
            images = encode_in_parts(self.encode_images, images, parts)
        else:
            images = self.encode_images(images)
        captions = encode_in_parts(self.encode_captions, text, (parts + 1) // 2)
        back = order.argsort()
        return images, {name: x[back.to(x.device)] for name, x in captions.items()}

    def encode_images(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['images'] (I, R, F) -> {'regions': (I, R, D)}.

        With batch['region_mask'] (I, R), the regions that are scored, also 'region_mask'.
        """
        return without_dropped(self.img_enc(batch["images"]), batch)

    def encode_captions(self, batch: dict[str, Tensor]) -> Encoding:
        """batch['captions'] (C, W), batch['lengths'] (C,) -> {'words': (C, W, D), 'lengths'}."""
        words = self.txt_enc(batch["captions"], batch["lengths"])
        return {"words": words, "lengths": batch["lengths"]}


class SCAN(Encoders):
    """Region and word encoders, and their stacked cross attention score.

    `image_encoder` makes the image encoder; `text_encoder` is one that takes the place of the GRU,
    such as BERT's. Raises ValueError on an unknown variant.
    """

    BONUS = {"t2i": 0.0, "i2t": 0.0}  # AttentionConfig.bonus of each direction

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
        bonus = choose(self.BONUS, cross_attn, "cross_attn")
        choose(RAW_FEATURE_NORM, raw_feature_norm, "raw_feature_norm")
        choose(AGG_FUNC, agg_func, "agg_func")
        self.config = AttentionConfig(
            cross_attn, raw_feature_norm, agg_func, lambda_softmax, lambda_lse, bonus
        )

    def similarity(
        self, images: Encoding, captions: Encoding, cross_attn: str | None = None
    ) -> Tensor:
        """Scores (I, C) of every encoded image with every encoded caption.

        `cross_attn` (t2i or i2t) is a direction other than the one that the model was made for.
        """
        config = self.config
        if cross_attn is not None:
            config = config._replace(cross_attn=cross_attn, bonus=self.BONUS[cross_attn])
        words, lengths = captions["words"], captions["lengths"]
        return xattn_score(images["regions"], words, lengths, config, images.get("region_mask"))
