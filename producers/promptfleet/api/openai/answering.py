"""A request that waits for its job: accept, wait, answer; what has to wait too long stays a job."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from promptfleet.api.auth import Caller
from promptfleet.api.errors import ApiError, JsonResponse, api_error
from promptfleet.api.openai.answers import openai_answer
from promptfleet.api.openai.failures import JOB_HEADER, NO_REPEAT, failure, still_running
from promptfleet.api.openai.options import cancels_on_disconnect, fleet_options
from promptfleet.api.openai.translating import PROMPT_FIELDS, count_prompts, make_job
from promptfleet.api.services import Services
from promptfleet.api.shapes import fleet_headers
from promptfleet.options import refuse
from promptfleet_shared.errors import PromptFleetError
from promptfleet_shared.jobs import JobKind, JobSpec, Result

# How long the client itself waits for bytes: Python's sends the first, JavaScript's the second.
_PATIENCE_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
_MARGIN = 0.1
_LONGEST_MARGIN_S = 1.0
_REPLAYED = {"idempotent-replayed": "true"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request that is under way.

    Attributes:
        body: Decoded JSON.
        began_s: When it came, by `time.perf_counter`.
    """

    request: Request
    services: Services
    tenant: str
    kind: JobKind
    body: Mapping[str, Any]
    began_s: float

    @property
    def model(self) -> str:
        """The model as the client calls it."""
        return str(self.body.get("model"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """A job that is committed.

    Attributes:
        is_new: False for one that was accepted earlier under the same idempotency key.
    """

    id: uuid.UUID
    is_new: bool

    @property
    def headers(self) -> dict[str, str]:
        """What tells the client of it."""
        return {JOB_HEADER: str(self.id), **({} if self.is_new else _REPLAYED)}


async def read_request(
    request: Request, services: Services, caller: Caller, kind: JobKind
) -> Asked:
    """Read a request's body.

    Raises:
        InvalidRequestError: It is no JSON object.
        ApiError: It is beyond a limit.
    """
    began_s = time.perf_counter()
    body = await services.limits.read_json(request)
    if not isinstance(body, Mapping):
        refuse("the body", "an object", body)
    return Asked(
        request=request,
        services=services,
        tenant=caller.tenant,
        kind=kind,
        body=body,
        began_s=began_s,
    )


def job_of(asked: Asked, *, stream: bool = False) -> JobSpec:
    """The job that the request asks for.

    Raises:
        InvalidRequestError: `field` names what is wrong.
        ApiError: There is no such model, or the prompt is beyond a limit.
    """
    services = asked.services
    spec = make_job(
        asked.kind,
        asked.body,
        fleet=services.fleet,
        defaults=services.defaults_of(asked.tenant),
        options=fleet_options(asked.body, asked.request),
        stream=stream,
    )
    field = PROMPT_FIELDS[asked.kind]
    if asked.kind is not JobKind.CHAT:
        services.limits.check_prompts(count_prompts(asked.body[field]), param=field)
    services.limits.check_tokens(spec, param=field)
    return spec


async def accept(asked: Asked, spec: JobSpec) -> Accepted:
    """Commit the job.

    Raises:
        ApiError: 429 or 503, there is no room for it.
        IdempotencyConflictError: Its key was used with another request.
        StoreUnavailableError: Nothing was accepted, unless `unknown_outcome`.
    """
    services = asked.services
    with services.limits.submissions.taken(asked.tenant):
        await services.limits.check_backlog(asked.tenant)
        (job_id,) = await services.stores.submit(asked.tenant, [spec])
    is_new = job_id == spec.id
    if is_new:
        services.limits.accepted(asked.tenant, 1)
    return Accepted(id=job_id, is_new=is_new)


async def wait_for(asked: Asked, accepted: Accepted) -> Result:
    """Wait for the job's end, for as long as the client and the settings have patience.

    Raises:
        ApiError: 504, it is still under way; says which job it is.
        ClientDisconnect: The client has left; its job goes on unless it asked for its end.
    """
    patience_s = patience(asked.request, asked.services.settings.api_wait_s)
    waiting = asyncio.ensure_future(
        asked.services.results.wait(asked.tenant, [accepted.id], patience_s, is_new=accepted.is_new)
    )
    leaving = asyncio.ensure_future(_left(asked.request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            if cancels_on_disconnect(asked.request):
                asked.services.streams.cancel_soon(asked.tenant, accepted.id)
            raise ClientDisconnect
    finally:
        waiting.cancel()
        leaving.cancel()
    result = waiting.result().get(accepted.id)
    if result is None:
        raise still_running(accepted.id)
    return result


async def answer(asked: Asked) -> tuple[Result, dict[str, Any], dict[str, str]]:
    """See the request through: its result, the answer in OpenAI's shape, and its headers.

    Raises:
        ApiError: There is none, for whichever reason.
        As `job_of`, `accept` and `wait_for` besides.
    """
    spec = job_of(asked)
    # Before anything is accepted: who is told to come again would else have two jobs.
    with asked.services.limits.waiting.taken(asked.tenant):
        accepted = await accept(asked, spec)
        with told_of(accepted):
            result = await wait_for(asked, accepted)
            if not result.succeeded:
                raise failure(result)
            headers = {**accepted.headers, **response_headers(asked, result)}
            return result, openai_answer(result, asked.kind, asked.model), headers


@contextlib.contextmanager
def told_of(accepted: Accepted) -> Iterator[None]:
    """Name the job in whatever error comes after its commit, and keep clients from repeating it."""
    try:
        yield
    except ApiError as error:
        error.headers = {**accepted.headers, **error.headers}
        raise
    except ClientDisconnect:
        raise
    except PromptFleetError as error:
        known = api_error(error)
        known.headers |= {**accepted.headers, **NO_REPEAT}
        raise known from error


def response_headers(asked: Asked, result: Result | None = None) -> dict[str, str]:
    """How the answer was made, what that took, and how much more the client may ask."""
    headers = {"openai-processing-ms": str(round((time.perf_counter() - asked.began_s) * 1000))}
    headers |= rate_limit_headers(asked.services, asked.tenant)
    if result is not None:
        headers |= fleet_headers(result)
    return headers


def rate_limit_headers(services: Services, tenant: str) -> dict[str, str]:
    """How many requests may wait at once, and how many more; of tokens there is no limit."""
    room = services.limits.waiting
    return {
        "x-ratelimit-limit-requests": str(room.most_of_tenant),
        "x-ratelimit-remaining-requests": str(room.left(tenant)),
        "x-ratelimit-reset-requests": "1s",
    }


def json_answer(answer: dict[str, Any], headers: Mapping[str, str]) -> Response:
    """The response to a request that was answered."""
    return JsonResponse(answer, headers=dict(headers))


def patience(request: Request, most_s: float) -> float:
    """Seconds to wait: a little less than the client does, so that it hears of its job.

    Args:
        request: Of a client.
        most_s: What the settings say.
    """
    for name in _PATIENCE_HEADERS:
        try:
            told_s = float(request.headers.get(name, ""))
        except ValueError:
            continue
        if math.isfinite(told_s) and told_s > 0:
            return min(most_s, told_s - min(told_s * _MARGIN, _LONGEST_MARGIN_S))
    return most_s


async def _left(request: Request) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
