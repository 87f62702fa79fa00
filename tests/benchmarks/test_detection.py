"""The detection benchmark: complete rows, and going on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from pipelines.benchmarks import cases, detection
from pipelines.benchmarks.baselines import PEERS, Context, Measured
from pipelines.benchmarks.cases import Case, Data
from pipelines.benchmarks.detection_findings import AFTER_FOLDS, DEFAULT, Removed, removed, table
from pipelines.benchmarks.detection_report import report
from pipelines.benchmarks.first_round import FirstRound
from posttrain.influence.noise_rate import NoiseEstimate

NOISY = Case("digits", "symmetric 40", "memorised", 0)
CLEAN = Case("digits", "clean", "memorised", 0)


def wrong_of(case: Case) -> np.ndarray:
    train = cases.load(case).train
    return train.given != train.true


def stand_in(case: Case, data: Data, weights: bytes) -> FirstRound:
    """An oracle with errors: known scores, the true labels as suggestions but for the first tenth."""
    n = len(data.train)
    wrong = data.train.given != data.train.true
    draw = np.random.default_rng(case.seed)
    scores = wrong + draw.normal(size=n)
    suggested = data.train.true.copy()
    suggested[: n // 10] = (suggested[: n // 10] + 1) % data.classes
    return FirstRound(
        scores={DEFAULT: scores, "worse": wrong + 2 * draw.normal(size=n)},
        suggested=suggested,
        confidence=draw.random(n),
        layers=("input", "head"),
        l2_values=(0.1, 1.0),
        table=[("input", 0.1, 1.5, 0.5), ("head", 0.1, 1.9, 0.4), ("head", 1.0, 1.8, 0.45)],
        noise=NoiseEstimate(0.4, 0.3, 0.5, 0.6, 20, 50, True),
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
def quick(two_epochs: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The stand-in for posttrain, the baselines that need no package; counts who was asked."""
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
    monkeypatch.setattr(detection, "first_round", counting("ours", stand_in))
    return asked


# -- one case ----------------------------------------------------------------------------------------------


def test_a_case_has_complete_rows_of_every_score_and_every_peer(quick: dict[str, int], tmp_path: Path):
    found = detection.measure(NOISY, tmp_path)
    rows = table([found]).to_pylist()
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
    assert found.cleanlab_removed == removed(flagged, wrong)
    network = cases.loaded(NOISY, cases.trained(NOISY, data, tmp_path).weights)
    assert found.test_accuracy == cases.accuracy(NOISY, network, data.test)


def test_a_clean_case_has_no_precision_but_says_what_would_be_removed(quick: dict[str, int], tmp_path: Path):
    found = detection.measure(CLEAN, tmp_path, "none")
    assert found.noise_rate == 0.0
    for row in table([found]).to_pylist():
        assert row["average_precision"] is row["auroc"] is row["precision_at_noise"] is None
        assert row["seconds"] is not None and row["passes"] is not None
    selected = stand_in(CLEAN, cases.load(CLEAN), b"").selected
    assert found.removed == Removed(selected.mean(), 0.0, None)
    assert "| digits | clean | memorised | 0.0 | 15." in report([found], "command")


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
    # two cases, each with two scores and three baselines
    assert pq.read_table(tmp_path / "out" / "detection.parquet").num_rows == 2 * 5
    text = (tmp_path / "out" / "detection.md").read_text()
    assert capsys.readouterr().out.endswith(text + "\n")
    assert str(tmp_path) not in text


# -- everything as it is -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
def test_posttrain_finds_the_flipped_digits_that_a_network_has_memorised(tmp_path: Path):
    for package in ("captum", "kronfluence"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'posttrain[benchmark]'")
    found = detection.measure(NOISY, tmp_path, "none")
    assert [r.method for r in found.rankings if r.kind == "peer"] == [name for name in PEERS if name not in AFTER_FOLDS]
    default, control = found.of("ours", DEFAULT), found.of("peer", "random")
    assert default is not None and control is not None
    # 0.995 was measured, of a random order as much as there is noise
    assert default.average_precision is not None and default.average_precision > 0.95
    assert control.average_precision == pytest.approx(found.noise_rate, abs=0.06)
    assert default.precision_at_noise is not None and default.precision_at_noise > 0.95
    assert found.removed.precision is not None and found.removed.precision > 0.95
    assert found.low < found.noise_rate < found.high
    assert found.train_accuracy > 0.99
