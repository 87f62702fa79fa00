"""The sections `probe` and `removal` of a run file: how wrong labels are found, and what is done about them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from posttrain.config.section import Positive, Section, Text


def _l2_values(value: object) -> object:
    return (value,) if isinstance(value, int | float | str) and not isinstance(value, bool) else value


def _layer_names(value: object) -> object:
    return (value,) if isinstance(value, str) and value not in ("auto", "last") else value


class Probe(Section):
    """The linear probes: softmax regressions that are fitted on the frozen features of the network's layers."""

    l2: Annotated[
        tuple[Positive, ...],
        Field(min_length=1),
        BeforeValidator(_l2_values, json_schema_input_type=Positive | tuple[Positive, ...]),
    ] = (1.0, 0.1, 0.01)
    """L2 penalty of a probe, on standardised features, or a list of penalties: each layer takes the one with the
    lowest cross-entropy on the validation labels."""
    layers: Annotated[
        Annotated[tuple[Text, ...], Field(min_length=1)] | Literal["auto", "last"],
        BeforeValidator(_layer_names, json_schema_input_type=Text | tuple[Text, ...]),
    ] = "auto"
    """Layers to fit probes on: their dotted names (input: the image itself; the head's name: what goes into the head).
    auto: found automatically. last: only what goes into the head. The probes of the best layers together form the
    decision boundary."""
    max_features: int = Field(default=256, ge=8)
    """Largest number of features of a layer: a wider one is averaged over pixels and projected. What goes into the head
    is never reduced."""
    curvature: Literal["auto", "exact", "ekfac"] = "auto"
    """Hessian of the probe's loss. exact: the full matrix. ekfac: a Kronecker-factored approximation, for any size.
    auto: exact up to `exact_limit`."""
    exact_limit: int = Field(default=2048, ge=0)
    """Largest number of probe parameters (features x classes) for which auto takes the exact curvature."""


class Removal(Section):
    """Which samples are removed, how many in one round, and when the run stops."""

    score: Literal["mislabel_odds", "loo_margin", "parameter", "data", "loss", "margin", "gradient_norm", "random"] = (
        "mislabel_odds"
    )
    """What samples are ranked by. mislabel_odds: odds that the given label is wrong, from the leave-one-out prediction
    and the estimated label noise. loo_margin: leave-one-out margin, positive where a boundary fitted without the sample
    contradicts its label. parameter: influence on the probe's weights. data: influence on the other samples'
    predictions. loss, margin, gradient_norm: of the given label, with the sample in the fit. random: the control."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """A sample is removed only if the probability that its label is wrong is above this: 0.5 means more likely wrong
    than right; with 1, none is removed. It applies to every score but random."""
    max_share: Annotated[float, Field(ge=0, le=1)] | Literal["estimated"] = "estimated"
    """Largest share of the samples removed in all rounds together. estimated: the upper end of the 99.9 % interval of
    the estimated share of wrong labels, and 0 where there is no sign of wrong labels."""
    action: Literal["remove", "relabel"] = "remove"
    """remove: selected samples are removed. relabel: a selected sample whose suggested label is certain enough gets
    that label and stays; the others are removed."""
    relabel_above: float = Field(default=0.95, gt=0, le=1)
    """A selected sample is relabelled if its suggested label has at least this confidence (action relabel only)."""
    budget: float = Field(default=0.05, gt=0, lt=1)
    """Largest share of the live samples removed or relabelled in one round."""
    class_floor: float = Field(default=0.1, ge=0, le=1)
    """Smallest share of its initial samples that each class keeps; a class keeps at least one sample in any case."""
    max_rounds: int = Field(default=10, ge=1)
    """Largest number of rounds."""
    min_share: float = Field(default=0.002, ge=0, lt=1)
    """The run stops when fewer than this share of the live samples are candidates for removal."""
    patience: int = Field(default=2, ge=1)
    """The run stops after so many rounds in a row whose validation accuracy is more than two standard errors below the
    best one."""

    @property
    def min_log_odds(self) -> float:
        """`threshold` as log odds."""
        if self.threshold in (0, 1):
            return math.inf if self.threshold else -math.inf
        return math.log(self.threshold / (1 - self.threshold))
