"""What becomes of bad input, as a table: `PYTHONPATH=tests python -m harness.bad_input` writes bad_input.md.

`tests/end_to_end/test_wrong_input.py` checks every line of it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from pathlib import Path

from harness import RESULTS, python_path
from harness.bad_rows import Outcome, run_rows
from harness.refusals import REFUSALS, refused
from harness.workshop import Workshop

_HEAD = """\
# Bad input

`PYTHONPATH=tests python -m harness.bad_input`

{inputs} inputs of {kinds} kinds: {counts}.
What is refused ends with exit code 2 and this one sentence, and no run folder is made; what is
quarantined is a row of `quarantine.parquet` with this reason, and the run goes on.

| kind | what was given | outcome | message |
| --- | --- | --- | --- |
"""


def table(outcomes: list[Outcome]) -> str:
    """The table in Markdown."""
    counts = Counter(one.outcome for one in outcomes)
    text = _HEAD.format(
        inputs=len(outcomes),
        kinds=len({one.kind for one in outcomes}),
        counts=", ".join(f"{counts[name]} {name}" for name in ("taken", "quarantined", "refused")),
    )
    for one in outcomes:
        row = " | ".join((one.kind, one.given, one.outcome, one.message.replace("|", "\\|")))
        text += f"| {row} |\n".replace("<", "&lt;").replace("*", "\\*")
    return text


def main() -> None:
    os.environ["PYTHONPATH"] = python_path()  # before Ray starts its workers
    from posttrain.cluster.session import session
    from posttrain.report.visible import visible

    with tempfile.TemporaryDirectory() as folder, session(num_cpus=2, object_store_gb=0.5):
        workshop = Workshop(Path(folder))
        outcomes = run_rows(workshop, Path(folder, "run"))
        for refusal in REFUSALS:
            _, said, _ = refused(workshop, refusal)
            message = visible(re.sub(rf"{re.escape(folder)}/(\d\d\d-)?", "", said.removeprefix("error: ")))
            outcomes.append(Outcome(refusal.kind, refusal.given, "refused", message))
    (RESULTS / "bad_input.md").write_text(table(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
