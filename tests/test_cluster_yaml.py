from __future__ import annotations

import copy
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


@pytest.fixture
def checked():
    """Ray's own check, as `ray up` makes it before it starts anything; it needs no network."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    def check(config: dict[str, Any]) -> dict[str, Any]:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
        return prepared

    return check


def test_ray_takes_the_cluster_file(cluster, checked):
    prepared = checked(cluster)
    assert set(prepared["available_node_types"]) == {"head", "gpu_worker"}
    assert prepared["head_node_type"] == "head" and cluster["cluster_name"] == "posttrain"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.update(max_wokers=4),
        lambda config: config.update(head_node_type="boss"),
        lambda config: config["available_node_types"]["gpu_worker"].update(min_workers=9),
    ],
    ids=["unknown key", "unknown head type", "more workers at least than at most"],
)
def test_the_check_is_one_that_can_fail(cluster, checked, spoil):
    from jsonschema import ValidationError

    spoilt = copy.deepcopy(cluster)
    spoil(spoilt)
    with pytest.raises((ValidationError, ValueError)):
        checked(spoilt)


def test_workers_come_on_demand_and_go_when_idle(cluster):
    worker = cluster["available_node_types"]["gpu_worker"]
    assert (worker["min_workers"], worker["max_workers"]) == (0, 4)
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in cluster["available_node_types"]["head"]["node_config"]
    assert cluster["idle_timeout_minutes"] > 0


def test_ray_start_knows_every_option_that_it_is_given(cluster):
    from ray.scripts.scripts import start

    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        words = shlex.split(cluster[key][-1])
        options = words[words.index("start") + 1 :]
        context = start.make_context("start", options)
        assert context.params["object_spilling_directory"] == "/home/ray/spill"
        assert "RAY_AUTH_MODE=token" in words


def test_the_cluster_has_the_ray_that_the_package_asks_for(cluster):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    [ray] = [r for r in map(Requirement, project["dependencies"]) if r.name == "ray"]
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        tag = re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py(\d)(\d+)-(cpu|gpu)", image)
        assert tag and ray.specifier.contains(tag[1]), image
        assert project["requires-python"] == ">=3.11" and (int(tag[2]), int(tag[3])) >= (3, 11)
    # the checkout with the extra that brings the dashboard, of the same version
    assert shlex.split(cluster["setup_commands"][0])[-1] == "/home/ray/posttrain[cluster]"
    assert "/home/ray/posttrain" in cluster["file_mounts"]
    [extra] = map(Requirement, project["optional-dependencies"]["cluster"])
    assert (extra.name, extra.extras, extra.specifier) == ("ray", {"default"}, ray.specifier)
