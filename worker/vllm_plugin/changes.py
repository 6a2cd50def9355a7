"""How vLLM is changed from within: methods of classes, all that are wanted or none.

All of it is private to vLLM. So nothing is done in another minor version than those that this was
tested with, nor in one of them where something is not found.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

VERSIONS: Final = ("0.32.",)

_MARK: Final = "_unbroken_changed"

_log = logging.getLogger("vllm.unbroken")

Method: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A method, or class method, that is to be another one."""

    module: str
    owner: str
    name: str
    change: Callable[[Method], Method]


def change_all(make: Callable[[], Sequence[Change]]) -> None:
    """Make these changes in this process, if its vLLM is one that is known. Idempotent.

    What `make` does may fail like a change: for what is not there.
    """
    version: str = importlib.import_module("vllm").__version__
    if not version.startswith(VERSIONS):
        _log.warning("unbroken: vLLM %s is not one of %s: left as it is", version, VERSIONS)
        return
    try:
        changes = make()
        found = [_find(change) for change in changes]
    except (ImportError, AttributeError, KeyError) as error:
        _log.warning("unbroken: vLLM %s is not as it was (%r): left as it is", version, error)
        return
    for change, (owner, method) in zip(changes, found, strict=True):
        _put(change, owner, method)


def _find(change: Change) -> tuple[type, Any]:
    """Its owner and the method as it is. Raises ImportError, AttributeError, KeyError."""
    owner: type = getattr(importlib.import_module(change.module), change.owner)
    return owner, owner.__dict__[change.name]


def _put(change: Change, owner: type, found: Any) -> None:
    """Put `change(method)` in the place of a method, once."""
    is_of_class = isinstance(found, classmethod)
    method: Any = getattr(found, "__func__", found)
    if hasattr(method, _MARK):
        return
    changed: Any = change.change(method)
    setattr(changed, _MARK, True)
    setattr(owner, change.name, classmethod(changed) if is_of_class else changed)
