"""The pages keep up with the code: links, quirks, names of files and tests, a short README."""

import ast
import functools
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUIRK = re.compile(r"\bQ\d+b?\b")
NOWHERE = "no place in the code"  # what a row says of a quirk that no line can cite
FOLDERS = ("util", "scripts", "tests")
THEIRS = {"evaluation_ensemble.py", "generate_tsv.py"}  # files of other programs


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted(root.glob("docs/*.md"))]


def sources(root: Path) -> list[Path]:
    return [path for folder in (".", "util", "scripts") for path in root.glob(f"{folder}/*.py")]


def without_blocks(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = Counter()
    for title in re.findall(r"^#{1,6} +(.+)$", without_blocks(page.read_text()), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title.strip())
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found[slug] += 1
    return {f"{slug}-{k}" if k else slug for slug, n in found.items() for k in range(n)}


def links(page: Path) -> list[str]:
    """The targets of a page's links that stay inside the project."""
    text = re.sub(r"`[^`\n]*`", "", without_blocks(page.read_text()))
    found = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)|(?:src|href)=\"([^\"]+)\"", text, re.M)
    targets = ["".join(groups) for groups in found]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def broken_links(root: Path) -> list[str]:
    faults = []
    for page in pages(root):
        for target in links(page):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.is_relative_to(root) or not file.exists():
                faults.append(f"{page.name}: {target}: no such file")
            elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
                faults.append(f"{page.name}: {target}: no such heading")
    return faults


def quirks(root: Path) -> tuple[list[str], dict[str, str]]:
    """The ids of the page's tables, and of its last table the row of each id."""
    described, _, last = (root / "docs/quirks.md").read_text().partition("## Code and tests")
    ids = re.findall(r"^\| (Q\w+) \|", described, re.M)
    return ids, dict(re.findall(r"^\| (Q\w+) \|(.*)$", last, re.M))


def quirk_faults(root: Path) -> list[str]:
    ids, rows = quirks(root)
    faults = [f"{id} is described {n} times" for id, n in Counter(ids).items() if n > 1]
    faults += [f"{id} stands in one table only" for id in sorted(set(ids) ^ rows.keys())]
    cited = defaultdict(set)  # by the path from the root
    for path in sources(root):
        cited[str(path.relative_to(root))] = set(QUIRK.findall(path.read_text()))
    everywhere = set().union(*cited.values())
    faults += [f"{id} is cited, but not on the page" for id in sorted(everywhere - set(ids))]
    for id, row in rows.items():
        if NOWHERE in row:
            continue
        files = re.findall(r"\(\.\./([^)]+)\)", row.partition("|")[0])
        faults += [f"{id}: {file} does not cite it" for file in files if id not in cited[file]]
        faults += [] if files else [f"{id}: no file named"]
    return faults


@functools.cache
def defined(path: Path) -> set[str]:
    """The functions, classes, methods (Class.method) and constants of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [x.name for x in node.body if isinstance(x, ast.FunctionDef)]
            names |= {f"{node.name}.{name}" for name in methods}
    return names


def missing_names(root: Path) -> list[str]:
    """Names that docs/quirks.md gives after the link to a file, and that the file does not have."""
    text, faults = (root / "docs/quirks.md").read_text(), []
    for target, names in re.findall(r"\]\((\S+\.py)\)((?:,? `[\w.]+`)+)", text):
        path = root / "docs" / target
        has = defined(path) if path.is_file() else set()
        said = re.findall(r"`([\w.]+)`", names)
        faults += [f"{target}: no {name}" for name in said if name not in has]
    _, rows = quirks(root)
    faults += [
        f"{id}: no test named"
        for id, row in rows.items()
        if not re.search(r"\(\.\./tests/\S+\) `test_", row) and "no test" not in row
    ]
    return faults


def missing_files(root: Path) -> list[str]:
    """Files of Python and bash that a page names or runs, and that are not there."""
    faults = []
    for page in pages(root):
        text = page.read_text()
        names = re.findall(r"`([\w./-]+\.(?:py|sh))`", text)
        names += re.findall(r"\b(?:python|bash) ([\w./-]+\.(?:py|sh))\b", text)
        for name in sorted(set(names) - THEIRS):
            folders = () if "/" in name else FOLDERS
            if not any((root / folder / name).is_file() for folder in ("", *folders)):
                faults.append(f"{page.name}: {name}: no such file")
    return faults


def long_readme(root: Path) -> list[str]:
    lines = len((root / "README.md").read_text().splitlines())
    return [f"README.md has {lines} lines"] if lines > 250 else []


CHECKS = [broken_links, quirk_faults, missing_names, missing_files, long_readme]


@pytest.mark.parametrize("check", CHECKS)
def test_pages(check):
    assert not check(ROOT)


ADD = r"\Z"  # the end of a file
TESTS = "[x](../tests/test_docs.py)"
# Faults that the checks must find: files, what is replaced in them, by what, and what is said.
FAULTS = [
    (broken_links, "README.md", ADD, "[x](docs/none.md)", "docs/none.md: no such file"),
    (broken_links, "docs/data.md", ADD, "[x](../..)", "../..: no such file"),
    (broken_links, "docs/data.md", ADD, "[x](#none)", "#none: no such heading"),
    (broken_links, "README.md", ADD, "[x](docs/data.md#none)", "data.md#none: no such heading"),
    (
        quirk_faults,
        "docs/quirks.md",
        "## Code and",
        "| Q8 |\n## Code and",
        "Q8 is described 2 times",
    ),
    (quirk_faults, "docs/quirks.md", ADD, "| Q80 | |\n", "Q80 stands in one table only"),
    (quirk_faults, "docs/quirks.md", ADD, "| Q80 | x |\n", "Q80: no file named"),
    (quirk_faults, "data.py", ADD, "# Q99\n", "Q99 is cited, but not on the page"),
    (quirk_faults, "*.py", r"\bQ27\b", "", "Q27: batches.py does not cite it"),
    (missing_names, "docs/quirks.md", ADD, f"{TESTS} `anchors`, `test_none`", "no test_none"),
    (missing_names, "docs/quirks.md", ADD, "[x](../none.py) `none`", "../none.py: no none"),
    (missing_names, "docs/quirks.md", ADD, f"| Q80 | {TESTS} |", "Q80: no test named"),
    (missing_files, "docs/data.md", ADD, "`none.py`", "data.md: none.py: no such file"),
    (missing_files, "README.md", ADD, "bash scripts/none.sh", "scripts/none.sh: no such file"),
    (long_readme, "README.md", ADD, "\n" * 250, "README.md has"),
]


@pytest.mark.parametrize(("check", "files", "old", "new", "said"), FAULTS)
def test_a_broken_page_is_found(tmp_path, check, files, old, new, said):
    for pattern in ("README.md", "LICENSE", "docs/*", "*.py", *(f"{x}/*.*" for x in FOLDERS)):
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
    before = check(tmp_path)
    for path in tmp_path.glob(files):
        path.write_text(re.sub(old, new, path.read_text()))
    faults = [fault for fault in check(tmp_path) if fault not in before]
    assert any(said in fault for fault in faults), faults
