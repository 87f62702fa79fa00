"""The reference of the run file, docs/pages/run-file.md, from its JSON schema.

`python docs/run_file.py` writes the page; tests/test_docs.py fails when it is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain import config

PAGE = Path(__file__).resolve().parent / "pages/run-file.md"

_HEAD = """\
# Run file reference

<!-- Made by `python docs/run_file.py` from the code; do not edit. -->

A run file is YAML. Every key has a default, and all defaults together are the embedded digits run, which
`pipelines/configs/digits.yaml` writes out in full. An unknown key is an error that names the nearest known one. A key
can also be set on the command line:

```bash
posttrain clean --set removal.budget=0.03 --set run.path=runs/digits-3
posttrain schema
posttrain schema --job
```

`posttrain schema` prints the JSON schema, for completion and checks in an editor; `--job` prints the one of a
[job file](retraining.md), which has the sections [`job`](#job) and [`gate`](#gate) as well.
"""


def page() -> str:
    """The whole page in Markdown."""
    lines = [_HEAD]
    of_job = config.schema(config.JobFile)
    for name, prop in of_job["properties"].items():
        # a job has another default of `results`; the page gives the run file's
        schema = config.schema() if name in config.RunFile.model_fields else of_job
        section = _resolved(schema["properties"].get(name, prop), schema)
        lines += [f"## {name}", "", section.get("description", ""), ""]
        lines += ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
        lines += ["| " + " | ".join(row) + " |" for row in _rows(name, section, schema)]
        lines += ["", *_mappings(name, section, schema)]
    return "\n".join(lines).rstrip() + "\n"


def _mappings(prefix: str, section: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """The values of a mapping from free keys to sections, and its default."""
    for key, prop in section["properties"].items():
        values = _resolved(prop.get("additionalProperties") or {}, schema)
        if "properties" not in values:
            continue
        yield f"Each value of `{prefix}.{key}`: {values.get('description', '')}"
        yield ""
        yield "| key | values | meaning |"
        yield "| --- | --- | --- |"
        for name, of_value in values["properties"].items():
            yield f"| `{name}` | {_values(of_value, schema)} | {_cell(of_value.get('description', ''))} |"
        yield ""
        yield f"The default of `{prefix}.{key}`:"
        yield ""
        for name, default in prop.get("default", {}).items():
            yield f"- `{name}`: `{json.dumps(default, ensure_ascii=False)}`"
        yield ""


def _rows(prefix: str, section: dict[str, Any], schema: dict[str, Any]) -> Iterator[list[str]]:
    for key, given in section["properties"].items():
        prop = _resolved(given, schema)
        default = "required" if key in section.get("required", []) else _default(prop.get("default"))
        yield [f"`{prefix}.{key}`", _values(prop, schema), default, _cell(prop.get("description", ""))]
        if nested := _section_within(prop, schema):
            yield from _rows(f"{prefix}.{key}", nested, schema)


def _section_within(prop: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    for one in [prop, *prop.get("anyOf", [])]:
        if "properties" in (found := _resolved(one, schema)):
            return found
    return None


def _resolved(prop: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in prop:
        return prop
    name = prop["$ref"].rpartition("/")[2]
    return {**schema["$defs"][name], **{key: value for key, value in prop.items() if key != "$ref"}}


def _values(prop: dict[str, Any], schema: dict[str, Any]) -> str:
    """Types, choices and bounds in words."""
    prop = _resolved(prop, schema)
    if "anyOf" in prop:
        return " or ".join(dict.fromkeys(_values(one, schema) for one in prop["anyOf"]))
    if "enum" in prop:
        return ", ".join(f"`{value}`" for value in prop["enum"])
    if "const" in prop:
        return f"`{prop['const']}`"
    kind = prop.get("type")
    if kind == "array":
        items = prop.get("items") or {}
        of = _values(items, schema) if items else ""
        fewest, most = prop.get("minItems"), prop.get("maxItems")
        number = f"{fewest} " if fewest == most and fewest is not None else ""
        return f"list of {number}{of}".rstrip() if of else f"list of {number}values"
    if kind == "object":
        return "section" if "properties" in prop else "mapping"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    name = words.get(str(kind), "null" if kind == "null" else "any value")
    bounds = [
        f"{sign} {prop[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in prop and abs(prop[key]) < 2**31
    ]
    return " ".join([name, *[", ".join(bounds)] * bool(bounds)])


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return "see below" if value else "`{}`"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    """Text that stays within one cell of a Markdown table, and is no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
