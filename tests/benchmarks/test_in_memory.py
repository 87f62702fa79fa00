"""posttrain in memory: what a round takes, what a boundary is worth, when it becomes the head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.benchmarks import cases, in_memory
from pipelines.benchmarks.cases import Case, Data
from pipelines.benchmarks.first_round import first_round
from posttrain.live import Live
from posttrain.rounds import State
from posttrain.schema import Round
from posttrain.vision.images import normalize
from posttrain.vision.probed_network import with_probe

NOISY = Case("digits", "symmetric 40", "memorised", 0)


@pytest.fixture(scope="module")
def begin(fifteen_epochs: None) -> tuple[Data, in_memory.Start]:
    data = cases.load(NOISY)
    return data, in_memory.start(NOISY, data, cases.train(NOISY, data.train, seed=0).weights)


def test_the_first_round_takes_the_samples_whose_label_is_most_likely_wrong(
    begin: tuple[Data, in_memory.Start],
):
    data, start = begin
    once = in_memory.REMOVAL.model_copy(update={"max_rounds": 1})
    run = in_memory.CleaningInMemory(NOISY, data, "head", start, removal=once)
    outcome = run.clean()
    assert outcome.reason == "removal.max_rounds = 1 reached"
    odds = first_round(NOISY, data, start.weights).scores["mislabel_odds"]
    tenth = int(0.1 * len(data.train))
    assert set(np.flatnonzero(~run.kept)) == set(np.argsort(-odds)[:tenth])


def test_rounds_go_on_with_what_is_left_and_other_features(begin: tuple[Data, in_memory.Start]):
    data, start = begin
    once = in_memory.REMOVAL.model_copy(update={"max_rounds": 1})
    run = in_memory.CleaningInMemory(NOISY, data, "head", start, removal=once)
    run.clean()
    other = in_memory.start(NOISY, data, cases.train(NOISY, data.train, seed=1).weights, run.kept)
    following = run.going_on(other)
    following.removal = in_memory.REMOVAL.model_copy(update={"max_rounds": 3})
    following.clean()
    assert [done.number for done in following.history] == [0, 1, 2, 3]
    assert [done.removed > 0 for done in following.history] == [False, True, False, True]
    assert not (following.kept & ~run.kept).any() and following.kept.sum() == following.history[-1].live
    assert len(following.estimates) == 1, "what the first features showed is not asked again"


def test_the_accuracy_of_a_boundary_is_that_of_the_network_that_ends_in_it(begin: tuple[Data, in_memory.Start]):
    data, start = begin
    boundary = start.boundary
    weight, bias = (part.float() for part in boundary.fold())
    dataset = cases.DATASETS["digits"]
    size = (dataset.image.channels, *dataset.image.size)
    network = cases.loaded(NOISY, start.weights)
    _, _, probed = with_probe(
        network,
        "head",
        boundary.layers,
        in_memory.PROBE.max_features,
        weight,
        bias,
        factory=dataset.factory,
        arguments=dataset.arguments,
        size=size,
    )
    found = in_memory.boundary_accuracies(boundary, start.test)
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
        ("network", 1, 0.2, False),
        ("both", 1, "as good", True),
    ],
)
def test_the_boundary_becomes_the_head_in_the_end_where_the_mode_asks_for_it(
    begin: tuple[Data, in_memory.Start], mode: in_memory.Mode, rounds: int, before: float | str, becomes: bool
):
    data, start = begin
    accuracy = start.boundary.accuracy if before == "as good" else float(before)
    history = tuple(
        Round(number, len(data.train), 0, 0, 0, {"validation_accuracy": accuracy}) for number in range(rounds + 1)
    )
    model = in_memory.Model(start.weights)
    state = State(history, Live(len(data.train)), model, model, model, len(data.validation))
    after = in_memory.CleaningInMemory(NOISY, data, mode, start).concluded(state, mode)
    assert (after.model.boundary is start.boundary) is becomes
    assert after.number == rounds + becomes
    if becomes:
        expected = in_memory.boundary_accuracies(start.boundary, start.test)
        assert after.history[-1].metrics == expected
