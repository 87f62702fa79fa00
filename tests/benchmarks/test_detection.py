"""The detection benchmark: its figures against plain loops, going on, and what the report says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from pipelines.benchmarks import cases, detection
from pipelines.benchmarks.cases import Case, Data
from pipelines.benchmarks.detection import DEFAULT, Finding, Ranking, Removed, Tried
from pipelines.benchmarks.ours import Ours
from pipelines.benchmarks.peers import PEERS, Context, Measured
from posttrain.influence.audit import NoiseEstimate

NOISY = Case("digits", "symmetric 40", "memorised", 0)
CLEAN = Case("digits", "clean", "memorised", 0)


def wrong_of(case: Case) -> np.ndarray:
    train = cases.load(case).train
    return train.given != train.true


def stand_in(case: Case, data: Data, weights: bytes) -> Ours:
    """An oracle with errors: known scores, the true labels as suggestions but for the first tenth."""
    n = len(data.train)
    wrong = data.train.given != data.train.true
    draw = np.random.default_rng(case.seed)
    scores = wrong + draw.normal(size=n)
    suggested = data.train.true.copy()
    suggested[: n // 10] = (suggested[: n // 10] + 1) % data.classes
    return Ours(
        scores={DEFAULT: scores, "worse": wrong + 2 * draw.normal(size=n)},
        suggested=suggested,
        confidence=draw.random(n),
        layers=("input", "head"),
        dampings=(0.1, 1.0),
        table=[("input", 0.1, 1.5, 0.5), ("head", 0.1, 1.9, 0.4), ("head", 1.0, 1.8, 0.45)],
        noise=NoiseEstimate(0.4, 0.3, 0.5, 20, 50, True),
        selected=scores > 1.0,
        last_layer=wrong + 3 * draw.normal(size=n),
        boundary_test_accuracy=0.9,
        seconds=2.0,
        passes=1.1,
    )


def oracle_of_the_folds(context: Context) -> Measured:
    """In the place of cleanlab: the out-of-sample probability of the given label."""
    own = context.out_of_sample.probabilities[np.arange(len(context.given)), context.given]
    return Measured(-own.astype(np.float64), 20.0, 30.0, flagged=own < 0.1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Two epochs, the stand-in for posttrain, the peers that need no package; counts who was asked."""
    training = cases.DATASETS["digits"].training
    for network in cases.NETWORKS:
        monkeypatch.setitem(training, network, replace(training[network], epochs=2, until_train_accuracy=None))
    asked: dict[str, int] = {}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            asked[name] = asked.get(name, 0) + 1
            return function(*arguments)

        return counted

    used = {
        "confident_learning": oracle_of_the_folds,
        "self_confidence": oracle_of_the_folds,
        **{name: PEERS[name] for name in ("aum", "knn", "random")},
    }
    monkeypatch.setattr(detection, "PEERS", {name: counting(name, peer) for name, peer in used.items()})
    monkeypatch.setattr(detection, "ours", counting("ours", stand_in))
    return asked


# -- the figures -------------------------------------------------------------------------------------------


def test_average_precision_is_the_mean_over_the_wrong_labels_of_the_precision_down_to_each():
    draw = np.random.default_rng(0)
    wrong = draw.random(300) < 0.3
    scores = wrong + draw.normal(size=300)
    found = detection.ranking("peer", "any", scores, wrong, seconds=1.0, passes=2.0)
    hits, precisions = 0, []
    for rank, at in enumerate(np.argsort(-scores), start=1):
        if wrong[at]:
            hits += 1
            precisions.append(hits / rank)
    assert found.average_precision == pytest.approx(np.mean(precisions))
    ahead = [a > b for a in scores[wrong] for b in scores[~wrong]]
    assert found.auroc == pytest.approx(np.mean(ahead))


def test_precision_at_the_noise_rate_looks_at_as_many_as_are_wrong():
    # three wrong; of the three highest, two are
    wrong = np.array([True, False, True, False, False, True])
    scores = np.array([0.9, 0.8, 0.7, 0.1, 0.2, 0.3])
    found = detection.ranking("peer", "any", scores, wrong, seconds=0.0, passes=0.0)
    assert found.precision_at_noise == pytest.approx(2 / 3)


