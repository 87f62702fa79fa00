"""Fuzzing guided by coverage: `python tests/fuzz.py image -max_total_time=60`, targets image, run_file and parquet.

Whatever comes must end in a result or in posttrain's own error; anything else is a finding, and its input is kept as
crash-* in the current folder. Needs atheris (`pip install -e '.[fuzz]'`); options after the target are libFuzzer's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def image() -> Callable[[bytes], None]:
    """Encoded images, by torchvision and by Pillow."""
    from posttrain.vision.images import UnreadableImage, decode

    def one(data: bytes) -> None:
        with contextlib.suppress(UnreadableImage):
            decode(data, channels=1 + 2 * (len(data) % 2), size=(8, 8))

    return one


def run_file() -> Callable[[bytes], None]:
    """The run file."""
    from posttrain.config import load
    from posttrain.errors import ConfigError

    file = Path(tempfile.mkdtemp(), "run.yaml")

    def one(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(ConfigError):
            load(file)

    return one


def parquet() -> Callable[[bytes], None]:
    """What is looked at in a Parquet file before Ray reads it."""
    from posttrain.cluster.reading import ParquetSource, highest_label, list_source, string_labels
    from posttrain.errors import DataError

    file = Path(tempfile.mkdtemp(), "a.parquet")
    source = ParquetSource((str(file),), "id", "image", "label")

    def one(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(DataError):
            list_source(source)
            if string_labels(source) is None:
                highest_label(source)

    return one


TARGETS = {"image": image, "run_file": run_file, "parquet": parquet}


def seeds(target: str) -> Path:
    """A folder with whole inputs to begin from."""
    folder = Path(tempfile.mkdtemp())
    if target == "image":
        from harness.bad_input import ROWS

        contents = [cell for row in ROWS if (cell := row.image()) is not None and len(cell) < 4000]
    elif target == "run_file":
        import pipelines

        configs = Path(pipelines.__file__).parent / "configs"
        contents = [path.read_bytes() for path in sorted(configs.glob("*.yaml"))]
    else:
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq

        stream = io.BytesIO()
        pq.write_table(pa.table({"id": [1, 2], "image": [b"a", b"b"], "label": [0, 1]}), stream)
        contents = [stream.getvalue()]
    for number, content in enumerate(contents):
        (folder / str(number)).write_bytes(content)
    return folder


def main() -> None:
    target, options = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if target not in TARGETS:
        raise SystemExit(__doc__)
    if importlib.util.find_spec("atheris") is None:
        print("skipped: atheris is not installed (pip install -e '.[fuzz]')")
        return
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["posttrain", "ruamel", "PIL"]):
        one = TARGETS[target]()
    atheris.Setup([sys.argv[0], *options, str(seeds(target))], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
