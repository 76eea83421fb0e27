"""Classes of users' own, found by entry point or by dotted path; errors say what exists."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from promptfleet_shared.errors import ConfigurationError


def load_plugin(group: str, name: str, *, field: str, built_in: Collection[str]) -> Any:
    """What an installed distribution offers by this name.

    Args:
        group: Of entry points, such as `promptfleet.providers`.
        name: The entry point's.
        field: What errors call the place where the name stands.
        built_in: Names that need no entry point, for the error.

    Raises:
        ConfigurationError: There is none, there are two, or it can't be imported.
    """
    found = list(entry_points(group=group, name=name))
    if not found:
        raise ConfigurationError(_no_such_name(group, name, field, built_in))
    if len({point.value for point in found}) > 1:
        who = ", ".join(sorted(_owner(point) for point in found))
        message = f"{field}: {name!r} is offered more than once in {group}, by {who}"
        raise ConfigurationError(message)
    return _loaded(found[0], f"{field}: {name!r} of {_owner(found[0])}")


def load_path(path: str, *, field: str) -> Any:
    """What "module:Class" names.

    Raises:
        ConfigurationError: It can't be imported.
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ConfigurationError(f'{field}: {path!r} is no "module:Class"')
    return _loaded(EntryPoint(name=path, value=path, group=""), f"{field}: {path!r}")


def _loaded(point: EntryPoint, what: str) -> Any:
    importlib.invalidate_caches()
    try:
        return point.load()
    except (ImportError, AttributeError, ValueError) as error:
        message = f"{what} can't be imported ({type(error).__name__}: {error})"
        raise ConfigurationError(message) from None


def _no_such_name(group: str, name: str, field: str, built_in: Collection[str]) -> str:
    installed = sorted({point.name for point in entry_points(group=group)})
    others = ", ".join(installed) if installed else "none is installed"
    known = ", ".join(sorted(built_in))
    return f"{field}: {name!r} is none of {known}, nor an entry point of {group} ({others})"


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
