"""README, docs/ and the other pages say what is so: links, paths, commands and figures."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import unicodedata
from pathlib import Path

import pytest
import yaml
from dvc.cli.parser import get_main_parser

from ssnas.config.schema import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "docs/api/*.md", "papers/README.md", "ssnas/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
YOURS = "data/raw/"


def prose(page):
    """The text of a page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def code_spans(page):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands(page, program):
    """The lines of shell blocks and the code spans that run `program`, as words."""
    lines = code_spans(page)
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            lines += block.splitlines()
    for line in lines:
        for command in line.split(" #")[0].split("&&"):
            words = shlex.split(command) if command.strip().startswith(program) else []
            if words[:1] == [program] and len(words) > 1:
                yield words, "cd papers" in line or page.parent == ROOT / "papers"


def every(program):
    return [
        pytest.param(words, in_papers, id=" ".join(words))
        for page in PAGES
        for words, in_papers in commands(page, program)
    ]


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (unicodedata.normalize("NFKD", re.sub(r"[`*]", "", head)).lower() for head in headings)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head).strip()) for head in plain}


def stage_names(folder):
    return yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def outputs():
    """What the main run's stages write: not all of it is in git."""
    for stage in stage_names(ROOT).values():
        for entry in (*stage.get("outs", []), *stage.get("plots", []), *stage.get("metrics", [])):
            yield entry if isinstance(entry, str) else next(iter(entry))


# Links


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_included_pages_exist(page):
    for name in re.findall(r'^--8<-- "(.+)"$', page.read_text(encoding="utf-8"), re.MULTILINE):
        assert (ROOT / name).is_file()


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    fetched = re.compile(r'<(?:script|img|link)[^>]*(?:src|href)="?(?:https?:)?//')
    assert html and not any(map(fetched.search, html))


# Paths and commands


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_paths_exist(page):
    tops = "benchmarks|data|docs|metrics|papers|report|ssnas|stages|tests"
    written = tuple(outputs())
    for span in code_spans(page):
        if not re.fullmatch(rf"(?:{tops})/[\w./-]*|[\w-]+\.(?:yaml|lock|md|cff|toml)", span):
            continue
        if span == "MODEL_CARD.md":  # beside the model, wherever that is
            continue
        exists = (ROOT / span).exists() or span.startswith((YOURS, *written))
        assert exists or (page.parent / span).exists(), span


@pytest.mark.parametrize(("words", "in_papers"), every("make"))
def test_make_targets_exist(words, in_papers):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words[1:]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(("words", "in_papers"), every("python"))
def test_modules_exist(words, in_papers):
    assert words[1] == "-m"
    assert importlib.util.find_spec(words[2]) is not None


@pytest.mark.parametrize(("words", "in_papers"), every("dvc"))
def test_dvc_commands_are_accepted(words, in_papers):
    arguments = get_main_parser().parse_args(words[1:])
    if words[1] != "repro" or arguments.glob:
        return
    for target in arguments.targets:
        name, _, key = str(target).partition("@")
        folder = ROOT / "papers" if in_papers else ROOT
        stages = stage_names(folder)
        assert name in stages
        if key:
            rows = yaml.safe_load((folder / "rows.yaml").read_text(encoding="utf-8"))
            assert key in rows[re.search(r"\w+", stages[name]["foreach"]).group()]


@pytest.mark.parametrize(("words", "in_papers"), every("dvc"))
def test_keys_that_a_command_sets_exist(words, in_papers):
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for flag, setting in itertools.pairwise(words):
        if flag != "-S":
            continue
        *path, key = setting.partition("=")[0].removeprefix("+").split(".")
        section = params
        for name in path:
            section = section[name]
        if setting.startswith("+"):
            assert key not in section
            assert hasattr(SECTIONS[path[0]], key)
        else:
            assert key in section


# The README's first result


def test_the_readme_is_short_and_begins_with_a_result():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert "## A first result" in lines[:40]
    assert any(line.startswith("| balanced accuracy") for line in lines[:40])


def test_the_readme_has_the_figures_of_the_main_run():
    text = README.read_text(encoding="utf-8")
    cells = {
        row.split("|")[1].split(" (%)")[0].strip(): [float(x) for x in row.split("|")[2:-1]]
        for row in text.splitlines()
        if re.match(r"\| (balanced accuracy|recall of the classes)", row)
    }
    folder = ROOT / "metrics" / "main"
    evaluated = json.loads((folder / "evaluate.json").read_text(encoding="utf-8"))
    rare = "recall of the classes with fewer than 20 training images"
    # The constant predictor names the largest class, so it recalls no image of a rare one.
    expected = {
        "balanced accuracy": [
            evaluated[f"{who}balanced_accuracy"] for who in ("", "linear_", "constant_")
        ],
        rare: [evaluated["few_shot"], evaluated["linear_few_shot"], 0.0],
    }
    for name, values in expected.items():
        assert cells[name] == [round(100 * value, 1) for value in values]
    counts = json.loads((folder / "data.json").read_text(encoding="utf-8"))["counts"]
    train, test = counts["train"], counts["test"]
    rare_images = sum(n for n, seen in zip(test, train, strict=True) if seen < 20)
    network = json.loads((folder / "finetune.json").read_text(encoding="utf-8"))
    for fact in (
        f"{train[0]} training images",
        f"down to {train[-1]} of",
        f"{sum(test)} balanced images",
        f"{rare_images} test images",
        f"{network['parameters']:,} parameters",
    ):
        assert fact in text.replace("\n", " ")
