"""What users type: paths of several forms, other data sets, --resume and nothing else."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluation
import options
import train
import vocab
from tests.conftest import read_log, same_weights, train_args, write_split
from util import dependency_parser, positions
from util.cli import InputError

FOLDER = Path("data/tiny_precomp")


@pytest.fixture
def trained(tiny):
    train.main(train_args(num_epochs=1))
    return tiny


def test_resume_needs_no_other_flag(tiny, capsys):
    """It goes on in its own folders with its own options; what is given again wins."""
    flags = {"agg_func": "Mean", "no_imgnorm": True, "drop": True, "model_name": "a/checkpoint"}
    flags["logger_name"] = "a/log"
    train.main(train_args(num_epochs=3, **flags | {"model_name": "w", "logger_name": "wl"}))
    train.main(train_args(num_epochs=2, **flags))
    train.main(["--resume", "a/checkpoint/checkpoint_1.pth.tar", "--num_epochs", "3"])
    assert same_weights("a/checkpoint/checkpoint_2.pth.tar", "w/checkpoint_2.pth.tar")
    assert not os.path.exists("runs") and len(os.listdir("a/log")) >= 2
    assert "changed options" not in capsys.readouterr().out
    train.main(
        ["--resume", "a/checkpoint/checkpoint_2.pth.tar", "--num_epochs", "4", "--no-drop"]
        + ["--learning_rate", "0.5"]
    )
    said = capsys.readouterr().out
    assert "changed options: --learning_rate 0.01 -> 0.5, --drop True -> False" in said
    opt = torch.load("a/checkpoint/checkpoint_3.pth.tar", weights_only=False)["opt"]
    assert (opt.learning_rate, opt.drop, opt.agg_func, opt.no_imgnorm) == (0.5, False, "Mean", True)


def test_resume_of_a_moved_checkpoint_goes_on_beside_it(trained):
    os.makedirs("moved")
    shutil.copy("run/checkpoint_0.pth.tar", "moved/last.pth.tar")
    train.main(["--resume", "moved/last.pth.tar", "--num_epochs", "2"])
    assert {"last.pth.tar", "checkpoint_1.pth.tar", "log.jsonl"} <= set(os.listdir("moved"))
    assert not os.path.exists("run/checkpoint_1.pth.tar")


def test_a_new_run_from_weights_takes_the_options_of_the_model_only(trained):
    more = ["--resume", "run/checkpoint_0.pth.tar", "--reset_start_epoch", "--num_epochs", "1"]
    more += ["--data_path", "data", "--data_name", "tiny_precomp", "--vocab_path", "vocab"]
    train.main([*more, "--workers", "0", "--model_name", "new", "--logger_name", "new"])
    opt = torch.load("new/checkpoint_0.pth.tar", weights_only=False)["opt"]
    assert (opt.embed_size, opt.bi_gru, opt.learning_rate, opt.batch_size) == (16, True, 2e-4, 128)
    assert sorted(x for x in os.listdir("run") if "earlier" in x) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--embed_size", "512"], "cannot follow: --embed_size 512, the checkpoint has 16$"),
        (["--word_dim", "9"], "--word_dim 9, the checkpoint has 8$"),
        (["--num_layers", "2", "--embed_size", "8"], "--embed_size 8, the .* 16; --num_layers 2,"),
        (["--img_dim", "40"], "regions have 12 numbers, the model expects 40"),
    ],
)
def test_weights_that_cannot_follow_name_the_flag(trained, flags, message):
    with pytest.raises(InputError, match=message):
        train.main(["--resume", "run/checkpoint_0.pth.tar", "--num_epochs", "2", *flags])


def test_resume_refuses_another_system(trained, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", "run/checkpoint_0.pth.tar", "--model", "chan"])
    assert "--model chan: the checkpoint of --resume is of scan" in capsys.readouterr().err


@pytest.mark.parametrize(("strange", "said"), [(0, None), (10, "warning"), (60, "train afresh")])
def test_resume_on_other_captions_counts_unknown_words(trained, capsys, strange, said):
    other = Path("data/other_precomp")
    shutil.copytree(FOLDER, other)
    lines = (other / "train_caps.txt").read_text().splitlines()
    lines = ["zebra wolf"] * strange + lines[strange:]
    (other / "train_caps.txt").write_text("".join(f"{x}\n" for x in lines))
    flags = ["--resume", "run/checkpoint_0.pth.tar", "--num_epochs", "2", "--workers", "0"]
    flags += ["--data_name", "other_precomp", "--model_name", "more"]
    if strange == 60:
        with pytest.raises(InputError, match=said):
            train.main(flags)
        train.main([*flags, "--allow_unknown"])
    else:
        train.main(flags)
    found = "not in its vocabulary, which was built from other captions" in capsys.readouterr().out
    assert found == (strange > 0)


def test_validation_in_training_equals_evaluation(tiny):
    """On a dev of uneven counts, all captions are scored."""
    write_split(FOLDER, "dev", 10, k=3)
    lines = (FOLDER / "dev_caps.txt").read_text().splitlines()[:27]
    (FOLDER / "dev_caps.txt").write_text("".join(f"{x}\n" for x in lines))
    table = [caption // 3 for caption in range(24)] + [8, 9, 9]
    (FOLDER / "dev_caption_image.txt").write_text("".join(f"{x}\n" for x in table))
    train.main(train_args(num_epochs=1))
    got = evaluation.evalrank("run/checkpoint_0.pth.tar", split="dev")
    assert read_log("run")[-1]["rsum"] == pytest.approx(got["rsum"])


def test_resume_from_another_folder_logs_where_it_logged(tiny, monkeypatch):
    names = {"model_name": "runs/a/ckpt", "logger_name": "runs/a/log"}
    train.main(train_args(num_epochs=1, **names))
    (tiny / "other" / "vocab").mkdir(parents=True)
    shutil.copy("vocab/tiny_precomp_vocab.json", "other/vocab")
    text = Path("other/vocab/tiny_precomp_vocab.json").read_text()
    text = text.replace('"dog": ', '"x": ').replace('"cat": ', '"dog": ')
    Path("other/vocab/tiny_precomp_vocab.json").write_text(text)  # it is not looked at
    monkeypatch.chdir(tiny / "other")
    flags = ["--resume", "../runs/a/ckpt/checkpoint_0.pth.tar", "--num_epochs", "2"]
    train.main([*flags, "--data_path", "../data", "--workers", "0"])
    assert len(read_log("../runs/a/log")) == 2


def test_img_dim_follows_from_the_features(tiny):
    train.main(train_args(num_epochs=1, img_dim=None))
    opt = torch.load("run/checkpoint_0.pth.tar", weights_only=False)["opt"]
    assert opt.img_dim == 12
    evaluation.evalrank("run/checkpoint_0.pth.tar")


def test_a_model_is_evaluated_on_another_data_set(trained, capsys):
    other = Path("data/other_precomp")
    other.mkdir()
    write_split(other, "test", 9, k=3)
    path = "run/model_best.pth.tar"
    metrics = evaluation.evalrank(path, split="test", data_name="other_precomp")
    out = capsys.readouterr().out
    assert f"Checkpoint: {path}\n" in out and "Split: test of data/other_precomp\n" in out
    assert "Images: 9, Captions: 27\nCaptions per image: 3\n" in out
    flags = ["--split", "test", "--data_name", "other_precomp/", "--save_path", "s.npy"]
    evaluation.main([path, *flags])
    out = capsys.readouterr().out
    assert f"rsum: {metrics['rsum']:.1f}" in out and "Scores saved to s.npy\n" in out
    evaluation.main(["s.npy"])
    assert (
        "Scores: s.npy\nImages: 9, Captions: 27\nCaptions per image: 3" in capsys.readouterr().out
    )


def test_paths_in_several_forms(tiny, monkeypatch):
    """~, slashes at the end, the folder of the data itself, the file of the vocabulary."""
    monkeypatch.setenv("HOME", str(tiny))
    forms = [
        {"data_path": "~/data/", "data_name": "tiny_precomp/", "vocab_path": "~/vocab/"},
        {"data_path": "data/tiny_precomp", "vocab_path": "vocab/tiny_precomp_vocab.json"},
        {"data_path": "data/tiny_precomp/", "vocab_path": "~/vocab/tiny_precomp_vocab.json"},
    ]
    for k, form in enumerate(forms):
        out = {"model_name": f"~/run{k}/", "logger_name": f"~/run{k}"}
        train.main(train_args(num_epochs=1, **form, **out))
        assert same_weights("run0/checkpoint_0.pth.tar", f"run{k}/checkpoint_0.pth.tar")
    got = evaluation.evalrank(
        "~/run0/checkpoint_0.pth.tar", "~/data", "test", vocab_path="~/vocab", save_path="~/s.npy"
    )
    assert os.path.isfile("s.npy") and not os.path.exists("~")
    path = "run0/checkpoint_0.pth.tar"
    assert evaluation.evalrank(path, "data/tiny_precomp", "test") == got
    train.main(["--resume", "~/run0/checkpoint_0.pth.tar", "--num_epochs", "2"])
    vocab.main(["--data_path", "~/data", "--data_name", "tiny_precomp/", "--out", "again.json"])


@pytest.mark.parametrize(
    "program",
    [
        lambda *data: train.main(train_args() + [*data]),
        lambda *data: vocab.main([*data]),
        lambda *data: positions.main([*data]),
        lambda *data: dependency_parser.main([*data]),
    ],
    ids=["train", "vocab", "positions", "dependency_parser"],
)
def test_a_data_folder_that_is_not_there_is_answered(tiny, program):
    with pytest.raises(FileNotFoundError, match=r"data/x: no such .*\(there are tiny_precomp\)"):
        program("--data_path", "data", "--data_name", "x")
    said = re.escape("but data/tiny_precomp is one: give --data_path data --data_name tiny_precomp")
    with pytest.raises(FileNotFoundError, match=said):
        program("--data_path", "data/tiny_precomp", "--data_name", "x")
    os.makedirs("data/other_precomp")
    shutil.copy("data/tiny_precomp/test_caps.txt", "data/other_precomp")
    said = re.escape("give --data_path data --data_name other_precomp")
    with pytest.raises(FileNotFoundError, match=said):
        program("--data_path", "data/tiny_precomp", "--data_name", "other_precomp")
    monkey = os.getcwd()
    os.chdir("data/tiny_precomp")
    try:
        with pytest.raises(FileNotFoundError, match=r"give --data_path \S+/data --data_name tiny"):
            program("--data_path", ".", "--data_name", "x")
    finally:
        os.chdir(monkey)


@pytest.mark.parametrize("name", ["lr[2e-4]", "a*b", "why?", "x[!y]"])
def test_a_second_run_into_a_folder_of_any_name_loses_nothing(tiny, name):
    flags = {"num_epochs": 1, "model_name": name, "logger_name": name}
    train.main(train_args(**flags))
    first = torch.load(f"{name}/checkpoint_0.pth.tar", weights_only=False)["model"]
    train.main(train_args(**flags, seed=5))
    kept = torch.load(f"{name}/earlier_1/checkpoint_0.pth.tar", weights_only=False)["model"]
    assert torch.equal(first[0]["fc.weight"], kept[0]["fc.weight"])
    assert len((Path(name) / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("images", "fold"), [(15, "3"), (50, "10"), (5, "1"), (13, "2 or 3")])
def test_five_folds_say_their_size(trained, capsys, images, fold):
    write_split(FOLDER, "test", images)
    evaluation.evalrank("run/model_best.pth.tar", split="test", fold5=True, save_path="s.npy")
    said = f"Five folds of {fold} images each\nnotice: this is not the published protocol"
    assert said in capsys.readouterr().out
    evaluation.main(["s.npy", "--fold5"])
    assert said in capsys.readouterr().out
    np.save("published.npy", np.random.default_rng(0).normal(size=(5000, 5000)).astype("f4"))
    evaluation.main(["published.npy", "--fold5"])
    out = capsys.readouterr().out
    assert "Five folds of 1,000 images each" in out and "notice" not in out


@pytest.mark.parametrize("fold5", [[], ["--fold5"]])
def test_the_row_of_a_paper_stands_beside_as_many_images_only(trained, capsys, fold5):
    flags = ["run/model_best.pth.tar", "--split", "test", "--paper", *"123456", *fold5]
    n = 3 if fold5 else 15
    evaluation.main([*flags, "--paper_images", str(n)])
    assert "\npaper          1.0" in capsys.readouterr().out
    write_split(FOLDER, "test", 15, k=4)
    evaluation.main([*flags, "--paper_images", str(n)])
    out = capsys.readouterr().out
    assert "it ranks 5 captions per image" in out and "\npaper" not in out
    evaluation.main([*flags, "--paper_images", "1000"])
    out = capsys.readouterr().out
    assert "\npaper" not in out
    said = "has folds of" if fold5 else "has"
    assert f"it ranks among 1,000 images, this split {said} {n}\n" in out


def test_a_missing_split_lists_those_there(trained):
    os.remove(FOLDER / "test_ims.npy")
    with pytest.raises(FileNotFoundError, match="test_ims.npy: no such file; splits there: train"):
        evaluation.evalrank("run/model_best.pth.tar", split="test")


def test_given_options_are_told_from_defaults():
    argv = ["--model", "gsmn", "--bi_gru", "--no-drop", "--num_block", "16"]
    assert options.given(argv) == {"model", "bi_gru", "drop", "num_block"}
