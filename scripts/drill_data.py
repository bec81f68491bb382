"""A small set of random data that every system can train on, for fault_drill.py and soak.py.

Shapes: N images, R regions, F numbers per region.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from util import positions
from vocab import SPECIAL, Vocabulary, serialize_vocab

NAME = "drill_precomp"
IMAGES = {"train": 40, "dev": 10}
CAPTIONS, REGIONS, DIM = 5, 4, 12  # captions of an image, its regions, numbers per region
USED = 60  # words that captions hold
# With the embedding of so many words a checkpoint has some 20 MiB: saving it takes a while.
WORDS = 30_000

# Of train.py, for this set: small, with each kind of state that a checkpoint must bring back.
FLAGS = (
    f"--data_name {NAME} --embed_size 32 --word_dim 48 --batch_size 16 --learning_rate 0.005 "
    "--val_step 0 --log_step 1 --bi_gru --max_violation --vse_mean_warmup_epochs 1 --lr_update 4 "
    "--device cpu --quiet"
).split()


def write_data(
    folder: Path, seed: int = 0, images: dict[str, int] = IMAGES, words: int = WORDS
) -> None:
    """Write data/drill_precomp and vocab/ into a folder: all files that some system reads.

    `images` of each split; `words` of the vocabulary.
    """
    vocab = Vocabulary("one_sentence")
    for word in [*SPECIAL, *(f"w{k}" for k in range(words))]:
        vocab.add_word(word)
    serialize_vocab(vocab, folder / "vocab" / f"{NAME}_vocab.json")
    data = folder / "data" / NAME
    data.mkdir(parents=True)
    for number, (split, n) in enumerate(images.items()):
        write_split(data / split, n, vocab, np.random.default_rng([seed, number]))


def write_split(stem: Path, n: int, vocab: Vocabulary, rng: np.random.Generator) -> None:
    """Write a split of n images. Captions name the kinds of their image's regions."""
    kinds = np.random.default_rng(0).normal(size=(USED, DIM))  # the same for all splits
    shown = np.stack([rng.choice(USED, REGIONS, replace=False) for _ in range(n)])  # (N, R)
    regions = kinds[shown] + 0.1 * rng.normal(size=(n, REGIONS, DIM))  # (N, R, F)
    captions = [
        " ".join(f"w{word}" for word in rng.permutation(words)[: rng.integers(2, REGIONS + 1)])
        for words in shown
        for _ in range(CAPTIONS)
    ]
    sizes = rng.integers(200, 600, (n, 2))
    corners = np.sort(rng.random((n, REGIONS, 2, 2)), 2) * sizes[:, None, None]
    ids = [vocab.encode(caption) for caption in captions]
    arrays = {
        "ims": regions.astype(np.float32),
        "who_ims": regions.mean(1).astype(np.float32),  # (N, F)
        "ims_bbx": corners.reshape(n, REGIONS, 4).astype(np.float32),
        "ims_size": np.array(
            [tuple(size) for size in sizes], [("image_w", "<i8"), ("image_h", "<i8")]
        ),
    }
    for name, array in arrays.items():
        np.save(f"{stem}_{name}.npy", array)
    positions.convert(str(stem))
    texts = {
        "caps.txt": "".join(f"{caption}\n" for caption in captions),
        "precaps_stan.txt": "".join(",".join(map(str, row)) + "\n" for row in ids),
        # Each word depends on the one before it.
        "caps.json": json.dumps([[[k, k + 1] for k in range(len(row) - 2)] for row in ids]),
    }
    for name, text in texts.items():
        Path(f"{stem}_{name}").write_text(text)
