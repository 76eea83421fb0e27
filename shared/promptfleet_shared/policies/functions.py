"""Users' own functions, named in fleet.toml as `module:function`; imported at first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from promptfleet_shared.errors import ConfigurationError


def find_function(path: str) -> Callable[..., Any]:
    """The function that a dotted path names.

    Args:
        path: As in `my_app.prompts:score`.

    Raises:
        ConfigurationError: There is none; says what is missing.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        msg = f"{path}: can't import {module_name}: {type(error).__name__}"
        raise ConfigurationError(msg) from error
    function = getattr(module, name, None)
    if not callable(function):
        msg = f"{path}: {module_name} has no function {name!r}"
        raise ConfigurationError(msg)
    found: Callable[..., Any] = function
    return found
