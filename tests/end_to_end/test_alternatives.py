"""The best of several models: `refine.scope: auto`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from small_data import (
    Digits,
    accuracy,
    as_built,
    assert_same_result,
    interrupted_after,
    memorise,
    removed_ids,
    rounds,
)

from posttrain.cluster import training

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]

AUTO: dict[str, dict[str, Any]] = {
    "model": {"initial_weights": "factory"},
    "pretrain": {"epochs": 8, "ema": 0.9},
    "refine": {"scope": "auto", "method": "gce", "augment": "crop"},
    "removal": {"max_rounds": 2, "budget": 0.1},
}


@pytest.fixture(scope="module")
def best(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("auto") / "run", **AUTO)


def test_the_model_with_the_lowest_corrected_loss_is_delivered(best: dict[str, Any], digits: Digits) -> None:
    offered = {one["name"]: one for one in best["alternatives"]}
    assert list(offered) == [
        "the model as it came",
        "the boundary, nothing removed",
        "the boundary on what is left",
        "the network refined on what is left",
        "a boundary on the network refined",
        "the network trained again on what is left",
        "a boundary on the network trained again",
    ]
    (delivered,) = (one for one in offered.values() if one["delivered"])
    assert delivered["validation_corrected_loss"] == min(one["validation_corrected_loss"] for one in offered.values())
    assert best["test_accuracy_after"] == delivered["test_accuracy"] > best["test_accuracy_before"] + 0.05
    labels = torch.from_numpy(digits.true[list(digits.splits["test"])])
    found = accuracy(as_built(best["run"]), digits.inputs("test"), labels)
    assert found == pytest.approx(delivered["test_accuracy"], abs=0.005)
    # what they say of themselves is what a run that makes only the one says
    assert offered["the model as it came"]["test_accuracy"] == best["test_accuracy_before"]
    assert offered["the boundary, nothing removed"]["test_accuracy"] == best["test_accuracy_boundary"]


def test_a_run_interrupted_between_alternatives_makes_only_those_that_are_missing(
    best: dict[str, Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # `conclude` finds the alternatives by their module
        from posttrain.runs import alternatives

        made, keep = [], alternatives._keep

        def interrupted(*arguments: Any) -> Any:
            made.append(keep(*arguments))
            if len(made) == 4:
                raise KeyboardInterrupt
            return made[-1]

        patch.setattr(alternatives, "_keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", **AUTO)
    trained = []
    real = training.train
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", lambda *a, **o: trained.append(o["run_name"]) or real(*a, **o))
        run(tmp_path / "run", **AUTO)
    assert [name.split("-")[0] for name in trained] == ["pretrain"]
    assert_same_result(tmp_path / "run", best["run"])
    assert not (tmp_path / "run" / "alternatives").exists()


@pytest.mark.parametrize("train_workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_network_that_cannot_be_trained_or_cannot_take_every_sample_is_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train_workers: int
) -> None:
    real = training.train

    def overflowing(*arguments: Any, **options: Any) -> Any:
        trained = real(*arguments, **options)
        # features are kept as float16
        tensors = {name: tensor * 1e6 for name, tensor in load(trained.weights).items()}
        return replace(trained, weights=save(tensors)) if "pretrain" in options["run_name"] else trained

    monkeypatch.setattr(training, "train", overflowing)
    diverging = AUTO["refine"] | {"method": "cross_entropy", "learning_rate": 1e30}
    summary = run(tmp_path / "run", **AUTO | {"refine": diverging}, ray={"train_workers": train_workers})
    assert [one["name"] for one in summary["alternatives"]] == [
        "the model as it came",
        "the boundary, nothing removed",
        "the boundary on what is left",
    ]
    assert summary["quarantined"] == 0
    said = capsys.readouterr().err
    assert said.count("left out: ") == 2, said
    assert "training diverged in epoch 1" in said
    assert "samples cannot be used with it, the first: " in said


@pytest.fixture(scope="module")
def pretrained(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights that know the right labels, as those of other data would, and what memorising the given ones made of
    them."""
    from posttrain.vision.models import mlp

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = mlp(10)
    right = Digits()
    right.given = right.true
    memorise(right, model, folder / "initial.pt", epochs=20)
    memorise(digits, model, folder / "weights.pt", epochs=300)
    return {"weights": str(folder / "weights.pt"), "initial_weights": str(folder / "initial.pt")}


