"""Checks of types at run time at a cost that the suite can bear.

The import hook of jaxtyping wraps every function of the package: a call binds its arguments, keeps
their shapes and checks its parameters twice, which often takes longer than the function itself.
Only a function whose annotations name shapes needs that; beartype alone checks the others.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping

_with_shapes = jaxtyping.jaxtyped


def names_shapes(function: Callable[..., Any]) -> bool:
    """Whether an annotation holds a type of jaxtyping, or is a string that may name one."""
    types = inspect.get_annotations(function).values()
    return any("jaxtyping" in repr(kind) or isinstance(kind, str) for kind in types)


def checked(function: Any, typechecker: Callable[..., Any]) -> Any:
    """The function or class with its types checked at each call."""
    if inspect.isfunction(function) and not names_shapes(function):
        return typechecker(function)
    return _with_shapes(function, typechecker=typechecker)


def install() -> None:
    """Let the import hook, which looks its decorator up for each function, find `checked`."""
    jaxtyping.jaxtyped = lambda *, typechecker: lambda function: checked(function, typechecker)
