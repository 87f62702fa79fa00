"""Whether the nodes of a cluster see the same files, with nodes that are played by functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.cluster.nodes import Complaint, check_nodes, check_this_node
from posttrain.errors import ConfigError
from posttrain.store.folder import RunFolder

NODES = {"0a": "head (0a)", "1b": "one (1b)", "2c": "two (2c)"}
Ask = Callable[..., dict[str, Complaint | None]]


def everyone(nodes: Sequence[str], *question: Any) -> dict[str, Complaint | None]:
    location, token, data = question
    return {node: check_this_node(location, token, data, node) for node in nodes}


def at_home(homes: Mapping[str, Path], patch: pytest.MonkeyPatch) -> Ask:
    """Nodes for which ~ is another place: what lies there is not shared."""

    def ask(nodes: Sequence[str], *question: object) -> dict[str, Complaint | None]:
        found: dict[str, Complaint | None] = {}
        for node in nodes:
            with patch.context() as own:
                if node in homes:
                    own.setenv("HOME", str(homes[node]))
                found |= everyone([node], *question)
        return found

    return ask


@pytest.fixture
def data(tmp_path: Path) -> dict[str, tuple[str, ...]]:
    paths = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for path in paths:
        path.write_bytes(b"")
    return {"data.train": tuple(map(str, paths))}


@pytest.mark.parametrize("local", [True, False])
def test_nodes_that_see_the_same_pass_and_nothing_is_left(tmp_path: Path, data, local: bool) -> None:
    location = str(tmp_path / "run") if local else (tmp_path / "run").as_uri()
    check_nodes(location, data, NODES, everyone)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_node_with_a_run_folder_of_its_own_is_named_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = r"^run\.path = ~/run: node two \(2c\) does not see what the driver wrote there; all nodes of a cluster"
    with pytest.raises(ConfigError, match=expected):
        check_nodes("~/run", {}, NODES, at_home({"2c": tmp_path / "elsewhere"}, monkeypatch))
    # and nothing is made on the node
    assert not (tmp_path / "elsewhere").exists()
    assert list((tmp_path / "home" / "run").iterdir()) == []


def test_data_that_a_node_does_not_see_are_named_by_their_key(
    tmp_path: Path, data: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "test").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ask = at_home({"1b": tmp_path / "one", "2c": tmp_path / "two"}, monkeypatch)
    with pytest.raises(
        ConfigError, match=r"^data\.test = ~/test: node one \(1b\) \(and 1 more of 3 nodes\) does not see"
    ):
        check_nodes(str(tmp_path / "run"), {**data, "data.test": ("~/test",)}, NODES, ask)


def test_what_a_node_only_seems_to_write_is_noticed(tmp_path: Path) -> None:
    # a cache, an overlay: the node reads the driver's file, and its own goes nowhere
    with pytest.raises(
        ConfigError, match=r"node head \(0a\) \(and 2 more .* writes what the driver does not see there"
    ):
        check_nodes(str(tmp_path / "run"), {}, NODES, lambda nodes, *question: dict.fromkeys(nodes))


def test_a_node_that_may_not_write_says_why(tmp_path: Path) -> None:
    def ask(nodes: Sequence[str], location: str, *question: object) -> dict[str, Complaint | None]:
        [place] = Path(location).iterdir()
        (place / "1b").mkdir()  # a file cannot take the place of a folder, whoever writes
        return everyone(nodes, location, *question)

    with pytest.raises(ConfigError, match=r"node one \(1b\) cannot work there \(.*1b cannot be written"):
        check_nodes(str(tmp_path / "run"), {}, NODES, ask)


def test_a_check_that_was_killed_does_not_spoil_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))

    def dies(*question: object) -> dict[str, Complaint | None]:
        raise SystemExit

    with pytest.raises(SystemExit):
        check_nodes(folder.location, {}, NODES, dies)
    (tmp_path / "run" / ".nodes-of-a-killed-check").mkdir()
    assert folder.is_empty()
    (tmp_path / "run" / "something").touch()
    assert not folder.is_empty()
