"""The tables of `synergy`: every method on all labels, with posttrain after it, and with other removals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.benchmarks.cases import FEATURES, NOISES
from pipelines.benchmarks.in_memory import PROBE
from pipelines.benchmarks.tables import document, markdown, percent_with_error
from pipelines.benchmarks.training import DECAY, REFINE
from posttrain.config import Removal
from posttrain.methods import METHODS, NEEDS_NOISE

Record = Mapping[str, Any]
"""The fields of a `synergy.Finding`."""

LAST, AVERAGE, BEST = "all, last epoch", "all, average of weights", "all, best epoch"
AUTO, HEAD, NETWORK = "posttrain, chosen", "posttrain, head", "posttrain, network"
BOUNDARY, LEFT = "boundary, nothing removed", "boundary, what is left"
RANDOM, SMALL_LOSS, CLEANLAB = "random removal", "small-loss removal", "cleanlab's removal"
SCRATCH, RIGHT = "from scratch, posttrain kept", "from scratch, right labels"
SCRATCH_OTHERS = {name: f"from scratch, {name}" for name in (RANDOM, SMALL_LOSS, CLEANLAB)}
OTHERS = (*SCRATCH_OTHERS, *SCRATCH_OTHERS.values())
OURS = (AUTO, HEAD, NETWORK, SCRATCH)
OFFERED = (LAST, BOUNDARY, LEFT, NETWORK, SCRATCH)
"""What `AUTO` chooses from, those that change less first."""
VARIANTS = (LAST, AVERAGE, BEST, BOUNDARY, LEFT, *OURS, *OTHERS, RIGHT)
REMOVAL = Removal(budget=0.1, max_rounds=8)
"""Of posttrain's rounds."""


def report(records: Sequence[Record], command: str, hardware: str) -> str:
    """All tables."""
    ordered = sorted(
        records, key=lambda one: (list(METHODS).index(one["method"]), NOISES.index(one["noise"]), one["seed"])
    )
    noisy = [one for one in ordered if one["wrong"]]
    return document(
        [
            ["# posttrain with every method for learning with noisy labels", "", f"`{command}`; {hardware}"],
            _sizes(ordered),
            _variants(),
            *(_of_noisy(noisy) if noisy else []),
            *_by_noise(ordered),
            _removals(ordered),
            _costs(ordered),
        ]
    )


def _sizes(records: Sequence[Record]) -> list[str]:
    size = next(iter(FEATURES.values()))
    training = next(iter(size.training.values()))
    seeds = ", ".join(str(seed) for seed in sorted({one["seed"] for one in records}))
    return [
        f"CIFAR-10N: {size.train:,} training images, {size.validation:,} validation images with labels as noisy, "
        f"{size.test:,} test images with right ones; seeds {seeds}.",
        "Sized so that all of it takes less than two hours on two cores: the network is a two-layer perceptron (1,280",
        "inputs, 256 ReLU units, 10 classes) on the pooled features of EfficientNet-Lite0 (ImageNet, at 64 pixels),",
        f"which stays as it is. The perceptron is trained for {training.epochs} epochs of {training.optimizer}, batch "
        f"{training.batch_size}, learning rate {training.learning_rate:g} ({training.schedule}), so long that",
        "cross-entropy memorises its labels (see the last table), or in as many steps on fewer samples. Nothing is",
        f"augmented. Refining takes {REFINE.epochs} epochs of {REFINE.optimizer} a round, batch {REFINE.batch_size}, "
        f"learning rate {REFINE.learning_rate:g}. posttrain has its defaults but for",
        f"removal.budget = {REMOVAL.budget:g} and removal.max_rounds = {REMOVAL.max_rounds}: a layer of more than "
        f"{PROBE.max_features} features, such as the input, is projected. The methods have the settings of their",
        f"papers. {' and '.join(NEEDS_NOISE)} are told the noise by a first network that cross-entropy trains; after a "
        "removal, what is left of it; of the right labels, that there is none.",
        "",
        "Nothing is chosen by test labels, but for the best of the other removals, by case and in its favour. Trained",
        f"alike: `{SCRATCH}` is compared with the others from scratch, the rest with those that are trained on.",
        "In percent, ± the standard error of the mean; differences are paired, by noise and seed.",
    ]


