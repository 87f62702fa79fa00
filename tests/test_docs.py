"""README.md and docs/pages: every block, command, run file, link, key and file name in them is true."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import typer.main

from posttrain.cli import app
from posttrain.config import JobFile, Removal, RunFile, load, load_job

REPOSITORY = Path(__file__).parent.parent
PAGES = REPOSITORY / "docs/pages"
NOT_RUN = "# not run: "
"""How a Python block begins that cannot run here; a reader sees it, too."""


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without its blocks."""
        return re.sub(r"^```\w+\n.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)

    @cached_property
    def anchors(self) -> set[str]:
        headings = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)}
        # mkdocstrings' directives
        return headings | set(re.findall(r"^::: (\S+)$", self.prose, re.MULTILINE))

    @property
    def commands(self) -> list[str]:
        found = r"\bposttrain (?:clean|pretrain|tune|retrain|rollback|schema)\b.*"
        return re.findall(found, "\n".join(self.blocks("bash")))

    def write_files(self, folder: Path) -> None:
        """The page's run files and Python modules, under their names."""
        for block in [*self.blocks("yaml"), *(block for block in self.blocks("python") if is_module(block))]:
            (folder / name_of(block)).write_text(block, encoding="utf-8")


def anchor(heading: str) -> str:
    """The anchor that GitHub and the site make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def name_of(block: str) -> str:
    """The file name that a block begins with, as in `# photos.yaml`."""
    match = re.match(r"# ([\w.-]+)\n", block)
    assert match, f"the block should begin with its file's name:\n{block}"
    return match[1]


def is_module(block: str) -> bool:
    return bool(re.match(r"# [\w.-]+\.py\n", block))


README = Page(REPOSITORY / "README.md")
ALL = [README, *(Page(path) for path in sorted(PAGES.glob("*.md")))]
YAML = [pytest.param(page, block, id=name_of(block)) for page in ALL for block in page.blocks("yaml")]
COMMANDS = [pytest.param(page, line, id=f"{page.name}: {line}") for page in ALL for line in page.commands]
PYTHON = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in ALL
    for number, block in enumerate(page.blocks("python"))
    if not is_module(block) and not block.startswith(NOT_RUN)
]


def targets(pattern: str) -> list[object]:
    return [
        pytest.param(page, target, id=f"{page.name}: {target}")
        for page in ALL
        for target in sorted(set(re.findall(pattern, page.prose)))
    ]


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(path: Path) -> RunFile:
    """The run file, or the job file, at the path."""
    is_job = re.search(r"^job:", path.read_text(encoding="utf-8"), re.MULTILINE)
    return load_job(path) if is_job else load(path)


# The README -------------------------------------------------------------------------------------------------


def test_the_readme_can_be_read_at_one_sitting():
    assert len(README.text.splitlines()) <= 200


def test_the_first_command_runs_the_embedded_digits_in_a_fresh_environment():
    first = "python3 -m venv .venv && . .venv/bin/activate && pip install . && posttrain clean\n"
    assert README.blocks("bash")[0] == first


def test_the_marked_command_is_the_one_that_runs_the_tests():
    [marked] = re.findall(r"^<!-- test-command -->\n```bash\n(.*?)^```$", README.text, re.MULTILINE | re.DOTALL)
    assert marked == "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && pytest\n"


def test_ci_takes_the_marked_command_from_the_readme():
    script = (REPOSITORY / ".ci/run").read_text()
    [program] = re.findall(r"^awk '(.*?)' README\.md", script, re.MULTILINE | re.DOTALL)
    taken = subprocess.run(["awk", program, "README.md"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert taken.stdout == README.blocks("bash")[1]


# Blocks -----------------------------------------------------------------------------------------------------


def test_every_block_has_a_language_that_is_looked_at():
    for page in ALL:
        languages = re.findall(r"^```(\w*)\n.*?^```$", page.text, re.MULTILINE | re.DOTALL)
        assert set(languages) <= {"bash", "yaml", "python", "text", "mermaid"}, page.name


@pytest.mark.parametrize(("page", "block"), YAML)
def test_every_run_file_is_valid(page, block, tmp_path):
    page.write_files(tmp_path)
    assert loaded(tmp_path / name_of(block)) != RunFile()


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_is_one_that_posttrain_takes(page, line, tmp_path):
    page.write_files(tmp_path)
    group = typer.main.get_group(app)
    name, *arguments = shlex.split(line)[1:]
    with group.make_context("posttrain", [name]) as context:
        _, command, _ = group.resolve_command(context, [name])
        assert command is not None
        given = command.make_context(name, arguments, parent=context).params
    if name != "schema":
        path = given.get("runfile", given.get("jobfile"))
        overrides = given["overrides"] or ()
        if path is not None and path.name == "best.yaml":
            return  # `tune` writes it: tests/end_to_end/test_tune.py
        if name in ("retrain", "rollback"):
            load_job(tmp_path / path, overrides)
        else:
            load(None if path is None else tmp_path / path, overrides)


@pytest.mark.parametrize("block", PYTHON)
def test_every_python_block_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_python_that_is_not_run_is_python_and_names_what_there_is():
    import posttrain

    skipped = [block for page in ALL for block in page.blocks("python") if block.startswith(NOT_RUN)]
    for block in skipped:
        compile(block, "block", "exec")
        for name in re.findall(r"\bposttrain\.(\w+)\(", block):
            assert hasattr(posttrain, name)


def test_the_notebook_runs(monkeypatch):
    import nbclient
    import nbformat

    # the kernel is a process of its own
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    notebook = nbformat.read(PAGES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    assert len(notebook.cells) > 10


def test_the_model_of_ones_own_is_one_that_posttrain_builds(tmp_path, monkeypatch):
    import torch

    from posttrain.vision import models
    from posttrain.vision.embedding import features_and_logits

    Page(PAGES / "your-model.md").write_files(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    settings = load(tmp_path / "own-model.yaml").model
    network = models.build(settings.factory, classes=5, arguments=settings.arguments)
    assert models.find_head(network, classes=5, name=settings.head) == "classifier"
    assert isinstance(settings.image_size, int)
    side = settings.image_size
    features, logits = features_and_logits(network, "classifier", torch.zeros(2, settings.channels, side, side))
    assert features.shape == (2, 128) and logits.shape == (2, 5)


# What is generated ------------------------------------------------------------------------------------------


def test_the_run_file_reference_is_up_to_date():
    reference = script("run_file")
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run `python docs/run_file.py`"


def test_the_tables_of_results_are_what_was_measured():
    results = script("results")
    for path in results.PAGES:
        text = path.read_text(encoding="utf-8")
        assert text == results.filled(text), "run `python docs/results.py`"


def test_a_table_gives_the_mean_over_cases_and_the_spread_over_seeds():
    results = script("results")
    rows = [{"seed": seed, "test_accuracy": value} for seed, value in [(0, 0.6), (0, 0.8), (1, 0.7), (1, 0.9)]]
    # the seeds' means are 70 and 80
    assert results.spread(results.by_seed(rows, "test_accuracy")) == "75.0 ± 7.1"


def test_pictures_are_small():
    pictures = [path for path in PAGES.rglob("*") if path.suffix in (".svg", ".png")]
    assert pictures and all(path.stat().st_size < 100_000 for path in pictures)


# Links and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "target"), targets(r"\]\(((?!https?:)[^)]+)\)"))
def test_every_link_leads_to_a_page_and_a_heading(page, target):
    path, _, fragment = target.partition("#")
    linked = (page.path.parent / path).resolve() if path else page.path
    assert linked.exists()
    if fragment:
        assert fragment in Page(linked).anchors


def test_links_between_pages_stay_within_the_site():
    outside = [t for page in ALL[1:] for t in re.findall(r"\]\((\.\.[^)]*)\)", page.prose)]
    assert outside == []


@pytest.mark.parametrize(("page", "path"), targets(r"`((?:pipelines|posttrain|tests|docs|\.ci)/[\w./-]*)(?:::\w+)?`"))
def test_every_file_that_is_named_exists(page, path):
    assert (REPOSITORY / path).exists()


def test_every_name_that_is_said_to_be_in_a_file_is_there():
    named = [found for page in ALL for found in re.findall(r"`(\w+)` in `(posttrain/[\w/]+\.py)`", page.prose)]
    assert len(named) >= 2
    for name, path in named:
        code = (REPOSITORY / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def |class )?{name}\b", code, re.MULTILINE), f"{name} in {path}"


@pytest.mark.parametrize(("page", "test"), targets(r"`(tests/[\w./-]+::\w+)`"))
def test_every_test_that_is_named_exists(page, test):
    path, _, name = test.partition("::")
    assert f"def {name}(" in (REPOSITORY / path).read_text(encoding="utf-8")


def test_every_key_of_a_run_file_that_is_named_exists():
    defaults = JobFile.model_validate({"job": {"name": "any"}})
    sections = "|".join(JobFile.model_fields)
    named = {pair for page in ALL for pair in re.findall(rf"`({sections})\.(\w+)[`:]", page.prose)}
    assert len(named) > 30
    for section, key in sorted(named):
        # `run.yaml`, `removed.parquet` and the like are files
        if key not in ("yaml", "json", "py", "parquet", "safetensors"):
            assert hasattr(getattr(defaults, section), key), f"{section}.{key}"


def test_the_table_of_scores_has_every_score_once():
    [section] = re.findall(r"^## Scores\n(.*?)^## ", Page(PAGES / "how-it-works.md").prose, re.MULTILINE | re.DOTALL)
    scores = list(get_args(Removal.model_fields["score"].annotation))
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == scores


def test_every_file_and_column_of_the_run_folder_is_one_that_the_code_writes():
    page = Page(PAGES / "run-folder.md")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "posttrain").rglob("*.py"))
    files = re.findall(r"\b(\w+\.(?:parquet|json|csv|yaml|db|safetensors))\b", "\n".join(page.blocks("text")))
    columns = re.findall(r"^\| (`[^|]+`) \|", page.prose, re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(columns))
    assert len(files) > 15 and len(names) > 40
    named_by_table = {"removed.parquet", "relabelled.parquet"}  # f"{name}.parquet"
    missing = [name for name in {*files, *names} - named_by_table if name not in code]
    assert missing == []


def test_the_tutorial_explains_every_line_of_the_summary():
    [table] = re.findall(
        r"^\| line \| meaning \|\n(.*?)\n\n", Page(PAGES / "tutorial.md").prose, re.MULTILINE | re.DOTALL
    )
    explained = set(re.findall(r"^\| ([\w ]+) \|", table, re.MULTILINE)) - {"ended because"}
    code = (REPOSITORY / "posttrain/report/summary.py").read_text(encoding="utf-8")
    printed = {name.strip() for name in re.findall(r"^ +\(?\"( *[a-z ]+)\",", code, re.MULTILINE)}
    assert explained == printed


def test_mkdocs_lists_every_page():
    nav = (REPOSITORY / "docs/mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in ALL[1:]} <= set(re.findall(r"([\w-]+\.md)\b", nav))


def test_there_is_enough_to_check():
    assert len(YAML) >= 10 and len(COMMANDS) >= 12 and len(PYTHON) >= 3
    assert sys.version_info >= (3, 11)
