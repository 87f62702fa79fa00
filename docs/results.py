"""The tables and figures of the documentation, from what the benchmarks measured.

`python docs/results.py` fills the marked tables of README.md and docs/pages/results.md and draws docs/pages/figures.
tests/test_docs.py holds the tables to pipelines/benchmarks/results.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parent.parent
MEASURED = REPOSITORY / "pipelines/benchmarks/results"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "docs/pages/results.md"]
FIGURES = REPOSITORY / "docs/pages/figures"

Row = dict[str, Any]
COLUMNS = {
    *("dataset", "noise", "network", "seed", "kind", "method", "average_precision"),
    *("name", "test_accuracy", "samples", "wrong", "rate"),
}
NETWORKS = ("memorised", "augmented")
DATASETS = {"digits": "digits", "fashion_mnist": "Fashion-MNIST", "cifar10n": "CIFAR-10N"}
METHODS = {
    ("ours", "mislabel_odds"): "**posttrain `mislabel_odds`** (default)",
    ("ours", "loo_margin"): "posttrain `loo_margin`",
    ("ours", "loss"): "posttrain `loss` (of the probes)",
    ("ours", "data"): "posttrain `data`",
    ("ours", "parameter"): "posttrain `parameter`",
    ("peer", "aum"): "AUM (has to watch the training)",
    ("peer", "self_confidence"): "cleanlab, self-confidence (trains 5 more networks)",
    ("peer", "confident_learning"): "cleanlab, confident learning (trains 5 more networks)",
    ("peer", "tracin"): "captum TracInCPFast (needs checkpoints)",
    ("peer", "ekfac"): "kronfluence EK-FAC, last layer",
    ("peer", "knn"): "nearest neighbours, last layer",
    ("peer", "random"): "random",
}
SHORT_METHODS = [("ours", "mislabel_odds"), *(key for key in METHODS if key[0] == "peer")]
CONTROLS = [
    "the network as it came",
    "no removal, same steps",
    "same, EMA",
    "random removal",
    "removal by loss",
    "cleanlab's removal, same steps",
    "new head, nothing removed",
]
"""What a user could do instead of posttrain."""
ROWS = {
    "the network as it came": "the network as it came",
    "posttrain, head": "**posttrain, `refine.scope: head`**",
    "posttrain, both": "posttrain, `both`",
    "posttrain, network": "posttrain, `network`",
    "new head, nothing removed": "new head, nothing removed",
    "chosen boundary, nothing removed": "probe ensemble, nothing removed",
    "chosen boundary, the right labels alone": "probe ensemble, right labels only",
    "no removal, same steps": "no removal, as many steps",
    "same, EMA": "the same, averaged weights (EMA)",
    "random removal": "random removal",
    "removal by loss": "removal by the network's loss",
    "cleanlab's removal, same steps": "cleanlab's removal, as many steps",
    "from scratch, all": "from scratch, on everything",
    "from scratch, what posttrain (network) kept": "from scratch, on what posttrain (`network`) kept",
    "from scratch, what cleanlab kept": "from scratch, on what cleanlab kept",
    "from scratch, what removal by loss kept": "from scratch, on what removal by loss kept",
    "from scratch, the right labels alone": "from scratch, right labels only (the ceiling)",
}
SHORT_ROWS = [
    "the network as it came",
    "posttrain, head",
    "new head, nothing removed",
    "chosen boundary, nothing removed",
    "random removal",
    "cleanlab's removal, same steps",
    "chosen boundary, the right labels alone",
]


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(name: str) -> list[Row]:
    """What a benchmark measured, a row for each method or procedure of each case."""
    path = MEASURED / f"{name}.parquet"
    return pq.read_table(path, columns=[name for name in pq.read_schema(path).names if name in COLUMNS]).to_pylist()


def noisy(name: str) -> list[Row]:
    """The rows of the cases with wrong labels."""
    return [row for row in read(name) if row["noise"] != "clean"]


def where(rows: list[Row], **values: str) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[column] == value for column, value in values.items())]


def by_seed(rows: list[Row], figure: str) -> list[float]:
    """The mean of a figure over the cases of each seed, in percent."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(row[figure])
    return [100 * statistics.mean(values) for values in found.values()]


