"""What a run prints of itself: banner, lines with names, summary; trackers and pictures."""

import math
import os
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import banner
import evaluation
import train
from tests.conftest import read_log, same_weights, train_args
from util import log, tracker
from util.cli import InputError

ROOT = Path(train.__file__).parent
PUBLISHED = re.compile(
    r"Epoch: \[\d+\]\[\d+/\d+\]  Eit \d+  lr \S+  Le \d+\.\d{4} \(\d+\.\d{4}\)  "
    r"Time \d+\.\d{4} \(\d+\.\d{4}\)  Data \d+\.\d{4} \(\d+\.\d{4}\)"
    r"|(Image to text|Text to image): \d+\.\d(, \d+\.\d){4}"
    r"|rsum: \d+\.\d \(step \d+, \d+\.\d s\)"
)
WITHOUT_TIMES = re.compile(r"\d+\.\d s\)|(Time|Data) .*")


def output(capsys, **flags) -> list[str]:
    """The lines that a run prints."""
    capsys.readouterr()
    train.main(train_args(**flags))
    return capsys.readouterr().out.splitlines()


def facts(lines: list[str]) -> dict[str, str]:
    """The banner's lines by name."""
    found = [re.fullmatch(r"  ([a-z]+) {2,}(\S.*)", line) for line in lines]
    return {m[1]: m[2] for m in reversed(found) if m}


def warnings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("warning: ")]


# The banner


def test_banner_names_what_a_run_works_with(tiny, capsys):
    text = (tiny / "data/tiny_precomp/train_caps.txt").read_text()
    (tiny / "data/tiny_precomp/train_caps.txt").write_text(text.replace("dog", "wolf"))
    words = sum(len(line.split()) for line in text.splitlines())
    lines = output(capsys, num_epochs=1, allow_unknown=True, logger_name="my logs")
    found = facts(lines)
    assert lines[0] == "reading data/tiny_precomp"
    assert "SCAN: 1 epoch of 7 steps, 16 pairs a step" in lines
    assert found["train"] == "20 images x 4 regions x 12 numbers; 100 captions, 5 an image"
    assert found["dev"] == "10 images x 4 regions x 12 numbers; 50 captions, 5 an image"
    share = 100 * text.count("dog") / words
    assert found["vocabulary"].startswith("vocab/tiny_precomp_vocab.json: 20 words; ")
    assert f"{share:.2f} % of train's words are unknown" in found["vocabulary"]
    model = torch.load("run/checkpoint_0.pth.tar", weights_only=False)["model"]
    sizes = [sum(x.numel() for x in part.values()) for part in model]
    assert found["parameters"] == f"{sum(sizes):,}: img_enc {sizes[0]:,}, txt_enc {sizes[1]:,}"
    assert found["device"].startswith("cpu, ")
    assert found["device"].endswith("; loading in this process")
    assert banner.loaders(2) == "loading: 2 more processes" and found["seed"] == "0"
    assert torch.__version__ in found["versions"]
    assert found["writes"].startswith("run: checkpoints; my logs: ")
    assert "Namespace" not in "\n".join(lines)


def test_banner_shows_only_options_that_differ(tiny_graphs, capsys):
    """GSMN's own defaults are not listed, SCAN's values would be."""
    flags = {"model": "gsmn", "feat_dim": 4, "num_block": 4, "hid_dim": 8, "out_dim": 4}
    lines = output(capsys, num_epochs=1, val_step=None, no_imgnorm=True, **flags)
    start = next(k for k, line in enumerate(lines) if line.startswith("  options"))
    end = next(k for k, line in enumerate(lines) if k > start and not line.startswith(" " * 14))
    words = shlex.split(" ".join(lines[start + 1 : end]))
    assert "--no_imgnorm" in words and "--bi_gru" in words
    assert not {"--log_step", "--val_step", "--seed", "--margin", "--model"} & set(words)
    assert words[words.index("--feat_dim") + 1] == "4"
    assert " ".join(lines[:start]).count("_graph ") == 2


def test_the_commit_of_the_code(monkeypatch):
    for found, said in (
        (None, None),
        ("a" * 40, "git commit aaaaaaa"),
        (f"{'b' * 40}-dirty", "git commit bbbbbbb, and changes that are not committed"),
    ):
        monkeypatch.setattr(banner, "commit_of", lambda folder, found=found: found)
        assert banner.code() == said


# Lines of steps and validations


