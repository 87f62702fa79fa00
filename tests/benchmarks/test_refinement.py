"""The refinement benchmark: every row as it is told, the same steps for all, and going on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.benchmarks import cases, in_memory, refinement, training
from pipelines.benchmarks.cases import Case, Data, Part
from pipelines.benchmarks.in_memory import Start
from pipelines.benchmarks.refinement_findings import (
    BY_LOSS,
    CHOSEN,
    CLEANLAB,
    EMA,
    FROM_SCRATCH,
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
    Finding,
    Row,
    precision,
)

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
def trainings(fifteen_epochs: None) -> Iterator[list[Training]]:
    """Two rounds, the stand-in for cleanlab; records what is trained on."""
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
        patch.setattr(cases, "fit_network", counting)
        patch.setattr(cases, "train", noting)
        patch.setattr(refinement, "flagged", first_tenth)
        patch.setattr(in_memory, "REMOVAL", in_memory.REMOVAL.model_copy(update={"max_rounds": 2}))
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
    assert {row(found, name).steps for name in FROM_SCRATCH} == {own}
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
        ours = precision(found, found.ours(mode))
        # 36.6 % of the labels are wrong
        assert ours is not None and ours > 0.9
    by_chance = precision(found, row(found, RANDOM))
    assert by_chance == pytest.approx(found.wrong / found.samples, abs=0.08)


@pytest.mark.long
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


# -- the controls ------------------------------------------------------------------------------------------


def test_the_control_by_loss_ranks_by_the_networks_own_cross_entropy(with_batch_norm: tuple[Data, bytes]):
    data, weights = with_batch_norm
    kept = np.arange(130) % 3 > 0
    found = refinement.by_loss(NOISY, data)(1, weights, kept)
    part = data.train.rows(kept)
    probabilities = cases.logits(NOISY, cases.loaded(NOISY, weights), part).double().softmax(dim=1)
    expected = [-float(p[label].log()) for p, label in zip(probabilities, part.given, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# -- going on ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_stopped_run_goes_on_without_doing_anything_again(
    trainings: list[Training],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    command = ["--datasets", "digits", "--noises", "clean", "symmetric 40", "--networks", "memorised", "--seeds", "0"]
    command += ["--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    asked: list[Case] = []

    def noting(case: Case, data: Data, weights: bytes) -> Start:
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
    assert own["removal_precision"] == precision(found, found.ours("network"))
    assert own["posttrain_steps"] == list(found.cleanings["network"].steps)


def test_what_was_measured_with_other_settings_is_refused(
    noisy: tuple[Finding, list[Training]], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "REFINE", training.REFINE.model_copy(update={"learning_rate": 0.02}))
    with pytest.raises(ValueError, match=r"seed_0\.json was measured with other settings"):
        refinement.measure(NOISY, folder)