def spread(seeds: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(seeds):.1f} ± {statistics.stdev(seeds):.1f}"


def detection(methods: list[tuple[str, str]]) -> str:
    """Average precision by method."""
    sets = {"digits and Fashion-MNIST": noisy("detection"), "CIFAR-10N": noisy("detection_cifar10n")}
    rows: list[list[str]] = []
    for kind, method in methods:
        cells = [
            spread(by_seed(where(measured, kind=kind, method=method, network=network), "average_precision"))
            for measured in sets.values()
            for network in NETWORKS
        ]
        rows.append([METHODS[kind, method], *(f"**{c}**" if method == "mislabel_odds" else c for c in cells)])
    return table([f"{name}, {network}" for name in sets for network in NETWORKS], rows)


def accuracies(names: list[str]) -> str:
    """Test accuracy by procedure."""
    measured = noisy("refinement")
    columns = [(dataset, network) for dataset in DATASETS for network in NETWORKS]
    rows = [
        [ROWS[name]]
        + [spread(by_seed(where(measured, name=name, dataset=d, network=n), "test_accuracy")) for d, n in columns]
        for name in names
    ]
    return table([f"{DATASETS[dataset]}, {network}" for dataset, network in columns], rows)


def differences(name: str) -> str:
    """posttrain (head) minus the best control, by kind of wrong labels."""
    measured = noisy(name)
    kinds = list(dict.fromkeys(row["noise"] for row in measured))
    rows: list[list[str]] = []
    for dataset, shown in DATASETS.items():
        for network in NETWORKS:
            cells = [f"{shown}, {network}"]
            for kind in kinds:
                case = where(measured, dataset=dataset, network=network, noise=kind)
                cells.append(_points(_above_controls(case)) if case else "")
            rows.append(cells)
    return table([kind.replace("human ", "people: ") for kind in kinds], rows)


def _above_controls(case: list[Row]) -> list[float]:
    """Points by which posttrain (head) is above the best control, for each seed."""
    best: dict[int, float] = {}
    for row in case:
        if row["name"] in CONTROLS:
            best[row["seed"]] = max(best.get(row["seed"], 0.0), row["test_accuracy"])
    return [100 * (row["test_accuracy"] - best[row["seed"]]) for row in where(case, name="posttrain, head")]


def _points(by_seed: list[float]) -> str:
    """Mean ± standard error, bold where it is more than two of them from 0."""
    mean, error = statistics.mean(by_seed), statistics.stdev(by_seed) / len(by_seed) ** 0.5
    text = f"{mean:+.1f} ± {error:.1f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def tables() -> dict[str, str]:
    """By the name of their mark, as in `<!-- table: detection -->`."""
    return {
        "detection": detection(list(METHODS)),
        "detection, short": detection(SHORT_METHODS),
        "accuracies": accuracies(list(ROWS)),
        "accuracies, short": accuracies(SHORT_ROWS),
        "differences": differences("refinement"),
        "differences, 20 %": differences("refinement_20"),
    }


def filled(text: str) -> str:
    """A page with every marked table made anew."""
    made = tables()
    return re.sub(
        r"<!-- table: (.+?) -->\n.*?<!-- /table -->",
        lambda mark: f"<!-- table: {mark[1]} -->\n{made[mark[1]]}\n<!-- /table -->",
        text,
        flags=re.DOTALL,
    )


# Figures ----------------------------------------------------------------------------------------------------

OURS, OTHERS, CONTROL = "#1f5fbf", "#9aa0a6", "#d9a441"


def _plain(text: str) -> str:
    return re.sub(r"[*`]| \(.*?\)", "", text)


def draw() -> None:
    import matplotlib

    FIGURES.mkdir(parents=True, exist_ok=True)
    matplotlib.rc("svg", hashsalt="posttrain", fonttype="none")
    matplotlib.rc("font", size=9, family="sans-serif")
    matplotlib.rc("axes.spines", top=False, right=False)
    for name, figure in {"detection": _detection(), "accuracy": _accuracy(), "noise-rate": _noise_rate()}.items():
        figure.savefig(FIGURES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})


