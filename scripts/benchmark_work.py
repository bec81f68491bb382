"""The batch on which scripts/benchmark.py times its jobs: noise of the paper's size."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoint as ckpt
import options
from data import collate_fn
from losses import ContrastiveLoss
from system import System
from tests.reference import caption_loop, chan_plain, gsmn_caption_loop
from util.devices import to_device
from vocab import SPECIAL, Vocabulary

REGIONS, WORDS, N_VOCAB = 36, (9, 21), 8481
PARTS_OF_BATCH = 12  # for the step with --grad_checkpointing


def scan_loop(work: "Work", images: dict, captions: dict) -> Tensor:
    config, lengths = work.model.config, captions["lengths"].tolist()
    options = config.raw_feature_norm, config.agg_func, config.lambda_softmax, config.lambda_lse
    parts = images["regions"], captions["words"], lengths
    return caption_loop(config.cross_attn, *parts, *options)


def gsmn_loop(work: "Work", images: dict, captions: dict) -> Tensor:
    return gsmn_caption_loop(work.model, images, captions, work.batch["boxes"])


def chan_loop(work: "Work", images: dict, captions: dict) -> Tensor:
    parts = images["regions"], captions["words"], captions["lengths"]
    return chan_plain(*parts, work.model.config.belta)


LOOPS = {"scan": scan_loop, "gsmn": gsmn_loop, "chan": chan_loop}


class Work:
    """One batch at one size and way, and the jobs that are timed on it."""

    def __init__(self, size: dict, system: System, way: str, device: torch.device):
        self.usual = LOOPS.get(system.name)
        flags = f"--model {system.name} {system.benchmarks[way]} {size_flags(size)}"
        opt = options.parse(flags.split())
        with tempfile.TemporaryDirectory() as folder:
            vocab = write_split(Path(folder) / "noise", size["batch"], size["img_dim"], k=1)
            system.prepare_split(f"{folder}/noise/test")
            dataset = system.dataset(f"{folder}/noise", "test", system.vocabulary(vocab, opt), opt)
            batch = collate_fn([dataset[k] for k in range(size["batch"])])
        torch.manual_seed(0)
        self.model = ckpt.build_model(opt, len(vocab)).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-4, fused=True)
        self.batch = to_device(batch, device)

    @functools.cached_property
    def encoded(self) -> tuple[dict, dict]:
        """The batch's images and captions, for the jobs without the encoders."""
        with torch.no_grad():
            return self.model(self.batch)

    @functools.cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """All vectors of the images and all of the captions, without padding: (n, D) each."""
        images, captions = (next(iter(x.values())) for x in self.encoded)
        if captions.dim() == 3:  # words
            lengths = self.batch["lengths"].tolist()
            captions = torch.cat([x[:n] for x, n in zip(captions, lengths, strict=True)])  # (T, D)
        return images.flatten(0, -2), captions

    @torch.no_grad()
    def score_ours(self) -> Tensor:
        return self.model.similarity(*self.encoded)

    @torch.no_grad()
    def score_loop(self) -> Tensor:
        return self.usual(self, *self.encoded)

    @torch.no_grad()
    def gemm(self) -> Tensor:
        """The product that every score needs, without padding: the floor of scoring."""
        images, captions = self.rows
        return images @ captions.mT

    def step(self, similarity: Callable[[dict, dict], Tensor]) -> float:
        """A whole training step with hardest negatives."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = ContrastiveLoss(0.2, max_violation=True)(similarity(*self.model(self.batch)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        return loss.item()

    def step_ours(self) -> float:
        return self.step(self.model.similarity)

    def step_loop(self) -> float:
        return self.step(functools.partial(self.usual, self))

    def step_parts(self) -> float:
        """The step of this project with --grad_checkpointing."""
        self.model.grad_checkpointing = PARTS_OF_BATCH
        loss = self.step_ours()
        self.model.grad_checkpointing = 0
        return loss

    def encoders(self) -> None:
        """Forward and backward of the encoders alone."""
        self.optimizer.zero_grad(set_to_none=True)
        images, captions = self.model(self.batch)
        outputs = [x for x in (*images.values(), *captions.values()) if x.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def size_flags(size: dict) -> str:
    return " ".join(f"--{name} {size[name]}" for name in ("img_dim", "embed_size", "word_dim"))


def write_split(folder: Path, n: int, img_dim: int, k: int = 5) -> Vocabulary:
    """n images of noise with k captions each and boxes, as a `test` split; and their vocabulary."""
    rng = np.random.default_rng(0)
    vocab = Vocabulary("one_sentence")
    for word in [*SPECIAL, *(f"w{k}" for k in range(N_VOCAB - len(SPECIAL)))]:
        vocab.add_word(word)
    folder.mkdir(parents=True)
    np.save(folder / "test_ims.npy", rng.normal(size=(n, REGIONS, img_dim)).astype(np.float32))
    with open(folder / "test_caps.txt", "w") as file:
        for _ in range(k * n):
            length = rng.integers(WORDS[0] - 2, WORDS[1] - 1)  # <start> and <end> come on top
            words = rng.integers(N_VOCAB - len(SPECIAL), size=length)
            file.write(" ".join(f"w{word}" for word in words) + "\n")
    corners = np.sort(rng.random((n, REGIONS, 2, 2)), axis=2) * (640, 480)
    np.save(folder / "test_ims_bbx.npy", corners.reshape(n, REGIONS, 4).astype(np.float32))
    sizes = np.array([(640, 480)] * n, [("image_w", "<i8"), ("image_h", "<i8")])
    np.save(folder / "test_ims_size.npy", sizes)
    return vocab
