"""posttrain: take a trained model as it is, find the labels that bend its boundary, remove them, refine.

```python
import posttrain

issues = posttrain.find_label_issues(features, labels, validation=(val_features, val_labels))
issues = posttrain.find_label_issues_with(model, train_set, validation=val_set)
result = posttrain.clean(posttrain.load("photos.yaml"))
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.api import Result, clean, find_label_issues_with, load, retrain, tune
    from posttrain.errors import PosttrainError
    from posttrain.label_issues import LabelIssues, find_label_issues

__version__ = "0.1.0"

__all__ = [
    "LabelIssues",
    "PosttrainError",
    "Result",
    "__version__",
    "clean",
    "find_label_issues",
    "find_label_issues_with",
    "load",
    "retrain",
    "tune",
]

# loaded when first asked for: importing posttrain takes no torch, no Ray and no MLflow
_HOMES = {
    "LabelIssues": "posttrain.label_issues",
    "PosttrainError": "posttrain.errors",
    "find_label_issues": "posttrain.label_issues",
    **dict.fromkeys(("Result", "clean", "find_label_issues_with", "load", "retrain", "tune"), "posttrain.api"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
