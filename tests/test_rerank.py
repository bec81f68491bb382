"""evaluation.py --rerank: the recalls of two stages, compared with searching one by one."""

import numpy as np
import pytest

import evaluation
import rerank
from metrics import metrics_of_ranks
from tests.two_stages import (
    FOLDER,
    SYSTEMS,
    captions,
    fewer_regions,
    matrix,
    searcher,
    write_model,
)
from util.cli import InputError

WHERE = {"data_path": "data", "split": "test", "vocab_path": None, "device": "cpu"}
WHERE |= {"batch_size": None}
ARGS = ["model.pth.tar", "--data_path", "data", "--device", "cpu"]


@pytest.mark.parametrize("flags", SYSTEMS, ids=str)
def test_a_list_of_all_gives_the_plain_metrics(tiny_positions, flags):
    if not flags.get("need_box_whole"):
        fewer_regions()
    path = write_model(**flags)
    want = evaluation.evalrank(path, "data", "test", device="cpu")
    for k in (75, 1000):
        metrics, shape = rerank.rerank(path, k, **WHERE)
        assert metrics == want and shape == (15, 75)


def rank_in(places: list[int], own: list[int], scores: np.ndarray, first: np.ndarray) -> int:
    """The rank of the best own one: in the shortlist by the scores, else by the first stage."""
    listed = [k for k in own if k in places]
    if listed:
        best = max(scores[listed])
        return sum(scores[k] >= best for k in places) - sum(scores[k] >= best for k in listed)
    best = max(first[own])
    return int((first >= best).sum() - (first[own] >= best).sum())


@pytest.mark.parametrize("other", [False, True], ids=["own vectors", "another model's"])
def test_the_metrics_are_those_of_searches(tiny, other):
    path = write_model(model="chan")
    first = write_model("other.pth.tar", 4) if other else None
    scores, found = matrix(path), searcher(path, first_stage=first)
    alone = np.zeros((15, 75))
    for caption, text in enumerate(captions()):
        got = found.images_for(text, 15, stages="first")
        alone[got.places, caption] = got.scores
    for k in (1, 6):
        ranks = {"t2i": [], "i2t": []}
        for caption, text in enumerate(captions()):
            places = found.images_for(text, k, k).places
            own = [caption // 5]
            ranks["t2i"].append(rank_in(places, own, scores[:, caption], alone[:, caption]))
        for image in range(15):
            places = found.captions_for(image, k, k).places
            own = [*range(5 * image, 5 * image + 5)]
            ranks["i2t"].append(rank_in(places, own, scores[image], alone[image]))
        metrics, _ = rerank.rerank(path, k, first, **WHERE)
        for way, numbers in ranks.items():
            assert metrics[way] == metrics_of_ranks(np.array(numbers)), (way, k)


def test_only_listed_pairs_are_scored(tiny, monkeypatch, capsys):
    path = write_model()
    scored = []
    kind = type(searcher(path).model)
    plain = kind.similarity

    def similarity(self, images, texts, *more):
        found = plain(self, images, texts, *more)
        scored.append(found.numel())
        return found

    monkeypatch.setattr(kind, "similarity", similarity)
    rerank.rerank(path, 2, **WHERE)
    assert 2 * 75 <= sum(scored) <= 2 * 75 + 2 * 15
    share = 100 * sum(scored) / (15 * 75)
    said = capsys.readouterr().out
    assert f"Two stages: shortlists of 2, {share:.1f} % of all pairs scored" in said
    assert "Queries with a right one in the shortlist: i2t " in said


def test_the_command(tiny, capsys):
    write_model()
    evaluation.main([*ARGS, "--rerank", "75", "--paper", *"123456"])
    out = capsys.readouterr().out
    metrics = evaluation.evalrank("model.pth.tar", "data", "test", device="cpu")
    assert f"rsum: {metrics['rsum']:.1f}" in out and "paper" in out
    write_model("other.pth.tar", 4)
    capsys.readouterr()
    evaluation.main([*ARGS, "--rerank", "3", "--first_stage", "other.pth.tar", "--split", "dev"])
    assert capsys.readouterr().out.count("Checkpoint: ") == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["b.pth.tar", "--rerank", "5"], "--rerank: give one checkpoint"),
        (["--rerank", "5", "--fold5"], "--rerank does not go with --fold5"),
        (["--rerank", "5", "--save_path", "s.npy"], "--rerank does not go with --save_path"),
        (["--rerank", "5", "--json", "f", "--csv", "g"], "does not go with --csv, --json"),
        (["--rerank", "5", "--report", "r.html"], "--rerank does not go with --report"),
        (["--rerank", "5", "--published_boxes"], "--rerank does not go with --published_boxes"),
        (["--first_stage", "b.pth.tar"], "give their length, --rerank K"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_work(tiny, more, said):
    with pytest.raises(InputError, match=said):
        evaluation.main([ARGS[0], *more])  # nothing is there to evaluate


def test_matrices_embeddings_and_wrong_numbers_are_refused(tiny, capsys):
    for source in (["a.npy"], ["--embeddings", "a.npy", "b.npy"]):
        with pytest.raises(InputError, match="--rerank: give one checkpoint"):
            evaluation.main([*source, "--rerank", "5"])
    for number in ("0", "-2", "x"):
        with pytest.raises(SystemExit):
            evaluation.main([*ARGS, "--rerank", number])
        assert "--rerank" in capsys.readouterr().err
    with pytest.raises(InputError, match="--rerank 0"):
        rerank.rerank(write_model(), 0, **WHERE)


def test_other_images_in_the_first_stage_are_refused(tiny_positions):
    """Another system may read a split in another way."""
    path = write_model()
    other = write_model("whole.pth.tar", model="pfan_whole")
    metrics, _ = rerank.rerank(path, 5, other, **WHERE)
    assert metrics["rsum"] >= 0
    images = np.load(f"{FOLDER}/test_ims.npy")
    np.save(f"{FOLDER}/test_ims.npy", np.repeat(images, 5, 0)[:, :, :])
    boxes, whole = (np.load(f"{FOLDER}/test_{x}.npy") for x in ("boxes", "who_ims"))
    np.save(f"{FOLDER}/test_boxes.npy", np.repeat(boxes, 5, 0))
    np.save(f"{FOLDER}/test_who_ims.npy", np.repeat(whole, 5, 0))
    with open(f"{FOLDER}/test_sent_caps.txt", "w") as file:
        file.writelines(f"{line}\n" for line in captions()[:15])
    with open(f"{FOLDER}/train_sent_caps.txt", "w") as file:
        file.write("a dog\n")
    with pytest.raises(InputError, match="several candidate images are not supported"):
        rerank.rerank(other, 5, **WHERE)
    with pytest.raises(InputError, match="reads other images or captions"):
        rerank.rerank(path, 5, other, **WHERE)
