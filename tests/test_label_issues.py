"""`find_label_issues` and `find_label_issues_with`: what they find, what they refuse, what they do not import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import posttrain
from posttrain.errors import ConfigError, DataError, LabelRangeError, ModelError


def digits_whole() -> tuple[Any, Any]:
    return load_digits(return_X_y=True)  # pyright: ignore[reportReturnType]


def flipped(labels: np.ndarray, rate: float, seed: int = 0) -> np.ndarray:
    generator, classes = np.random.default_rng(seed), int(labels.max()) + 1
    wrong = generator.choice(len(labels), round(rate * len(labels)), replace=False)
    given = labels.copy()
    given[wrong] = (labels[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return given


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features, true labels, given labels): the first 900 digits, a fifth of the labels flipped."""
    features, labels = (part[:900] for part in digits_whole())
    return features, labels, flipped(labels, 0.2)


@pytest.fixture(scope="module")
def issues(digits: tuple[np.ndarray, ...]) -> posttrain.LabelIssues:
    features, _, given = digits
    return posttrain.find_label_issues(features, given, progress=False)


@pytest.mark.parametrize("load", [load_breast_cancer, pytest.param(load_wine, marks=pytest.mark.long)])
def test_wrong_labels_of_a_table_rank_as_high_as_cross_validated_regression_has_them_or_higher(load: Any):
    features, labels = load(return_X_y=True)
    own, of_regression = [], []
    for seed in range(3):
        given = flipped(labels, 0.2, seed)
        found = posttrain.find_label_issues(features, given, progress=False)
        own.append(average_precision_score(given != labels, -found.label_quality))
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probabilities: Any = cross_val_predict(model, features, given, cv=5, method="predict_proba")
        quality = probabilities[np.arange(len(given)), given]
        of_regression.append(average_precision_score(given != labels, -quality))
    # three seeds differ by about 0.01
    assert np.mean(own) > np.mean(of_regression) - 0.01 and np.mean(own) > 0.85


def test_what_is_removed_is_mostly_wrong_and_the_rate_is_in_its_interval(
    digits: tuple[np.ndarray, ...], issues: posttrain.LabelIssues
):
    _, labels, given = digits
    wrong = given != labels
    assert wrong[issues.is_issue].mean() > 0.85
    assert issues.is_issue[wrong].mean() > 0.85
    assert issues.noise.found and issues.noise.low is not None and issues.noise.high is not None
    assert issues.noise.low < wrong.mean() < issues.noise.high
    assert "out-of-fold" in str(issues.noise) and "validation" not in str(issues.noise)


def test_the_probe_on_what_is_left_is_better_than_one_on_all(digits: tuple[np.ndarray, ...]):
    features, labels, _ = digits
    given = np.where(np.random.default_rng(0).random(900) < 0.3, (labels + 1) % 10, labels)
    x_new, y_new = (part[900:] for part in digits_whole())
    found = posttrain.find_label_issues(features, given, progress=False)
    nothing_removed = posttrain.find_label_issues(features, given, max_share=0.0, progress=False)
    assert not nothing_removed.is_issue.any()
    # no run file, so that no section of one is named
    assert nothing_removed.ended.startswith("nothing is removed: max_share = 0;")
    assert found.probe.score(x_new, y_new) > nothing_removed.probe.score(x_new, y_new) + 0.03
    probabilities = found.probe.predict_proba(x_new)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(found.probe.classes_[probabilities.argmax(axis=1)], found.probe.predict(x_new))


def test_of_clean_labels_next_to_nothing_is_removed():
    features, labels = digits_whole()
    found = posttrain.find_label_issues(features[:900], labels[:900], progress=False)
    assert found.is_issue.mean() <= 0.01 and not found.noise.found
    assert "0 of 900 labels, in 0 rounds" in repr(found) and found.rounds[0]["removed"] == 0


def test_too_few_samples_are_answered_with_what_can_be_done_in_python():
    features = digits_whole()[0][:40]
    found = posttrain.find_label_issues(features, np.arange(40) % 2, progress=False)
    assert found.noise.why == "fewer than 50 samples tell nothing of their labels; give at least 50 samples, better 500"
    assert found.noise.why in found.ended and "data." not in found.ended


