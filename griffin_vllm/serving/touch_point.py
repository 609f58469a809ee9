"""How a place in vLLM is touched: only if it is what we expect, at once or when vLLM imports it, never fatally.

What is touched, and why, is in ``hooks.py``.
"""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.abc
import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class DoesNotFitError(Exception):
    """This vLLM is not what a touch point expects."""


@dataclass(frozen=True)
class TouchPoint:
    """One place in vLLM: where it is, why we need it, and how it is touched (safe to repeat)."""

    module: str
    attribute: str
    why: str
    touch: Callable[[ModuleType], None]
    # Names in the module that must be there, functions with the parameters they must take.
    needs: tuple[str, ...] = ()
    # Touched when vLLM imports the module by itself: the import is slow, and only workers need it.
    on_import: bool = False
    # Neither touched nor looked at on other platforms.
    cpu_only: bool = False


# What did not fit in this process: place to reason.
misfits: dict[str, str] = {}


def touch(point: TouchPoint) -> None:
    """Touch vLLM there if it has what the point needs; if not, log that once and put it among ``misfits``."""
    place = f"{point.module}.{point.attribute}"
    try:
        module = importlib.import_module(point.module)
        for need in point.needs:
            expect(module, need)
        point.touch(module)
    except Exception as error:  # of whatever kind: a vLLM that does not use GRIFFIN must not notice
        misfits[place] = f"{place} ({error})"
        log_once(f"griffin-vllm cannot be used: {misfits[place]}")


def wrap_once(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have ``around(original, ...)`` called in the place of the function ``owner.name``, unless that is so already."""
    original = getattr(owner, name)
    if hasattr(original, "griffin"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped.griffin = True  # type: ignore[attr-defined]
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


@functools.cache
def log_once(message: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.griffin_vllm").warning(message)


class OnImport(importlib.abc.MetaPathFinder):
    """Touches a module right after its import by whoever imports it first. One for each module: two would ask each
    other for it without end."""

    def __init__(self, point: TouchPoint) -> None:
        self.point = point

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.point.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_touch(module: ModuleType) -> None:
                execute(module)
                # only now: a module can be looked for without being imported
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                touch(self.point)

            spec.loader.exec_module = execute_and_touch  # type: ignore[method-assign]
        return spec


def parse_need(need: str) -> tuple[str, list[str]]:
    """``"Class.function(a, b)"`` as its dotted name and its parameters."""
    name, _, parameters = need.rstrip(")").partition("(")
    return name, [parameter for parameter in parameters.split(", ") if parameter]


def expect(module: ModuleType, need: str) -> None:
    """Raise AttributeError or DoesNotFitError if ``module`` lacks what ``need`` names, or one of its parameters."""
    name, parameters = parse_need(need)
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError:
        owner, _, attribute = name.rpartition(".")
        if not owner or parameters or not _sets_on_self(operator.attrgetter(owner)(module), attribute):
            raise
        return
    if not parameters:
        return
    if not callable(found):
        raise DoesNotFitError(f"{name} is no function")
    missing = set(parameters) - set(inspect.signature(found).parameters)
    if missing:
        raise DoesNotFitError(f"{name} has no parameter {', '.join(sorted(missing))}")


def _sets_on_self(owner: Any, attribute: str) -> bool:
    """Whether a method of the class ``owner``, or of a base, sets ``attribute`` of some object.

    Also where that cannot be known: something else has put its own function around one of the methods.
    """
    methods = (
        (base, inspect.unwrap(method))
        for base in getattr(owner, "__mro__", ())
        for method in vars(base).values()
        if inspect.isfunction(method)
    )
    return any(
        method.__globals__["__name__"] != base.__module__
        or any(
            instruction.opname == "STORE_ATTR" and instruction.argval == attribute
            for instruction in dis.get_instructions(method)
        )
        for base, method in methods
    )
