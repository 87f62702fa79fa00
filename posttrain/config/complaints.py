"""Sentences about what is wrong in a run file, from pydantic's errors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from posttrain.config.search import Distribution
from posttrain.config.section import Section


def complaints(error: ValidationError, raw: Mapping[str, Any], kind: type[Section]) -> list[str]:
    """What is wrong, once per key: `removal.budget = 3: should be less than 1`. `kind`: what `raw` was to be."""
    found: dict[str, list[str]] = {}
    for entry in error.errors(include_url=False):
        parts = _located(entry["loc"], kind)
        key = ".".join(parts)
        of_space = parts[:2] == ["search", "space"] and len(parts) > 2
        message = entry["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if entry["type"] in ("int_parsing", "float_parsing"):
            message += _unit(entry["input"])
        if entry["type"] == "too_short":
            lengths = entry.get("ctx", {})
            if lengths["actual_length"] < len(entry["input"]):
                continue  # pydantic does not count an invalid item, which has a complaint of its own
            fewest = lengths["min_length"]
            message = f"should hold at least {fewest} value{'s' * (fewest > 1)}"
        if entry["type"] == "extra_forbidden":
            beside = [f"{'.'.join(parts[:-1])}.{how}" for how in Distribution.model_fields] if of_space else []
            found[unknown_key(key, beside or list(known_keys(kind)))] = []
        elif entry["type"] == "invalid_key" or entry["loc"][-1:] == ("[key]",):
            *under, bad = [part for part in entry["loc"] if part != "[key]"]
            where = ".".join(_located(tuple(under), kind)) if under else "the run file"
            found[f"{where} has the key {bad}, which is not text (put quotes around it)"] = []
        elif entry["type"] == "missing":
            found[f"{key} has to be set"] = []
        elif entry["type"] in ("model_type", "dict_type"):
            found.setdefault(f"{key} = {shown(entry['input'])}", []).append("should be a mapping with keys beneath it")
        elif entry["type"] == "value_error" and (not key or any(k.startswith(f"{key}.") for k in known_keys(kind))):
            found[message] = []  # a check across keys, which names them itself
        else:
            found.setdefault(f"{key} = {shown(_at(raw, parts))}", []).append(message)
    return [": ".join([what] + [" or ".join(dict.fromkeys(whys))] * bool(whys)) for what, whys in found.items()]


def _located(location: tuple[int | str, ...], kind: type[Section]) -> list[str]:
    """The key of the run file at pydantic's location, without indices and the branches of unions."""
    parts: list[str] = []
    inside: Any = kind
    for part in map(str, location):
        parts.append(part)
        if get_origin(inside) is dict:
            inside = get_args(inside)[1]
        elif part in inside.model_fields:
            annotation = inside.model_fields[part].annotation
            of_sections = get_origin(annotation) is dict and _section(get_args(annotation)[1])
            inside = annotation if of_sections else _section(annotation)
        else:
            break
        if inside is None:
            break
    return parts


def _section(annotation: Any) -> type[Section] | None:
    """The section in a field of this type (`Noise` for `Noise | None`); None where it has none."""
    if get_origin(annotation) is dict:
        return None
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def known_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """All keys of a section, dotted, with those of the sections beneath it."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if beneath := _section(field.annotation):
            yield from known_keys(beneath, f"{prefix}{name}.")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """That a key is unknown, and the most similar known one: first in its own section, then anywhere."""
    name_shown = key if key.isprintable() and key.strip() else shown(key)
    parent, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    anywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    for names in (anywhere if name in anywhere else siblings, anywhere):
        if near := difflib.get_close_matches(name, names, n=1):
            return f"{name_shown} is not a key of a run file; did you mean {names[near[0]]}?"
    return f"{name_shown} is not a key of a run file; there are {', '.join(siblings.values() or known)}"


def _at(raw: Any, parts: Sequence[str]) -> object:
    """The value of a key in nested mappings."""
    for part in parts:
        if isinstance(raw, Mapping) and part not in raw and "." in part:
            raw = _at(raw, part.split("."))
        else:
            raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


def _unit(value: object) -> str:
    """What to write in place of a number with a unit."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[a-zA-Z]{1,3})\s*", value) if isinstance(value, str) else None
    if found is None:
        return ""
    return f" (write {float(found[1]) / 100:g})" if found[2] == "%" else f" (write {found[1]}, without a unit)"


def shown(value: object) -> str:
    """A value as JSON, cut to 60 characters."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):  # a number of thousands of digits, a key that is no text
        return "(too long to show)"
    return text if len(text) <= 60 else text[:57] + "..."
