"""Precomputed region features and captions, read lazily; batches; loaders.

`DATA_PATH/DATA_NAME/` holds per split `{split}_ims.npy` (rows, R, F), `{split}_caps.txt` and,
optionally, `{split}_ids.txt`. gsmn_data.py and pfan_data.py read what these papers need besides.

Everything travels as tensors by name. A dataset gives items, `collate_fn` makes a batch of them,
and the encoders make two encodings of the batch. These are all the names:

| key             | in       | shape        | content                                          |
|-----------------|----------|--------------|--------------------------------------------------|
| images          | batch    | (B, R, F)    | region features, float16 or float32              |
| captions        | batch    | (B, W)       | word ids, padded with 0                          |
| lengths         | both     | (B,)         | words of each caption; they stay on the host     |
| index           | batch    | (B,)         | which caption it is                              |
| image_index     | batch    | (B,)         | which image the pair shows                       |
| region_mask     | both     | (B, R)       | True: the region is there; only if some are not  |
| boxes           | batch    | (B, R, 4)    | GSMN: corners in parts of the image's size        |
| adjacency       | both     | (B, W, W)    | GSMN, sparse: dependency pairs and the identity  |
| blocks, overlap | batch    | (B, R, K)    | PFAN: block ids, and their parts of the overlap  |
| whole           | both     | (B, F or D)  | PFAN, whole images: vector of the whole image    |
| regions         | encoding | (B, R, D)    | encoded regions                                  |
| words           | encoding | (B, W, D)    | encoded words, zeros beyond each length          |
| sentence        | encoding | (B, D)       | PFAN, whole images: final state of the GRU       |
| edges           | encoding | (B, R, K)    | GSMN: edges of the visual graph                  |
| keys, norms     | encoding | (B, R, ...)  | GSMN, evaluation: see block_keys and block_norms |

A batch holds images and captions of B pairs. In evaluation images and captions are encoded apart,
I images and C captions. A new paper may add names of its own. Further letters: R regions, F
numbers per region, W words, D joint dimension, K blocks per region (PFAN), K kernels (GSMN).
"""

import os
import signal
import threading
from array import array as flat_array
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from util.arrays import open_array
from util.cli import InputError, progress
from vocab import Vocabulary, read_captions

DEV_CAPTIONS = 5000  # the published programs validate on the first 5,000 captions (Q2)


class Batch(dict):
    """Tensors by name; a name that the dataset does not give is an error in one line."""

    def __missing__(self, key: str):
        raise InputError(
            f"the model reads {key!r} of a batch, but its dataset gives only {', '.join(self)}; "
            "its System needs a dataset() that gives it (docs/adding_a_model.md)"
        )


