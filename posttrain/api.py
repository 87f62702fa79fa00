"""The public functions besides `find_label_issues`: on a torch module and data sets, and whole runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.config import JobFile, RunFile
from posttrain.errors import ConfigError, DataError
from posttrain.store.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn
    from torch.utils.data import Dataset

    from posttrain.label_issues import LabelIssues


@dataclass(frozen=True, eq=False)
class Result:
    """What cleaning left behind."""

    model: nn.Module
    """The refined model, on the CPU, in evaluation mode."""
    removed: pd.DataFrame
    """A row for each removed sample, with its label, the suggested one, scores and the reason."""
    summary: Mapping[str, Any]
    """The figures of the summary table, and for a run its files."""
    issues: LabelIssues | None = field(default=None, repr=False)
    """Of `clean(model=...)` alone: what it found, sample by sample."""


def load(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunFile:
    """The run file at a path, checked; the embedded digits run without one. One with a section `job` is a JobFile.

    `overrides`: values by dotted key, as `{"removal.budget": 0.03}`. Raises ConfigError, with every complaint.

    >>> import posttrain
    >>> posttrain.load(overrides={"removal.budget": 0.03}).removal.budget
    0.03
    """
    from posttrain import config
    from posttrain.config import yaml

    # as the command's --set takes them
    given = [
        f"{key}={yaml.dump(value).removesuffix('...' + chr(10)).strip()}" for key, value in (overrides or {}).items()
    ]
    return config.load_either(path, given, given_by="overrides")


def clean(
    config: RunFile | str | Path | None = None,
    *,
    model: nn.Module | None = None,
    train: Dataset[Any] | None = None,
    validation: Dataset[Any] | None = None,
    path: str | Path | None = None,
    verbose: bool = False,
    quiet: bool = True,
    **options: Any,
) -> Result:
    """A clean data set and a better model: by a run file, or from a torch module and data sets.

    `clean(config)`, with a run file or its path, does what `posttrain clean` does, on Ray, with checkpoints in
    `run.path`: called again, it goes on where it was. It takes its settings from the run file alone; `load` takes
    others. Progress goes to standard error; `quiet=False` prints the summary table, `verbose` Ray's own messages.

    `clean(model=..., train=..., validation=...)` finds label issues as `find_label_issues_with` does, with the same
    `options`, in this process, and gives the model the boundary that was fitted on what is left as its new head.
    The model stays as it came where that is clearly better by its accuracy on `validation`, and, where nothing was
    removed, unless the boundary is clearly better: by more than two standard errors of a difference.
    With `path` it writes `removed.csv`, `summary.json` and `model.safetensors` into that folder; it keeps no
    checkpoints.

    Raises PosttrainError (see `posttrain.errors`).
    """
    if (config is None) == (model is None):
        raise DataError("give clean either a run file (posttrain.load) or model=, train= and validation=")
    if config is not None:
        config = load(config) if isinstance(config, str | Path) else config
        if not isinstance(config, RunFile):
            raise ConfigError(
                f"clean takes a run file (posttrain.load) or its path, and was given a {type(config).__name__}; a "
                "model is given as model="
            )
        others = {"train": train, "validation": validation, "path": path}
        if given := [*(name for name, value in others.items() if value is not None), *options]:
            raise ConfigError(
                f"clean(config) does not take {', '.join(given)}: its settings are those of the run file; change them "
                "with load(path, {'removal.budget': 0.03})"
            )
        return _clean_run(config, verbose=verbose, quiet=quiet)
    assert model is not None
    if verbose or not quiet:
        raise ConfigError("clean(model=...) prints nothing: verbose and quiet belong to clean(config)")
    if train is None or validation is None:
        raise DataError(
            "clean(model=...) needs train= and validation=, data sets; the model must not have seen the latter"
        )
    return _clean_model(model, train, validation, path, options)


def _clean_run(config: RunFile, *, verbose: bool, quiet: bool) -> Result:
    import safetensors.torch

    from posttrain.config import yaml
    from posttrain.runs.clean import clean
    from posttrain.vision import models
    from posttrain.vision.weights import load_bytes

    summary = clean(config, verbose=verbose, quiet=quiet)
    folder = RunFolder(config.run.path)
    section = yaml.load(folder.read_bytes(folder.path("model.yaml")), where="model.yaml")["model"]
    removed = folder.read_table(folder.path("removed.parquet")).to_pandas()
    weights = folder.read_bytes(folder.path("model.safetensors"))
    # the file says of how many classes: those of the head
    classes = len(safetensors.torch.load(weights)[f"{section['head']}.weight"])
    network = models.build(section["factory"], classes=classes, arguments=section["arguments"])
    load_bytes(network, weights)
    return Result(network.eval(), removed, summary)


def _clean_model(
    model: nn.Module, train: Dataset[Any], validation: Dataset[Any], path: str | Path | None, options: dict[str, Any]
) -> Result:
    import json

    from posttrain import policy, torch_datasets
    from posttrain.vision.weights import to_bytes

    issues = find_label_issues_with(model, train, validation=validation, **options)
    loading = {"batch_size": options.get("batch_size", 256), "num_workers": options.get("num_workers", 0)}
    before = torch_datasets.accuracy(model, validation, **loading)
    rounds, probes = len(issues.rounds) - 1, issues.rounds[-1]["validation_accuracy"]
    # as map-style data sets, they have a length
    replaced = policy.probes_become_head(rounds, before, probes, len(validation))  # pyright: ignore[reportArgumentType]
    refined = copy.deepcopy(model).cpu().eval()
    if replaced:
        refined = _with_probes_as_head(refined, train, issues, options)
    removed = issues.to_frame().loc[issues.is_issue]
    summary = {
        "rounds": rounds,
        "ended": issues.ended,
        "live": len(issues) - len(removed),
        "removed": len(removed),
        "noise": {"rate": issues.noise.rate, "low": issues.noise.low, "high": issues.noise.high},
        "head_replaced": replaced,
        "validation_accuracy_before": before,
        "validation_accuracy_boundary": issues.rounds[0]["validation_accuracy"],
        "validation_accuracy_after": probes if replaced else before,
    }
    if path is not None:
        folder = RunFolder(str(path))
        folder.write_bytes(folder.path("removed.csv"), removed.to_csv().encode())
        folder.write_bytes(folder.path("model.safetensors"), to_bytes(refined))
        folder.write_bytes(folder.path("summary.json"), json.dumps(summary, indent=2).encode())
    return Result(refined, removed, summary, issues)


def _with_probes_as_head(
    model: nn.Module, train: Dataset[Any], issues: LabelIssues, options: Mapping[str, Any]
) -> nn.Module:
    """The model, changed in place, with the probes that were fitted on what is left in place of its head."""
    import torch

    from posttrain.torch_datasets import sample
    from posttrain.vision import models
    from posttrain.vision.probed_network import ProbedNetwork

    head = models.find_head(model, classes=len(issues.classes), name=options.get("head"))
    weight, bias = issues.probe.linear()
    layers = [name for name, _ in issues.probe.layers]
    if layers == [head]:
        models.replace_head(model, head, weight.float(), bias.float())
        return model
    example = torch.stack([sample(train, 0)[0]] * 2)
    width = options.get("max_features", 256)
    probed = ProbedNetwork(model, head, layers, width, len(issues.classes), example).eval()
    models.replace_head(probed, "probe", weight.float(), bias.float())
    return probed


def find_label_issues_with(
    model: nn.Module,
    train: Dataset[Any],
    *,
    validation: Dataset[Any] | None = None,
    head: str | None = None,
    layers: tuple[str, ...] | None = None,
    max_features: int = 256,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = True,
    **options: Any,
) -> LabelIssues:
    """`find_label_issues` on the features of a torch classifier's own layers; `options` are that function's.

    `train` and `validation`: map-style data sets of pairs (float tensor, label), as torch's and torchvision's are with
    their transform, or of dicts with an image and a label, as Hugging Face's are with `set_transform`. The model must
    not have been trained on `validation`; without one, samples are judged out-of-fold, and what the model has memorised
    goes unseen. Labels are class numbers in the order of the model's outputs.

    The model computes on the device where its parameters are, one pass over each data set, and is in evaluation mode
    afterwards. `head`: dotted name of the last Linear; `layers`: where to try probes, None: found automatically;
    `max_features` of a layer other than the head's input. `num_workers`: processes that load samples.

    Raises ModelError where the model has no such head or layers, DataError for samples that it cannot take.
    """
    from posttrain import torch_datasets
    from posttrain.label_issues import find_label_issues, shown

    classes = torch_datasets.count_outputs(model, train)
    name, found = torch_datasets.find_layers(model, train, classes=classes, head=head)

    def embedded(of: str, dataset: Dataset[Any]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        with shown(progress) as tell:
            return torch_datasets.embed(
                model,
                dataset,
                head=name,
                layers=layers or found,
                max_features=max_features,
                batch_size=batch_size,
                num_workers=num_workers,
                tell=lambda done, total: tell(f"embedding {of}: {done:,} of {total:,}"),
            )

    features, labels = embedded("train", train)
    torch_datasets.refuse_other_classes(labels, classes)
    of_validation = None if validation is None else embedded("validation", validation)
    return find_label_issues(features, labels, validation=of_validation, progress=progress, **options)


def tune(config: RunFile, *, verbose: bool = False, quiet: bool = True) -> Mapping[str, Any]:
    """A search for the cleaning recipe by the section `search` of a run file, as `posttrain tune`; its summary."""
    from posttrain.search.tune import tune

    return tune(config, verbose=verbose, quiet=quiet)


def retrain(config: RunFile, *, accept: bool = False, verbose: bool = False, quiet: bool = True) -> Mapping[str, Any]:
    """One start of a scheduled job, as `posttrain retrain`; its summary, with `outcome`, `reason` and `exit_code`."""
    from posttrain.jobs.retrain import retrain

    if not isinstance(config, JobFile):
        raise ConfigError("a job needs the section job in its run file, with job.name: see posttrain schema --job")
    return retrain(config, accept=accept, verbose=verbose, quiet=quiet)
