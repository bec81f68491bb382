"""A split of images without captions: one's own pictures, which are searched, not ranked."""

import os

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import evaluation
import options
import systems
from explain import explain_pair
from scoring import encode_split
from util.cli import InputError
from util.visualize import main as visualize
from vocab import deserialize_vocab

FOLDER = "data/tiny_precomp"
# Flags of each system; the files that it reads besides features and captions.
ALL = [
    (["--model", "scan"], []),
    (["--model", "gsmn"], ["ims_bbx", "ims_size"]),
    (["--model", "pfan"], ["boxes"]),
    (["--model", "pfan_whole"], ["boxes", "who_ims"]),
    (["--model", "chan"], []),
]


def remove_captions(*splits: str) -> None:
    for split in splits:
        for name in ("caps.txt", "precaps_stan.txt", "caps.json", "caption_image.txt"):
            path = f"{FOLDER}/{split}_{name}"
            if os.path.exists(path):
                os.remove(path)


def open_images(flags: list[str], split: str = "test", **more):
    opt = options.parse([*flags, "--img_dim", "12"])
    words = deserialize_vocab("vocab/tiny_precomp_vocab.json")
    return systems.open_split(FOLDER, split, systems.of(opt).vocabulary(words, opt), opt, **more)


@pytest.mark.parametrize(("flags", "files"), ALL, ids=lambda x: x[1] if len(x) > 1 else None)
@pytest.mark.parametrize("split", ["test", "dev"])
def test_every_system_opens_images_without_captions(
    tiny_graphs, tiny_positions, split, flags, files
):
    with_captions = open_images(flags, split)
    remove_captions(split)
    data = open_images(flags, split, images_only=True)
    n = len(np.load(f"{FOLDER}/{split}_ims.npy"))
    assert (data.n_images, data.n_captions, len(data)) == (n, 0, 0)
    assert data.ids is None and data.rows.tolist() == list(range(n))
    for image in (0, n - 1):
        for name, x in with_captions.image_item(image).items():
            assert torch.equal(x, data.image_item(image)[name]), name
    with pytest.raises(FileNotFoundError, match=f"{split}_caps.txt: no such caption file"):
        open_images(flags, split)
    for name in files:
        os.remove(f"{FOLDER}/{split}_{name}.npy")
        with pytest.raises((FileNotFoundError, InputError), match=f"{split}_{name}.npy"):
            open_images(flags, split, images_only=True)
        break


def test_captions_that_are_there_are_read(tiny):
    plain, asked = open_images(ALL[0][0]), open_images(ALL[0][0], images_only=True)
    assert asked.n_captions == plain.n_captions == 75
    assert torch.equal(plain.words, asked.words)


def test_ids_name_the_images(tiny):
    remove_captions("test")
    with open(f"{FOLDER}/test_ids.txt", "w") as file:
        file.writelines(f"photo {k}.jpg\n" for k in range(15))
    assert open_images(ALL[0][0], images_only=True).ids == [f"photo {k}.jpg" for k in range(15)]
    with open(f"{FOLDER}/test_ids.txt", "a") as file:
        file.write("one more.jpg\n")
    with pytest.raises(InputError, match="test_ids.txt: 16 ids for 15 images"):
        open_images(ALL[0][0], images_only=True)


def test_a_sparse_gsmn_says_that_it_needs_captions(tiny_graphs):
    remove_captions("test")
    with pytest.raises(InputError, match="a sparse GSMN reads the dependencies of each caption"):
        open_images(["--model", "gsmn", "--is_sparse"], images_only=True)


def test_programs_that_rank_still_need_captions(untrained):
    remove_captions("test", "train")
    with pytest.raises(FileNotFoundError, match="test_caps.txt: no such caption file"):
        evaluation.evalrank("model.pth.tar", split="test")
    with pytest.raises(FileNotFoundError, match="test_caps.txt: no such caption file"):
        encode_split("model.pth.tar", "data", "test", None, torch.device("cpu"), None)


def test_a_sentence_of_ones_own_on_such_a_picture(untrained, tmp_path, capsys):
    """The picture of attention needs no caption file if it draws --text."""
    model, words, opt = ckpt.load_model("model.pth.tar")
    with_captions = systems.open_split(FOLDER, "test", words, opt)
    want = explain_pair(model, with_captions, None, words, 3, "a red dog")
    remove_captions("test")
    data = systems.open_split(FOLDER, "test", words, opt, images_only=True)
    found = explain_pair(model, data, None, words, 3, "a red dog")
    assert torch.equal(found.t2i, want.t2i) and found.score == want.score
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    pytest.importorskip("PIL")
    visualize(
        ["model.pth.tar", "--image", "3", "--text", "a red dog", "--out", str(tmp_path / "seen")]
    )
    assert "Image 3: a red dog" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="test_caps.txt: no such caption file"):
        visualize(["model.pth.tar", "--image", "3", "--out", str(tmp_path / "seen")])


def write_table(split: str, lines: list[int]) -> None:
    """Captions of some images only: a line per caption, the row of its image."""
    with open(f"{FOLDER}/{split}_caps.txt", "w") as file:
        file.writelines(f"a red dog {k}\n" for k in range(len(lines)))
    with open(f"{FOLDER}/{split}_caption_image.txt", "w") as file:
        file.writelines(f"{row}\n" for row in lines)


@pytest.mark.parametrize("lines", [[3, 3, 9, 1], [9, 1, *range(13)], list(range(14, -1, -1))])
def test_images_without_a_caption_are_searched_too(tiny, lines, capsys):
    """Their numbers are those of the rows, as without captions."""
    write_table("test", lines)
    data = open_images(ALL[0][0], images_only=True)
    assert data.rows.tolist() == list(range(15)) and data.image_of.tolist() == lines
    assert "left out" not in capsys.readouterr().out
    ranked = open_images(ALL[0][0])
    assert ranked.rows.tolist() == sorted(set(lines))
    assert ranked.rows[ranked.image_of].tolist() == lines


def test_copies_of_an_image_stay_one_image(tiny):
    """COCO's test holds a row per caption."""
    rows = np.load(f"{FOLDER}/test_ims.npy")
    np.save(f"{FOLDER}/test_ims.npy", np.repeat(rows, 5, 0))
    data = open_images(ALL[0][0], images_only=True)
    assert data.n_images == 15 and data.n_captions == 75
    assert data.rows.tolist() == list(range(0, 75, 5))
