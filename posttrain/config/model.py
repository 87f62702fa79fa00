"""The sections `model`, `pretrain` and `refine` of a run file: the network, and how it is trained."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from posttrain.config.section import Section, Text
from posttrain.methods import BOUNDS, METHODS, Method

Byte = Annotated[int, Field(ge=0, le=255)]


class Model(Section):
    """The trained model: how to build it, its weights, and the images that it expects."""

    factory: Text = "posttrain.vision.models:mlp"
    """Name of a torchvision model (resnet18), or your own function (package.module:function). It is called with
    classes=<number of classes> and the arguments below, and returns the module."""
    arguments: dict[str, JsonValue] = Field(default={})
    """Further keyword arguments of the factory."""
    weights: Text | None = None
    """A state_dict (.pt, .pth), a safetensors file, or an MLflow model (models:/..., runs:/...). null:
    posttrain trains the model first."""
    initial_weights: Text | None = None
    """The weights that the training of this model began with, such as pre-trained ones: as in weights, or factory, for
    those that the factory builds it with. posttrain's own training begins with them, and refine.scope auto trains the
    network again from them. null: those of the factory where weights is null, else not known."""
    head: Text | None = None
    """Dotted name of the last Linear module. null: found automatically."""
    channels: Literal[1, 3] = 1
    """Channels that the model expects: 1 (grey) or 3 (RGB)."""
    image_size: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 8
    """Pixels that the model expects: one number for squares, or height and width."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from pixels scaled to 0..1: one number, or one per channel."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    """Then pixels are divided by this: one number, or one per channel."""
    background: Byte | tuple[Byte, Byte, Byte] = 255
    """Colour behind images with an alpha channel, as the model was trained: a grey (0 is black, 255 white), or red,
    green and blue."""

    @field_validator("weights", "initial_weights")
    @classmethod
    def _weights_of_a_known_kind(cls, weights: str | None, info: ValidationInfo) -> str | None:
        if info.field_name == "initial_weights" and weights == "factory":
            return weights
        if weights is None or re.match(r"(models|runs):/", weights):
            return weights
        if "://" in weights:
            raise ValueError(
                "should be a path on the machine that posttrain is started on (copy the file there), or an MLflow URI "
                "(models:/..., runs:/...)"
            )
        if not re.search(r"\.(pt|pth|safetensors)$", weights):
            raise ValueError("should be a .pt, .pth or .safetensors file or an MLflow URI (models:/..., runs:/...)")
        return weights

    @model_validator(mode="after")
    def _one_mean_per_channel(self) -> Self:
        for key in ("mean", "std"):
            given = len(getattr(self, key))
            if given not in (1, self.channels):
                raise ValueError(
                    f"model.{key} has {given} values, and model.channels is {self.channels}: give one value"
                    + (" per channel, or one for all" if self.channels > 1 else "")
                )
        return self


Augment = Literal["none", "crop_flip", "crop"]


class Training(Section):
    """How a network is trained; the sections pretrain and refine share these keys."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training data."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per step, over all workers."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Learning rate at the start."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd; adamw ignores it."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay of the optimizer."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (with Nesterov momentum where momentum is above 0) or adamw."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over time. constant, or cosine: it falls to 0 over all steps."""
    method: Method = "cross_entropy"
    """What is minimised, to learn with noisy labels: cross_entropy, label_smoothing, mixup, gce (generalised
    cross-entropy), sce (symmetric cross-entropy), bootstrapping, elr (early-learning regularisation), forward (loss
    correction with the estimated transition matrix), co_teaching (two networks that choose samples for each other), sop
    (sparse over-parameterisation)."""
    method_arguments: dict[str, float] = Field(default={})
    """Arguments of the method, in place of those of its paper: smoothing (label_smoothing), alpha (mixup), q (gce),
    alpha, beta and log_zero (sce), beta (bootstrapping), strength and momentum (elr), ramp (co_teaching), rate_u and
    rate_v (sop)."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay, by step, of a moving average of the weights, which training leaves behind. null: the last weights."""

    @field_validator("method_arguments")
    @classmethod
    def _arguments_of_the_method(cls, arguments: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        method = info.data.get("method")
        if method is None:  # refused itself
            return arguments
        known = METHODS[method]
        for name, value in arguments.items():
            if name not in known:
                has = f"has {' and '.join(known)}" if known else "has none"
                raise ValueError(f"{name} is no argument of method = {method}, which {has}")
            words, holds = BOUNDS[method][name]
            if not holds(value):
                raise ValueError(f"{name} should be {words} with method = {method}")
        return arguments


class Pretrain(Training):
    """Training the model where no weights are given, and training it again (refine.scope auto)."""

    epochs: int = Field(default=200, ge=1)
    """Largest number of passes over the training data."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per step, over all workers."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Learning rate at the start."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """sgd (with Nesterov momentum where momentum is above 0) or adamw."""
    augment: Augment = "none"
    """Augmentation of the training images: none, crop (random shifts), crop_flip (random shifts and mirroring)."""
    until_train_accuracy: float | None = Field(default=0.995, gt=0, le=1)
    """Stop after the epoch that reaches this accuracy on the given labels. null: train all epochs."""


class Refine(Training):
    """Refining the model after each removal."""

    scope: Literal["auto", "head", "network", "both"] = "auto"
    """What is retrained on the samples that are left. head: the decision boundary fitted to them becomes the new head;
    the other keys of this section have no effect. auto: rounds as with head, and at the end what does best on the
    validation labels, corrected for their noise, is delivered: the model as it came, the boundary with nothing removed
    or on what is left, and, where the weights that its training began with are known (model.initial_weights, or
    posttrain trained it), the network refined by this section or trained again by the section pretrain, each with a
    boundary of its own; gce stands in for method cross_entropy. While a boundary on the network trained again is
    better, the rounds go on with its features. network: the whole network is trained in every round.
    both: as network, and at the end the boundary becomes its new head, unless it does worse on validation labels. If
    nothing was removed, head and both change the head only if that is clearly better."""
    augment: Augment | None = None
    """Augmentation of the training images: none, crop (random shifts), crop_flip (random shifts and mirroring). null:
    as in pretrain, where posttrain trains the model itself; else crop_flip."""

    @property
    def keeps_backbone(self) -> bool:
        """Whether the rounds change nothing but the head."""
        return self.scope in ("auto", "head")