def test_the_rounds_take_the_features_of_the_initial_weights_where_these_are_better(
    pretrained: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    removal = {"max_rounds": 2, "budget": 0.1}
    sections: dict[str, dict[str, Any]] = {
        "model": pretrained,
        "refine": {"scope": "auto"},
        "pretrain": {"epochs": 3},
        "removal": removal,
    }
    with interrupted_after("tell_round", call=2):
        run(tmp_path / "auto", **sections)
    summary = run(tmp_path / "auto", **sections)
    alone = run(tmp_path / "head", model={"weights": pretrained["initial_weights"]}, removal=removal)
    assert removed_ids(tmp_path / "auto") == removed_ids(tmp_path / "head")
    offered = {one["name"]: one["test_accuracy"] for one in summary["alternatives"]}
    assert offered["the boundary on what is left"] == alone["test_accuracy_after"]
    assert offered["the boundary, nothing removed"] == alone["test_accuracy_boundary"]
    # before and after are those of the model that came and of the delivered one
    assert summary["test_accuracy_before"] == offered["the model as it came"] != alone["test_accuracy_before"]
    assert summary["test_accuracy_after"] == next(
        one["test_accuracy"] for one in summary["alternatives"] if one["delivered"]
    )


GOING_ON: dict[str, dict[str, Any]] = {
    **AUTO,
    "pretrain": {"epochs": 40},
    "probe": {"layers": "last"},
    "removal": {"max_rounds": 8, "budget": 0.2},
}


@pytest.fixture(scope="module")
def going_on(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary, with the transition matrices by which losses were corrected."""
    from posttrain.runs import evaluate

    used: list[torch.Tensor] = []
    real = evaluate.corrected_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "corrected_loss", lambda *given: used.append(given[2]) or real(*given))
        summary = run(tmp_path_factory.mktemp("going-on") / "run", **GOING_ON)
    return summary | {"transitions": used}


def test_the_rounds_go_on_with_the_network_trained_again_while_its_boundary_is_better(
    going_on: dict[str, Any],
) -> None:
    folder = Path(going_on["run"])
    done = rounds(folder)
    bases = [one["number"] for one in done[1:] if not one["removed"] and not one["ended"]]
    assert bases and [int(path.parent.name) for path in sorted(folder.glob("rounds/*/base.safetensors"))] == bases
    # with the features of each base the rounds are of a choice of its own
    backbones = [json.loads((folder / f"rounds/{number:04d}/probes.json").read_text())["backbone"] for number in bases]
    assert len(set(backbones)) == len(bases)
    assert done[bases[0] + 1]["removed"], "what the first features did not show"
    accuracies = [one["metrics"]["test_accuracy"] for one in done]
    assert accuracies[bases[-1]] > accuracies[bases[0] - 1]
    offered = {one["name"]: one for one in going_on["alternatives"]}
    # the last network trained again showed nothing more: its boundary is that of the rounds
    assert bases[-1] == len(done) - 2 and going_on["bases"] == len(bases)
    assert list(offered)[-2:] == ["a boundary on the network refined", "the network trained again on what is left"]
    assert offered["the network trained again on what is left"]["seconds"] > 0
    # and the noise of the validation labels is still known, of the features before
    assert all(float(transition.diagonal().max()) < 0.95 for transition in going_on["transitions"])
    assert not list(folder.glob("rounds/*/scoring/*"))
    # the control is still of the features that the rounds began with
    assert offered["the boundary, nothing removed"]["test_accuracy"] == going_on["test_accuracy_boundary"]
    assert not list(folder.glob("alternatives")) and len(list((folder / "features").iterdir())) == 1


@pytest.mark.parametrize(
    ("step", "call"),
    [
        pytest.param("tell_round", 3, marks=pytest.mark.long),  # the last round before the network is trained again
        ("tell_round", 4),  # the base
        pytest.param("tell_round", 5, marks=pytest.mark.long),  # a round on it
        pytest.param("write_checkpoint", 4, marks=pytest.mark.long),  # while the base is committed
    ],
)
def test_a_run_that_goes_on_with_another_base_ends_the_same_after_a_kill(
    going_on: dict[str, Any], run: Run, tmp_path: Path, step: str, call: int
) -> None:
    with interrupted_after(step, call=call):
        run(tmp_path / "run", **GOING_ON)
    summary = run(tmp_path / "run", **GOING_ON)
    assert_same_result(tmp_path / "run", going_on["run"])
    assert [one["name"] for one in summary["alternatives"]] == [one["name"] for one in going_on["alternatives"]]


def test_no_network_is_trained_where_the_initial_weights_are_not_known(run: Run, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", refine={"scope": "auto"}, removal={"max_rounds": 1})
    assert [one["name"] for one in summary["alternatives"]] == [
        "the model as it came",
        "the boundary, nothing removed",
        "the boundary on what is left",
    ]


@pytest.mark.long
def test_a_run_interrupted_when_the_best_is_committed_ends_the_same(
    best: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    with interrupted_after("tell_round", call=4):
        run(tmp_path / "run", **AUTO)
    run(tmp_path / "run", **AUTO)
    assert_same_result(tmp_path / "run", best["run"])
    assert not (tmp_path / "run" / "alternatives").exists()
    told = json.loads((tmp_path / "run" / "alternatives.json").read_text())
    assert [one["delivered"] for one in told] == [one["delivered"] for one in best["alternatives"]]


@pytest.mark.long
@pytest.mark.parametrize("method", ["forward", "co_teaching"])
def test_a_network_is_trained_with_the_noise_that_was_estimated(run: Run, tmp_path: Path, method: str) -> None:
    given: list[Any] = []
    real = training.train

    def noting(*arguments: Any, **options: Any) -> Any:
        given.append((options["run_name"].split("-")[0], arguments[3].method, options["noise"]))
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", noting)
        summary = run(
            tmp_path / "run",
            model={"weights": None},
            pretrain={"method": method, "epochs": 20},
            refine={"scope": "network", "method": method, "augment": "crop", "learning_rate": 0.001},
            removal={"max_rounds": 1},
        )
    (plain, before, refined) = given
    assert plain == ("pretrain", "cross_entropy", None) and before[:2] == ("pretrain", method)
    assert refined[:2] == ("refine", method)
    rate = summary["noise"]["rate"]
    assert before[2].rate == pytest.approx(rate, abs=0.15) and refined[2].rate < before[2].rate
    assert torch.allclose(before[2].transition.sum(dim=1), torch.ones(10, dtype=torch.float64))
