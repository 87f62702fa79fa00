"""`posttrain.find_label_issues` on ready features of tables and texts, against cleanlab with cross-validated logistic
regression on the same features, one after the other in one process.

    python -m pipelines.benchmarks.features

Labels are flipped by a seed; the true ones serve for measuring alone. Writes results/features.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import posttrain
from pipelines.benchmarks.baselines import package
from pipelines.benchmarks.hardware import hardware

RESULTS = Path(__file__).parent / "results" / "features.md"
SEEDS = (0, 1, 2)
RATES = (0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Found:
    precision: float
    """Average precision over all samples."""
    seconds: float
    flagged: float
    """Share of the samples that is called wrong."""
    right: float
    """Share of these whose label is wrong."""


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Docstrings of four packages as TF-IDF in 200 dimensions; the label is the package."""
    import inspect

    import numpy
    import pandas
    import scipy.stats
    import torch

    found: list[tuple[str, int]] = []
    for label, module in enumerate((numpy, pandas.DataFrame, scipy.stats, torch)):
        docs = {inspect.getdoc(getattr(module, name, None)) or "" for name in sorted(dir(module)) if name[0] != "_"}
        found += [(text, label) for text in sorted(docs) if len(text) > 200]
    words = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform([text for text, _ in found])
    return TruncatedSVD(200, random_state=0).fit_transform(words), np.array([label for _, label in found])


SETS: dict[str, Callable[[], Any]] = {
    "breast cancer (table, 569 x 30)": lambda: datasets.load_breast_cancer(return_X_y=True),
    "wine (table, 178 x 13)": lambda: datasets.load_wine(return_X_y=True),
    "digits (pixels, 1,797 x 64)": lambda: datasets.load_digits(return_X_y=True),
    "docstrings (text, TF-IDF 200)": texts,
}


def flipped(labels: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """The labels with exactly this share of them replaced by another class, all equally likely."""
    generator, classes = np.random.default_rng(seed), int(labels.max()) + 1
    given = labels.copy()
    wrong = generator.choice(len(labels), round(rate * len(labels)), replace=False)
    given[wrong] = (labels[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return given


def with_posttrain(features: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(suspicion [n], bool [n] what is called wrong)."""
    issues = posttrain.find_label_issues(features, given, progress=False)
    return -issues.label_quality, issues.is_issue


def with_cleanlab(features: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As a user of cleanlab would: five-fold logistic regression, self-confidence, its own cut."""
    find_label_issues = package("cleanlab.filter").find_label_issues
    get_label_quality_scores = package("cleanlab.rank").get_label_quality_scores
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probabilities: Any = cross_val_predict(model, features, given, cv=5, method="predict_proba")
    return -get_label_quality_scores(given, probabilities), find_label_issues(given, probabilities)


METHODS = {"posttrain": with_posttrain, "cleanlab, 5-fold logistic regression": with_cleanlab}


def measured(method: Any, features: np.ndarray, labels: np.ndarray, given: np.ndarray) -> Found:
    began = time.perf_counter()
    suspicion, flagged = method(features, given)
    seconds, wrong = time.perf_counter() - began, given != labels
    return Found(
        average_precision_score(wrong, suspicion),
        seconds,
        float(flagged.mean()),
        float(wrong[flagged].mean()) if flagged.any() else float("nan"),
    )


def rows() -> Iterator[str]:
    yield "| data | wrong labels | method | average precision | called wrong | of these wrong | seconds |"
    yield "|---|---|---|---|---|---|---|"
    for name, load in SETS.items():
        features, labels = map(np.asarray, load())
        for rate in RATES:
            for method, run in METHODS.items():
                found = [measured(run, features, labels, flipped(labels, rate, seed)) for seed in SEEDS]
                precision = np.array([100 * each.precision for each in found])
                yield (
                    f"| {name} | {100 * rate:.0f} % | {method} | {precision.mean():.1f} ± {precision.std(ddof=1):.1f} "
                    f"| {100 * np.mean([each.flagged for each in found]):.1f} % "
                    f"| {100 * np.mean([each.right for each in found]):.1f} % "
                    f"| {np.median([each.seconds for each in found]):.2f} |"
                )


def main() -> None:
    # imports and first calls are nobody's seconds
    warm, labels = map(np.asarray, datasets.load_wine(return_X_y=True))
    for run in METHODS.values():
        run(warm, labels)
    table = list(rows())
    text = (
        "# Ready features: posttrain.find_label_issues against cleanlab\n\n"
        f"Mean ± standard deviation over seeds {SEEDS}; seconds: median. {hardware()}.\n"
        "`python -m pipelines.benchmarks.features`\n\n"
    )
    RESULTS.write_text(text + "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
