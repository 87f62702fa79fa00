"""The manifests of pipelines/kubernetes, checked without a cluster."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from jsonschema import Draft202012Validator, ValidationError
from packaging.requirements import Requirement

from posttrain import config
from posttrain.cli import app
from posttrain.config import RunFile

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "pipelines" / "kubernetes"
FIELDS = json.loads((Path(__file__).parent / "kubernetes_fields.json").read_text())
MANIFESTS = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
OBJECTS = [
    pytest.param(document, id=f"{name}-{document['kind']}") for name, found in MANIFESTS.items() for document in found
]
JOBS = {name: {document["kind"]: document for document in found} for name, found in MANIFESTS.items() if len(found) > 1}

Change = Callable[[dict[str, Any]], Any]


def check(document: dict[str, Any]) -> None:
    """Raises ValidationError for a field that the object's definition does not have, or a value that it refuses."""
    assert document["kind"] in FIELDS["$defs"], document["kind"]
    Draft202012Validator({"$ref": f"#/$defs/{document['kind']}", "$defs": FIELDS["$defs"]}).validate(document)


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """The pod templates anywhere in a document."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


def start_params(node: Any) -> Iterator[dict[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "rayStartParams":
                yield value
            else:
                yield from start_params(value)
    elif isinstance(node, list):
        for value in node:
            yield from start_params(value)


def clusters(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The cluster that a document asks KubeRay for, if it does."""
    kind, spec = document["kind"], document.get("spec", {})
    found = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec")}
    found["RayCronJob"] = spec.get("jobTemplate", {}).get("rayClusterSpec")
    return [found[kind]] if found.get(kind) else []