def test_quiet_leaves_the_published_lines(tiny, capsys):
    loud = output(capsys, num_epochs=2, log_step=3, val_step=4)
    quiet = output(capsys, num_epochs=2, log_step=3, val_step=4, quiet=True, model_name="quiet")
    assert [line for line in quiet if not PUBLISHED.fullmatch(line)] == [
        line for line in quiet if line.startswith("notice: ")
    ]
    assert sum(map(bool, map(PUBLISHED.fullmatch, quiet))) == 4 + 3 * 5
    kept = [line for line in loud if PUBLISHED.fullmatch(line)]
    same = [[WITHOUT_TIMES.sub("", x) for x in lines] for lines in (kept, quiet)]
    assert same[0] == [line for line in same[1] if not line.startswith("notice: ")]


@pytest.mark.parametrize(
    ("flags", "phases"),
    [
        ({}, ["summed hinge", "hardest negatives"]),
        ({"vse_mean_warmup_epochs": None}, ["hardest negatives"] * 2),
        ({"max_violation": None}, ["summed hinge"] * 2),
        ({"criterion": "InfoNCELoss"}, ["InfoNCE"] * 2),
    ],
)
def test_step_lines_say_phase_and_loss_of_a_pair(tiny, capsys, flags, phases):
    lines = output(capsys, num_epochs=2, log_step=5, **flags)
    steps = [k for k, line in enumerate(lines) if line.startswith("Epoch: ")]
    assert len(steps) == 2
    for phase, k in zip(phases, steps, strict=True):
        total = float(re.search(r"Le (\S+)", lines[k])[1])
        each = total if phase == "InfoNCE" else total / 16
        number = re.fullmatch(
            rf"  {phase}: (\d+\.\d{{4}})/pair  grad \S+  [\d,.]+ pairs/s  "
            r"left [\d.]+ (ms|s), run [\d.]+ (ms|s)",
            lines[k + 1],
        )[1]
        assert float(number) == pytest.approx(each, abs=1e-3)


