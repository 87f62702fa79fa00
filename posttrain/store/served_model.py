"""The refined model as MLflow serves it: MLflow runs a copy of this file to load the logged model.

The model is built by its factory, and its weights come from a safetensors file: nothing is unpickled.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

_BATCH = 256


class PosttrainModel(PythonModel):
    """Class probabilities for images."""

    def load_context(self, context: Any) -> None:
        """Build the model from the logged recipe and weights (`logged_model.log_model`)."""
        # here, not above: MLflow also runs this file to log the model, which needs no torch
        from posttrain.vision.models import build, load_weights

        self.recipe: dict[str, Any] = context.model_config
        self.model = build(self.recipe["factory"], classes=self.recipe["classes"], arguments=self.recipe["arguments"])
        load_weights(self.model, Path(context.artifacts["weights"]))
        self.model.eval()

    # MLflow does not enforce this type: a list or an array is accepted, too. Without a type it warns.
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """[n, classes] float32 probabilities.

        model_input: n images in a data frame (its column `image`, else its first), a list or an array; each image is
        encoded (bytes, or a base64 string for JSON) or a uint8 array. Raises ValueError naming the row of an unreadable
        image.
        """
        import torch

        from posttrain.vision.images import UnreadableImage, decode, normalize

        image = self.recipe["image"]
        if isinstance(model_input, pd.DataFrame):
            cells = list(model_input["image" if "image" in model_input else model_input.columns[0]])
        else:
            cells = list(model_input)
        shape = tuple(image["shape"]) if image["shape"] else None
        probabilities = np.empty((len(cells), self.recipe["classes"]), dtype=np.float32)
        for start in range(0, len(cells), _BATCH):
            pixels = []
            for row, cell in enumerate(cells[start : start + _BATCH], start):
                try:
                    cell = base64.b64decode(cell, validate=True) if isinstance(cell, str) else cell
                    pixels.append(decode(cell, channels=image["channels"], size=tuple(image["size"]), shape=shape))
                except (UnreadableImage, ValueError) as error:
                    raise ValueError(f"image {row} cannot be read: {error}") from error
            with torch.inference_mode():
                batch = normalize(torch.stack(pixels), tuple(image["mean"]), tuple(image["std"]))
                probabilities[start : start + len(pixels)] = self.model(batch).softmax(dim=1).numpy()
        return probabilities


set_model(PosttrainModel())
