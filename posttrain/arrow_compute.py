"""Arrow's compute functions, `pc`, as a type checker takes them: pyarrow makes them when it is imported."""

from __future__ import annotations

from typing import Any, cast

import pyarrow.compute

pc = cast(Any, pyarrow.compute)