def test_time_left_counts_steps_and_validations():
    phase = log.Phase("x", True, epochs_after=2, val_step=0)
    phase.validation = 50
    assert phase.left(step=10, batch=10, batches=100, seconds=1) == "left 1.5 min, run 7.3 min"
    phase.val_step = 30  # 290 steps are left, so nine validations within the epochs
    want = log.duration(290 + 50 * (3 + 300 // 30 - 10 // 30))
    assert phase.left(step=10, batch=10, batches=100, seconds=1).endswith(f"run {want}")
    said = [log.duration(x) for x in (0, 0.03, 0.4, 9.94, 59, 100, 5000, 9000, 90000, 200000)]
    assert said == "0 s,30 ms,0.4 s,9.9 s,59 s,1.7 min,83 min,2.5 h,25 h,2.3 days".split(",")


def test_validation_lines_have_names_and_the_best(tiny, capsys):
    lines = output(capsys, num_epochs=3)
    records = read_log("run")
    heads = [
        k for k, line in enumerate(lines) if line.endswith(" R@1    R@5   R@10  median    mean")
    ]
    assert len(heads) == 3
    best = -1
    for record, k in zip(records, heads, strict=True):
        assert lines[k - 1].startswith("rsum: ")
        for line, end in zip(lines[k + 1 : k + 3], ("", "i"), strict=True):
            numbers = [float(x) for x in line.split()[3:]]
            want = [record[f"{name}{end}"] for name in ("r1", "r5", "r10", "medr", "meanr")]
            assert numbers == pytest.approx(want, abs=0.051)
        assert lines[k + 3].split() == ["by", "chance", "10.0", "50.0", "100.0"]
        assert f"sum of the six recalls {record['rsum']:.1f}" in lines[k + 4]
        saved = "new best: saved run/model_best.pth.tar" in lines[k + 5 : k + 6]
        assert saved == (record["rsum"] > best)
        best = max(best, record["rsum"])


def test_a_run_is_never_silent(tiny, capsys, monkeypatch):
    """With --log_step and --val_step beyond an epoch, as GSMN's are on small data."""
    monkeypatch.setattr(log, "SILENCE", 0.0)
    lines = output(capsys, num_epochs=1, log_step=100, val_step=15000)
    assert sum(line.startswith("  epoch 0, step ") for line in lines) == 7
    assert not any(line.startswith("Epoch: ") for line in lines)
    quiet = output(capsys, num_epochs=1, log_step=100, quiet=True)
    assert not any(line.startswith("  ") for line in quiet)


def test_long_work_gives_a_sign_of_life(capsys, monkeypatch):
    monkeypatch.setattr(log, "SILENCE", 0.01)
    with log.sign_of_life("validation"):
        while "validation: " not in (said := capsys.readouterr().out):
            pass
    assert re.search(r"  validation: [\d.]+ (ms|s) so far\n", said)
    with log.sign_of_life("validation", quiet=True):
        math.factorial(20000)
    assert not capsys.readouterr().out


# The summary


@pytest.mark.parametrize("again", ["first", "resumed", "nothing"])
def test_the_command_of_the_summary_evaluates_the_best(tiny, capsys, monkeypatch, again):
    folder = "it's my run"
    flags = {"num_epochs": 2, "model_name": folder, "logger_name": folder}
    lines = output(capsys, **flags)
    if again != "first":
        flags |= {"resume": f"{folder}/checkpoint_1.pth.tar"}
        lines = output(capsys, **flags | {"num_epochs": 2 if again == "nothing" else 3})
    records = read_log(folder)
    best = max(records, key=lambda record: record["rsum"])
    said = f"best: rsum {best['rsum']:.1f} after epoch {best['epoch']}, saved in "
    assert said + f"{folder}/model_best.pth.tar" in lines
    assert any(line.startswith("done: ") for line in lines) == (again != "nothing")
    command = shlex.split(lines[-1].removeprefix("to evaluate it: "))
    assert os.path.samefile(command[0], sys.executable) or command[0] == "python"
    assert os.path.samefile(command[1], ROOT / "evaluation.py") and "--split" in command
    assert command[command.index("--split") + 1] == "test"
    evaluation.main(command[2:])
    assert "Images: 15, Captions: 75" in capsys.readouterr().out


def test_the_best_of_another_folder_is_named(tiny, capsys):
    train.main(train_args(num_epochs=2, seed=3))
    state = torch.load("run/checkpoint_1.pth.tar", weights_only=False)
    state["best_rsum"] = state["run"]["best_rsum"] = 599.0
    torch.save(state, "run/checkpoint_1.pth.tar")
    more = {"resume": "run/checkpoint_1.pth.tar", "model_name": "more", "logger_name": "more"}
    lines = output(capsys, num_epochs=3, **more)
    rest = "this one has found nothing better"
    assert f"best: rsum 599.0, of the run before (run/model_best.pth.tar); {rest}" in lines
    assert " run/model_best.pth.tar " in lines[-1]
    os.remove("run/model_best.pth.tar")
    lines = output(capsys, num_epochs=3, **more)
    assert f"(but there is no run/model_best.pth.tar); {rest}" in "\n".join(lines)
    assert " run/checkpoint_1.pth.tar " in lines[-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "1 epoch done, best rsum 77.0"),
        ({"epoch": 3, "batch": 1}, "3 epochs and 1 step done, best rsum 77.0"),
        (
            {"epoch": 0, "batch": 4, "best_rsum": -1.0},
            "0 epochs and 4 steps done, best rsum none yet",
        ),
        (None, "its weights"),
    ],
)
def test_what_a_resumed_run_has_loaded(tiny, capsys, changes, said):
    train.main(train_args(num_epochs=1))
    state = torch.load("run/checkpoint_0.pth.tar", weights_only=False)
    state["run"] |= {"best_rsum": 77.0} | (changes or {})
    torch.save(state, "at.pth.tar")
    flags = {"reset_start_epoch": True} if changes is None else {}
    lines = output(capsys, resume="at.pth.tar", dry_run=True, **flags)
    assert f"=> loaded at.pth.tar: {said}" in lines


@pytest.mark.parametrize("missing", [False, True])
def test_a_vocabulary_that_has_all_words_is_no_reason_to_warn(tiny, capsys, missing):
    path = Path("data/tiny_precomp/train_caps.txt")
    lines = path.read_text().splitlines(True)
    path.write_text("".join([*lines[1:], "A zebra .\n" if missing else "A dog .\n"]))
    found = [x for x in output(capsys, dry_run=True) if "built from other captions" in x]
    (line,) = found
    assert line.startswith("warning: " if missing else "notice: vocab/tiny_precomp_vocab.json: it ")
    assert ("vocab.py" in line) == missing == (" 1 of the " in line)
    assert line.endswith("; it has all words of train") != missing


