"""What the reports of the benchmarks are made of."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

from pipelines.benchmarks import tables
from pipelines.benchmarks.cases import Case


@dataclass(frozen=True)
class Finding:
    case: Case


def test_groups_stand_in_the_order_of_the_lists_and_keep_the_order_within():
    names = (["fashion_mnist", "digits"], ["symmetric 20", "clean"], ["augmented", "memorised"], [1, 0])
    findings = [Finding(Case(*cell)) for cell in itertools.product(*names)]
    found = tables.grouped(findings, "dataset", "noise")
    assert list(found) == list(itertools.product(["digits", "fashion_mnist"], ["clean", "symmetric 20"]))
    for (dataset, noise), group in found.items():
        assert group == [f for f in findings if (f.case.dataset, f.case.noise) == (dataset, noise)]
    assert list(tables.grouped(findings, "network")) == [("memorised",), ("augmented",)]


def test_percent_says_mean_spread_and_how_many_are_known():
    deviation = 100 * statistics.stdev([0.5, 0.7])
    assert tables.percent([0.5, 0.7]) == f"60.0 ± {deviation:.1f}" == "60.0 ± 14.1"
    assert tables.percent([0.5, None, 0.7], signed=True) == "+60.0 ± 14.1 (2)"
    assert tables.percent([-0.25], signed=True) == "-25.0"
    assert tables.percent([None]) == tables.percent([]) == ""


def test_a_document_is_its_sections_with_an_empty_line_between():
    table = tables.markdown(["a", "b"], [["1", "2"]])
    assert tables.document([["# title"], [], table]) == "# title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_the_head_names_sizes_seeds_and_each_machine_once():
    cases = [Case("digits", noise, "memorised", seed) for noise in ("clean", "pair 20") for seed in (2, 0)]
    lines = tables.head("T", "command", cases, noisy=2, machines=[("b", 2), ("a", 1), ("b", 2)], note="; so it is")
    assert lines[:4] == ["# T", "", "`command`", ""]
    assert lines[4].endswith("digits (1203 / 134 / 360)") and lines[5].startswith("- seeds: 0, 2 (")
    assert lines[6:] == [
        "- cases: 4, of which 2 with wrong labels; so it is",
        "- measured on: a; 1 thread(s)",
        "- measured on: b; 2 thread(s)",
    ]