def policy(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(\w*)", str(text)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def test_all_manifests_are_there():
    assert set(MANIFESTS) == {"raycluster", "rayjob-clean", "rayjob-tune", "raycronjob-retrain", "cronjob-retrain"}


@pytest.mark.parametrize("document", OBJECTS)
def test_a_manifest_has_only_fields_that_its_definition_knows(document):
    check(document)


SPOILT: list[tuple[str, str, Change]] = [
    ("unknown field", "RayJob", lambda d: d["spec"].update(concurrencyPolicy="Forbid")),
    ("field of another kind", "RayCronJob", lambda d: d["spec"].update(concurrencyPolicy="Forbid")),
    ("wrong type", "RayCluster", lambda d: d["spec"]["workerGroupSpecs"][0].update(replicas="0")),
    ("number for text", "RayJob", lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(a=1)),
    ("misspelt in a pod", "CronJob", lambda d: next(pods(d))["containers"][0].update(volumeMount=[])),
    ("no quantity", "CronJob", lambda d: next(pods(d))["containers"][0]["resources"]["limits"].update(memory="32 GB")),
    ("unknown action", "CronJob", lambda d: policy(d)["rules"][0].update(action="Stop")),
    ("no template", "RayCronJob", lambda d: d["spec"].pop("jobTemplate")),
    ("schedule", "CronJob", lambda d: d["spec"].update(schedule="daily")),
]


@pytest.mark.parametrize(("kind", "spoil"), [p[1:] for p in SPOILT], ids=[p[0] for p in SPOILT])
def test_the_check_is_one_that_can_fail(kind, spoil):
    document = copy.deepcopy(next(d for found in MANIFESTS.values() for d in found if d["kind"] == kind))
    check(document)
    spoil(document)
    with pytest.raises(ValidationError):
        check(document)


@pytest.mark.parametrize("document", OBJECTS)
def test_every_container_asks_for_what_it_may_use(document):
    for pod in pods(document):
        for container in pod["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
            # a pod whose volumes on disk hold more than its limit is evicted
            on_disk = sum(
                int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
                for volume in pod.get("volumes", ())
                if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory"
            )
            assert int(resources["limits"]["ephemeral-storage"].removesuffix("Gi")) > on_disk
            # requests below the limits would let a node promise the same memory twice
            assert resources["requests"] == resources["limits"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert pod["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("document", OBJECTS)
def test_what_is_mounted_is_there_and_shared_memory_holds_the_object_store(document):
    stores = [int(params["object-store-memory"]) for params in start_params(document)] or [int(8e9)]
    for pod in pods(document):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            memory = mounts["/dev/shm"]["emptyDir"]
            assert memory["medium"] == "Memory"
            assert (
                max(stores) < quantity(memory["sizeLimit"]) < 0.5 * quantity(container["resources"]["limits"]["memory"])
            )


@pytest.mark.parametrize("document", OBJECTS)
def test_workers_with_gpus_come_on_demand_and_the_head_has_none(document):
    for cluster in clusters(document):
        assert cluster["enableInTreeAutoscaling"]
        assert cluster["authOptions"] == {"mode": "token"}
        [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        assert "nvidia.com/gpu" not in head["resources"]["limits"]
        [group] = cluster["workerGroupSpecs"]
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        assert group["maxReplicas"] > 0
        pod = group["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pod["tolerations"])


@pytest.mark.parametrize("document", OBJECTS)
def test_ray_start_knows_every_parameter(document):
    from ray.scripts.scripts import start

    for params in start_params(document):
        context = start.make_context("start", [f"--{key}={value}" for key, value in params.items()])
        assert context.params["object_spilling_directory"] == "/spill"
        assert context.params["object_store_memory"] == 8_000_000_000


@pytest.mark.parametrize("document", OBJECTS)
def test_mlflow_and_its_credentials_come_from_a_secret_and_reach_the_driver_alone(document):
    text = json.dumps(document)
    assert "MLFLOW_TRACKING_PASSWORD" not in text
    for cluster in clusters(document):
        [worker] = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
        [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        assert head["envFrom"] == [{"secretRef": {"name": "posttrain-mlflow"}}]
        assert "envFrom" not in worker


def test_images_have_the_ray_that_the_package_asks_for():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    [ray] = [r for r in map(Requirement, project["dependencies"]) if r.name == "ray"]
    [base] = re.findall(r"^FROM rayproject/ray:(\d+\.\d+\.\d+)-py311-gpu$", (FOLDER / "Dockerfile").read_text(), re.M)
    assert ray.specifier.contains(base)
    for found in MANIFESTS.values():
        for document in found:
            assert all(cluster["rayVersion"] == base for cluster in clusters(document))
            images = {container["image"] for pod in pods(document) for container in pod["containers"]}
            assert images <= {f"registry.example.com/posttrain:ray{base}"}


@pytest.mark.parametrize("name", JOBS)
def test_the_run_file_and_the_command_of_a_job_are_taken_by_posttrain(name, tmp_path):
    data = JOBS[name]["ConfigMap"]["data"]
    (tmp_path / "run.yaml").write_text(data["run.yaml"])
    [line] = re.findall(r"^\s*(?:exec )?(posttrain \w+ /etc/.*)$", data["start.sh"], re.MULTILINE)
    _, command, *arguments = shlex.split(line)
    assert command in name
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    parsed = commands[command].make_context(command, arguments).params
    assert [str(v) for key, v in parsed.items() if key in ("runfile", "jobfile")] == ["/etc/posttrain/run.yaml"]
    overrides = [o.replace("$MLFLOW_TRACKING_URI", "https://mlflow.example.com") for o in parsed["overrides"]]
    load: Callable[..., RunFile] = config.load_job if command == "retrain" else config.load
    taken = load(tmp_path / "run.yaml", overrides)
    assert taken.tracking.uri == "https://mlflow.example.com"
    assert taken.run.path.startswith("s3://")
    assert (taken.ray.address == "auto") == (name != "cronjob-retrain")


@pytest.mark.parametrize("name", JOBS)
def test_a_job_reads_what_is_mounted_for_it(name):
    config_map = JOBS[name]["ConfigMap"]
    [job] = [document for kind, document in JOBS[name].items() if kind != "ConfigMap"]
    using = [
        (pod, volume["name"])
        for pod in pods(job)
        for volume in pod["volumes"]
        if volume.get("configMap") == {"name": config_map["metadata"]["name"]}
    ]
    [(pod, volume)] = using
    mounts = pod["containers"][0]["volumeMounts"]
    assert {"name": volume, "mountPath": "/etc/posttrain", "readOnly": True} in mounts
    started = json.dumps(job["spec"])
    assert "/etc/posttrain/start.sh" in started and "start.sh" in config_map["data"]


# -- exit codes of retrain ---------------------------------------------------------------------------------


def starts(name: str, codes: list[int], folder: Path) -> tuple[int, int]:
    """The exit code of the job's start.sh, and how often it started posttrain, which ends with these codes in turn."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    for command, body in {
        "posttrain": f'echo "$@" >>{folder}/calls; n=$(wc -l <{folder}/calls); exit $(sed -n "${{n}}p" {folder}/codes)',
        "sleep": "exit 0",
    }.items():
        (folder / command).write_text(f"#!/bin/sh\n{body}\n")
        (folder / command).chmod(0o755)
    script = JOBS[name]["ConfigMap"]["data"]["start.sh"]
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "MLFLOW_TRACKING_URI": "https://mlflow.example.com"}
    done = subprocess.run(["sh", "-c", script], env=environment, timeout=60)
    calls = (folder / "calls").read_text().splitlines()
    assert set(calls) == {"retrain /etc/posttrain/run.yaml --set tracking.uri=https://mlflow.example.com"}
    return done.returncode, len(calls)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0], (0, 1)),
        ([2], (2, 1)),
        ([10], (10, 1)),
        ([11], (11, 1)),
        ([1, 0], (0, 2)),
        ([1, 1, 10], (10, 3)),
        ([1, 1, 1, 0], (1, 3)),
    ],
)
def test_on_a_cluster_only_a_failure_is_tried_again(codes, expected, tmp_path):
    assert starts("raycronjob-retrain", codes, tmp_path) == expected
    assert JOBS["raycronjob-retrain"]["RayCronJob"]["spec"]["jobTemplate"]["backoffLimit"] == 0


@pytest.mark.parametrize("code", [0, 1, 2, 10, 11])
def test_in_one_pod_only_a_failure_is_tried_again(code, tmp_path):
    assert starts("cronjob-retrain", [code], tmp_path) == (code, 1)
    cron = JOBS["cronjob-retrain"]["CronJob"]["spec"]
    job = cron["jobTemplate"]["spec"]
    final = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert [(code in rule["values"], rule["operator"]) for rule in final] == [(code in (2, 10, 11), "In")]
    assert job["backoffLimit"] > 0 and cron["concurrencyPolicy"] == "Forbid"
    # a policy for failures takes pods that are not restarted in place
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert final[0]["containerName"] in {c["name"] for c in job["template"]["spec"]["containers"]}
