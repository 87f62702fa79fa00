"""What a search comes to: the best trial, its recipe as a run file, and the summary of all trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from posttrain import policy
from posttrain.config import RunFile, Search, dump, without_credentials, without_marks, without_secrets, yaml
from posttrain.errors import StepError
from posttrain.schema import Round
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger

if TYPE_CHECKING:
    from posttrain.search.trial import Trial

METRICS = ("validation_accuracy", "validation_loss")


@dataclass(frozen=True)
class Result:
    """A trial at its end."""

    trial: Trial
    history: Sequence[Round]
    how: str
    why: str

    def summary(self, varied: Sequence[str]) -> dict[str, Any]:
        """Its figures, with its values for the varied keys."""
        last = self.history[-1] if self.history else None
        return {
            "number": self.trial.number,
            "values": {key: _value(self.trial.config, key) for key in varied},
            "rounds": policy.rounds_that_acted(self.history),
            "live": last.live if last else None,
            "removed": sum(done.removed for done in self.history),
            "relabelled": sum(done.relabelled for done in self.history),
            **{name: last.metrics[name] if last else None for name in METRICS},
            "how": self.how,
            "ended": self.why,
        }

    def rank(self, metric: str) -> tuple[float, float, int, int]:
        """Lower is better: by the metric after the last round, by the loss, by how many samples were acted on."""
        last = self.history[-1].metrics
        first = -last[metric] if metric == "validation_accuracy" else last[metric]
        acted_on = sum(done.removed + done.relabelled for done in self.history)
        return first, last["validation_loss"], acted_on, self.trial.number


def result_of(trial: Trial) -> Result:
    """The result of a trial that is at its end."""
    end = trial.ended()
    assert end is not None, "the search ends with its trials"
    return Result(trial, trial.ledger.rounds(), **end)


def best_of(results: Sequence[Result], metric: str) -> Result:
    """The best of the trials that ran to their end. Raises StepError where none did."""
    finished = [result for result in results if result.how == "finished"]
    if not finished:
        raise StepError(f"no trial ran to its end; trial 0: {results[0].why}")
    return min(finished, key=lambda result: result.rank(metric))


def _value(config: RunFile, key: str) -> JsonValue:
    section, _, name = key.partition(".")
    return config.model_dump(mode="json")[section][name]


def write_best(config: RunFile, trial: Trial, digests: Mapping[str, str], first: bytes) -> str:
    """`best.yaml`: the run file with the trial's values, which `posttrain clean` takes as it is; its path.

    `digests`: of the data. `first`: the weights that all trials started from.
    """
    folder = RunFolder(config.run.path)
    run_path = folder.absolute.beneath("best").location
    recipe = config.with_values(trial.values)
    rays = recipe.ray
    if recipe.refine.scope != "head" and (rays.train_workers or 0) > 1:
        # as in the trial: several would share out the batches in another way
        rays = rays.model_copy(update={"train_workers": 1})
    run = config.run.model_copy(update={"path": run_path})
    recipe = recipe.model_copy(update={"run": run, "search": Search(), "ray": rays})
    if config.model.weights is None:
        # trained once for all trials: the run goes on from there
        best = Ledger(RunFolder(run_path))
        if best.started() is None:
            best.start(recipe, dict(digests))
        best.folder.write_bytes(best.folder.path("pretrained", "model.safetensors"), first)
    search = without_credentials(config.run.path)
    text = f"# Written by posttrain tune: the best recipe of {search}, trial {trial.number}.\n"
    record = yaml.load(dump(recipe), where="the recipe")
    del record["search"]
    if without_secrets(record) != record:
        record = without_marks(without_secrets(record))
        text += "# Users, passwords and keys of its URIs are left out: add them, or leave them to the environment\n"
        text += "# (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, AWS_ACCESS_KEY_ID and the like).\n"
    path = folder.path("best.yaml")
    folder.write_bytes(path, (text + yaml.dump(record)).encode())
    return path
