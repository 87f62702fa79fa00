"""Sizes of a checkout: lines by part, the largest modules, functions and classes.

python tests/harness/sizes.py [FOLDER]
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MODULE_LINES, FUNCTION_LINES = 400, 60
"""Most lines of a module and of a function of the product."""

PARTS = {
    "product": ("posttrain/",),
    "benchmarks": ("pipelines/benchmarks/",),
    "tests": ("tests/",),
    "docs": ("docs/", "README.md"),
}


class Sized(NamedTuple):
    lines: int
    name: str


def files(root: Path, ending: str = ".py") -> list[Path]:
    """The files that git tracks."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [root / name for name in listed if name.endswith(ending)]


def modules(root: Path, prefix: str = "posttrain/") -> list[Sized]:
    """Modules below a folder, the longest first."""
    own = [path for path in files(root) if str(path.relative_to(root)).startswith(prefix)]
    return sorted(
        (Sized(len(path.read_text().splitlines()), str(path.relative_to(root))) for path in own), reverse=True
    )


def definitions(root: Path, *kinds: type[ast.AST]) -> list[Sized]:
    """Functions or classes of the product, the longest first."""
    return sorted(_definitions(root, kinds), reverse=True)


def _definitions(root: Path, kinds: tuple[type[ast.AST], ...]) -> Iterator[Sized]:
    for module in modules(root):
        for node in ast.walk(ast.parse((root / module.name).read_text())):
            if isinstance(node, kinds):
                assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.end_lineno
                yield Sized(node.end_lineno - node.lineno + 1, f"{module.name}:{node.name}")


def main(root: Path) -> None:
    everything = [path for path in files(root, "") if path.is_file()]
    for part, prefixes in PARTS.items():
        own = [path for path in everything if str(path.relative_to(root)).startswith(prefixes)]
        own = [path for path in own if path.suffix in (".py", ".md", ".yml")]
        print(f"{part:<11} {sum(len(path.read_text().splitlines()) for path in own):>7,} lines in {len(own)} files")
    functions = definitions(root, ast.FunctionDef, ast.AsyncFunctionDef)
    print(f"largest module    {modules(root)[0]}, of {len(modules(root))}")
    print(f"largest function  {functions[0]}, of {len(functions)}")
    print(f"largest class     {definitions(root, ast.ClassDef)[0]}")
    print(f"over {FUNCTION_LINES} lines: {[sized.name for sized in functions if sized.lines > FUNCTION_LINES]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