def test_of_classes_with_three_samples_each_nothing_is_said():
    features, labels = make_blobs(300, n_features=32, centers=100, cluster_std=0.3, random_state=0)[:2]
    # the most confident predictions would show 82 % of wrong labels
    found = posttrain.find_label_issues(features, flipped(labels, 0.2), progress=False)
    assert found.noise.rate is None and not found.is_issue.any()
    assert "classes of fewer than 5 samples tell nothing of their labels" in found.ended


def test_a_validation_set_serves_in_place_of_folds(digits: tuple[np.ndarray, ...]):
    features, labels, given = digits
    x, y = (part[900:1500] for part in digits_whole())
    found = posttrain.find_label_issues(features, given, validation=(x, flipped(y, 0.2)), progress=False)
    assert (given != labels)[found.is_issue].mean() > 0.85 and "validation samples" in str(found.noise)


def test_labels_may_be_text_and_features_of_any_kind(digits: tuple[np.ndarray, ...]):
    features, given = (part[digits[1] < 3][:200] for part in (digits[0], digits[2]))
    issues = posttrain.find_label_issues(features, given, progress=False)
    assert issues.is_issue.any() and not issues.is_issue.all()
    names = np.array([f"digit {label}" for label in given])
    frame = pd.DataFrame(features, index=[f"row {at}" for at in range(len(given))])
    same: Any
    for same in (frame, torch.from_numpy(features).float(), scipy.sparse.csr_matrix(features), {"pixels": features}):
        found = posttrain.find_label_issues(same, names, progress=False)
        np.testing.assert_array_equal(found.is_issue, issues.is_issue)
    table = posttrain.find_label_issues(frame, pd.Series(names), progress=False).to_frame()
    assert list(table.index[:2]) == ["row 0", "row 1"] and set(table["given_label"]) == set(names)
    assert {"is_label_issue", "label_quality", "given_label", "predicted_label"} <= set(table.columns)


def test_a_table_of_issues_has_the_index_of_a_data_frame_and_none_of_a_list():
    features, labels = load_wine(return_X_y=True)
    names = [f"row {at}" for at in range(len(labels))]
    frame = pd.DataFrame(features, index=names)
    given: Any
    for given, index in ((frame, names), ({"columns": frame}, names), (features.tolist(), range(len(labels)))):
        table = posttrain.find_label_issues(given, labels, max_rounds=1, progress=False).to_frame()
        assert list(table.index) == list(index)


def test_the_scale_of_a_column_does_not_matter(digits: tuple[np.ndarray, ...], issues: posttrain.LabelIssues):
    features, _, given = digits
    found = posttrain.find_label_issues(1e4 + 1e-3 * features, given, progress=False)
    np.testing.assert_array_equal(found.is_issue, issues.is_issue)


def test_ranked_has_the_removed_first_and_why_names_both_labels(issues: posttrain.LabelIssues):
    ranked = issues.ranked
    assert sorted(ranked) == list(range(len(issues)))
    assert issues.is_issue[ranked[: issues.is_issue.sum()]].all()
    worst = ranked[0]
    assert str(issues.suggested[worst]) in issues.why(worst) and "wrong" in issues.why(worst)
    table = issues.to_frame()
    assert all(issues.why(at) == table["why"][at] for at in ranked[:3]) and issues.why(-1) == table["why"].iloc[-1]