def test_only_the_first_process_prints(tiny, torchrun):
    for more in ({}, {"dry_run": True, "model_name": "dry", "logger_name": "dry"}):
        flags = train_args(num_epochs=2, log_step=5, **more)
        done = torchrun(ROOT / "train.py", *flags)
        assert done.returncode == 0, done.stderr
        for said in ("  device      2 processes, the first on cpu", "  parameters  "):
            assert done.stdout.count(said) == 1
        times = 0 if more else 1
        assert done.stdout.count("by chance") == 2 * times
        assert done.stdout.count(" pairs/s  left ") == 2 * times
        assert done.stdout.count("to evaluate it: ") == times
        assert done.stdout.count("dry run: all data was read") == 1 - times
    assert not os.path.exists("dry") and len(read_log("run")) == 2


# TensorBoard, pictures and trackers


def events(folder: str = "run") -> EventAccumulator:
    log = EventAccumulator(folder)
    log.Reload()
    return log


@pytest.mark.parametrize("clip", [0, 0.5])
def test_the_gradient_norm_of_each_step(tiny, monkeypatch, clip):
    """That before clipping, whether or not there is any; log_step does not divide the steps."""
    norms, update = [], torch.optim.Adam.step

    def step(self, *args, **more):
        squares = [x.grad.double().square().sum() for g in self.param_groups for x in g["params"]]
        norms.append(float(sum(squares).sqrt()))
        return update(self, *args, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    train.main(train_args(num_epochs=2, grad_clip=clip, log_step=3, val_step=4))
    found = events().Scalars("grad_norm")
    assert [event.step for event in found] == list(range(1, 15))
    values = [event.value for event in found]
    if clip:
        assert norms == pytest.approx([min(value, clip) for value in values], rel=1e-4)
    else:
        assert norms == pytest.approx(values, rel=1e-4)


def test_pictures_of_four_pairs_each_epoch(tiny):
    pytest.importorskip("matplotlib")
    train.main(train_args(num_epochs=2, log_images=True))
    log = events()
    tags = [f"attention/caption_{k}" for k in (0, 16, 32, 49)]
    assert sorted(log.Tags()["images"]) == sorted(tags)
    for tag in tags:
        assert [image.step for image in log.Images(tag)] == [7, 14]
    train.main(train_args(num_epochs=2, model_name="plain", logger_name="plain"))
    assert same_weights("run/checkpoint_1.pth.tar", "plain/checkpoint_1.pth.tar")
    for one, other in zip(read_log("run"), read_log("plain"), strict=True):
        assert one["rsum"] == other["rsum"] and one["Le"] == other["Le"]


def test_pictures_need_matplotlib_before_training(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="--log_images: .*pip install matplotlib"):
        train.main(train_args(log_images=True))
    assert not os.path.exists("run")


def fake_tracker(monkeypatch, fails_at: int | None = None) -> list:
    """A module wandb that notes what it gets, and fails from a call on."""
    seen = []

    def log(values, step):
        if fails_at is not None and len(seen) >= fails_at:
            raise ConnectionError("no network")
        seen.append((step, values))

    module = types.SimpleNamespace(
        init=lambda **_: None, log=log, finish=lambda: seen.append("end")
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    return seen


def test_a_tracker_gets_the_scalars_in_order(tiny, monkeypatch):
    seen = fake_tracker(monkeypatch)
    train.main(train_args(num_epochs=2, tracker="wandb", val_step=3, log_step=5))
    assert seen.pop() == "end"
    steps = [step for step, _ in seen]
    assert steps == sorted(set(steps)) == list(range(1, 15))
    log, values = events(), dict(seen)
    for tag in log.Tags()["scalars"]:
        for event in log.Scalars(tag):
            name = tracker.RENAMED.get(tag, tag)
            assert values[event.step][name] == pytest.approx(event.value)


def test_a_tracker_that_fails_ends_nothing(tiny, monkeypatch, capsys):
    fake_tracker(monkeypatch, fails_at=4)
    train.main(train_args(num_epochs=2, tracker="wandb"))
    assert len(read_log("run")) == 2
    assert capsys.readouterr().out.count("no network") == 1


def test_a_tracker_that_is_missing_is_said_before_training(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    with pytest.raises(InputError, match="pip install trackio"):
        train.main(train_args(tracker="trackio"))
    with pytest.raises(InputError, match="pip install trackio"):
        train.main(train_args(tracker="trackio", dry_run=True))
    assert not os.path.exists("run")


def test_a_dry_run_starts_no_run_of_a_tracker(tiny, monkeypatch):
    fake_tracker(monkeypatch)
    monkeypatch.setattr(__import__("sys").modules["wandb"], "init", None)
    train.main(train_args(tracker="wandb", dry_run=True))
