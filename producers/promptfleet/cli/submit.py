"""`promptfleet submit`: a file of prompts in, a file of results out."""

from __future__ import annotations

import contextlib
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import orjson
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from promptfleet.bulk.files import Fingerprint, RowFile, fingerprint
from promptfleet.bulk.lines import read_lines
from promptfleet.bulk.submission import Counts, Run, Submission
from promptfleet.cli.environment import DEFAULT_DATA_DIR, DataDir, find_settings
from promptfleet.cli.exits import ExitCode
from promptfleet.cli.terminal import JsonFlag, err, note, print_json
from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import load_fleet
from promptfleet_shared.settings import Settings

_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_RUN_ID_CHARS = 16


def submit(
    path: Annotated[
        str,
        typer.Argument(
            help="A line a prompt: a JSON string, an object with prompt or messages and options,"
            " an OpenAI batch line, or an MT-Bench line; - reads stdin."
        ),
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Gets a row a success.")
    ] = None,
    errors: Annotated[
        Path | None, typer.Option(help="Gets a row a failure; by default OUTPUT.errors.jsonl.")
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            help="Where a line names none; models of OpenAI batch lines are left out then."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where a line names none.")] = None,
    system: Annotated[str | None, typer.Option(help="Where a line has none.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Where a line has none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Where a line has none.")] = None,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Open jobs at most.")] = 5000,
    run_id: Annotated[
        str | None,
        typer.Option(
            help="By default made of the file's content and the options; another one"
            " asks everything again."
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again what is in the errors file.")
    ] = False,
    with_response: Annotated[
        bool, typer.Option("--with-response", help="Rows carry the provider's whole response.")
    ] = False,
    only_forecast: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check every line, say what it will cost, and submit nothing."
        ),
    ] = False,
    as_json: JsonFlag = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Submit a file of prompts of any size; run it again after Ctrl-C and it goes on."""
    settings = find_settings(data_dir)
    options = _given(
        tier=tier, model=model, system=system, max_tokens=max_tokens, temperature=temperature
    )
    if only_forecast:
        _check_tier(settings, tier)
        _forecast(path, settings, options, keep_model=tier is None, as_json=as_json)
        return
    if output is None:
        raise ConfigurationError("--output: a file for the results is needed, or --dry-run")
    identity = _identify(path, options, run_id)
    run = Run(
        id=identity.digest,
        options=options,
        max_in_flight=max_in_flight,
        keep_model=tier is None,
        with_response=with_response,
        retry_failed=retry_failed,
    )
    errors = errors or output.with_suffix(".errors.jsonl")
    _check_paths(path, output, errors)
    _check_tier(settings, tier)
    with _row_file(output) as results, _row_file(errors, keep_empty=False) as failures:
        counts = _run(path, run, settings, results, failures, lines=identity.lines)
    _report(counts, run, output, errors, as_json=as_json)
    if counts.failed or counts.invalid:
        raise typer.Exit(ExitCode.JOBS_FAILED)


def _forecast(
    path: str, settings: Settings, options: dict[str, Any], *, keep_model: bool, as_json: bool
) -> None:
    from promptfleet.cli.forecasts import dry_run  # noqa: PLC0415  # seldom needed

    with _opened(path) as file:
        found = dry_run(file, settings, options, keep_model=keep_model, as_json=as_json)
    if found.invalid:
        raise typer.Exit(ExitCode.JOBS_FAILED)


def _run(
    path: str, run: Run, settings: Settings, results: RowFile, failures: RowFile, *, lines: int
) -> Counts:
    from promptfleet.client import Client  # noqa: PLC0415  # the database's library is slow

    with Client(settings) as client, _progress(lines) as show, _opened(path) as file:
        submission = Submission(client, run, results=results, errors=failures, on_progress=show)
        if submission.counts.settled:
            note(f"going on with run {run.id}: {submission.counts.settled:,} lines are settled")
        try:
            return submission.go(read_lines(file))
        except KeyboardInterrupt:
            note(_interrupted(submission.counts))
            raise


def _interrupted(counts: Counts) -> str:
    return (
        f"interrupted: {counts.settled:,} lines are settled; {counts.in_flight:,} prompts go on"
        " in the fleet. The same command collects them and goes on."
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _identify(path: str, options: dict[str, Any], run_id: str | None) -> Fingerprint:
    """The run's id, and how many lines there are (0: nobody knows)."""
    if run_id is not None and not _RUN_ID.fullmatch(run_id):
        raise ConfigurationError("--run-id: up to 100 letters, digits and ._- are accepted")
    if path == "-":
        return Fingerprint(digest=run_id or uuid.uuid4().hex[:_RUN_ID_CHARS], lines=0)
    salt = orjson.dumps(options, option=orjson.OPT_SORT_KEYS)
    with _opened(path) as file:
        found = fingerprint(file, salt)
    return Fingerprint(digest=run_id or found.digest[:_RUN_ID_CHARS], lines=found.lines)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = Path(path).open("rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise ConfigurationError(f"{path}: can't be read: {error.strerror}") from None
    with file:
        yield file


@contextlib.contextmanager
def _row_file(path: Path, *, keep_empty: bool = True) -> Iterator[RowFile]:
    rows = RowFile(path)
    try:
        yield rows
    finally:
        rows.close(remove_if_empty=not keep_empty)


def _check_paths(path: str, output: Path, errors: Path) -> None:
    places = [Path(place).resolve() for place in (path, output, errors) if place != "-"]
    if len(set(places)) < len(places):
        raise ConfigurationError("the input, --output and --errors must be different files")


def _check_tier(settings: Settings, tier: str | None) -> None:
    """Once here, rather than once a line."""
    known = load_fleet(settings.config_path).tier_names
    if tier is not None and settings.config_path is not None and tier not in known:
        raise ConfigurationError(f"--tier: must be one of {', '.join(known)}, not {tier!r}")


@contextlib.contextmanager
def _progress(lines: int) -> Iterator[Callable[[Counts], None]]:
    bar = Progress(
        TextColumn("[bold]prompts"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.fields[open]:,} open"),
        TextColumn("[red]{task.fields[bad]:,} failed"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        console=err(),
    )
    task = bar.add_task("prompts", total=lines or None, open=0, bad=0)

    def show(counts: Counts) -> None:
        bad = counts.failed + counts.invalid
        bar.update(task, completed=counts.settled, open=counts.in_flight, bad=bad)

    with bar:
        yield show
        bar.update(task, total=bar.tasks[task].completed)  # blank lines were none


def _report(counts: Counts, run: Run, output: Path, errors: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "run": run.id,
                "output": output,
                "errors": errors,
                "earlier": counts.earlier,
                "succeeded": counts.succeeded,
                "failed": counts.failed,
                "invalid": counts.invalid,
                "submitted": counts.submitted,
            }
        )
        return
    earlier = f" ({counts.earlier:,} of an earlier start)" if counts.earlier else ""
    console = err()
    console.print(
        f"[green]{counts.succeeded + counts.earlier:,} answered[/]{earlier} → {output}",
        soft_wrap=True,
    )
    if bad := counts.failed + counts.invalid:
        kinds = f"{counts.failed:,} failed, {counts.invalid:,} lines are not valid"
        console.print(f"[red]{bad:,} not answered[/] ({kinds}) → {errors}", soft_wrap=True)
        if counts.failed:
            note("--retry-failed asks those again")
    note(f"run {run.id}")
