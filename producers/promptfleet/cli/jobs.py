"""Commands about single jobs: enqueue, result, cancel."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any, NoReturn

import typer

from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, open_client
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.terminal import JsonFlag, complain, note, print_json, print_text
from promptfleet.handles import PromptJob
from promptfleet.options import PromptOptions
from promptfleet_shared.errors import (
    InvalidRequestError,
    JobFailedError,
    JobNotFoundError,
    WaitTimeoutError,
)
from promptfleet_shared.jobs import JobState, OnUnknown, Result

Timeout = Annotated[float | None, typer.Option("--timeout", min=0, help="Seconds to wait at most.")]


def enqueue(
    prompt: Annotated[str, typer.Argument(help="The prompt's text; - reads it from stdin.")],
    *,
    tier: Annotated[str | None, typer.Option(help="Which tier answers, e.g. basic.")] = None,
    model: Annotated[str | None, typer.Option(help="One model instead of the tier's.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of the answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="From 0 to 2.")] = None,
    priority: Annotated[int | None, typer.Option(help="0 to 9, the most urgent.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds until it expires.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key with the same request is one job.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, given back with the result; repeatable.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Ask the provider anew.")] = False,
    on_unknown: Annotated[
        OnUnknown | None,
        typer.Option(help="When a call was lost that may have been billed: retry, or fail."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the answer and print it.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the answer as it comes; not with --json.")
    ] = False,
    timeout: Timeout = None,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Enqueue one prompt: prints its id, or with --wait or --stream its answer."""
    if stream and as_json:
        msg = "--stream: prints text as it comes, which --json can't; --wait --json can wait"
        raise typer.BadParameter(msg)
    options: PromptOptions = {
        "tier": tier,
        "model": model,
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "priority": priority,
        "deadline": deadline,
        "idempotency_key": idempotency_key,
        "metadata": _pairs(metadata or []),
        "cache": False if no_cache else None,
        "on_unknown": on_unknown,
        "stream": stream or None,
    }
    with open_client(data_dir) as client:
        job = client.enqueue_prompt(sys.stdin.read() if prompt == "-" else prompt, **options)
        if stream:
            _print_tokens(job, timeout)
        elif wait:
            _wait(client.wait_for_result, job.id, timeout, as_json=as_json)
        elif as_json:
            print_json({"id": str(job.id), "tier": job.tier})
        else:
            print_text(str(job.id))


def result(
    id: Annotated[str, typer.Argument(help="The job's id.")],  # noqa: A002  # what users call it
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the job's end.")] = False,
    timeout: Timeout = None,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Print a job's answer; exit 3 if it has none, 4 if it is not finished."""
    with open_client(data_dir) as client:
        if wait:
            _wait(client.wait_for_result, id, timeout, as_json=as_json)
            return
        found = client.get_result(id)
        if found is not None:
            _show(found, as_json=as_json)
            return
        state = client.get_state(id)
        if as_json:
            print_json({"id": id, "state": state})
        else:
            note(f"The job is {state}; --wait waits for its end.")
        raise typer.Exit(ExitCode.NOT_YET)


def cancel(
    ids: Annotated[list[str], typer.Argument(help="The jobs' ids.")],
    *,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Ask for the cancellation of jobs; exit 1 if one does not exist."""
    answers: dict[str, str] = {}
    with open_client(data_dir) as client:
        for id_ in ids:
            try:
                answers[id_] = "cancelling" if client.cancel(id_) else "was finished already"
            except JobNotFoundError:
                answers[id_] = "not found"
    if as_json:
        print_json(answers)
    else:
        for id_, answer in answers.items():
            print_text(f"{id_}: {answer}")
    if "not found" in answers.values():
        raise typer.Exit(ExitCode.FAILED)


def as_record(found: Result) -> dict[str, Any]:
    """A result as JSON shows it."""
    record = dataclasses.asdict(found)
    return {"id": str(record.pop("job_id")), **record}


def _print_tokens(job: PromptJob, timeout: float | None) -> None:
    """Print the text as it comes; a try that broke off stays on the screen, marked as void."""
    last = ""
    tokens = job.tokens(timeout)
    try:
        for token in tokens:
            if token.restarts and last:
                print_text("")
                note("The answer broke off; here it is from its beginning.")
            last = token
            sys.stdout.write(token)
            sys.stdout.flush()
    except JobFailedError:
        _show(job.wait(), as_json=False)
    except WaitTimeoutError:
        _not_yet(job.id, timeout)
    if not last and tokens.result is not None:
        _show(tokens.result, as_json=False)
    elif not last.endswith("\n"):
        print_text("")


def _wait(wait_for_result: Any, id_: Any, timeout: float | None, *, as_json: bool) -> None:
    try:
        found = wait_for_result(id_, timeout)
    except WaitTimeoutError:
        if as_json:
            print_json({"id": str(id_), "state": "not finished"})
        _not_yet(id_, timeout)
    _show(found, as_json=as_json)


def _not_yet(id_: Any, timeout: float | None) -> NoReturn:
    note(f"Not finished within {timeout:g} s; it goes on: promptfleet result {id_} --wait")
    raise typer.Exit(ExitCode.NOT_YET) from None


def _show(found: Result, *, as_json: bool) -> None:
    if as_json:
        print_json(as_record(found))
    elif found.text is not None:
        print_text(found.text)
    elif found.succeeded:  # e.g. an embedding or a tool call: no text, but a response
        print_json(found.response)
    if found.state is not JobState.SUCCEEDED:
        if not as_json:
            reason = f": {found.error.code}: {found.error.message}" if found.error else ""
            complain(f"the job {found.job_id} {found.state}{reason}")
        raise typer.Exit(ExitCode.JOBS_FAILED)


def _pairs(texts: list[str]) -> dict[str, str] | None:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            msg = f"--metadata: must be NAME=VALUE, not {text!r}"
            raise InvalidRequestError(msg, field="metadata")
        pairs[name] = value
    return pairs or None
