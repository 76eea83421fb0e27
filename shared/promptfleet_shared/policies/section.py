"""What every section of fleet.toml is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Milliseconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of fleet.toml: frozen, and with no key that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)
