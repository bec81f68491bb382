"""The vectors of the first stage: kept in files, stale and damaged ones noticed; the index."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import first_stage as stage
from tests.two_stages import FOLDER, captions, matrix, searcher, write_model
from util.cli import InputError

KEPT = Path(FOLDER, "test_search")


def search_all(**more) -> list[int]:
    return searcher(**more).images_for(captions()[4], 15, stages="first").places


def files(ending: str, folder: Path = KEPT) -> Path:
    (found,) = folder.rglob(f"*_images{ending}")
    return found


def test_the_mean_of_regions_and_words_that_are_there():
    torch.manual_seed(0)
    regions, words = torch.randn(3, 5, 4), torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 4 + [True]])
    got = stage.pooled_images({"regions": regions, "region_mask": mask})
    for x, y, there in zip(got, regions, mask, strict=True):
        mean = y[there].mean(0)
        torch.testing.assert_close(x, mean / mean.norm())
    got = stage.pooled_captions({"words": words, "lengths": torch.tensor([6, 2])})
    for x, mean in zip(got, (words[0].mean(0), words[1, :2].mean(0)), strict=True):
        torch.testing.assert_close(x, mean / mean.norm())
    one = stage.pooled_images({"image": 3 * regions[0]})  # a model's own vectors stay
    assert torch.equal(one, 3 * regions[0])
    assert torch.equal(stage.pooled_captions({"sentence": 2 * words[0]}), 2 * words[0])
    assert not stage.pooled_images({"regions": torch.zeros(1, 2, 4)}).any()
    with pytest.raises(InputError, match="hold edges, but neither .*--stages exact"):
        stage.pooled_images({"edges": regions})


def test_vectors_are_computed_once_and_kept(tiny, capsys, monkeypatch):
    write_model()
    first = search_all()
    assert "vectors of 15 images are kept in" in capsys.readouterr().out
    kept = np.load(files(".npy"))
    assert kept.shape == (15, 16) and kept.dtype == np.float32
    assert not list(KEPT.glob("*.part"))

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(stage, "image_vectors", fail)
    assert search_all() == first
    assert "notice" not in capsys.readouterr().out


def test_blocks_give_the_same_vectors(tiny, monkeypatch):
    write_model()
    first = searcher()
    first.prepare()
    images, texts = (np.load(f) for f in sorted(KEPT.glob("*.npy"), reverse=True))
    monkeypatch.setattr(stage, "BLOCK", 4)
    again = searcher(cache="other")
    again.prepare()
    more = [np.load(f) for f in sorted(Path("other").rglob("*.npy"), reverse=True)]
    for one, other in zip((images, texts), more, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    scores = matrix("model.pth.tar")
    got = again.images_for(captions()[3], 15, stages="exact")
    assert got.scores == pytest.approx(scores[got.places, 3], abs=1e-5)


def change_features() -> None:
    images = np.load(f"{FOLDER}/test_ims.npy")
    images[7] *= -1
    np.save(f"{FOLDER}/test_ims.npy", images)


def fewer_images() -> None:
    np.save(f"{FOLDER}/test_ims.npy", np.load(f"{FOLDER}/test_ims.npy")[:10])
    Path(f"{FOLDER}/test_caps.txt").write_text("\n".join(captions()[:50]) + "\n")


def count_regions() -> None:
    np.save(f"{FOLDER}/test_num_boxes.npy", np.full(15, 3))


def flip_a_byte() -> None:
    raw = bytearray(files(".npy").read_bytes())
    raw[-7] ^= 64
    files(".npy").write_bytes(raw)


CHANGES = {
    "features": (change_features, "made of other data, or of the data before it was changed"),
    "images": (fewer_images, "made of other data"),
    "counts": (count_regions, "made of other data"),
    "byte": (flip_a_byte, "damaged, it is not the file that was written"),
    "cut": (lambda: files(".npy").write_bytes(b"\x93NUMPY"), "damaged"),
    "empty": (lambda: files(".npy").write_bytes(b""), "damaged"),
    "record": (lambda: files(".json").write_text("{"), "not whole"),
    "list": (lambda: files(".json").write_text("[1]"), "not whole"),
    "deep": (lambda: files(".json").write_text("[" * 10**5), "not whole"),
    "bytes": (lambda: files(".json").write_bytes(b"\xff\xfe"), "not whole"),
    "no record": (lambda: os.remove(files(".json")), "not whole"),
    "no vectors": (lambda: os.remove(files(".npy")), "not whole"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_vectors_of_other_data_or_damaged_ones_are_made_again(tiny, capsys, change):
    write_model()
    search_all()
    do, said = CHANGES[change]
    do()
    capsys.readouterr()
    n = len(np.load(f"{FOLDER}/test_ims.npy"))
    found = searcher().images_for(captions()[4], 15, stages="first").places
    out = capsys.readouterr().out
    assert said in out and "the vectors are computed again" in out
    assert found == search_all(cache="new") and sorted(found) == list(range(n))
    capsys.readouterr()
    search_all()
    assert "notice" not in capsys.readouterr().out


def test_a_copied_folder_is_taken(tiny, capsys):
    """Times differ, so the SHA-256 decides."""
    write_model()
    want = search_all()
    for path in KEPT.iterdir():
        os.utime(path, (1, 1))
    capsys.readouterr()
    assert search_all() == want and "notice" not in capsys.readouterr().out


def test_changed_captions_are_encoded_again(tiny, capsys):
    write_model()
    searcher().captions_for(0)
    Path(f"{FOLDER}/test_caps.txt").write_text("\n".join(captions()[::-1]) + "\n")
    capsys.readouterr()
    got = searcher().captions_for(2, 75, stages="first")
    assert "_captions.npy: made of other data" in capsys.readouterr().out
    assert got.places == searcher(cache="new").captions_for(2, 75, stages="first").places


def test_each_checkpoint_and_split_has_its_own_vectors(tiny):
    for seed in (0, 1):
        write_model(f"{seed}.pth.tar", seed)
        searcher(f"{seed}.pth.tar").prepare()
        for split in ("test", "dev"):
            searcher(f"{seed}.pth.tar", split=split, cache="shared").prepare()
    assert len(list(KEPT.glob("*.npy"))) == 4 and len(list(Path("shared").rglob("*.npy"))) == 8
    write_model("0.pth.tar", 5)  # trained on: other bytes under the same name
    assert search_all(path="0.pth.tar") == search_all(path="0.pth.tar", cache="new")


def test_a_folder_that_cannot_be_written(tiny, capsys, monkeypatch):
    """A file in its place stands for a read-only folder: root may write everywhere."""
    write_model()
    want = search_all(cache="new")
    KEPT.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny / "home"))
    assert search_all() == want
    assert len(list(Path("home").rglob("*_images.npy"))) == 1
    capsys.readouterr()
    assert search_all() == want and "notice" not in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(KEPT))
    with pytest.raises(InputError, match="no folder for the vectors.*test_search.*--cache FOLDER"):
        search_all()
    with pytest.raises(InputError, match="no folder for the vectors.*--cache FOLDER"):
        search_all(cache=str(KEPT))


def test_old_vectors_in_a_read_only_folder_are_said_once(tiny, monkeypatch, capsys):
    write_model()
    search_all()
    change_features()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny / "home"))
    writable = stage.writable
    monkeypatch.setattr(stage, "writable", lambda places: writable(places[1:] or places))
    capsys.readouterr()
    found = search_all()
    assert "test_search" in capsys.readouterr().out
    assert search_all() == found == search_all(cache="new")
    assert "computed again" not in capsys.readouterr().out


def test_kept_vectors_in_a_folder_that_became_read_only_are_read(tiny, monkeypatch, capsys):
    write_model()
    want = search_all()

    def refuse(*_):
        raise AssertionError("nothing needs to be written")

    monkeypatch.setattr(stage, "writable", refuse)
    assert search_all() == want


def test_a_stopped_computation_leaves_nothing(tiny, monkeypatch):
    write_model()
    compute = stage.image_vectors

    def stop(model, dataset):
        yield next(compute(model, dataset))[:4]
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "image_vectors", stop)
    with pytest.raises(KeyboardInterrupt):
        search_all()
    assert os.listdir(KEPT) == []
    monkeypatch.setattr(stage, "image_vectors", compute)
    assert len(search_all()) == 15


def test_a_vector_of_nan_is_refused(tiny):
    path = write_model()
    state = torch.load(path, weights_only=False)
    state["model"][0]["fc.weight"][:] = 3e38  # finite; what it computes is not
    torch.save(state, path)
    with pytest.raises(InputError, match="the vector of image 0 .*NaN or Inf"):
        search_all()


# The index


def unit(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def without_faiss(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)


@pytest.mark.parametrize("faiss", [True, False])
def test_a_flat_index_compares_all(monkeypatch, faiss):
    if faiss:
        pytest.importorskip("faiss", reason="pip install faiss-cpu")
    else:
        without_faiss(monkeypatch)
    x, q = unit(50), unit(4, seed=1)
    x[[30, 7]] = x[20]
    index = stage.VectorIndex(x)
    assert index.kind == "flat" and ("faiss" in index.about) == faiss
    for k in (1, 9, 50, 80):
        scores, found = index.search(torch.from_numpy(q), k)
        assert scores.shape == found.shape == (4, min(k, 50))
        want = q @ x.T
        np.testing.assert_allclose(scores, np.take_along_axis(want, found, 1), atol=1e-6)
        np.testing.assert_allclose(scores, -np.sort(-want, axis=1)[:, :k], atol=1e-6)
    for row in found.tolist():
        assert row.index(7) < row.index(20) < row.index(30)


def test_without_faiss_a_large_set_is_refused_with_the_command(monkeypatch):
    without_faiss(monkeypatch)
    monkeypatch.setattr(stage, "LARGE", 40)
    with pytest.raises(InputError, match="40 vectors need .*faiss.*: pip install faiss-cpu$"):
        stage.VectorIndex(unit(40))
    assert stage.VectorIndex(unit(39)).kind == "flat"


def test_a_search_without_faiss_finds_the_same(tiny, monkeypatch):
    write_model()
    want = search_all()
    without_faiss(monkeypatch)
    assert search_all() == want


@pytest.fixture
def large(tiny, monkeypatch):
    """The tiny set counts as large, and all cells are compared."""
    pytest.importorskip("faiss", reason="pip install faiss-cpu")
    write_model()
    want = search_all(cache="flat")
    monkeypatch.setattr(stage, "LARGE", 10)
    return want


def test_cells_are_kept_and_read_again(large, monkeypatch, capsys):
    monkeypatch.setattr(stage, "probes", lambda cells: cells)
    found = searcher()
    assert found.images_for(captions()[4], 15, stages="first").places == large
    assert found.image_index.kind == "IVF" and "3 of 3 cells" in found.image_index.about
    said = capsys.readouterr().out
    assert "making an index of 15 vectors in 3 cells" in said
    assert files(".faiss").stat().st_size

    def fail(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(stage.VectorIndex, "_cells", fail)
    assert search_all() == large


def test_fewer_cells_find_less_but_no_wrong_scores(large, monkeypatch):
    monkeypatch.setattr(stage, "probes", lambda cells: 1)
    scores = matrix("model.pth.tar")
    found = searcher().images_for(captions()[4], 15, 15)
    assert 0 < len(found.places) < 15 and set(found.places) <= set(range(15))
    assert found.scores == pytest.approx(scores[found.places, 4], abs=1e-5)


@pytest.mark.parametrize("fault", ["byte", "cut", "other", "unsaid", "copied"])
def test_an_index_that_is_not_ours_is_never_read(large, monkeypatch, capsys, fault):
    import faiss

    monkeypatch.setattr(stage, "probes", lambda cells: cells)
    search_all()
    path = files(".faiss")
    raw = bytearray(path.read_bytes())
    if fault == "byte":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif fault == "cut":
        path.write_bytes(raw[:100])
    elif fault == "other":
        other = faiss.IndexFlatIP(16)
        other.add(unit(15, 16))
        faiss.write_index(other, str(path))
    elif fault == "copied":  # with its times, as an archive of a stranger's folder has them
        shutil.copy2(path, "copy")
        os.replace("copy", path)
    else:
        record = json.loads(files(".json").read_text())
        del record["index"]
        files(".json").write_text(json.dumps(record))
    capsys.readouterr()
    read, faiss_read = [], faiss.read_index

    def watched(name: str, *more):
        said = json.loads(files(".json").read_text())["index"]
        read.append(stage.file_hash(name) == said["sha256"])
        return faiss_read(name, *more)

    monkeypatch.setattr(faiss, "read_index", watched)
    assert search_all() == large and read == [True]  # the one that was made again
    assert "of other vectors, or damaged; the index is made again" in capsys.readouterr().out
    assert search_all() == large and read == [True, True]
    assert "notice" not in capsys.readouterr().out


def test_an_index_that_cannot_be_written_is_used_all_the_same(large, monkeypatch, capsys):
    import faiss

    monkeypatch.setattr(stage, "probes", lambda cells: cells)

    def full(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    assert search_all() == large
    assert "could not be written (No space left" in capsys.readouterr().out
    assert not list(KEPT.glob("*.part")) and not list(KEPT.glob("*.faiss"))


def test_changed_features_need_a_new_index(large, monkeypatch, capsys):
    monkeypatch.setattr(stage, "probes", lambda cells: cells)
    search_all()
    change_features()
    capsys.readouterr()
    found = search_all()
    said = capsys.readouterr().out
    assert "the vectors are computed again" in said and "making an index" in said
    assert found == search_all(cache="new") != large


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny, monkeypatch):
    """A mapped file would end the process, without a word."""

    class Full(stage.NpyWriter):
        def write(self, row, place=None):
            if self.rows == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(row, place)

    blocks = lambda: iter([np.ones((5, 4), np.float32)])  # noqa: E731
    kept = stage.Kept("v", "images", {}, 5, blocks)
    said = "v.npy: .* could not be written .No space left on device"
    with monkeypatch.context() as patch, pytest.raises(InputError, match=said):
        patch.setattr(stage, "NpyWriter", Full)
        stage.kept_vectors(["vectors"], kept)
    assert os.listdir("vectors") == []
    assert np.array_equal(stage.kept_vectors(["vectors"], kept)[0], np.ones((5, 4)))
