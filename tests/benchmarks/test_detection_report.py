"""What the detection benchmark says of its findings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipelines.benchmarks.baselines import PEERS
from pipelines.benchmarks.cases import NETWORKS, Case
from pipelines.benchmarks.detection_findings import DEFAULT, Finding, Ranking, Removed, Tried
from pipelines.benchmarks.detection_report import DEFAULT_METHOD, defeats, report, shown


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


def test_of_one_seed_every_difference_is_listed():
    [only] = defeats([finding(ours=0.800, aum=0.801)])
    assert only.clear and only.spread is None


def test_the_spread_is_over_seeds_and_not_over_kinds_of_noise():
    findings = [
        finding("pair 20", seed=0, ours=0.9),
        finding("pair 40", seed=0, ours=0.5),
        finding("pair 20", seed=1, ours=0.94),
        finding("pair 40", seed=1, ours=0.5),
    ]
    # the seeds' means are 70 and 72
    own = next(line for line in report(findings, "command").splitlines() if DEFAULT in line and "|" in line)
    assert "| **71.0 ± 1.4** |" in own


def test_a_method_that_is_not_measured_everywhere_says_so_and_never_wins():
    findings = [
        finding("pair 20", ours=0.9, confident_learning=0.95, random=0.2),
        finding("pair 40", ours=0.5, random=0.2),
    ]
    text = report(findings, "command")
    rows = [line for line in text.splitlines() if line.startswith("| cleanlab, confident learning |")]
    assert "| 95.0 (1) | 95.0 (1) | 95.0 (1) | 20.00 | 10.00 | 1.0 | 1 of 2 |" in rows[0]
    assert "On the 1 cases with cleanlab, confident learning: 90.0 against 95.0." in text
    assert "| **70.0** |" in text
    order = [line.split(" |")[0] for line in text.splitlines() if line.endswith("of 2 |")]
    assert order == [f"| posttrain `{DEFAULT}` (default)", "| random", "| cleanlab, confident learning"]
    # it did win the one kind of noise that it was measured on
    assert rows[1] == "| cleanlab, confident learning | **95.0** |  | 95.0 (1) |"
    assert "median 10.0 %, at most 10.0 % (1 of 2 cases)" in text


def test_seconds_of_two_runs_are_not_compared():
    of_one = finding("pair 20", ours=0.9, confident_learning=0.95)
    first, second = finding("pair 40", ours=0.5, confident_learning=0.6).rankings
    before = replace(second, alongside=False, seconds=1.0)
    of_two = replace(finding("pair 40", ours=0.5), rankings=(first, before))
    assert "median 10.0 %, at most 10.0 % (1 of 2 cases)" in report([of_one, of_two], "command")
    text = report([of_two], "command")
    assert "Its seconds as a share" not in text
    assert "| 60.0 | 60.0 | 60.0 | 1.00 |  | 1.0 | 1 of 1 |" in text.replace("**", "")


def test_the_report_names_every_method():
    values: dict[str, Any] = dict.fromkeys(PEERS, 0.5)
    text = report([finding(network=network, ours=0.9, **values) for network in NETWORKS], "command")
    for method in [DEFAULT_METHOD, *(("peer", name) for name in PEERS)]:
        assert f"| {shown(method)} | " in text
    assert "nan" not in text
