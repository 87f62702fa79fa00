"""The refinement benchmark: every row as it is told, the same steps for all, going on, and what the report says."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from pipelines.benchmarks import cases, refinement
from pipelines.benchmarks.cases import Case, Data, Part
from pipelines.benchmarks.ours import ours
from pipelines.benchmarks.refinement import (
    AFTER_FOLDS,
    BY_LOSS,
    CHOSEN,
    CLEANLAB,
    EMA,
    MODES,
    NEW_HEAD,
    NO_REMOVAL,
    ORACLE,
    OURS,
    RANDOM,
    REFINED,
    ROWS,
    SCRATCH,
    SCRATCH_CLEANLAB,
    SCRATCH_OURS,
    THEN_BOUNDARY,
    UNTOUCHED,
    Cleaning,
    Estimate,
    Finding,
    Row,
)
from posttrain.rounds import State
from posttrain.schema import Round
from posttrain.vision import layers, models
from posttrain.vision.images import normalize

NOISY = Case("digits", "symmetric 40", "memorised", 0)
CLEAN = Case("digits", "clean", "memorised", 0)
EPOCHS = 15


@dataclass(frozen=True)
class Training:
    """One call of the training loop."""

    samples: int
    wrong: int
    steps: int
    """As the loop itself counts them."""
    from_scratch: bool


def first_tenth(case: Case, data: Data, folder: Path) -> np.ndarray:
    """In the place of cleanlab: flags the first tenth of the samples, whatever their labels."""
    return np.arange(len(data.train)) < len(data.train) // 10


@pytest.fixture(scope="module")
def trainings() -> Iterator[list[Training]]:
    """A few epochs for the networks, two rounds, the stand-in for cleanlab; records what is trained on."""
    noted: list[Training] = []
    train, fit = cases.train, cases.fit_network
    steps: list[int] = []

    def counting(*arguments: Any, **settings: Any) -> Any:
        found = fit(*arguments, **settings)
        steps.append(found["steps"])
        return found

    def noting(case: Case, part: Part, **settings: Any) -> Any:
        found = train(case, part, **settings)
        wrong = int((part.given != part.true).sum())
        noted.append(Training(len(part), wrong, steps[-1], settings.get("weights") is None))
        return found

    with pytest.MonkeyPatch.context() as patch:
        for network in cases.NETWORKS:
            own = cases.DATASETS["digits"].training
            patch.setitem(own, network, replace(own[network], epochs=EPOCHS, until_train_accuracy=None))
        patch.setattr(cases, "fit_network", counting)
        patch.setattr(cases, "train", noting)
        patch.setattr(refinement, "flagged", first_tenth)
        patch.setattr(refinement, "REMOVAL", refinement.REMOVAL.model_copy(update={"max_rounds": 2}))
        yield noted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refinement")


@pytest.fixture(scope="module")
def noisy(trainings: list[Training], folder: Path) -> tuple[Finding, list[Training]]:
    """The noisy case with cleanlab's rows, and the trainings that it took after the network's own."""
    cases.trained(NOISY, cases.load(NOISY), folder)
    trainings.clear()
    found = refinement.measure(NOISY, folder, cleanlab=True)
    return found, list(trainings)


@pytest.fixture(scope="module")
def begin(noisy: tuple[Finding, list[Training]], folder: Path) -> tuple[Data, refinement.Start]:
    data = cases.load(NOISY)
    return data, refinement.start(NOISY, data, cases.trained(NOISY, data, folder).weights)


def row(found: Finding, name: str) -> Row:
    own = found.row(name)
    assert own is not None
    return own


# -- one case ----------------------------------------------------------------------------------------------


def test_a_case_has_every_row_once(noisy: tuple[Finding, list[Training]]):
    found, _ = noisy
    assert sorted(own.name for own in found.rows) == sorted(ROWS)
    data = cases.load(NOISY)
    wrong = int((data.train.given != data.train.true).sum())
    assert (found.samples, found.wrong) == (len(data.train), wrong)
    for own in found.rows:
        assert 0 < own.test_accuracy <= 1 and 0 < own.validation_accuracy <= 1
        # what a row does without is what it lost of the wrong labels and of the right ones
        assert 0 <= own.wrong <= wrong and 0 <= own.samples - own.wrong <= found.samples - wrong
    for name in (UNTOUCHED, NEW_HEAD, CHOSEN, NO_REMOVAL, EMA, THEN_BOUNDARY, SCRATCH):
        assert (row(found, name).samples, row(found, name).wrong) == (found.samples, wrong)


def test_all_that_refine_the_network_take_the_same_number_of_steps(noisy: tuple[Finding, list[Training]]):
    found, trainings = noisy
    plan = found.cleanings["network"]
    live = found.samples - np.cumsum(plan.removed)
    assert len(plan.removed) == 2
    # two epochs of batches of 64 a round
    assert list(plan.steps) == [2 * -(-n // 64) for n in live]
    assert {row(found, name).steps for name in REFINED} == {sum(plan.steps)}
    # and so says the training loop, which counts for itself: posttrain, no removal (EMA is an average over it),
    # random, by loss, cleanlab
    refining = [t.steps for t in trainings if not t.from_scratch]
    assert refining == 5 * list(plan.steps)
    for name in (OURS["head"], NEW_HEAD, CHOSEN, UNTOUCHED):
        assert row(found, name).steps == 0


def test_from_scratch_takes_as_many_steps_as_the_network_of_the_case(noisy: tuple[Finding, list[Training]]):
    found, trainings = noisy
    own = EPOCHS * -(-found.samples // 64)
    assert {row(found, name).steps for name in refinement.FROM_SCRATCH} == {own}
    assert [t.steps for t in trainings if t.from_scratch] == 5 * [own]


def test_the_oracle_trains_on_all_right_labels_and_no_wrong_one(noisy: tuple[Finding, list[Training]]):
    found, trainings = noisy
    right = found.samples - found.wrong
    assert (row(found, ORACLE).samples, row(found, ORACLE).wrong) == (right, 0)
    assert [t.samples for t in trainings if t.wrong == 0] == [right]


def test_the_controls_remove_as_many_in_each_round_as_posttrain(noisy: tuple[Finding, list[Training]]):
    found, trainings = noisy
    plan = found.cleanings["network"]
    live = (found.samples - np.cumsum(plan.removed)).tolist()
    refining = [t.samples for t in trainings if not t.from_scratch]
    everything, rest = [found.samples] * len(live), found.samples - found.samples // 10
    assert refining == [*live, *everything, *live, *live, *([rest] * len(live))]
    for name in (OURS["network"], OURS["both"], RANDOM, BY_LOSS, SCRATCH_OURS):
        assert row(found, name).samples == live[-1]
    assert row(found, CLEANLAB).samples == row(found, SCRATCH_CLEANLAB).samples == rest


def test_posttrain_finds_wrong_labels_and_chance_does_not(noisy: tuple[Finding, list[Training]]):
    found, _ = noisy
    for mode in MODES:
        precision = refinement.precision(found, found.ours(mode))
        # 36.6 % of the labels are wrong
        assert precision is not None and precision > 0.9
    by_chance = refinement.precision(found, row(found, RANDOM))
    assert by_chance == pytest.approx(found.wrong / found.samples, abs=0.08)


def test_on_clean_data_nothing_goes_and_every_row_of_the_network_is_as_it_came(trainings: list[Training], folder: Path):
    found = refinement.measure(CLEAN, folder)
    assert found.wrong == 0 and found.row(CLEANLAB) is None
    assert all(cleaning.removed == cleaning.steps == () for cleaning in found.cleanings.values())
    before = row(found, UNTOUCHED)
    for name in REFINED:
        if name != CLEANLAB:
            assert replace(row(found, name), name=UNTOUCHED) == before
    # the very same samples are trained on once
    assert row(found, ORACLE).test_accuracy == row(found, SCRATCH).test_accuracy


# -- posttrain in memory -----------------------------------------------------------------------------------


def test_the_first_round_takes_the_samples_with_the_largest_directed_margin(
    begin: tuple[Data, refinement.Start], monkeypatch: pytest.MonkeyPatch
):
    data, start = begin
    monkeypatch.setattr(refinement, "REMOVAL", refinement.REMOVAL.model_copy(update={"max_rounds": 1}))
    run = refinement.CleaningInMemory(NOISY, data, "head", start)
    outcome = run.clean()
    assert outcome.reason == "removal.max_rounds = 1 reached"
    margins = ours(NOISY, data, start.weights).scores["directed_margin"]
    tenth = int(0.1 * len(data.train))
    assert set(np.flatnonzero(~run.kept)) == set(np.argsort(-margins)[:tenth])


def test_a_cut_leaves_every_class_its_floor():
    draw = np.random.default_rng(0)
    given = np.repeat([0, 1, 2], [50, 30, 20])
    part = Part(draw.permutation(100), torch.zeros(100, 1, 2, 2, dtype=torch.uint8), given, given)
    kept = np.ones(100, bool)
    kept[:10] = False
    scores = draw.random(100).astype(np.float32)
    # a plain walk down the scores: a tenth of all samples of a class stays
    left, expected = {0: 40, 1: 30, 2: 20}, set()
    for at in np.argsort(-scores):
        floor = {0: 5, 1: 3, 2: 2}[int(given[at])]
        if kept[at] and len(expected) < 79 and left[int(given[at])] > floor:
            left[int(given[at])] -= 1
            expected.add(int(at))
    cut, gone = refinement.taken(part, kept, scores[kept], classes=3, at_most=79)
    assert set(np.flatnonzero(gone)) == expected and cut.total == 79
    assert refinement.taken(part, kept, scores[kept], classes=3, at_most=90)[0].total == 80


def test_the_accuracy_of_a_boundary_is_that_of_the_network_that_ends_in_it(begin: tuple[Data, refinement.Start]):
    data, start = begin
    boundary = start.boundary
    weight, bias = (part.float() for part in boundary.fold())
    dataset = cases.DATASETS["digits"]
    size = (dataset.image.channels, *dataset.image.size)
    network = cases.loaded(NOISY, start.weights)
    _, _, probed = layers.as_probed(
        network,
        "head",
        boundary.layers,
        refinement.PROBE.width,
        weight,
        bias,
        factory=dataset.factory,
        arguments=dataset.arguments,
        size=size,
    )
    found = refinement.boundary_accuracies(boundary, start.test)
    for name, part in (("validation", data.validation), ("test", data.test)):
        images = normalize(part.pixels, dataset.image.mean, dataset.image.std)
        with torch.inference_mode():
            right = (probed.eval()(images).argmax(dim=1).numpy() == part.given).mean()
        # features are kept in float16
        assert found[f"{name}_accuracy"] == pytest.approx(right, abs=0.005)


@pytest.mark.parametrize(
    ("mode", "rounds", "before", "becomes"),
    [
        ("head", 0, 0.2, True),
        # not by two standard errors
        ("head", 0, "as good", False),
        ("head", 1, 0.2, False),
        ("network", 1, 0.2, False),
        ("both", 0, 0.2, False),
        ("both", 1, "as good", True),
        ("both", 1, 1.0, False),
    ],
)
def test_the_boundary_becomes_the_head_in_the_end_where_the_mode_asks_for_it(
    begin: tuple[Data, refinement.Start], mode: refinement.Mode, rounds: int, before: float | str, becomes: bool
):
    data, start = begin
    accuracy = start.boundary.accuracy if before == "as good" else float(before)
    history = tuple(
        Round(number, len(data.train), 0, 0, 0, {"validation_accuracy": accuracy}) for number in range(rounds + 1)
    )
    state = State(history, refinement.Model(start.weights), len(data.validation))
    after = refinement.CleaningInMemory(NOISY, data, mode, start).last_boundary(state, mode)
    assert (after.model.boundary is start.boundary) is becomes
    assert after.number == rounds + becomes
    if becomes:
        expected = refinement.boundary_accuracies(start.boundary, start.test)
        assert after.history[-1].metrics == expected


# -- training ----------------------------------------------------------------------------------------------


@pytest.fixture
def with_batch_norm(monkeypatch: pytest.MonkeyPatch) -> tuple[Data, bytes]:
    """The digits' network is a small ResNet, and its data are few."""
    digits = cases.DATASETS["digits"]
    other = replace(digits, factory="posttrain.vision.models:small_resnet", arguments={"width": 8, "channels": 1})
    monkeypatch.setitem(cases.DATASETS, "digits", other)
    data = cases.load(NOISY)
    data = replace(data, train=data.train.rows(np.arange(130)))
    return data, models.to_bytes(cases.network(NOISY, 0))


