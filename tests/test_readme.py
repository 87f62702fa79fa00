from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import typer.main

from posttrain.cli import app
from posttrain.config import JobFile, Removal, RunFile, load, load_job

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
"""(language, text) of every fenced block, in their order."""
PROSE = re.sub(r"^```\w+\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def name_of(block: str) -> str:
    """The file name that a block begins with, as in `# photos.yaml`."""
    match = re.match(r"# ([\w.-]+)\n", block)
    assert match, f"the block should begin with its file's name:\n{block}"
    return match[1]


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


COMMANDS = re.findall(r"\bposttrain (?:clean|pretrain|tune|retrain|rollback|schema)\b.*", "\n".join(blocks("bash")))


def loaded(path: Path) -> RunFile:
    """The run file, or the job file, at the path."""
    is_job = re.search(r"^job:", path.read_text(encoding="utf-8"), re.MULTILINE)
    return load_job(path) if is_job else load(path)


@pytest.fixture
def run_files(tmp_path) -> Path:
    """A folder with every run file of the README under its name."""
    for block in blocks("yaml"):
        (tmp_path / name_of(block)).write_text(block, encoding="utf-8")
    return tmp_path


def test_the_first_command_runs_the_embedded_digits_in_a_fresh_environment():
    first = "python3 -m venv .venv && . .venv/bin/activate && pip install . && posttrain clean\n"
    assert blocks("bash")[0] == first


def test_the_marked_command_is_the_one_that_runs_the_tests():
    [marked] = re.findall(r"^<!-- test-command -->\n```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert marked == "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && pytest\n"


def test_ci_takes_the_marked_command_from_the_readme():
    script = (REPOSITORY / ".ci/run").read_text()
    [program] = re.findall(r"^awk '(.*?)' README\.md", script, re.MULTILINE | re.DOTALL)
    taken = subprocess.run(["awk", program, "README.md"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert taken.stdout == blocks("bash")[1]


@pytest.mark.parametrize("block", blocks("yaml"), ids=name_of)
def test_every_run_file_is_valid(block, run_files):
    assert loaded(run_files / name_of(block)) != RunFile()


def test_the_run_files_have_different_names():
    names = [name_of(block) for block in blocks("yaml")]
    assert len(names) >= 5 and len(set(names)) == len(names)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_posttrain_takes(line, run_files):
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
            load_job(run_files / path, overrides)
        else:
            load(None if path is None else run_files / path, overrides)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", PROSE))))
def test_every_relative_link_leads_somewhere(target):
    assert (REPOSITORY / target).exists()


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"`((?:pipelines|posttrain|tests|\.ci)/[\w./-]+)`", PROSE))),
)
def test_every_file_that_is_named_exists(path):
    assert (REPOSITORY / path).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(#([^)]+)\)", PROSE))))
def test_every_link_within_the_page_leads_to_a_heading(target):
    assert target in {anchor(heading) for heading in re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)}


def test_every_key_of_a_run_file_that_is_named_exists():
    defaults = JobFile.model_validate({"job": {"name": "any"}})
    named = re.findall(rf"`({'|'.join(JobFile.model_fields)})\.(\w+)[`:]", PROSE)
    assert len(named) > 15
    for section, key in named:
        # `run.yaml`, `removed.parquet` and the like are files
        if key not in ("yaml", "json", "py"):
            assert hasattr(getattr(defaults, section), key), f"{section}.{key}"


def test_the_table_of_scores_has_every_score_once():
    [section] = re.findall(r"^## Scores\n(.*?)^## ", PROSE, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(
        get_args(Removal.model_fields["score"].annotation)
    )


def test_the_model_of_ones_own_is_one_that_posttrain_builds(tmp_path, monkeypatch, run_files):
    import torch

    from posttrain.vision import models
    from posttrain.vision.embedding import features_and_logits

    for block in blocks("python"):
        (tmp_path / name_of(block)).write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    settings = load(run_files / "own-model.yaml").model
    network = models.build(settings.factory, classes=5, arguments=settings.arguments)
    assert models.find_head(network, classes=5, name=settings.head) == "classifier"
    assert isinstance(settings.image_size, int)
    side = settings.image_size
    features, logits = features_and_logits(network, "classifier", torch.zeros(2, settings.channels, side, side))
    assert features.shape == (2, 128) and logits.shape == (2, 5)
