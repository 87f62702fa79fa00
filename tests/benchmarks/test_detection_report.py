"""What the detection benchmark says of its findings."""

from __future__ import annotations

import pytest

from pipelines.benchmarks.cases import Case
from pipelines.benchmarks.detection_findings import DEFAULT, Finding, Ranking, Removed, Tried
from pipelines.benchmarks.detection_report import defeats, report


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
            alongside=True,
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
        l2_values=(0.1, 0.1),
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
    found = {d.method[1]: d for d in defeats(findings)}
    assert set(found) == {"aum", "knn"}
    assert found["aum"].clear and not found["knn"].clear
    assert found["aum"].difference == pytest.approx(0.04) and found["aum"].spread == pytest.approx(0.01)
    text = report(findings, "command")
    row = "| digits | pair 20 | memorised | AUM | 83.0, 94.0, 75.0 | 80.0, 90.0, 70.0 | 4.0 ± 1.0 |"
    assert text.count(row) == 1
    assert "beaten by a peer by more than the spread over seeds: 1 times" in text.lower()
    assert "a peer is ahead 1 times more" in text
