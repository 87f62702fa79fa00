"""YAML 1.2 in and out, by ruamel.yaml: plain data alone, no key twice, and no aliases that grow without bounds."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from posttrain.errors import ConfigError

MAX_VALUES = 100_000
"""Most values of a document; those behind an alias count every time that the alias is used."""


def load(text: str | bytes, *, where: str) -> Any:
    """The document's value: mappings, lists, texts, numbers, booleans and None.

    Raises ConfigError, in one sentence that begins with `where` and names the line.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor defined twice, a number that YAML 1.1 reads differently
            node = yaml.compose(text)
        if node is None:
            return None
        if (size := _size(node, {})) > MAX_VALUES:
            shown = f"{size:,}" if size < 10**9 else "billions of"
            raise ConfigError(
                f"{where}: its aliases and lists stand for {shown} values, and at most {MAX_VALUES:,} are read; "
                "write it without aliases"
            )
        return yaml.constructor.construct_object(node, deep=True)
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        problem = (error.problem or error.context or "").partition(" with value ")[0]
        ways_out = {"tag": "leave the tag out", "duplicate key": "keep one of the two"}
        problem += "".join(f"; {way_out}" for sign, way_out in ways_out.items() if sign in problem)
        raise ConfigError(f"{where}{line}: {' '.join(problem.split())}") from None
    except YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply; write it with fewer levels") from None
    # ruamel's constructors raise these for a value that does not fit its tag, such as !!timestamp x
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        raise ConfigError(f"{where}: a value cannot be read: {' '.join(str(error).split())}") from None


def dump(value: Any) -> str:
    """The value as YAML that `load` reads back unchanged; mappings keep their order, and nothing is an alias."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 110
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


class _Representer(SafeRepresenter):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sort_base_mapping_type_on_output = False

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        # written plainly, these are read back as line breaks or not at all
        escaped = re.search("[\x85\u2028\u2029\ufeff]", data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if escaped else None)


_Representer.add_representer(str, _Representer.represent_str)


def _size(node: Node, known: dict[int, int]) -> int:
    """Number of values that a node stands for: a few aliases of aliases can stand for billions."""
    size = known.get(id(node))
    if size is None:
        known[id(node)] = 0
        inside: list[Node] = []
        if isinstance(node, MappingNode):
            inside = [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            inside = node.value
        size = known[id(node)] = 1 + sum(_size(part, known) for part in inside)
    elif size == 0:  # still being counted: it lies within itself
        raise MarkedYAMLError(
            problem="an anchor contains itself; write out what it stands for", problem_mark=node.start_mark
        )
    return size