def test_scores_that_are_no_numbers_are_refused():
    wrong = np.array([True, False, True])
    with pytest.raises(ValueError, match=r"tracin: \(3,\) scores for 3 samples, 1 of them not finite"):
        detection.ranking("peer", "tracin", np.array([0.1, np.nan, 0.3]), wrong, seconds=0.0, passes=0.0)


def test_what_is_removed_is_counted_against_what_is_wrong():
    taken = np.array([True, True, True, False, False, False, False, False])
    wrong = np.array([True, True, False, True, True, False, False, False])
    assert detection.removed(taken, wrong) == Removed(3 / 8, 2 / 3, 2 / 4)
    nothing = np.zeros(8, bool)
    assert detection.removed(nothing, wrong) == Removed(0.0, None, 0.0)
    assert detection.removed(taken, nothing) == Removed(3 / 8, 0.0, None)


def test_the_calibration_error_is_the_weighted_gap_of_each_bin():
    draw = np.random.default_rng(1)
    confidence = draw.random(500)
    right = draw.random(500) < confidence**2
    expected = 0.0
    for lower in range(15):
        inside = [i for i in range(500) if lower / 15 < confidence[i] <= (lower + 1) / 15]
        if inside:
            gap = np.mean(confidence[inside]) - np.mean(right[inside])
            expected += len(inside) / 500 * abs(gap)
    assert detection.calibration_error(confidence, right) == pytest.approx(expected)
    assert detection.calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0.0
    assert detection.calibration_error(np.empty(0), np.empty(0, bool)) is None


# -- one case ----------------------------------------------------------------------------------------------


def test_a_case_has_complete_rows_of_every_score_and_every_peer(quick: dict[str, int], tmp_path: Path):
    found = detection.measure(NOISY, tmp_path)
    rows = detection.table([found]).to_pylist()
    methods = [(row["kind"], row["method"]) for row in rows]
    assert methods == [("ours", DEFAULT), ("ours", "worse"), *(("peer", name) for name in detection.PEERS)]
    for row in rows:
        assert (row["dataset"], row["noise"], row["network"], row["seed"]) == ("digits", "symmetric 40", "memorised", 0)
        assert not [name for name, value in row.items() if value is None]
    assert [row["seconds"] for row in rows[:4]] == [2.0, 2.0, 20.0, 20.0]
    data = cases.load(NOISY)
    wrong = wrong_of(NOISY)
    own = stand_in(NOISY, data, b"")
    assert rows[0]["average_precision"] == average_precision_score(wrong, own.scores[DEFAULT])
    assert rows[1]["auroc"] == roc_auc_score(wrong, own.scores["worse"])
    assert found.last_layer_auroc == roc_auc_score(wrong, own.last_layer)
    assert found.noise_rate == wrong.mean()
    assert found.removed.precision == wrong[own.scores[DEFAULT] > 1.0].mean()
    assert found.suggested_accuracy == (own.suggested == data.train.true)[wrong].mean()
    assert found.removed_confidence == own.confidence[own.selected].mean()
    probabilities = cases.out_of_sample(NOISY, data, tmp_path).probabilities
    assert found.cleanlab_suggested_accuracy == (probabilities.argmax(axis=1) == data.train.true)[wrong].mean()
    flagged = probabilities[np.arange(len(wrong)), data.train.given] < 0.1
    assert found.cleanlab_removed == detection.removed(flagged, wrong)
    network = cases.loaded(NOISY, cases.trained(NOISY, data, tmp_path).weights)
    assert found.test_accuracy == cases.accuracy(NOISY, network, data.test)


def test_a_clean_case_has_no_precision_but_says_what_would_be_removed(quick: dict[str, int], tmp_path: Path):
    found = detection.measure(CLEAN, tmp_path, "none")
    assert found.noise_rate == 0.0
    for row in detection.table([found]).to_pylist():
        assert row["average_precision"] is row["auroc"] is row["precision_at_noise"] is None
        assert row["seconds"] is not None and row["passes"] is not None
    selected = stand_in(CLEAN, cases.load(CLEAN), b"").selected
    assert found.removed == Removed(selected.mean(), 0.0, None)
    assert "| digits | clean | memorised | 0.0 | 15." in detection.report([found], "command")


