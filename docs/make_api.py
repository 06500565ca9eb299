"""Prints docs/api.md: every public name as its source declares it, signature, fields and docstring, without the body.

    python docs/make_api.py > docs/api.md

The text is taken from the source rather than from `inspect.signature`, so that it is the same under every Python.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import tspin
import tspin_kernels

HEAD = """# API reference

Every public name as its source declares it. Made by `python docs/make_api.py > docs/api.md`; a test compares.
"""


def declaration(thing: Any) -> str:
    """Signature and docstring of a function; fields, docstring and documented public methods of a class."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))
    return "\n".join(_declared(ast.parse(source).body[0], source.splitlines()))


def _declared(node: ast.stmt, lines: list[str]) -> Iterator[str]:
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    is_class = isinstance(node, ast.ClassDef)
    methods = [child for child in node.body if is_class and isinstance(child, ast.FunctionDef)]
    fields = [child for child in node.body if is_class and child not in methods]
    kept = fields or node.body[: ast.get_docstring(node) is not None]
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    yield from lines[start - 1 : kept[-1].end_lineno if kept else node.body[0].lineno - 1]
    for method in methods:
        if method.name == "__init__" or (not method.name.startswith("_") and ast.get_docstring(method)):
            yield ""
            yield from _declared(method, lines)


def page(modules: tuple[ModuleType, ...] = (tspin_kernels, tspin)) -> str:
    """The whole page; its fences are `py`, because `python` fences are examples and run in the tests."""
    parts = [HEAD]
    for module in modules:
        parts.append(f"\n## {module.__name__}\n\n{(module.__doc__ or '').strip()}\n")
        for name in module.__all__:
            parts.append(f"\n### {name}\n\n```py\n{declaration(getattr(module, name))}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
