"""Published ways to rank samples by how wrong their label looks, each by the package that is known for it.

cleanlab (confident learning, Northcutt et al. 2021), captum (TracIn, Pruthi et al. 2020) and kronfluence (EKFAC
influence, Grosse et al. 2023) come with `pip install 'posttrain[benchmark]'`; AUM (Pleiss et al. 2020) and the
disagreement of nearest neighbours need no package of their own.
"""

from __future__ import annotations

import importlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.benchmarks import cases
from pipelines.benchmarks.cases import Case, Data, OutOfSample, Trained
from posttrain.vision import models
from posttrain.vision.embedding import features_and_logits
from posttrain.vision.weights import load_bytes

NEIGHBOURS = 10
BATCH = 500


@dataclass(frozen=True)
class Measured:
    """What a peer says of each training sample, and what that costs on top of the trained network."""

    scores: np.ndarray
    """float64 [n], larger is more suspect."""
    seconds: float
    """Loading the packages is not counted."""
    passes: float
    """Over the training images: 1 for each forward pass, 3 for each epoch of training (a backward pass costs
    about two forward ones). Gradients of the last layer alone cost no pass."""
    flagged: np.ndarray | None = None
    """bool [n], the samples that the peer itself would remove; None where it only ranks."""


@dataclass(frozen=True)
class Context:
    """What the baselines may look at: one case, its network, and out-of-sample predictions."""

    case: Case
    data: Data
    trained: Trained
    out_of_sample: OutOfSample

    @property
    def given(self) -> np.ndarray:
        """[n] the training samples' given labels."""
        return self.data.train.given

    def network(self) -> tuple[nn.Module, str]:
        """The trained network in evaluation mode, and the name of its head."""
        model = cases.loaded(self.case, self.trained.weights)
        return model, models.find_head(model, classes=self.data.classes)

    def images(self) -> Tensor:
        """[n, channels, height, width] the training images as the network takes them."""
        return torch.cat(list(cases.inputs(self.case, self.data.train)))


def context(case: Case, folder: Path) -> Context:
    """All that the baselines need of a case; what takes long is kept in `folder`."""
    data = cases.load(case)
    return Context(case, data, cases.trained(case, data, folder), cases.out_of_sample(case, data, folder))


def package(name: str) -> Any:
    """The module of that name. Raises ModuleNotFoundError, with what to install, where it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the benchmark's baselines need {error.name}, which is not installed; pip install 'posttrain[benchmark]'",
            name=error.name,
        ) from error


# -- cleanlab: out-of-sample probabilities -----------------------------------------------------------------


def confident_learning(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n] and the mask [n] of `cleanlab.filter.find_label_issues` with its default filter.

    The default is `prune_by_noise_rate`: of each pair of classes, as many samples as the confident joint says. What it
    flags goes before everything else; within both groups the order is that of the `normalized_margin`
    quality, which is (p_y - max_{c != y} p_c + 1) / 2: the score is 2 * flagged - quality.
    """
    issues, rank = package("cleanlab.filter"), package("cleanlab.rank")
    probabilities = probabilities.astype(np.float64)
    # one process: forking beside torch's threads can hang
    flagged = issues.find_label_issues(labels, probabilities, n_jobs=1)
    quality = rank.get_label_quality_scores(labels, probabilities, method="normalized_margin")
    return 2.0 * flagged - quality, flagged


