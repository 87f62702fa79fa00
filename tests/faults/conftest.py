"""What the workers of Ray need to know."""

from __future__ import annotations

import os
from pathlib import Path

# before any Ray starts: its workers are to find the network of these tests
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