def test_what_is_kept_is_what_was_measured(quick: dict[str, int], tmp_path: Path):
    assert detection.kept(NOISY, tmp_path) is None
    found = detection.measure(NOISY, tmp_path)
    assert detection.kept(NOISY, tmp_path) == found


# -- going on ----------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_without_doing_anything_again(
    quick: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = ["--datasets", "digits", "--noises", "clean", "symmetric 40", "--networks", "memorised", "--seeds", "0"]
    command += ["--without-cleanlab", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    random = detection.PEERS["random"]

    def stopped(context: Context) -> Measured:
        if context.case == NOISY:
            raise KeyboardInterrupt
        return random(context)

    monkeypatch.setitem(detection.PEERS, "random", stopped)
    with pytest.raises(KeyboardInterrupt):
        detection.main(command)
    first = detection.kept(CLEAN, tmp_path)
    assert first is not None and detection.kept(NOISY, tmp_path) is None
    quick.clear()
    monkeypatch.setitem(detection.PEERS, "random", random)
    detection.main(command)
    assert quick == {"ours": 1, "aum": 1, "knn": 1, "random": 1}
    assert detection.kept(CLEAN, tmp_path) == first
    assert not list(tmp_path.rglob("*.tmp"))
    quick.clear()
    detection.main(command)
    assert not quick
    # two cases, each with two scores and three peers
    assert pq.read_table(tmp_path / "out" / "detection.parquet").num_rows == 2 * 5
    text = (tmp_path / "out" / "detection.md").read_text()
    assert capsys.readouterr().out.endswith(text + "\n")
    assert str(tmp_path) not in text


def test_cleanlab_can_be_added_to_what_was_measured_without_it(quick: dict[str, int], tmp_path: Path):
    without = detection.measure(NOISY, tmp_path, "none")
    assert without.cleanlab_removed is without.cleanlab_suggested_accuracy is None
    # its predictions are not in the folder
    assert detection.measure(NOISY, tmp_path, "kept") == without
    quick.clear()
    cases.out_of_sample(NOISY, cases.load(NOISY), tmp_path)
    found = detection.measure(NOISY, tmp_path, "kept")
    assert quick == {"confident_learning": 1, "self_confidence": 1}
    assert found.rankings[:-2] == without.rankings
    assert found.cleanlab_removed is not None and found.cleanlab_suggested_accuracy is not None


# -- the report --------------------------------------------------------------------------------------------


def finding(noise: str = "pair 20", network: str = "memorised", seed: int = 0, **average_precision: float) -> Finding:
    """A finding with these average precisions; `ours` is the default score's."""
    rankings = tuple(
        Ranking(
            "ours" if name == "ours" else "peer",
            DEFAULT if name == "ours" else name,
            value,
            value,
            value,
            2.0 if name == "ours" else 20.0,
            1.0,
            "a machine",
            1,
        )
        for name, value in average_precision.items()
    )
    return Finding(
        case=Case("digits", noise, network, seed),
        samples=100,
        noise_rate=0.2,
        estimate=0.25,
        low=0.15,
        high=0.35,
        removed=Removed(0.1, 0.9, 0.45),
        cleanlab_removed=None,
        suggested_accuracy=0.8,
        cleanlab_suggested_accuracy=None,
        removed_suggested_accuracy=0.85,
        removed_confidence=0.7,
        calibration_error=0.1,
        layers=("input", "head"),
        dampings=(0.1, 0.1),
        tried=(Tried("input", 0.1, 1.5, 0.5), Tried("head", 0.1, 1.9, 0.4)),
        last_layer="head",
        last_layer_auroc=0.6,
        train_accuracy=1.0,
        test_accuracy=0.8,
        boundary_test_accuracy=0.9,
        rankings=rankings,
    )


def test_a_peer_that_beats_the_default_by_more_than_the_spread_is_listed_with_its_figures():
    findings = [
        # aum: 4 +- 1 points ahead; knn: 1 +- 2; random: behind
        finding(seed=0, ours=0.80, aum=0.83, knn=0.82, random=0.2),
        finding(seed=1, ours=0.90, aum=0.94, knn=0.89, random=0.2),
        finding(seed=2, ours=0.70, aum=0.75, knn=0.72, random=0.2),
    ]
    found = {d.method[1]: d for d in detection.defeats(findings)}
    assert set(found) == {"aum", "knn"}
    assert found["aum"].clear and not found["knn"].clear
    assert found["aum"].difference == pytest.approx(0.04) and found["aum"].spread == pytest.approx(0.01)
    text = detection.report(findings, "command")
    row = "| digits | pair 20 | memorised | AUM | 83.0, 94.0, 75.0 | 80.0, 90.0, 70.0 | 4.0 ± 1.0 |"
    assert text.count(row) == 1
    assert "beaten by a peer by more than the spread over seeds: 1 times" in text.lower()
    assert "a peer is ahead 1 times more" in text


def test_of_one_seed_every_difference_is_listed():
    [only] = detection.defeats([finding(ours=0.800, aum=0.801)])
    assert only.clear and only.spread is None


def test_the_spread_is_over_seeds_and_not_over_kinds_of_noise():
    findings = [
        finding("pair 20", seed=0, ours=0.9),
        finding("pair 40", seed=0, ours=0.5),
        finding("pair 20", seed=1, ours=0.94),
        finding("pair 40", seed=1, ours=0.5),
    ]
    # the seeds' means are 70 and 72
    own = next(line for line in detection.report(findings, "command").splitlines() if DEFAULT in line and "|" in line)
    assert "| **71.0 ± 1.4** |" in own


def test_a_method_that_is_not_measured_everywhere_says_so_and_never_wins():
    findings = [
        finding("pair 20", ours=0.9, confident_learning=0.95, random=0.2),
        finding("pair 40", ours=0.5, random=0.2),
    ]
    text = detection.report(findings, "command")
    rows = [line for line in text.splitlines() if line.startswith("| cleanlab, confident learning |")]
    assert "| 95.0 (1) | 95.0 (1) | 95.0 (1) | 20.00 | 10.00 | 1.0 | 1 of 2 |" in rows[0]
    assert "On the 1 cases with cleanlab, confident learning: 90.0 against 95.0." in text
    assert "| **70.0** |" in text
    order = [line.split(" |")[0] for line in text.splitlines() if line.endswith("of 2 |")]
    assert order == [f"| posttrain `{DEFAULT}` (default)", "| random", "| cleanlab, confident learning"]
    # it did win the one kind of noise that it was measured on
    assert rows[1] == "| cleanlab, confident learning | **95.0** |  | 95.0 (1) |"
    assert "median 10.0 %, at most 10.0 % (1 cases)" in text


def test_the_report_and_the_short_table_name_every_method():
    values: dict[str, Any] = dict.fromkeys(PEERS, 0.5)
    findings = [finding(network=network, ours=0.9, **values) for network in cases.NETWORKS]
    for text in (detection.report(findings, "command"), detection.short(findings)):
        for method in [detection.DEFAULT_METHOD, *(("peer", name) for name in PEERS)]:
            assert f"| {detection.shown(method)} | " in text
        assert "nan" not in text
    assert f"| posttrain `{DEFAULT}` (default) | 90.0 | 90.0 | 2.00 |" in detection.short(findings)


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        detection.main(["--report", "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "measure them first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- everything as it is -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_posttrain_finds_the_flipped_digits_that_a_network_has_memorised(tmp_path: Path):
    for package in ("captum", "kronfluence"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'posttrain[benchmark]'")
    found = detection.measure(NOISY, tmp_path, "none")
    assert [r.method for r in found.rankings if r.kind == "peer"] == [
        name for name in PEERS if name not in detection.AFTER_FOLDS
    ]
    default, control = found.of("ours", DEFAULT), found.of("peer", "random")
    assert default is not None and control is not None
    # 0.995 was measured, of a random order as much as there is noise
    assert default.average_precision is not None and default.average_precision > 0.95
    assert control.average_precision == pytest.approx(found.noise_rate, abs=0.06)
    assert found.removed.precision is not None and found.removed.precision > 0.95
    assert found.low < found.noise_rate < found.high
    assert found.train_accuracy > 0.99
