"""No module and no function of the product is longer than a reader takes in at once."""

import ast
from pathlib import Path

from harness.sizes import FUNCTION_LINES, MODULE_LINES

PRODUCT = Path(__file__).parents[1] / "posttrain"


def test_modules_and_functions_of_the_product_are_short():
    long: list[str] = []
    for path in PRODUCT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MODULE_LINES:
            long.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES:
                long.append(f"{path.name}: {node.name}")
    assert long == []
