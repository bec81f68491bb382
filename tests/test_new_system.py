"""A fifth paper is one file and one line: tests/pooled.py goes through every program."""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import train_args
from tests.serving import make_body

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("starts_at_once")
LINE = '    "pooled:PooledSystem",\n'


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the new file, and the new line in systems.py."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("util", "scripts", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("golden", "__py*")
        )
    shutil.copy(ROOT / "tests" / "pooled.py", folder)
    listed = (folder / "systems.py").read_text()
    head, papers = listed.split("PAPERS = (\n")
    (folder / "systems.py").write_text(
        head + "PAPERS = (\n" + papers.replace(")\n", LINE + ")\n", 1)
    )
    return folder


def run(project: Path, script: str, *args: str, fails: bool = False) -> str:
    """Run one of the project's programs and return what it prints."""
    command = [sys.executable, str(project / script), *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert bool(done.returncode) == fails, done.stdout
    return done.stdout


def flags(**options) -> list[str]:
    return train_args(model="pooled", **options)


def edit(project: Path, **replaced: str) -> None:
    """Change the copy of the new file: name -> (old, new)."""
    text = (ROOT / "tests" / "pooled.py").read_text()
    for old, new in replaced.values():
        assert old in text
        text = text.replace(old, new)
    (project / "pooled.py").write_text(text)


def test_it_is_one_short_file_and_the_page_explains_it():
    text = (ROOT / "tests" / "pooled.py").read_text()
    assert len(text.splitlines()) <= 60
    page = (ROOT / "docs" / "adding_a_model.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    shown = [line for block in blocks for line in block.splitlines() if line]
    assert shown == [line for line in text.splitlines() if line], "the whole file, in its order"
    assert LINE.strip() in page


def test_training_resuming_evaluating_and_ensembles(project, tiny):
    run(project, "train.py", *flags(num_epochs=4, model_name="whole", logger_name="whole"))
    run(project, "train.py", *flags(num_epochs=2))
    run(project, "train.py", *flags(num_epochs=4, resume="run/checkpoint_1.pth.tar"))
    logs = [Path(f, "log.jsonl").read_text().splitlines() for f in ("whole", "run")]
    for one, other in zip(*logs, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert one["Le"] == other["Le"] and one["rsum"] == other["rsum"]
    assert json.loads(logs[0][-1])["Le"] < json.loads(logs[0][1])["Le"]
    options = {"criterion": "InfoNCELoss", "temperature": 0.1, "pooling": "max", "drop": True}
    run(project, "train.py", *flags(num_epochs=1, model_name="other", **options))
    models = "run/checkpoint_3.pth.tar", "other/checkpoint_0.pth.tar"
    alone = run(project, "evaluation.py", models[0], "--data_path", "data")
    both = run(project, "evaluation.py", *models, "--data_path", "data", "--fold5")
    assert "Text to image: " in alone and "Mean metrics: " in both
    # A checkpoint says which system wrote it: a project without that system says so.
    command = [sys.executable, str(ROOT / "evaluation.py"), models[0], "--data_path", "data"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (said,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "unknown system 'pooled': expected one of scan, gsmn, pfan, pfan_whole, chan" in said


def test_serving(project, tiny_positions):
    run(project, "train.py", *flags(num_epochs=1))
    command = [sys.executable, str(project / "serve.py"), "run/checkpoint_0.pth.tar", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert line.startswith("serving pooled at http://")
        url = f"{line.split()[3]}/scan_sentence_image_score"
        body = json.dumps(make_body()).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        answer = json.load(urllib.request.urlopen(request))
        assert answer["sim_t2i"] == answer["sim_i2t"] and len(set(answer["sim_t2i"])) > 1
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def test_comparing_and_benchmarking(project, tiny):
    where = ["--data_path", "data", "--data_name", "tiny_precomp", "--num_epochs", "1"]
    options = "--processes 1 --systems scan pooled -- --embed_size 16 --word_dim 8".split()
    table = run(project, "scripts/compare.py", *where, *options)
    assert (
        "| Pooled, maximum | " in table and "- Pooled, maximum: `--model pooled --pooling" in table
    )
    result = run(project, "scripts/benchmark.py", "--model", "pooled", "--quick")
    assert "| scoring, ours / bare matrix product | " in result and "usual loop" not in result
    assert "| step_ours_mib | " in result


def test_a_system_without_a_dataset_rule_is_named(project, tiny):
    """Its model reads a key that its dataset does not give."""
    edit(project, reads=('batch["images"]', 'batch["boxes"]'))
    said = run(project, "train.py", *flags(num_epochs=1), fails=True).splitlines()[-1]
    assert said.startswith("error: the model reads 'boxes' of a batch, but its dataset gives only")
    assert "images, " in said and "dataset() that gives it" in said
    edit(project)


def test_weights_that_no_checkpoint_would_hold_are_named(project, tiny):
    edit(project, part=("self.txt_enc = EncoderText(", "self.words = EncoderText("))
    said = run(project, "train.py", *flags(num_epochs=1), fails=True).splitlines()[-1]
    assert said.startswith(
        "error: pooled: weights outside of its parts img_enc, txt_enc, such as words."
    )
    edit(project)


def test_a_flag_of_another_system_keeps_its_settings(project, tiny):
    edit(project, flag=('"--pooling", default="mean"', '"--agg_func", default="Mean"'))
    said = run(project, "train.py", *flags(num_epochs=1), fails=True).splitlines()[-1]
    assert "pooled: --agg_func is a flag of scan with other settings" in said
    edit(project)
