"""Removes the user names, passwords and keys of URIs from texts and records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(
    r"((?:password|passwd|pwd|secret|token|signature|sig|credential|access_?key)[^=&#\s]*=)[^&#\s]+", re.I
)


def without_credentials(text: str) -> str:
    """The text with `***` in place of the user and password of each URI, and of the secrets in its query."""
    # up to the last @ before the path: a password may hold one
    text = re.sub(r"//[^/?#\s]*@", "//***@", text)
    return re.sub(r"(?<=[?&;])[^\s'\"]+", lambda query: _SECRET.sub(r"\1***", query[0]), text)


def without_secrets(record: Any) -> Any:
    """Nested mappings and lists, with `without_credentials` applied to every text in them."""
    if isinstance(record, Mapping):
        return {key: without_secrets(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [without_secrets(value) for value in record]
    return without_credentials(record) if isinstance(record, str) else record


def without_marks(record: Any) -> Any:
    """The result of `without_secrets` without `***@`, as if the URIs had never held a user and password."""
    return json.loads(json.dumps(record, default=str).replace("//***@", "//"))