def _bar(axis: Axes, at: float, seeds: list[float], height: float, **look: Any) -> None:
    """The mean over seeds, with their standard deviation."""
    error = statistics.stdev(seeds)
    axis.barh(at, statistics.mean(seeds), height, xerr=error, error_kw={"elinewidth": 0.8}, **look)


def _detection() -> Figure:
    sets = {"digits and Fashion-MNIST (72 cases)": "detection", "CIFAR-10N (48 cases)": "detection_cifar10n"}
    figure = Figure(figsize=(9, 4.2))
    axes = figure.subplots(1, 2, sharey=True)
    methods = list(METHODS)[::-1]
    for axis, (title, file) in zip(axes, sets.items(), strict=True):
        measured = noisy(file)
        for offset, network, alpha in ((0.2, "memorised", 1.0), (-0.2, "augmented", 0.5)):
            for at, (kind, method) in enumerate(methods):
                seeds = by_seed(where(measured, kind=kind, method=method, network=network), "average_precision")
                colour = OURS if kind == "ours" else OTHERS
                _bar(axis, at + offset, seeds, 0.38, color=colour, alpha=alpha)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 100)
        axis.set_xlabel("average precision, %")
    axes[0].set_yticks(range(len(methods)), [_plain(METHODS[key]) for key in methods])
    figure.suptitle("Finding wrong labels (dark: memorised network, light: trained with augmentation)", fontsize=10)
    figure.tight_layout()
    return figure


def _accuracy() -> Figure:
    measured = noisy("refinement")
    names = [
        "the network as it came",
        "random removal",
        "removal by loss",
        "cleanlab's removal, same steps",
        "new head, nothing removed",
        "chosen boundary, nothing removed",
        "posttrain, head",
        "chosen boundary, the right labels alone",
    ][::-1]
    figure = Figure(figsize=(9, 5))
    grid = figure.subplots(2, 3, sharey=True)
    for row, network in zip(grid, NETWORKS, strict=True):
        for axis, (dataset, shown) in zip(row, DATASETS.items(), strict=True):
            for at, name in enumerate(names):
                colour = OURS if name.startswith("posttrain") else CONTROL if "boundary" in name else OTHERS
                seeds = by_seed(where(measured, name=name, dataset=dataset, network=network), "test_accuracy")
                _bar(axis, at, seeds, 0.7, color=colour)
            axis.set_title(f"{shown}, {network}", fontsize=9)
            axis.set_xlim(0, 100)
        row[0].set_yticks(range(len(names)), [_plain(ROWS[name]) for name in names])
    for axis in grid[1]:
        axis.set_xlabel("test accuracy, %")
    figure.suptitle("Test accuracy where 40 % of the labels are wrong (CIFAR-10N: 40 % and 17 %)", fontsize=10)
    figure.tight_layout()
    return figure


def _noise_rate() -> Figure:
    runs = [row for name in ("safety", "safety_cifar10n") for row in read(name)]
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots(1, 2, sharey=True)
    parts = {
        "validation labels as noisy as the rest": [row for row in runs if not row["noise"].startswith("checked")],
        "validation labels corrected": [row for row in runs if row["noise"].startswith("checked")],
    }
    for axis, (title, part) in zip(axes, parts.items(), strict=True):
        axis.plot([0, 75], [0, 75], color="#cccccc", linewidth=1, zorder=0)
        for dataset, colour in zip(DATASETS, (OURS, CONTROL, "#b0413e"), strict=True):
            rows = where(part, dataset=dataset)
            truth = [100 * row["wrong"] / row["samples"] for row in rows]
            estimate = [100 * row["rate"] for row in rows]
            axis.scatter(truth, estimate, s=14, color=colour, alpha=0.7, linewidths=0, label=DATASETS[dataset])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("wrong labels, %")
    axes[0].set_ylabel("estimated, % (0: no sign)")
    axes[0].legend(frameon=False)
    figure.suptitle("The estimated share of wrong labels, one point per run", fontsize=10)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw()