def self_confidence(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scores [n]: minus cleanlab's `self_confidence` quality, the probability of the given label."""
    rank = package("cleanlab.rank")
    return -rank.get_label_quality_scores(labels, probabilities.astype(np.float64), method="self_confidence")


def cross_validated(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[n, classes] out-of-sample probabilities by five-fold logistic regression on standardised features [n, d]."""
    model = LogisticRegression(C=1 / (len(labels) * 0.01), max_iter=300)
    probabilities: Any = cross_val_predict(model, features, labels, cv=5, method="predict_proba")
    return probabilities


def suggested(probabilities: np.ndarray) -> np.ndarray:
    """[n] the most probable class: the label that cleanlab would put in place of the given one."""
    return probabilities.argmax(axis=1)


def by_confident_learning(context: Context) -> Measured:
    """`confident_learning` on the out-of-sample probabilities, whose training is most of its cost."""
    return _after_folds(context, lambda: confident_learning(context.out_of_sample.probabilities, context.given))


def by_self_confidence(context: Context) -> Measured:
    """`self_confidence` on the out-of-sample probabilities, whose training is most of its cost."""
    return _after_folds(context, lambda: (self_confidence(context.out_of_sample.probabilities, context.given), None))


def _after_folds(context: Context, rank: Callable[[], tuple[np.ndarray, np.ndarray | None]]) -> Measured:
    package("cleanlab.filter")
    began = time.perf_counter()
    scores, flagged = rank()
    seconds = time.perf_counter() - began + context.out_of_sample.seconds
    # each fold's network sees the other folds; its epochs are taken to be those of the case's network
    passes = 3.0 * (cases.FOLDS - 1) * context.trained.epochs + 1
    return Measured(scores, seconds, passes, flagged)


# -- captum: TracIn ----------------------------------------------------------------------------------------


def tracin_self_influence(
    model: nn.Module, head: str, images: Tensor, labels: np.ndarray, checkpoints: Sequence[tuple[bytes, float]]
) -> np.ndarray:
    """[n] by captum's TracInCPFast: the sum over (weights, learning rate) of rate * ||r_i||^2 ||h_i||^2.

    r_i is the gradient of the sample's cross-entropy by the logits, h_i the head's input. The head's bias does
    not count: captum leaves it out. The model stays in the mode it is in, and ends with the last weights.
    """
    captum = package("captum.influence")

    def load(model: nn.Module, checkpoint: tuple[bytes, float]) -> float:
        weights, rate = checkpoint
        load_bytes(model, weights)
        return rate

    found = captum.TracInCPFast(
        model=model,
        final_fc_layer=models.head_of(model, head),
        train_dataset=_dataset(images, labels),
        checkpoints=list(checkpoints),
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=BATCH,
    )
    return found.self_influence(outer_loop_by_checkpoints=True).detach().double().numpy()


def by_tracin(context: Context) -> Measured:
    """`tracin_self_influence` over the checkpoints of the training, the finished network among them.

    Needs checkpoints, thus a training that was watched: a network alone is not enough. Each is weighted by the
    learning rate of its moment; that the optimiser is AdamW, not SGD as in TracIn's derivation, is disregarded.
    """
    package("captum.influence")
    model, head = context.network()
    images, checkpoints = context.images(), _checkpoints(context)
    began = time.perf_counter()
    scores = tracin_self_influence(model, head, images, context.given, checkpoints)
    return Measured(scores, time.perf_counter() - began, float(len(checkpoints)))


def _checkpoints(context: Context) -> list[tuple[bytes, float]]:
    trained, training = context.trained, cases.DATASETS[context.case.dataset].training[context.case.network]
    # as cases.train keeps them
    every = max(1, training.epochs // 6)
    kept = [(weights, every * (number + 1)) for number, weights in enumerate(trained.checkpoints)]
    share = 1.0 if training.schedule == "cosine" else 0.0
    found = [
        (weights, training.learning_rate * 0.5 * (1 + math.cos(math.pi * share * epoch / training.epochs)))
        for weights, epoch in [*kept, (trained.weights, trained.epochs)]
    ]
    # at the end of a cosine the rate is 0, and the checkpoint would be a pass for nothing
    return [(weights, rate) for weights, rate in found if rate > 0]


# -- kronfluence: EKFAC ------------------------------------------------------------------------------------


def ekfac_self_influence(
    model: nn.Module, head: str, images: Tensor, labels: np.ndarray, *, seed: int, l2: float | None = 1e-8
) -> np.ndarray:
    """[n] by kronfluence: g_i^T (G + l2 I)^-1 g_i of the head's parameters, G the Fisher information as EKFAC.

    The Fisher's labels are drawn from the model's predictions with the seed. The l2 is kronfluence's own by
    default; None is a tenth of G's mean eigenvalue, as Grosse et al. (2023) choose it. Float32 on the CPU. The model
    is left wrapped by kronfluence: take a fresh one for anything else.
    """
    analysis, arguments, task = (package(f"kronfluence.{name}") for name in ("analyzer", "arguments", "task"))

    class Classification(task.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, targets = batch
            logits = model(inputs)
            if sample:
                targets = logits.detach().softmax(dim=1).multinomial(1)[:, 0]
            return cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [head]

    todo = Classification()
    dataset = _dataset(images, labels)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # a name of torch that kronfluence 1.0.1 still uses
        warnings.filterwarnings("ignore", message=".*GradScaler", category=FutureWarning)
        torch.manual_seed(seed)
        analyzer = analysis.Analyzer(
            "peer", analysis.prepare_model(model, todo), todo, cpu=True, disable_tqdm=True, output_dir=folder
        )
        analyzer.fit_all_factors(
            "ekfac", dataset, per_device_batch_size=BATCH, factor_args=arguments.FactorArguments(strategy="ekfac")
        )
        analyzer.compute_self_scores(
            "self",
            "ekfac",
            dataset,
            per_device_train_batch_size=BATCH,
            score_args=arguments.ScoreArguments(damping_factor=l2),
        )
        return analyzer.load_self_scores("self")["all_modules"].double().numpy()


def by_ekfac(context: Context) -> Measured:
    """`ekfac_self_influence` of the trained network: a pass for the covariances, the eigenvalues, the scores each.

    kronfluence collects Python's garbage after each step: seconds that do not depend on the number of samples.
    """
    package("kronfluence.analyzer")
    model, head = context.network()
    images = context.images()
    began = time.perf_counter()
    scores = ekfac_self_influence(model, head, images, context.given, seed=context.case.seed)
    return Measured(scores, time.perf_counter() - began, 3.0)


# -- without a package -------------------------------------------------------------------------------------


def by_aum(context: Context) -> Measured:
    """Minus the margin of the given label's logit, averaged over the training (AUM).

    Costs nothing more, but has to be recorded while the network is trained: of a network alone it is not to be had.
    Raises ValueError where the training was not watched.
    """
    if context.trained.aum is None:
        raise ValueError(f"{context.case}: the training was not watched, AUM is not known; train with watch=True")
    return Measured(-context.trained.aum.astype(np.float64), 0.0, 0.0)


def neighbour_disagreement(features: np.ndarray, labels: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """[n] share of the nearest other samples with another label, each weighted by its cosine similarity.

    Similarities that are not positive count as next to nothing, and all alike.
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=neighbours, metric="cosine", algorithm="brute").fit(features)
    # without an argument: a sample is not its own neighbour
    distances, at = index.kneighbors()
    weights = np.maximum(1.0 - distances, 1e-12).astype(np.float64)
    return (weights * (labels[at] != labels[:, None])).sum(axis=1) / weights.sum(axis=1)


def by_neighbours(context: Context) -> Measured:
    """`neighbour_disagreement` of the 10 nearest in the features that go into the trained network's head."""
    from sklearn import neighbors  # noqa: F401  loaded before the clock starts

    model, head = context.network()
    images = context.images()
    began = time.perf_counter()
    features = torch.cat([features_and_logits(model, head, batch)[0] for batch in images.split(BATCH)])
    scores = neighbour_disagreement(features.numpy(), context.given)
    return Measured(scores, time.perf_counter() - began, 1.0)


def at_random(context: Context) -> Measured:
    """The control: numbers drawn with the case's seed."""
    return Measured(np.random.default_rng([context.case.seed, 3]).random(len(context.given)), 0.0, 0.0)


def _dataset(images: Tensor, labels: np.ndarray) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(images, torch.from_numpy(labels))


PEERS: dict[str, Callable[[Context], Measured]] = {
    "confident_learning": by_confident_learning,
    "self_confidence": by_self_confidence,
    "tracin": by_tracin,
    "ekfac": by_ekfac,
    "aum": by_aum,
    "knn": by_neighbours,
    "random": at_random,
}