def _variants() -> list[str]:
    said = {
        LAST: "the method on all labels.",
        AVERAGE: f"the same training, moving average of its weights, decay {DECAY:g} a step.",
        BEST: "the same training, the epoch with the highest accuracy on the noisy validation labels.",
        BOUNDARY: f"posttrain's probes on `{LAST}` and on its input, which its rounds begin with.",
        LEFT: f"the same probes after the rounds of `{HEAD}`, on what is left.",
        AUTO: "the one with the lowest corrected loss on the noisy validation labels of "
        f"`{LAST}`, `{BOUNDARY}`, `{LEFT}`, `{NETWORK}` and `{SCRATCH}`; "
        "`refine.scope: auto` chooses in this way, among models of its own.",
        HEAD: f"rounds from `{LAST}` on with `refine.scope: head`; the boundary that they deliver.",
        NETWORK: "the same with `refine.scope: network`: each round goes on training by the method on what is left.",
        SCRATCH: f"the method on what `{HEAD}` kept, in as many steps as on all.",
        RANDOM: f"from `{LAST}` as many samples go as with `{NETWORK}`, at random; then the method goes on for as many "
        "steps.",
        SMALL_LOSS: f"the same, but those with the largest cross-entropy under `{LAST}` go.",
        CLEANLAB: "the same, but those go that cleanlab finds by five-fold logistic regression on the 1,280 features.",
        "from scratch, ...": "the method on what that removal kept, in as many steps as on all.",
        RIGHT: "the method on the right labels alone, in as many steps as on all.",
    }
    return [*(f"- *{name}*: {text}" for name, text in said.items()), "", *_NO_ROUND]


_NO_ROUND = (
    f"Where posttrain removes nothing, `{NETWORK}` takes no step, and neither do the other removals: all are the",
    "network as it came. Where that is clearly better on the validation labels in the end, posttrain delivers it.",
)


# -- over all kinds of noise -------------------------------------------------------------------------------


def _of_noisy(noisy: Sequence[Record]) -> list[list[str]]:
    methods = _by(noisy, "method")
    return [
        ["## Mean over the noisy labels", "", f"{len(noisy)} cases: {', '.join(_by(noisy, 'noise'))}."],
        markdown(["", *VARIANTS], [[name, *_accuracies(own)] for name, own in methods.items()]),
        *(_differences(methods, reference) for reference in _REFERENCES),
        _not_better(methods),
    ]


def _test(record: Record, name: str) -> float:
    return record["rows"][name]["test"]


def _best_alike(record: Record, ours: str) -> float:
    names = SCRATCH_OTHERS.values() if ours == SCRATCH else SCRATCH_OTHERS
    return max(_test(record, name) for name in names)


def _best_other(record: Record, ours: str) -> float:
    return max(_test(record, name) for name in OTHERS)


ALIKE, OTHER = "the best of the other removals, trained alike", "the best of the other removals"
_REFERENCES: dict[str, Callable[[Record, str], float]] = {
    LAST: lambda record, ours: _test(record, LAST),
    BEST: lambda record, ours: _test(record, BEST),
    ALIKE: _best_alike,
    OTHER: _best_other,
}
"""Test accuracy of what a variant is compared with. Trained alike: from scratch where that is, else trained on."""


def differences(records: Sequence[Record], name: str, reference: str) -> list[float]:
    """Test accuracy of a variant minus that of the reference, a share, for each record."""
    return [_test(one, name) - _REFERENCES[reference](one, name) for one in records]


def _differences(methods: Mapping[str, Sequence[Record]], reference: str) -> list[str]:
    rows = [[method, *(_marked(differences(own, name, reference)) for name in OURS)] for method, own in methods.items()]
    return [f"Minus `{reference}`, in points; bold: more than two standard errors:", "", *markdown(["", *OURS], rows)]


