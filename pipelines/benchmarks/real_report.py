"""The tables of `real`: ranking, removal and test accuracy beside the controls, by case and as means."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.benchmarks.tables import document, markdown, percent
from posttrain.influence.held_out import HeldOutLoss

Record = Mapping[str, Any]

AGAIN, EMA, BOUNDARY = "trained again, ", ", average of weights", ", its boundary"
"""Parts of the names of models: trained again from the pre-trained weights by generalised cross-entropy; the moving
average of its weights; and a boundary on its own features."""
_BOUNDARIES = ("boundary, nothing removed", "boundary, gce", "boundary, random removal", "boundary, cleanlab")
_TRAINED = tuple(
    f"{AGAIN}{kept}{form}" for kept in ("nothing removed", "random removal", "cleanlab") for form in ("", EMA, BOUNDARY)
)
CONTROLS = {
    "overfitted": ("as it came", f"as it came{EMA}", "new head", *_BOUNDARIES, *_TRAINED),
    "frozen": ("as it came", "new head", *_BOUNDARIES, *_TRAINED),
}
OURS = ("boundary, posttrain", *(f"{AGAIN}posttrain{form}" for form in ("", EMA, BOUNDARY)))
ORACLES = (
    "boundary, right labels alone",
    *(f"{AGAIN}right labels alone{form}" for form in ("", EMA, BOUNDARY)),
)
OFFERED = (
    "as it came",
    "boundary, nothing removed",
    "boundary, posttrain",
    f"{AGAIN}posttrain",
    f"{AGAIN}posttrain{BOUNDARY}",
)
"""What is delivered is one of these, those that change less first: as by `refine.scope: auto`, without the network
refined from where it is."""


def delivered(record: Record) -> str:
    """The model that `runs.alternatives` would deliver."""
    return min(OFFERED, key=lambda name: HeldOutLoss(**record["rows"][name]["loss"]).mean)


def report(records: Sequence[Record], command: str, hardware: str) -> str:
    """All tables."""
    seeds = sorted({_seed(one) for one in records})
    sections = [
        ["# A real pre-trained network", "", f"`{command}`; {hardware}"],
        [
            "EfficientNet-Lite0 (ImageNet) on 3,000 images at 64 pixels, 1,000 validation images with labels as noisy,",
            f"and 5,000 test images; seeds {', '.join(map(str, seeds))} (split, noise, first head, order of batches).",
            "*Overfitted*: fine-tuned on all given labels for 8 epochs, until it fits 99 % of them. *Frozen*: as",
            "pre-trained, with a fitted head. *Trained again*: from the pre-trained weights by generalised",
            "cross-entropy, in as many steps. Sized for two cores and 80 minutes: the first 11 of the 16 blocks",
            "stay as pre-trained in all trainings. No choice but that of the best control is made by test labels. In",
            "percent, ± the standard deviation over seeds.",
        ],
    ]
    for state in CONTROLS:
        own = [one for one in records if f", {state}," in one["case"]]
        if own:
            sections += [[f"## {state.capitalize()}"], *_of_state(own, state)]
    return document(sections)


def _of_state(records: Sequence[Record], state: str) -> Iterable[list[str]]:
    groups = _grouped(records)
    noisy = {name: own for name, own in groups.items() if "clean" not in name}
    yield [
        "Share of wrong labels, and as estimated; what posttrain and cleanlab remove. *At first*: the recall before",
        "the rounds go on with the features of the network trained again, which they do so often:",
        "",
        *markdown(
            [
                "",
                "wrong",
                "estimated",
                "removed",
                "precision",
                "recall",
                "at first",
                "so often",
                "cleanlab's precision",
                "recall",
            ],
            [
                [
                    name,
                    percent([one["wrong"] for one in own]),
                    percent([one["rate"][0] for one in own]),
                    *(percent([one["removed"]["posttrain"][k] for one in own]) for k in range(3)),
                    percent([one["removed"]["posttrain, first features"][2] for one in own]),
                    f"{statistics.mean(one['trained_bases'] for one in own):.1f}",
                    *(percent([one["removed"]["cleanlab"][k] for one in own]) for k in (1, 2)),
                ]
                for name, own in groups.items()
            ],
        ),
    ]
    methods = list(dict.fromkeys(method for one in records for method in one["ranking"]))
    yield [
        "Average precision of the ranking:",
        "",
        *markdown(
            ["", *methods],
            [
                [name, *(percent([one["ranking"].get(m) for one in own]) for m in methods)]
                for name, own in noisy.items()
            ],
        ),
    ]
    models = [*CONTROLS[state], *OURS]
    rows = [[name, *(percent([_test(one, name) for one in own]) for own in groups.values())] for name in models]
    rows.append(["**delivered**", *(percent([_test(one, delivered(one)) for one in own]) for own in groups.values())])
    rows += [
        [f"*{name}*", *(percent([_test(one, name) for one in own]) for own in groups.values())] for name in ORACLES
    ]
    yield ["Test accuracy:", "", *markdown(["", *groups], rows)]
    yield _gains(noisy, state)


def _gains(groups: Mapping[str, Sequence[Record]], state: str) -> list[str]:
    """What is delivered against the best control, the latter by test labels: in its favour."""
    rows, all_gains = [], []
    for name, own in groups.items():
        best = max(CONTROLS[state], key=lambda control: statistics.mean(_test(one, control) or 0.0 for one in own))
        gains = [(_test(one, delivered(one)) or 0.0) - (_test(one, best) or 0.0) for one in own]
        all_gains += gains
        rows.append([name, best, percent(gains, signed=True), _delivered(own)])
    if not rows:
        return []
    spread = 100 * statistics.stdev(all_gains) / len(all_gains) ** 0.5 if len(all_gains) > 1 else float("nan")
    return [
        "What is delivered, minus the best control (which test labels chose), in points:",
        "",
        *markdown(["", "best control", "delivered minus it", "delivered"], rows),
        "",
        f"Mean over the noisy cases: {100 * statistics.mean(all_gains):+.1f} points, standard error {spread:.1f}.",
    ]


def _delivered(own: Sequence[Record]) -> str:
    counts = {name: sum(delivered(one) == name for one in own) for name in {delivered(one) for one in own}}
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for one in records:
        dataset, noise, *_ = one["case"].split(", ")
        groups.setdefault(f"{dataset.removesuffix('-lite0-top')}, {noise}", []).append(one)
    return groups


def _seed(record: Record) -> int:
    return int(record["case"].rpartition(" ")[2])


def _test(record: Record, name: str) -> float | None:
    row = record["rows"].get(name)
    return None if row is None else row["test"]
