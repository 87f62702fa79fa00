"""The tables and figures of the documentation, from what the benchmarks measured.

`python docs/results.py` fills the marked tables of README.md and docs/pages/results.md and draws docs/pages/figures.
tests/test_docs.py holds the tables to pipelines/benchmarks/results.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pandas as pd

REPOSITORY = Path(__file__).resolve().parent.parent
MEASURED = REPOSITORY / "pipelines/benchmarks/results"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "docs/pages/results.md"]
FIGURES = REPOSITORY / "docs/pages/figures"

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
    "posttrain, head": "**posttrain, `refine.scope: head`** (default)",
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


def spread(values: pd.Series) -> str:
    """Mean ± standard deviation over seeds, in percent; `values` has the seed as a level of its index."""
    seeds = [100 * statistics.mean(of_seed) for _, of_seed in values.groupby("seed")]
    return f"{statistics.mean(seeds):.1f} ± {statistics.stdev(seeds):.1f}"


def rankings(name: str) -> pd.DataFrame:
    measured = pd.read_parquet(MEASURED / f"{name}.parquet")
    return measured[measured.noise != "clean"].set_index("seed")


def refinements(name: str = "refinement") -> pd.DataFrame:
    measured = pd.read_parquet(MEASURED / f"{name}.parquet")
    return measured[measured.noise != "clean"].set_index("seed")


def detection(methods: list[tuple[str, str]]) -> str:
    """Average precision by method."""
    sets = {"digits and Fashion-MNIST": rankings("detection"), "CIFAR-10N": rankings("detection_cifar10n")}
    rows: list[list[str]] = []
    for kind, method in methods:
        cells = [METHODS[kind, method]]
        for measured in sets.values():
            of_method = measured[(measured.kind == kind) & (measured.method == method)]
            cells += [spread(of_method[of_method.network == network].average_precision) for network in NETWORKS]
        if method == "mislabel_odds":
            cells = [cells[0], *(f"**{cell}**" for cell in cells[1:])]
        rows.append(cells)
    return table([f"{name}, {network}" for name in sets for network in NETWORKS], rows)


def accuracies(names: list[str]) -> str:
    """Test accuracy by procedure."""
    measured = refinements()
    columns = {(dataset, network): f"{DATASETS[dataset]}, {network}" for dataset in DATASETS for network in NETWORKS}
    rows = [
        [ROWS[name]]
        + [
            spread(measured[(measured.name == name) & (measured.dataset == d) & (measured.network == n)].test_accuracy)
            for d, n in columns
        ]
        for name in names
    ]
    return table(list(columns.values()), rows)


def differences(name: str) -> str:
    """posttrain (head) minus the best control, by kind of wrong labels."""
    measured = refinements(name)
    kinds = list(dict.fromkeys(measured.noise))
    rows: list[list[str]] = []
    for dataset, shown in DATASETS.items():
        for network in NETWORKS:
            cells = [f"{shown}, {network}"]
            for kind in kinds:
                case = measured[
                    (measured.dataset == dataset) & (measured.network == network) & (measured.noise == kind)
                ]
                if case.empty:
                    cells.append("")
                    continue
                own = case[case.name == "posttrain, head"].test_accuracy
                best = case[case.name.isin(CONTROLS)].groupby("seed").test_accuracy.max()
                points = 100 * (own - best)
                mean, error = points.mean(), points.std() / len(points) ** 0.5
                text = f"{mean:+.1f} ± {error:.1f}"
                cells.append(f"**{text}**" if abs(mean) > 2 * error else text)
            rows.append(cells)
    return table([kind.replace("human ", "people: ") for kind in kinds], rows)


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

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "posttrain", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
        | {"axes.spines.top": False, "axes.spines.right": False}
    )
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, figure in {"detection": _detection(), "accuracy": _accuracy(), "noise-rate": _noise_rate()}.items():
        figure.savefig(FIGURES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})


def _detection():
    from matplotlib.figure import Figure

    sets = {"digits and Fashion-MNIST (72 cases)": "detection", "CIFAR-10N (48 cases)": "detection_cifar10n"}
    figure = Figure(figsize=(9, 4.2))
    axes = figure.subplots(1, 2, sharey=True)
    methods = list(METHODS)[::-1]
    for axis, (title, file) in zip(axes, sets.items(), strict=True):
        measured = rankings(file)
        for offset, network, alpha in ((0.2, "memorised", 1.0), (-0.2, "augmented", 0.5)):
            for at, (kind, method) in enumerate(methods):
                rows = measured[
                    (measured.kind == kind) & (measured.method == method) & (measured.network == network)
                ].average_precision
                seeds = 100 * rows.groupby("seed").mean()
                axis.barh(
                    at + offset,
                    seeds.mean(),
                    0.38,
                    xerr=seeds.std(),
                    color=OURS if kind == "ours" else OTHERS,
                    alpha=alpha,
                    error_kw={"elinewidth": 0.8},
                )
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 100)
        axis.set_xlabel("average precision, %")
    axes[0].set_yticks(range(len(methods)), [_plain(METHODS[key]) for key in methods])
    figure.suptitle("Finding wrong labels (dark: memorised network, light: trained with augmentation)", fontsize=10)
    figure.tight_layout()
    return figure


def _accuracy():
    from matplotlib.figure import Figure

    measured = refinements()
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
                case = measured[
                    (measured.name == name) & (measured.dataset == dataset) & (measured.network == network)
                ].test_accuracy
                seeds = 100 * case.groupby("seed").mean()
                colour = OURS if name.startswith("posttrain") else CONTROL if "boundary" in name else OTHERS
                axis.barh(at, seeds.mean(), 0.7, xerr=seeds.std(), color=colour, error_kw={"elinewidth": 0.8})
            axis.set_title(f"{shown}, {network}", fontsize=9)
            axis.set_xlim(0, 100)
        row[0].set_yticks(range(len(names)), [_plain(ROWS[name]) for name in names])
    for axis in grid[1]:
        axis.set_xlabel("test accuracy, %")
    figure.suptitle("Test accuracy where 40 % of the labels are wrong (CIFAR-10N: 40 % and 17 %)", fontsize=10)
    figure.tight_layout()
    return figure


def _noise_rate():
    from matplotlib.figure import Figure

    runs = pd.concat([pd.read_parquet(MEASURED / f"{name}.parquet") for name in ("safety", "safety_cifar10n")])
    checked = runs.noise.str.startswith("checked")
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots(1, 2, sharey=True)
    parts = {
        "validation labels as noisy as the rest": runs[~checked],
        "validation labels corrected": runs[checked],
    }
    for axis, (title, part) in zip(axes, parts.items(), strict=True):
        axis.plot([0, 75], [0, 75], color="#cccccc", linewidth=1, zorder=0)
        for dataset, colour in zip(DATASETS, (OURS, CONTROL, "#b0413e"), strict=True):
            rows = part[part.dataset == dataset]
            truth, estimate = 100 * rows.wrong / rows.samples, 100 * rows.rate
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
