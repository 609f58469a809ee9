"""Does the source of a vLLM have what griffin-vllm relies on? For a vLLM that cannot run here.

Nothing is imported: both sources are read with ``ast``. Looked up are the needs listed in
``griffin_vllm/serving/hooks.py``, every name that griffin_vllm imports from vLLM, attributes of imported
modules, and the keywords with which imported classes and functions are called.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from griffin_vllm.serving import hooks
from griffin_vllm.serving.touch_point import parse_need

PACKAGE = Path(hooks.__file__).parent.parent


def missing(root: Path, package: Path = PACKAGE) -> tuple[int, list[str]]:
    """How many things were looked up below ``root``, the folder that holds ``vllm/``, and those not found."""
    source = Source(root)
    asked = {(point.module, need) for point in hooks.TOUCH_POINTS for need in point.needs}
    for entry in (*hooks.RELIED_ON, *hooks.RELIED_ON_BY_V2):
        module, _, need = entry.partition(":")
        asked.add((module, need))
    for path in package.rglob("*.py"):
        asked |= set(uses(ast.parse(path.read_text(encoding="utf-8")), source))
    return len(asked), [f"{module}:{need}" for module, need in sorted(asked) if not source.fits(module, need)]


def uses(tree: ast.Module, source: Source) -> Iterator[tuple[str, str]]:
    """(module, need) of each use of vLLM in a file of ours."""
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_vllm(node.module):
            for alias in node.names:
                imported[alias.asname or alias.name] = (str(node.module), alias.name)
                yield str(node.module), alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = imported.get(node.value.id, ("", ""))
            if module and source.module(f"{module}.{name}"):
                yield f"{module}.{name}", node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            module, name = imported[node.func.id]
            keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
            yield module, f"{name}({', '.join(keywords)})" if keywords else name


def _is_vllm(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "vllm"


class Definition(NamedTuple):
    """Where something is defined: its module, and the node there."""

    module: str
    node: ast.AST


class Source:
    """The names that an unpacked vLLM defines."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.module = functools.cache(self._module)

    def fits(self, module: str, need: str) -> bool:
        """Whether ``module`` has what ``need`` names, with the parameters."""
        name, parameters = parse_need(need)
        definition = self.find(module, name)
        if definition is None:
            return False
        taken = self._parameters(*definition) if parameters else None
        return taken is None or set(parameters) <= taken

    def find(self, module: str, dotted: str) -> Definition | None:
        """What a name such as ``Class.method`` of ``module`` stands for."""
        first, *rest = dotted.split(".")
        definition = self._at_top(module, first)
        for name in rest:
            if definition is None:
                return None
            where, node = definition
            if isinstance(node, ast.Module):
                definition = self._at_top(where, name)
            elif isinstance(node, ast.ClassDef):
                definition = self._in_class(where, node, name)
            else:
                # an object whose class is not looked for, such as a registry
                return definition
        return definition

    def _module(self, name: str) -> ast.Module | None:
        path = self.root.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    def _at_top(self, module: str, name: str) -> Definition | None:
        tree = self.module(module)
        if tree is None:
            return None
        # the last definition counts: overloads stand before it
        for node in reversed(list(_statements(tree.body))):
            if isinstance(node, ast.ImportFrom):
                origin = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*" and (definition := self._imported(origin, name)):
                        return definition
                    if (alias.asname or alias.name) == name:
                        if _is_vllm(origin):
                            return self._imported(origin, alias.name)
                        return Definition(module, node)
            elif name in _names(node):
                return Definition(module, node)
        inner = self.module(f"{module}.{name}")
        return Definition(f"{module}.{name}", inner) if inner else None

    def _imported(self, module: str, name: str) -> Definition | None:
        return self._at_top(module, name) if _is_vllm(module) else None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return str(node.module)
        is_package = self.root.joinpath(*module.split("."), "__init__.py").is_file()
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, node.module] if node.module else parts)

    def _in_class(self, module: str, node: ast.ClassDef, name: str) -> Definition | None:
        for statement in _statements(node.body):
            if name in _names(statement):
                return Definition(module, statement)
        for set_on_self in ast.walk(node):
            if (
                isinstance(set_on_self, ast.Attribute)
                and isinstance(set_on_self.ctx, ast.Store)
                and set_on_self.attr == name
            ):
                return Definition(module, set_on_self)
        for base in self._bases(module, node):
            if definition := self._in_class(*base, name):
                return definition
        return None

    def _bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        for base in node.bases:
            definition = self._at_top(module, base.id) if isinstance(base, ast.Name) else None
            if definition and isinstance(definition.node, ast.ClassDef):
                yield definition.module, definition.node

    def _parameters(self, module: str, node: ast.AST) -> set[str] | None:
        """The names that a call of ``node`` takes, None for any."""
        if isinstance(node, ast.ClassDef):
            if definition := self._in_class(module, node, "__init__"):
                return self._parameters(*definition)
            fields = {statement.target.id for statement in node.body if _is_field(statement)}  # type: ignore[attr-defined]
            return fields.union(*(self._parameters(*base) or () for base in self._bases(module, node)))
        if not isinstance(node, ast.FunctionDef) or node.args.kwarg:
            return None
        return {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the top of a module, those under an ``if`` or ``try`` as well."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            handlers = getattr(node, "handlers", [])
            for inner in (node, *handlers):
                yield from _statements([*inner.body, *getattr(inner, "orelse", [])])


def _names(node: ast.AST) -> set[str]:
    """The names that a statement defines, without imports."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_field(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