def _marked(values: Sequence[float]) -> str:
    text = percent_with_error(values, signed=True)
    mean, error = statistics.mean(values), _error(values)
    return f"**{text}**" if error is not None and abs(mean) > 2 * error else text


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _not_better(methods: Mapping[str, Sequence[Record]]) -> list[str]:
    """A sentence for each method whose mean posttrain does not improve."""
    lines: list[str] = []
    for method, own in methods.items():
        clauses: list[str] = []
        for reference in _REFERENCES:
            found = {name: differences(own, name, reference) for name in OURS}
            worse = [
                f"{name} {percent_with_error(values, signed=True)}"
                for name, values in found.items()
                if statistics.mean(values) <= 0
            ]
            if worse:
                clauses.append(f"`{reference}` ({'; '.join(worse)})")
        if clauses:
            lines.append(f"- {method}: posttrain does not improve the mean of {', nor of '.join(clauses)}.")
    return ["Where posttrain does not improve the mean:", "", *(lines or ["Nowhere."])]


# -- by noise, and what was removed ------------------------------------------------------------------------


def _by_noise(records: Sequence[Record]) -> list[list[str]]:
    found: list[list[str]] = []
    for noise, of_noise in sorted(_by(records, "noise").items(), key=lambda item: NOISES.index(item[0])):
        wrong = percent_with_error([one["wrong"] for one in _once(of_noise)])
        rows = [[method, *_accuracies(own)] for method, own in _by(of_noise, "method").items()]
        found += [[f"## {noise}", "", f"Wrong labels: {wrong}.", "", *markdown(["", *VARIANTS], rows)]]
    return found


def _removals(records: Sequence[Record]) -> list[str]:
    rows = [
        [method, name, *_removed(own, name)]
        for method, own in _by(records, "method").items()
        for name in (HEAD, NETWORK, SMALL_LOSS)
    ]
    rows.append(["any", CLEANLAB, *_removed(_once(records), CLEANLAB)])
    return [
        "## What is removed",
        "",
        "Wrong labels as posttrain estimates them on the validation labels (of noisy ones), and what is removed:",
        "share of the samples, precision and recall over the noisy labels (precision where anything is removed: in",
        "brackets the number of cases), and the share of clean ones, all of it wrongly removed. A random removal is as",
        "often right as labels are wrong.",
        "",
        *markdown(["", "", "estimated", "removed", "precision", "recall", "removed of clean"], rows),
    ]


def _removed(records: Sequence[Record], name: str) -> list[str]:
    noisy = [one["removed"][name] for one in records if one["wrong"]]
    clean = [one["removed"][name][0] for one in records if not one["wrong"]]
    estimated = [one.get("estimated") for one in records if one["wrong"]] if name in (HEAD, NETWORK) else []
    shares = (percent_with_error([part[k] for part in noisy]) for k in range(3))
    return [percent_with_error(estimated), *shares, percent_with_error(clean)]


def _once(records: Sequence[Record]) -> list[Record]:
    """One record of each kind of noise and seed, for what is the same for all methods."""
    return list({(one["noise"], one["seed"]): one for one in records}.values())


def _costs(records: Sequence[Record]) -> list[str]:
    parts = ("training", HEAD, NETWORK, CLEANLAB)
    rows: list[list[str]] = []
    for method, own in _by(records, "method").items():
        fitted = percent_with_error([one["fitted"] for one in own])
        seconds = [f"{statistics.mean(one['seconds'][part] for one in own):.1f}" for part in parts]
        means = [statistics.mean(one[name] for one in own) for name in ("best_epoch", "rounds", "steps")]
        rows.append([method, fitted, *seconds, f"{means[0]:.0f}", f"{means[1]:.1f}", f"{means[2]:.0f}"])
    columns = ["given labels fitted", *(f"{part}, s" for part in parts), "best epoch", f"rounds of `{NETWORK}`"]
    return [
        "## What it costs",
        "",
        "Means over all labels, clean ones among them; processor seconds. The training has the watching of its epochs",
        "and the average of weights in it; posttrain's the embedding. cleanlab's is the same for all methods.",
        "",
        *markdown(["", *columns, "their steps"], rows),
    ]


def _accuracies(records: Sequence[Record]) -> list[str]:
    return [percent_with_error([_test(one, name) for one in records]) for name in VARIANTS]


def _by(records: Sequence[Record], field: str) -> dict[str, list[Record]]:
    """The records by this field, in the order in which its values appear."""
    groups: dict[str, list[Record]] = {}
    for one in records:
        groups.setdefault(one[field], []).append(one)
    return groups