def repeats(array: np.ndarray, captions_per_row: int) -> int:
    """How many times in a row each image is stored: k, or 1 if all rows are distinct images.

    COCO's test and testall are stored with one row per caption. The run of equal rows at the start
    gives k. Up to 200 further groups, spread over the file, must repeat too: two equal photos at
    the start of a set with one caption per image shall not mislead.
    """
    if captions_per_row > 1 or len(array) == 1:
        return 1
    equal = 1
    while equal < len(array) and np.array_equal(array[0], array[equal]):
        equal += 1
    # The first photos may be equal to each other, so k can be any divisor of that run.
    for k in range(equal, 1, -1):
        if equal % k or len(array) % k:
            continue
        groups = np.unique(np.linspace(0, len(array) // k - 1, 200).astype(int)) * k
        if all(np.array_equal(array[g], array[g + j]) for g in groups for j in range(1, k)):
            return k
    return 1


class Drop:
    """Size augmentation, as published for CHAN: fewer regions and words in training.

    Each region is dropped with probability `rate`. Each word is chosen with probability 0.2; of the
    chosen words half are masked, a tenth are replaced by a random word, and the rest are dropped.
    <start> and <end> are words like the others; WordPiece's [CLS] and [SEP] are not, and the pieces
    of a word share its fate. An image keeps at least one region, and with `keep_last` its last one
    too; a caption keeps at least one word. The random numbers follow from seed, epoch and caption,
    so a resumed run draws the same (Q12).
    """

    def __init__(self, rate: float, seed: int, vocab: Vocabulary, keep_last: bool = False):
        if vocab.mask not in vocab.word2idx:
            raise InputError(
                f"--drop: the vocabulary has no {vocab.mask}, as the checkpoint of --resume was "
                "trained without --drop; train afresh"
            )
        self.rate, self.seed, self.keep_last = rate, seed, keep_last
        self.mask, self.size, self.pieces = vocab.word2idx[vocab.mask], len(vocab), vocab.pieces
        self.first = torch.ones(self.size, dtype=torch.bool)  # whether a piece begins a word
        if self.pieces:
            self.first[[i for w, i in vocab.word2idx.items() if w.startswith("##")]] = False

    def __call__(self, item: dict, epoch: int) -> dict:
        """An item with zeros for dropped regions, and 'region_mask' (R,): the regions left."""
        rng = np.random.default_rng((self.seed, epoch, item["index"]))
        images, captions = item["images"], item["captions"]
        mask = torch.from_numpy(rng.random(len(images)) >= self.rate)  # (R,)
        regions = mask[: len(mask) - self.keep_last]  # a view
        regions[rng.integers(len(regions))] |= not regions.any()
        mask[len(regions) :] = True
        chance = torch.from_numpy(rng.random(len(captions)) / 0.2)  # (W,), chosen below 1
        chance = chance[self.first[captions].cumsum(0) - 1]  # (W,), one number per word
        if self.pieces:
            chance[[0, -1]] = 1
        other = torch.from_numpy(rng.integers(self.size, size=len(captions)))  # (W,)
        words = captions.where(chance >= 0.5, self.mask)  # (W,)
        words = words.where((chance < 0.5) | (chance >= 0.6), other)  # (W,)
        stay = (chance < 0.6) | (chance >= 1)  # (W,)
        if not stay.any():
            words, stay = captions, torch.ones_like(stay)  # (W,)
        images = images.masked_fill(~mask[:, None], 0)  # (R, F)
        item = item | {"images": images, "captions": words[stay], "region_mask": mask}
        if "adjacency" in item:
            item["adjacency"] = item["adjacency"][stay][:, stay]  # (W', W')
        return item


class PrecompDataset(Dataset):
    """One split of precomputed features with its captions; an item is one caption and its image.

    `data_path` is the folder of the split's files, `data_split` one of train, dev, test, testall.
    Attributes: `n_images` distinct images, `n_captions`, `k` captions per image, `ids` or None.
    The training loop sets `drop`, which changes each item, and the `epoch`. Raises InputError or
    FileNotFoundError naming file and row if the files do not fit.
    """

    drop: Drop | None = None
    epoch = 0
    last_region_is_image = False  # the last region stands for the whole image: it is never dropped
    options_of_data: dict = {}  # options of the model that the files decide

    def __init__(self, data_path: str, data_split: str, vocab: Vocabulary, img_dim: int):
        stem = os.path.join(data_path, data_split)
        self.path = f"{stem}_ims.npy"
        text = self._caption_file(stem, vocab)
        captions = read_captions(text)
        self.images = open_array(self.path, ndim=3)  # (rows, R, F)
        rows, _, found = self.images.shape
        if found != img_dim:
            raise InputError(
                f"{self.path}: regions have {found} numbers, the model expects {img_dim}; "
                f"give --img_dim {found}, or the features that the checkpoint was trained on"
            )
        self.candidates = self._candidates(data_split, rows, len(captions))
        if self.candidates > 1:
            print(
                f"notice: {text}: {len(captions)} captions for {rows} images, so {self.candidates} "
                "candidate images per caption"
            )
        elif rows == 0 or len(captions) % rows:
            raise InputError(
                f"{text}: {len(captions)} captions for the {rows} rows of {self.path}; "
                "expected a multiple (usually 5 captions per image, image by image)"
            )
        # Rows per image, and captions per image.
        self.stride = repeats(self.images, len(captions) // rows) if self.candidates == 1 else 1
        self.k = len(captions) * self.candidates // (rows // self.stride)
        if data_split == "dev":
            captions = captions[: max(DEV_CAPTIONS // self.k, 1) * self.k]
        self.n_captions = len(captions)
        self.n_images = self.n_captions * self.candidates // self.k
        self.ids = self._read_ids(f"{stem}_ids.txt", rows)

        # One flat array: forked loader workers share it; they would copy a list of objects.
        words, lengths = flat_array("i"), []
        for ids in self._word_ids(progress(captions, f"tokenising {data_split}"), text, vocab):
            words.extend(ids)
            lengths.append(len(ids))
        self.lengths = torch.tensor(lengths)  # (n_captions,)
        self.words = torch.from_numpy(np.array(words, dtype=np.int32))
        self.start = self.lengths.cumsum(0) - self.lengths  # (n_captions,)

        self._warn_of_unknown_words(text, vocab)

    def _candidates(self, data_split: str, rows: int, captions: int) -> int:
        """How many candidate images each caption has; they stand in a row. Usually one."""
        return 1

    def _warn_of_unknown_words(self, path: str, vocab: Vocabulary) -> None:
        words = len(self.words) - 2 * self.n_captions  # without <start> and <end>
        unknown = int((self.words == vocab.word2idx[vocab.unknown]).sum())
        if unknown > 0.3 * words:
            print(
                f"warning: {path}: {unknown} of its {words} words are not in the vocabulary; is it "
                "that of other captions?"
            )

    def _caption_file(self, stem: str, vocab: Vocabulary) -> str:
        return f"{stem}_caps.txt"

    def _word_ids(
        self, captions: Iterable[str], path: str, vocab: Vocabulary
    ) -> Iterator[list[int]]:
        """Word ids of each line of a caption file."""
        empty = []
        for row, caption in enumerate(captions, 1):
            if not caption.strip():
                empty.append(row)
            yield vocab.encode(caption)
        if empty:
            print(
                f"warning: {path}: {len(empty)} empty captions (first at line {empty[0]}), kept "
                "without a word"
            )

    def _read_ids(self, path: str, rows: int) -> list[str] | None:
        if not os.path.isfile(path):
            return None
        ids = read_captions(path)
        if len(ids) == rows:
            ids = ids[:: self.stride]
        elif len(ids) == rows // self.stride * self.k and self.candidates == 1:
            ids = ids[:: self.k]
        elif len(ids) != rows // self.stride:
            raise InputError(f"{path}: {len(ids)} ids for {rows // self.stride} images")
        return ids[: self.n_images]

    def image_item(self, image: int) -> dict[str, Tensor]:
        """The distinct image `image` as the image encoder reads it: {'images': (R, F)}."""
        row = image * self.stride
        regions = np.array(self.images[row])  # a copy: the map stays read-only
        if not np.isfinite(regions).all():
            region = int(np.argmin(np.isfinite(regions).all(1)))
            raise InputError(
                f"{self.path}: row {row} (from 0), region {region} holds NaN or Inf; "
                "extract that image again"
            )
        return {"images": torch.from_numpy(regions)}

    def caption_item(self, caption: int) -> dict[str, Tensor]:
        """One caption as the text encoder reads it: {'captions': (W,)} word ids."""
        start = self.start[caption]
        return {"captions": self.words[start : start + self.lengths[caption]].long()}

    def __len__(self) -> int:
        return self.n_captions

    def __getitem__(self, caption: int) -> dict:
        image = caption * self.candidates // self.k
        where = {"index": caption, "image_index": image}
        item = self.image_item(image) | self.caption_item(caption) | where
        return item if self.drop is None else self.drop(item, self.epoch)


def collate_fn(items: list[dict]) -> Batch:
    """Items to a batch: images (B, R, F), captions (B, W), lengths (B,), and the rest by name.

    Tensors of different shapes are padded with zeros to the largest.
    """
    batch = Batch()
    for name in items[0]:
        values = [item[name] for item in items]
        if name == "captions":
            batch["lengths"] = torch.tensor([len(x) for x in values])  # (B,)
        if not isinstance(values[0], Tensor):
            batch[name] = torch.tensor(values)  # (B,)
            continue
        largest = [max(sizes) for sizes in zip(*(x.shape for x in values), strict=True)]
        values = [pad_to(x, largest) for x in values]
        batch[name] = default_collate(values)  # in a worker, straight into shared memory
    return batch


def pad_to(x: Tensor, shape: list[int]) -> Tensor:
    """x with zeros behind it, up to a shape."""
    if list(x.shape) == shape:
        return x
    behind = [(0, size - own) for own, size in zip(x.shape, shape, strict=True)]
    return F.pad(x, [n for pair in reversed(behind) for n in pair])


class EpochSampler(Sampler[list[int]]):
    """Batches of a shuffle that depends on (seed, epoch) only, from batch `first` on.

    Because the order follows from the epoch, a resumed run equals an unbroken one. With several
    processes each takes its share of every batch. The last one may be short (Q27).
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.n, generator=generator)
        for batch in order.split(self.batch_size)[self.first :]:
            yield (
                batch[self.rank :: self.world_size] if self.shared(len(batch)) else batch
            ).tolist()

    def shared(self, size: int) -> bool:
        """Whether a batch is split; one with too few pairs is taken whole by each process."""
        return size >= self.world_size

    def __len__(self) -> int:
        return -(-self.n // self.batch_size) - self.first


def leave_signals_to_the_loop(worker: int) -> None:
    """Let a loader worker end only when its training loop says so.

    Ctrl-C and the SIGTERM of a scheduler reach the workers too, and a worker that dies of one tears
    the loop's step. The loop's own process ends a worker by SIGTERM, so only that one counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def get_train_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    seed: int,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Shuffled batches; set `loader.batch_sampler.epoch` (and `.first`) before each epoch.

    Process `rank` of `world_size` gets its share of each batch.
    """
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return DataLoader(
        dataset,
        batch_sampler=EpochSampler(len(dataset), batch_size, seed, rank, world_size),
        collate_fn=collate_fn,
        # More processes than cores only slow each other down; the published default is 10 (Q3).
        num_workers=min(workers, cores),
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_loop,
        # Its own: seeding the workers must not draw from the state that a resume restores.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
