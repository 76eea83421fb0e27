"""Real servers and a process supervisor for one machine: what `promptfleet dev` stands on."""

from promptfleet.dev_stack.errors import (
    DataDirectoryError,
    DataDirectoryInUseError,
    DevStackError,
    PortTakenError,
    ServerMissingError,
    ServerStartError,
)
from promptfleet.dev_stack.ports import free_port
from promptfleet.dev_stack.postgres import EmbeddedPostgres
from promptfleet.dev_stack.supervisor import (
    Backoff,
    ChildExit,
    ChildSpec,
    ChildState,
    ChildStatus,
    Hooks,
    Supervisor,
)
from promptfleet.dev_stack.valkey import EmbeddedValkey

__all__ = [
    "Backoff",
    "ChildExit",
    "ChildSpec",
    "ChildState",
    "ChildStatus",
    "DataDirectoryError",
    "DataDirectoryInUseError",
    "DevStackError",
    "EmbeddedPostgres",
    "EmbeddedValkey",
    "Hooks",
    "PortTakenError",
    "ServerMissingError",
    "ServerStartError",
    "Supervisor",
    "free_port",
]
