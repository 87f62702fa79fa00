"""Input with which no run may begin: exit code 2, one sentence, and no run folder (`REFUSALS`)."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from harness.workshop import MODELS, Sections, Workshop
from posttrain.vision import models
from posttrain.vision.weights import to_bytes


@dataclass(frozen=True)
class Refusal:
    """Input with which no run may begin."""

    kind: str
    given: str
    make: Callable[[Workshop], Sections | bytes] = field(repr=False)
    """Keys of the run file, or all of it as bytes."""
    says: str
    """What the sentence has to hold."""
    reads: bool = False
    """Whether it is found only when the data are read, with Ray."""


def refused(workshop: Workshop, refusal: Refusal) -> tuple[int, str, list[str]]:
    """Exit code, the lines of `posttrain clean` that begin with "error: ", and what it left behind."""
    from typer.testing import CliRunner

    from posttrain.cli import app

    run = workshop.new("run")
    made = refusal.make(workshop)
    file = workshop.new("run.yaml")
    if isinstance(made, bytes):
        file.write_bytes(made.replace(b"RUN", str(run).encode()))
    else:
        file.write_text(yaml.safe_dump(workshop.run_file(run, made)), encoding="utf-8")
    result = CliRunner().invoke(app, ["clean", str(file)])
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, "\n".join(lines), os.listdir(run) if run.exists() else []


def _train(*, classes: Any = None, **columns: Any) -> Callable[[Workshop], Sections]:
    """The training data with other columns: None takes one away, a function gets the one that is there."""

    def make(workshop: Workshop) -> Sections:
        table = workshop.train
        for name, column in columns.items():
            at = table.schema.get_field_index(name)
            new = column(table[name]) if callable(column) else column
            table = table.remove_column(at) if new is None else table.set_column(at, name, new)
        return {"data": {"train": workshop.parquet(table), "classes": classes}}

    return make


def _second(change: Callable[[pa.Table], pa.Table], end: Callable[[bytes], bytes] = bytes) -> Any:
    """The training data as two files, of which the second is another."""
    return lambda w: {"data": {"train": w.parquet(w.train.slice(0, 300), change(w.train.slice(300)), end=end)}}


def _with(at: int, value: Any) -> Callable[[pa.ChunkedArray], pa.Array]:
    """The column with another value in that row."""

    def change(column: pa.ChunkedArray) -> pa.Array:
        values = column.to_pylist()
        values[at] = value
        return pa.array(values)

    return change


def _model(**keys: Any) -> Callable[[Workshop], Sections]:
    return lambda workshop: {"model": {k: v(workshop) if callable(v) else v for k, v in keys.items()}}


def _pickled(column: pa.ChunkedArray) -> pa.Array:
    """The column as Ray stores Python objects: one pickle in each cell."""
    return pa.array([pickle.dumps(value) for value in column.to_pylist()], pa.large_binary())


def _pickles(workshop: Workshop) -> Sections:
    kind = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}
    table = workshop.train.set_column(
        1, pa.field("image", pa.large_binary(), metadata=kind), _pickled(workshop.train["image"])
    )
    return {"data": {"train": workshop.parquet(table)}}


def _not_finite() -> dict[str, torch.Tensor]:
    state = models.mlp(10).state_dict()
    state["hidden.weight"][3, 5] = float("nan")
    return state


def _folders(*images: str, **links: str) -> Callable[[Workshop], Sections]:
    def make(workshop: Workshop) -> Sections:
        root = workshop.folders(*images, links={path.replace("__", "/"): target for path, target in links.items()})
        return {"data": {"source": "folder", "train": root, "validation": root}}

    return make


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

# fmt: off
REFUSALS: tuple[Refusal, ...] = (
    # Parquet
    Refusal("Parquet: truncated", "the second of two files, cut short", _second(lambda t: t, lambda b: b[:-40]),
            "b.parquet: not readable as Parquet"),
    Refusal("Parquet: truncated", "a file of 0 bytes", _second(lambda t: t, lambda b: b""),
            "b.parquet: not readable as Parquet (Could not open"),
    Refusal("Parquet: damaged", "labels overwritten, the footer whole", _second(lambda t: t, lambda b: _holed(b)),
            "b.parquet: not readable as Parquet"),
    Refusal("Parquet: no Parquet", "a text file", lambda w: {"data": {"train": w.bytes(b"id,label", "a.parquet")}},
            "a.parquet: not readable as Parquet"),
    Refusal("Parquet: no rows", "a file without rows", lambda w: {"data": {"train": w.parquet(w.train.slice(0, 0))}},
            "data: holds no samples; name a location with at least one row"),
    Refusal("Parquet: no such folder", "a path that is not there", lambda w: {"data": {"train": f"{w.folder}/absent"}},
            "absent: no such file or folder; check data.train"),
    Refusal("Parquet: wrong types", "paths instead of images", _train(image=lambda c: pa.array(["a.png"] * len(c))),
            "column 'image' is string where encoded images (binary), raw pixels or tensors are needed"),
    Refusal("Parquet: wrong types", "numbers instead of images", _train(image=lambda c: pa.array([0.5] * len(c))),
            "column 'image' is double where encoded images"),
    Refusal("Parquet: wrong types", "ids as floats", _train(id=lambda c: c.cast(pa.float64())),
            "a.parquet: column 'id' is double; ids have to be integers or strings (data.id)"),
    Refusal("Parquet: wrong types", "labels as timestamps", _train(label=lambda c: c.cast(pa.timestamp("s"))),
            "column 'label' is timestamp[ms]; labels have to be integers or class names"),
    Refusal("Parquet: null", "a label column of type null", _train(label=lambda c: pa.nulls(len(c))),
            "column 'label' is null; labels have to be integers or class names"),
    Refusal("Parquet: nested", "labels as lists", _train(label=lambda c: pa.array([[v] for v in c.to_pylist()])),
            "column 'label' is list<element: int64>; labels have to be"),
    Refusal("Parquet: nested", "labels in a struct",
            _train(label=lambda c: pa.array([{"y": v} for v in c.to_pylist()])),
            "column 'label' is struct<y: int64>; labels have to be"),
    Refusal("Parquet: missing column", "no column label", _train(label=None),
            "a.parquet: no column 'label'; the file has id, image; set data.label"),
    Refusal("Parquet: extra file with another schema", "a second file without labels",
            _second(lambda t: t.drop_columns(["label"])),
            "b.parquet: no column 'label'; the file has id, image; set data.label, or keep"),
    Refusal("Parquet: extra file with another schema", "names in the second file, numbers in the first",
            _second(lambda t: t.set_column(2, "label", t["label"].cast(pa.string()))),
            "b.parquet: column 'label' is string, and in"),
    Refusal("Parquet: two columns of one name", "two columns id",
            lambda w: {"data": {"train": w.parquet(w.train.append_column("id", w.train["label"]))}},
            "a.parquet: 2 columns 'id'; give each column a name of its own"),
    Refusal("Parquet: pickled objects", "images as Ray pickles Python objects", _pickles,
            "column 'image' holds pickled Python objects, which could run code and are refused"),
    Refusal("Parquet: broken metadata", "class_names that are no JSON",
            lambda w: {"data": {"train": w.parquet(w.train.replace_schema_metadata({"class_names": "[1, 2"}))}},
            "class_names in the schema's metadata are no list of names"),
    # labels
    Refusal("label: float", "2.5", _train(label=lambda c: pa.array([2.5, *map(float, c.to_pylist()[1:])])),
            "a.parquet: label 2.5 at sample_id", reads=True),
    Refusal("label: infinite", "infinity",
            _train(label=lambda c: pa.array([float("inf"), *map(float, c.to_pylist()[1:])])),
            "data: a label is inf; is data.label = 'label' the right column?"),
    Refusal("label: negative", "-1", _train(label=_with(7, -1)), "a.parquet: label -1 at sample_id", reads=True),
    Refusal("label: out of range", "17 of 10 classes",
            _train(label=_with(7, 17), classes=10),
            "a.parquet: label 17 at sample_id", reads=True),
    Refusal("label: far out of range", "numbers of seconds", _train(label=_with(7, 1_700_000_000)),
            "the labels go up to 1700000000, with 600 samples; is data.label = 'label' the right column?"),
    Refusal("label: string names", "a name that data.classes lacks",
            _train(label=lambda c: pa.array([f"n{v}" for v in c.to_pylist()]),
                   classes=[*(f"n{v}" for v in range(9)), "other"]),
            "a.parquet: label 'n9' at sample_id", reads=True),
    Refusal("label: one class only", "0 everywhere", _train(label=lambda c: pa.array([0] * len(c))),
            "only one class (0); at least two are needed"),
    Refusal("label: one class only", "3 of 10 classes everywhere",
            _train(label=lambda c: pa.array([3] * len(c)), classes=10),
            "only one class (3); at least two are needed", reads=True),
    # ids
    Refusal("id: duplicate", "3 twice", _train(id=lambda c: pa.array([*c.to_pylist()[:-1], c[0].as_py()])),
            "occurs twice in the train data", reads=True),
    Refusal("id: null", "one without", _train(id=_with(7, None)),
            "a.parquet: column 'id' has 1 empty ids; every sample needs one", reads=True),
    Refusal("id: too large", "2^63 + 5", _train(id=lambda c: pa.array([*c.to_pylist()[:-1], 2**63 + 5], pa.uint64())),
            "a.parquet: column 'id' holds an id above 2^63 - 1; write it as a string (data.id)", reads=True),
    Refusal("id: in two sets", "the first training id in the validation set, too",
            lambda w: {"data": {"validation": w.parquet(pa.concat_tables([w.validation, w.train.slice(0, 1)]))}},
            "is in both the train and the validation set", reads=True),
    # class folders
    Refusal("folders: an image in no class", "an image beside the class folders", _folders("cat/a.png", "b.png"),
            "classes/b.png: lies in no class folder; expected <class>/<image>"),
    Refusal("folders: a link that leads back", "cat/again -> ..", _folders("cat/a.png", "dog/b.png", cat__again=".."),
            "cat/again: is a link that leads back to"),
    Refusal("folders: a link that leads nowhere", "cat/b.png -> gone.png",
            _folders("cat/a.png", "dog/b.png", **{"cat__b.png": "gone.png"}), "cat/b.png: is a link to"),
    Refusal("folders: no images", "a folder with a text file", _folders("cat/a.txt"),
            "classes: holds no image; expected <class>/<image>"),
    # models
    Refusal("model: head not found", "model.head = fc", _model(head="fc"),
            "model.head 'fc' does not exist; the Linear modules that could be meant: head"),
    Refusal("model: head not found", "a network without a Linear", _model(factory=f"{MODELS}:without_head"),
            "no Linear module of the model has 10 outputs"),
    Refusal("model: head on maps", "a Linear without pooling before it", _model(factory=f"{MODELS}:without_pooling"),
            "not one vector for each; name a Linear behind the pooling or flattening"),
    Refusal("model: other number of classes", "weights for 7 classes",
            _model(weights=lambda w: w.torch(models.mlp(7).state_dict())), "head.weight (7, 128) for (10, 128)"),
    Refusal("model: batch norm in train mode", "statistics of the batch in evaluation mode",
            _model(factory=f"{MODELS}:in_train_mode"), "depends on the other images of its batch, in evaluation mode"),
    Refusal("model: not deterministic", "dropout in evaluation mode", _model(factory=f"{MODELS}:forgetful"),
            "gives other values at model.head 'head' for the same images when it is run again"),
    Refusal("model: not deterministic", "random noise on the features", _model(factory=f"{MODELS}:noisy"),
            "gives other values at model.head 'head' for the same images when it is run again"),
    Refusal("model: not finite", "NaN for every image", _model(factory=f"{MODELS}:not_finite"),
            "what the model computes at model.head 'head' is not finite for an image of random pixels"),
    Refusal("model: weights not finite", "NaN in hidden.weight", _model(weights=lambda w: w.torch(_not_finite())),
            "are not finite in hidden.weight; use other weights"),
    Refusal("model: pickled weights", "a whole module by torch.save", _model(weights=lambda w: w.torch(models.mlp(10))),
            "holds pickled objects (torch.nn.modules.container.Sequential), which could run code"),
    Refusal("model: no weights", "a list by torch.save", _model(weights=lambda w: w.torch([1, 2])),
            "holds no state_dict (names to tensors)"),
    Refusal("model: weights cut short", "half a safetensors file",
            _model(weights=lambda w: w.bytes(to_bytes(models.mlp(10))[:900], "w.safetensors")),
            "w.safetensors is not a readable weights file"),
    Refusal("model: weights not there", "a path that is not there", _model(weights=lambda w: f"{w.folder}/absent.pt"),
            "absent.pt: no such weights file; check model.weights"),
    Refusal("model: no such factory", "resnet81", _model(factory="resnet81"),
            "model.factory 'resnet81' is no classifier of torchvision (nearest: resnet18"),
    Refusal("model: no such factory", "a function that its module lacks", _model(factory=f"{MODELS}:forgetfull"),
            "has no function 'forgetfull' (nearest: forgetful)"),
    Refusal("model: factory fails", "a function that raises", _model(factory=f"{MODELS}:raising"),
            "failed: RuntimeError: there is no such width; check model.arguments"),
    Refusal("model: factory gives no module", "a function that returns a dict", _model(factory=f"{MODELS}:no_module"),
            "returned dict; return a torch.nn.Module"),
    Refusal("model: other images", "a network for RGB, grey images", _model(factory="resnet18"),
            "the model cannot take a batch of shape (2, 1, 8, 8)"),
    # run files
    Refusal("run file: unknown key", "removal.budgte", lambda w: {"removal": {"budgte": 0.1}},
            "removal.budgte is not a key of a run file; did you mean removal.budget?"),
    Refusal("run file: wrong unit", "removal.budget: 5 %", lambda w: {"removal": {"budget": "5 %"}},
            'removal.budget = "5 %": should be a valid number, unable to parse string as a number (write 0.05)'),
    Refusal("run file: wrong unit", "removal.budget: 5", lambda w: {"removal": {"budget": 5}},
            "removal.budget = 5: should be less than 1"),
    Refusal("run file: wrong unit", "ray.object_store_gb: 4GB", lambda w: {"ray": {"object_store_gb": "4GB"}},
            "(write 4, without a unit)"),
    Refusal("run file: wrong type", "removal.max_rounds: yes", lambda w: {"removal": {"max_rounds": True}},
            "removal.max_rounds = true: should not be a boolean"),
    Refusal("run file: a key twice", "run, twice", lambda w: b"run: {path: RUN}\nrun: {seed: 1}\n",
            "run.yaml, line 2: found duplicate key \"run\"; keep one of the two"),
    Refusal("run file: a key that is no text", "1: 2", lambda w: b"1: 2\n",
            "the run file has the key 1, which is not text (put quotes around it)"),
    Refusal("run file: cyclic anchor", "a list that holds itself", lambda w: b"model: {arguments: {a: &a [*a]}}\n",
            "line 1: an anchor contains itself; write out what it stands for"),
    Refusal("run file: aliases of aliases", "a billion values in 700 bytes", lambda w: LAUGHS.encode(),
            "stand for billions of values, and at most 100,000 are read; write it without aliases"),
    Refusal("run file: a tag that makes Python objects", "!!python/object/apply:os.system",
            lambda w: b"run: {path: !!python/object/apply:os.system [id]}\n",
            "python/object/apply:os.system'; leave the tag out"),
    Refusal("run file: nested deeply", "1,500 brackets", lambda w: b"run: " + b"[" * 1500,
            "nested too deeply; write it with fewer levels"),
    Refusal("run file: no mapping", "a list", lambda w: b"- run\n", "a run file is a mapping with sections"),
    Refusal("run file: no UTF-8", "Latin-1", lambda w: "run: {path: Prüfung}\n".encode("latin-1"),
            "a run file is YAML in UTF-8, and this is not UTF-8 text"),
    Refusal("run file: too large", "a megabyte of comments", lambda w: b"#\n" * 600_000,
            "is larger than 1,048,576 bytes"),
    Refusal("run file: control characters", "an escape sequence in run.path", lambda w: b'run: {path: "runs/\\e[2J"}\n',
            "should hold no control character such as \\x1b"),
    Refusal("run file: weights without validation", "no data.validation", lambda w: {"data": {"validation": None}},
            "a validation set the model has not seen is required"),
)
# fmt: on


def _holed(parquet: bytes) -> bytes:
    """The last column chunk's beginning overwritten; the footer stays."""
    file = pq.ParquetFile(io.BytesIO(parquet))
    column = file.metadata.row_group(0).column(2)
    at = column.dictionary_page_offset or column.data_page_offset
    return parquet[:at] + b"\xff" * 40 + parquet[at + 40 :]