def floats(weights: bytes) -> dict[str, Tensor]:
    """All that is averaged: weights, and the means and variances of batch norm."""
    state = cases.loaded(NOISY, weights).state_dict()
    return {name: value.double() for name, value in state.items() if value.is_floating_point()}


def test_the_average_after_one_step_is_a_hundredth_of_the_way(with_batch_norm: tuple[Data, bytes]):
    data, weights = with_batch_norm
    average = refinement.Average(NOISY, weights)
    after, steps = refinement.trained_on(
        NOISY, data.train, weights, seed=1, settings=refinement.refining("digits"), steps=1, watch=average.watch
    )
    assert steps == 1
    begun, ended, averaged = floats(weights), floats(after), floats(average.finished(after))
    assert any("running_var" in name for name in averaged)
    for name, value in averaged.items():
        assert not torch.equal(begun[name], ended[name])
        torch.testing.assert_close(value, 0.99 * begun[name] + 0.01 * ended[name], rtol=1e-5, atol=1e-7)


def test_the_average_goes_over_every_step_of_every_round_once(with_batch_norm: tuple[Data, bytes]):
    data, weights = with_batch_norm
    passed: list[dict[str, Tensor]] = []

    def remember(model: nn.Module) -> None:
        passed.append({name: value.detach().double().clone() for name, value in model.state_dict().items()})

    average = refinement.Average(NOISY, weights)

    def watch(model: nn.Module) -> None:
        remember(model)
        average.watch(model)

    plan = Cleaning("", False, (1, 1), (3, 2), (), ())
    after, kept, steps = refinement.refined(NOISY, data, weights, plan, watch=watch)
    assert steps == len(passed) == 5 and kept.all()
    expected = passed[0]
    for state in [*passed[1:], floats(after)]:
        expected = {name: 0.99 * expected[name] + 0.01 * value for name, value in state.items() if name in expected}
    for name, value in floats(average.finished(after)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("samples", [64, 65, 66, 127, 129])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_as_many_steps_are_taken_as_are_asked_for(with_batch_norm: tuple[Data, bytes], samples: int, steps: int):
    data, weights = with_batch_norm
    part = data.train.rows(np.arange(samples))
    settings = refinement.refining("digits")
    epoch = list(cases.Images(part, 0).batches(64, 100, 0))
    # a last batch of one is left out: batch normalisation cannot take it
    assert refinement.steps_of_epoch(samples, 64) == len(epoch)
    assert refinement.trained_on(NOISY, part, weights, seed=0, settings=settings, steps=steps)[1] == steps


def test_without_a_round_the_controls_are_the_network_as_it_came(with_batch_norm: tuple[Data, bytes]):
    data, weights = with_batch_norm
    none = Cleaning("", False, (), (), (), ())
    average = refinement.Average(NOISY, weights)
    after, kept, steps = refinement.refined(NOISY, data, weights, none, watch=average.watch)
    assert (after, steps) == (weights, 0) and kept.all()
    for name, value in floats(average.finished(after)).items():
        assert torch.equal(value, floats(weights)[name])


def test_the_control_by_loss_ranks_by_the_networks_own_cross_entropy(with_batch_norm: tuple[Data, bytes]):
    data, weights = with_batch_norm
    kept = np.arange(130) % 3 > 0
    found = refinement.by_loss(NOISY, data)(1, weights, kept)
    part = data.train.rows(kept)
    probabilities = cases.logits(NOISY, cases.loaded(NOISY, weights), part).double().softmax(dim=1)
    expected = [-float(p[label].log()) for p, label in zip(probabilities, part.given, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# -- going on ----------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_without_doing_anything_again(
    trainings: list[Training],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    command = ["--datasets", "digits", "--noises", "clean", "symmetric 40", "--networks", "memorised", "--seeds", "0"]
    command += ["--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    asked: list[Case] = []

    def noting(case: Case, data: Data, weights: bytes) -> refinement.Start:
        asked.append(case)
        if asked == [CLEAN, NOISY]:
            raise KeyboardInterrupt
        return begins(case, data, weights)

    begins = refinement.start
    monkeypatch.setattr(refinement, "start", noting)
    with pytest.raises(KeyboardInterrupt):
        refinement.main(command)
    first = refinement.kept(CLEAN, tmp_path)
    assert first is not None and refinement.kept(NOISY, tmp_path) is None
    refinement.main(command)
    assert asked == [CLEAN, NOISY, NOISY]
    assert refinement.kept(CLEAN, tmp_path) == first
    assert not list(tmp_path.rglob("*.tmp"))
    trainings.clear()
    capsys.readouterr()
    refinement.main(command)
    assert asked == [CLEAN, NOISY, NOISY] and not trainings
    text = (tmp_path / "out" / "refinement.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert str(tmp_path) not in text
    stored = pq.read_table(tmp_path / "out" / "refinement.parquet").to_pylist()
    # without cleanlab's two
    assert len(stored) == 2 * (len(ROWS) - 2)
    [own] = [r for r in stored if (r["noise"], r["name"]) == ("symmetric 40", OURS["network"])]
    found = refinement.kept(NOISY, tmp_path)
    assert found is not None
    assert own["removal_precision"] == refinement.precision(found, found.ours("network"))
    assert own["posttrain_steps"] == list(found.cleanings["network"].steps)


def test_cleanlab_is_added_to_what_was_measured_without_it(
    noisy: tuple[Finding, list[Training]], trainings: list[Training], tmp_path: Path, folder: Path
):
    whole, _ = noisy
    (tmp_path / "networks").symlink_to(folder / "networks")
    without = refinement.measure(NOISY, tmp_path)
    assert {own.name for own in whole.rows} - {own.name for own in without.rows} == set(AFTER_FOLDS)
    trainings.clear()
    # posttrain's plan comes from the file
    added = refinement.measure(NOISY, tmp_path, cleanlab=True)
    assert len(trainings) == len(whole.cleanings["network"].steps) + 1
    assert added == whole == refinement.kept(NOISY, tmp_path)


def test_what_was_measured_with_other_settings_is_refused(
    noisy: tuple[Finding, list[Training]], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(refinement, "REFINE", refinement.REFINE.model_copy(update={"learning_rate": 0.02}))
    with pytest.raises(ValueError, match=r"seed_0\.json was measured with other settings"):
        refinement.measure(NOISY, folder)


# -- the report --------------------------------------------------------------------------------------------


def finding(
    noise: str = "pair 40",
    seed: int = 0,
    *,
    validation: str = "head",
    others: dict[str, float] | None = None,
    **ours: float,
) -> Finding:
    """A finding with these test accuracies of the modes and of other rows, else 0.5.

    The mode `validation` has the best validation accuracy; cleanlab's rows are there where they are named.
    """
    named = {**{f"posttrain, {mode}": accuracy for mode, accuracy in ours.items()}, **(others or {})}
    given = {**dict.fromkeys(ROWS, 0.5), **named}
    wrong = 0 if noise == "clean" else 40
    removed = 0 if noise == "clean" else 30
    rows = tuple(
        Row(
            name,
            accuracy,
            0.9 if name == f"posttrain, {validation}" else 0.6,
            0,
            100 - removed * name.startswith("posttrain"),
            wrong - removed * 24 // 30 * name.startswith("posttrain"),
        )
        for name, accuracy in given.items()
        if name not in AFTER_FOLDS or name in named
    )
    estimates = (Estimate(0.4, 0.3, 0.5, True), Estimate(0.2, 0.1, 0.3, True))
    cleaning = Cleaning("removal.max_rounds = 4 reached", False, (10, 10, 10), (), (0.5, 0.6, 0.7), estimates)
    if noise == "clean":
        nothing = (Estimate(0.0, 0.0, 0.07, False),)
        cleaning = Cleaning("no sample goes: no sign", False, (), (), (), nothing)
    cleanings: dict[refinement.Mode, Cleaning] = {mode: cleaning for mode in MODES}
    cleanings["both"] = replace(cleaning, new_boundary=noise != "clean")
    case = Case("digits", noise, "memorised", seed)
    return Finding(case, 100, wrong, cleanings, rows, "a machine", 1, {})


def test_the_best_control_is_that_of_each_seed_and_the_best_mode_that_of_the_validation_labels():
    findings = [
        finding(seed=0, head=0.80, network=0.70, both=0.60, validation="head", others={CHOSEN: 0.76, EMA: 0.79}),
        finding(seed=1, head=0.80, network=0.70, both=0.90, validation="network", others={UNTOUCHED: 0.77, EMA: 0.60}),
        finding(seed=2, head=0.80, network=0.70, both=0.95, validation="both", others={THEN_BOUNDARY: 0.81}),
    ]
    [head] = refinement.compared(findings, "head")
    # a boundary without removal is posttrain's own: no control
    assert head.differences == pytest.approx([0.01, 0.03, 0.30])
    assert [name for name, _ in head.controls] == [EMA, UNTOUCHED, UNTOUCHED]
    [network] = refinement.compared(findings, "network")
    assert network.differences == pytest.approx([-0.09, -0.07, 0.20])
    [best] = refinement.compared(findings, "best")
    assert best.ours == (0.80, 0.70, 0.95)
    assert best.controls == ((EMA, 0.79), (UNTOUCHED, 0.77), (UNTOUCHED, 0.5))
    # the standard error of the mean of paired differences, by hand
    differences = [0.01, -0.07, 0.45]
    mean = sum(differences) / 3
    error = (sum((d - mean) ** 2 for d in differences) / 2 / 3) ** 0.5
    assert best.difference == pytest.approx(mean) and best.error == pytest.approx(error)
    assert not best.above and not best.below


def test_training_from_scratch_is_no_control():
    [only] = refinement.compared([finding(head=0.6, others={ORACLE: 0.99, SCRATCH: 0.98, NEW_HEAD: 0.55})], "best")
    assert only.controls == ((NEW_HEAD, 0.55),)
    [network] = refinement.compared([finding(network=0.6, others={CLEANLAB: 0.7})], "network")
    assert network.controls == ((CLEANLAB, 0.7),)


def test_the_report_counts_what_is_above_and_lists_what_is_not():
    findings = [
        *(finding("pair 40", seed, head=0.70 + 0.01 * seed, network=0.50 - 0.01 * seed) for seed in range(3)),
        *(finding("symmetric 40", seed, head=0.45 + 0.05 * seed, network=0.46 + 0.01 * seed) for seed in range(3)),
    ]
    text = refinement.report(findings, "command")
    assert "95 % interval would ask for 4.3 standard errors" in text
    assert (
        "**posttrain, head**: above the best control by more than 2 standard errors on 1 of 2 settings, not on 1; "
        "below it by more than that on 0. Not above:\n\n- digits, symmetric 40, memorised: +0.0 ± 2.9\n" in text
    )
    assert (
        "**posttrain, network**: above the best control by more than 2 standard errors on 0 of 2 settings, not on 2; "
        "below it by more than that on 1. Not above:\n\n- digits, symmetric 40, memorised: -3.0 ± 0.6 (below)\n"
        "- digits, pair 40, memorised: -1.0 ± 0.6\n" in text
    )
    row = "| digits | pair 40 | memorised | 3 | **+21.0 ± 0.6** | -1.0 ± 0.6 | +0.0 ± 0.0 | **+21.0 ± 0.6** |"
    assert row in text
    deviation = 100 * statistics.stdev([0.70, 0.71, 0.72])
    assert f"| posttrain, head | 50.0 ± 5.0 | 71.0 ± {deviation:.1f} |" in text
    removal = "| digits | pair 40 | memorised | network | 40.0 ± 0.0 | 40.0 ± 0.0 (30.0 to 50.0) | 20.0 ± 0.0 |"
    assert f"{removal} 3, 3, 3 | 30.0 ± 0.0 | 80.0 ± 0.0 | 60.0 ± 0.0 | rounds 3 | 3 |" in text
    assert "## Clean data" not in text


def test_of_one_seed_nothing_is_called_above():
    text = refinement.report([finding(head=0.9)], "command")
    assert (
        "on 0 of 0 settings, not on 0; below it by more than that on 0. Of 1 settings there is one seed alone." in text
    )
    assert "| digits | pair 40 | memorised | 1 | +40.0 | +0.0 | +0.0 | +40.0 |" in text


def test_clean_data_are_compared_with_the_untouched_network_and_are_no_win():
    findings = [finding("clean", seed, head=0.9, network=0.49, both=0.5) for seed in range(2)]
    text = refinement.report(findings, "command")
    assert "| digits | memorised | 2 | 50.0 ± 0.0 | +40.0 ± 0.0 | -1.0 ± 0.0 | +0.0 ± 0.0 |" in text
    assert "## Verdict" not in text and "minus the best control" not in text
    assert "| 0, 0 | 0.0 ± 0.0 |  |  | no sign 2 | 0 |" in text


def test_a_row_that_was_not_measured_in_every_seed_says_so():
    findings = [finding(seed=0, others={CLEANLAB: 0.6}), finding(seed=1)]
    text = refinement.report(findings, "command")
    assert f"| {CLEANLAB} | 60.0 (1) |" in text
    assert SCRATCH_CLEANLAB not in text
    assert "cleanlab's removal was measured on 1" in text


def test_the_short_table_is_the_mean_over_the_noisy_cases_and_its_spread_that_over_seeds():
    findings = [
        finding("pair 40", 0, head=0.6),
        finding("symmetric 40", 0, head=0.8),
        finding("pair 40", 1, head=0.7),
        finding("symmetric 40", 1, head=0.9),
        finding("clean", 0, head=0.1),
    ]
    text = refinement.short(findings)
    assert text.splitlines()[0] == "|  | digits, memorised |"
    # the seeds' means are 70 and 80
    assert "| posttrain, head | 75.0 ± 7.1 |" in text


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        refinement.main(["--report", "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "measure them first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