BAD: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "lengths": (np.ones((5, 2)), [0, 1, 0], {}, DataError, "features has 5 rows and labels has 3"),
    "one class": (np.eye(4), [1, 1, 1, 1], {}, DataError, "at least two"),
    "no variance": (np.ones((4, 2)), [0, 1, 0, 1], {}, DataError, "same features"),
    "not finite": ([[1.0, 2.0], [np.nan, 1.0]], [0, 1], {}, DataError, "first in row 1"),
    "three dimensions": (np.ones((4, 2, 2)), [0, 1, 0, 1], {}, DataError, "reshape"),
    "text": ([["a"], ["b"]], [0, 1], {}, DataError, "no matrix of numbers"),
    "fractions": (np.eye(2), [0.5, 1.0], {}, DataError, r"labels\[0\] is 0.5"),
    "missing label": (np.eye(2), [None, "a"], {}, DataError, r"labels\[0\] is None"),
    "missing text": (np.eye(3), pd.Series(["a", None, "b"], dtype="string"), {}, DataError, r"labels\[1\] is <NA>"),
    "missing number": (np.eye(3), pd.Series([0, 1, None], dtype="Int64"), {}, DataError, r"labels\[2\] is .*no label"),
    "one-hot": (np.eye(2), np.eye(2), {}, DataError, "argmax"),
    "budget": (np.eye(2), [0, 1], {"budget": 2.0}, ConfigError, "budget"),
    "score": (np.eye(2), [0, 1], {"score": "best"}, ConfigError, "score"),
    "validation": (np.eye(2), [0, 1], {"validation": (np.eye(3), [0, 1, 0])}, DataError, "3 columns"),
    "other class": (
        np.eye(2),
        [0, 1],
        {"validation": (np.eye(2), [0, 7])},
        DataError,
        "a class that no training label",
    ),
    "missing in a list": (np.eye(3), ["a", "b", float("nan")], {}, DataError, r"labels\[2\] is nan, no label"),
    "mixed in a list": (np.eye(2), [3, "a"], {}, DataError, "mixes int, str"),
    "missing number by name": (np.eye(2), pd.Series([0, None], dtype="Int64"), {}, DataError, r"labels\[1\] is <NA>"),
    "lists": (np.eye(2), [[1], [1, 2]], {}, DataError, "of the type list; give numbers"),
    "no samples": (np.empty((0, 2)), [], {}, DataError, "labels is empty: there are no samples"),
    "one class by name": (np.eye(2), [6, 6], {}, DataError, "all labels are 6; at least two classes"),
    "no validation samples": (
        np.eye(2),
        [0, 1],
        {"validation": (np.empty((0, 2)), [])},
        DataError,
        "validation labels is empty: there are no samples",
    ),
    "other class as a number": (
        np.eye(2),
        np.array([0, 1]),
        {"validation": (np.eye(2), np.array([6, 1]))},
        DataError,
        r"labels\[0\] is 6, a class",
    ),
    "no seed": (np.eye(2), [0, 1], {"seed": None}, ConfigError, "seed = None"),
    "half a seed": (np.eye(2), [0, 1], {"seed": 1.5}, ConfigError, r"seed = 1\.5"),
    "negative seed": (np.eye(2), [0, 1], {"seed": -1}, ConfigError, "seed = -1"),
    "fewer than folds": (
        np.eye(4),
        [0, 0, 1, 1],
        {},
        DataError,
        "4 samples are fewer than the 5 folds .*validation=",
    ),
    "one that differs": (np.eye(9)[:, :1], np.arange(9) % 2, {}, DataError, "without one of the 5 folds"),
    "huge": (np.eye(9) * 1e200, np.arange(9) % 2, {}, DataError, "column 0 are too large .* rescale"),
    "tiny": (np.eye(9) * 1e-200, np.arange(9) % 2, {}, DataError, "or too small .* rescale"),
    "largest": (
        np.where(np.eye(9), 1.7e308, -1.7e308),
        np.arange(9) % 2,
        {},
        DataError,
        r"largest: 1\.7e\+308\); rescale",
    ),
    "far validation": (
        np.eye(9),
        np.arange(9) % 2,
        {"validation": (np.eye(9) * 1e60, np.arange(9) % 2)},
        DataError,
        "1e.60 in row 0 and column 0 lies too far",
    ),
    "complex": (np.eye(2) * 1j, [0, 1], {}, DataError, "complex numbers"),
    "missing in a frame": (
        pd.DataFrame({"a": pd.array([1, None], "Int64"), "b": [1, 2]}),
        [0, 1],
        {},
        DataError,
        r"missing value \(first in row 1\); fill or drop it",
    ),
    "other order": (
        pd.DataFrame(np.eye(2)),
        pd.Series([0, 1], index=[1, 0]),
        {},
        DataError,
        r"different indices; give labels\.loc\[features\.index\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence(name: str):
    features, labels, options, kind, says = BAD[name]
    with pytest.raises(kind, match=says):
        posttrain.find_label_issues(features, labels, **options, progress=False)


def test_whole_numbers_of_any_type_are_labels(digits: tuple[np.ndarray, ...]):
    features, given = digits[0][:100], digits[2][:100]
    of_two_types = np.array([int(label) if at % 2 else label for at, label in enumerate(given)], dtype=object)
    for labels in (of_two_types, list(of_two_types), [torch.tensor(label) for label in given], pd.Categorical(given)):
        found = posttrain.find_label_issues(features, labels, max_rounds=1, progress=False)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(found.classes[found.given], given)


def test_features_may_lie_in_memory_that_cannot_be_written_to(digits: tuple[np.ndarray, ...]):
    features = digits[0][:100].copy()
    features.flags.writeable = False
    # torch would warn, and warnings are errors
    assert len(posttrain.find_label_issues(features, digits[2][:100], max_rounds=1, progress=False)) == 100


def test_neither_ray_nor_mlflow_is_imported_and_importing_is_light():
    code = """
import sys, time
began = time.perf_counter()
import posttrain
seconds = time.perf_counter() - began
assert "torch" not in sys.modules and "numpy" not in sys.modules
import numpy as np
posttrain.find_label_issues(np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 2, progress=False)
assert not {"ray", "mlflow"} & set(sys.modules), "heavy"
print(seconds)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


class Pictures(torch.utils.data.Dataset[Any]):
    """Digits as pairs, or as the dicts of a Hugging Face data set."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, *, as_dicts: bool = False) -> None:
        self.images = torch.from_numpy(features / 16).float().reshape(-1, 1, 8, 8)
        self.labels, self.as_dicts = labels, as_dicts

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> Any:
        image, label = self.images[at], int(self.labels[at])
        return {"image": image, "label": label} if self.as_dicts else (image, label)


def trained(features: np.ndarray, labels: np.ndarray) -> torch.nn.Module:
    """A network that has memorised these labels."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, int(labels.max()) + 1)
    )
    images, targets = torch.from_numpy(features / 16).float(), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    return model.eval()


def test_a_torch_module_is_cleaned_by_its_own_layers_and_gets_a_better_head(tmp_path: Any):
    features, labels = digits_whole()
    given = np.where(np.random.default_rng(0).random(len(labels)) < 0.3, (labels + 1) % 10, labels)
    model = trained(features[:900], given[:900])
    train = Pictures(features[:900], given[:900], as_dicts=True)
    validation = Pictures(features[900:1300], given[900:1300])
    issues = posttrain.find_label_issues_with(model, train, validation=validation, progress=False)
    assert (given != labels)[:900][issues.is_issue].mean() > 0.8
    result = posttrain.clean(model=model, train=train, validation=validation, path=tmp_path / "out", progress=False)
    assert result.issues is not None
    np.testing.assert_array_equal(result.issues.is_issue, issues.is_issue)
    assert len(result.removed) == issues.is_issue.sum() == result.summary["removed"]
    images, test = torch.from_numpy(features[1300:] / 16).float().reshape(-1, 1, 8, 8), labels[1300:]
    with torch.no_grad():
        before, after = ((own(images).argmax(dim=1).numpy() == test).mean() for own in (model, result.model))
    assert after > before + 0.05
    assert result.summary["validation_accuracy_after"] > result.summary["validation_accuracy_before"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"removed.csv", "model.safetensors"}


def test_a_model_stays_as_it_came_where_nothing_is_removed_and_the_probes_are_not_clearly_better():
    features, labels = digits_whole()
    model = trained(features[:900], labels[:900])
    train, validation = (Pictures(features[part], labels[part]) for part in (slice(900), slice(900, 1300)))
    result = posttrain.clean(model=model, train=train, validation=validation, progress=False)
    with torch.no_grad():
        right = (model(validation.images).argmax(dim=1).numpy() == labels[900:1300]).mean()
        torch.testing.assert_close(result.model(validation.images), model(validation.images))
    summary = result.summary
    assert summary["removed"] == 0 and not summary["head_replaced"]
    assert summary["validation_accuracy_before"] == summary["validation_accuracy_after"] == right


def test_data_sets_that_do_not_fit_the_model_are_refused_in_one_sentence():
    features, labels = (part[:60] for part in digits_whole())
    model = trained(features, labels)
    whole = Pictures(features, labels)
    with pytest.raises(DataError, match="has no length or no items"):
        posttrain.find_label_issues_with(model, iter(whole), progress=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LabelRangeError, match=r"10 outputs \(0..9\), and no training label is 9"):
        posttrain.find_label_issues_with(model, Pictures(features[labels < 9], labels[labels < 9]), progress=False)
    with pytest.raises(ModelError, match="cannot take a sample"):
        posttrain.find_label_issues_with(torch.nn.Linear(3, 10), whole, progress=False)
    with pytest.raises(DataError, match="give clean either"):
        posttrain.clean()
    with pytest.raises(DataError, match="needs train= and validation="):
        posttrain.clean(model=model, train=whole)


NETWORK = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
PAIRS = [(torch.tensor([at, -at]) / 60.0, at % 2) for at in range(60)]
ONE_HOT = [(image, torch.eye(2)[label]) for image, label in PAIRS]


@pytest.mark.parametrize(
    ("model", "train", "validation", "kind", "says"),
    [
        (NETWORK, ONE_HOT, None, DataError, r"sample 0 has the shape \(2,\).*argmax"),
        (NETWORK, PAIRS, ONE_HOT, DataError, r"sample 0 has the shape \(2,\).*argmax"),
        (NETWORK, [], None, DataError, "has no samples: give"),
        (NETWORK, PAIRS, [], DataError, "has no samples: give"),
        (torch.nn.Flatten(), PAIRS, None, ModelError, "has no parameters; give"),
        ("resnet", PAIRS, None, ModelError, "is a str; give a torch.nn.Module"),
        (lambda images: images, PAIRS, None, ModelError, "is a function; give a torch.nn.Module"),
    ],
)
def test_models_and_data_sets_of_another_kind_are_refused(
    model: Any, train: Any, validation: Any, kind: type[Exception], says: str
):
    with pytest.raises(kind, match=says):
        posttrain.find_label_issues_with(model, train, validation=validation, progress=False)


def test_clean_takes_the_path_of_a_run_file_and_says_what_else_it_does_not_take(tmp_path: Any):
    path = tmp_path / "photos.yaml"
    path.write_text("removal: {bugdet: 0.1}")
    for given in (path, str(path)):
        with pytest.raises(ConfigError, match=r"photos\.yaml: removal\.bugdet .* did you mean removal\.budget"):
            posttrain.clean(given)
    with pytest.raises(ConfigError, match=r"given a Linear; a model is given as model="):
        posttrain.clean(torch.nn.Linear(3, 10))  # pyright: ignore[reportArgumentType]


def test_complaints_about_overrides_name_the_argument_in_python():
    for overrides in ({"removal.budget": 3}, {"budget": {"a": 1}}, {"": 1}):
        with pytest.raises(ConfigError, match=r"^overrides") as refused:
            posttrain.load(overrides=overrides)
        assert "--set" not in str(refused.value)


def test_a_run_file_and_a_model_take_no_settings_of_each_other(tmp_path: Any):
    config = posttrain.load(overrides={"run.path": str(tmp_path / "run")})
    for given in ({"path": tmp_path / "other"}, {"budget": 0.03}, {"bugdet": 0.03}, {"train": []}):
        with pytest.raises(ConfigError, match=f"does not take {next(iter(given))}: .*load"):
            posttrain.clean(config, **given)
    assert not list(tmp_path.iterdir())
    for verbose, quiet in ((True, True), (False, False)):
        with pytest.raises(ConfigError, match="belong to clean"):
            posttrain.clean(model=torch.nn.Linear(3, 10), verbose=verbose, quiet=quiet)
