"""What routers ask for in their signatures: the services, and who calls.

@router.get("/v1/things")
async def list_things(services: ServicesDep, caller: Reader) -> ...
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from promptfleet.api.auth import Caller, authenticate, require
from promptfleet.api.services import Services


async def get_services(request: Request) -> Services:
    """The services of the app that this request came to.

    Asynchronous, though it waits for nothing: FastAPI would send it to a thread for each request.

    Raises:
        RuntimeError: The app was mounted and its lifespan not run: see `promptfleet.api.lifespan`.
    """
    services: Services | None = getattr(request.app.state, "services", None)
    if services is None:
        msg = "the API was not started: enter `promptfleet.api.lifespan(api)` in your app's own"
        raise RuntimeError(msg)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]

AnyCaller = Annotated[Caller, Depends(authenticate)]
"""Who calls, with any key."""
Submitter = Annotated[Caller, Depends(require("submit"))]
"""Who calls, with a key that may submit."""
Reader = Annotated[Caller, Depends(require("read"))]
"""Who calls, with a key that may read."""
Admin = Annotated[Caller, Depends(require("admin"))]
"""Who calls, with a key that may administer."""
