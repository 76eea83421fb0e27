"""Every example in the documentation runs as it stands there.

Python blocks of a page run one after the other in one namespace, under `promptfleet.testing`. What
an ```output block shows is what the block before it printed. ```python pytest is a test file of
its own; ```python recipe needs real servers, and runs in test_recipes.py.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import honcho.environ
import pytest
import typer
from tests.docs.pages import ROOT, Block, blocks, pages

from promptfleet.cli import app
from promptfleet.testing import fake_fleet
from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.settings import Settings

CLI_VARIABLES = {
    "PROMPTFLEET_API_HOST",
    "PROMPTFLEET_API_PORT",
    "PROMPTFLEET_API_WORKERS",
    "PROMPTFLEET_DATA_DIR",
    "PROMPTFLEET_FLOWER_URL",
}
_TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
# Programs that are not ours; what they are given is checked where it is a path of ours.
_OTHERS = {".", "cat", "cd", "cp", "curl", "docker", "eval", "git", "pip", "python"}


def _with(*languages: str) -> list[Path]:
    return [page for page in pages() if blocks(page, *languages)]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _where(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.mark.parametrize("page", _with("python"), ids=_name)
def test_python_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("documented")  # SQLAlchemy looks names up in their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = ""
    with fake_fleet():
        for block in blocks(page, "python", "output"):
            if block.language == "output":
                assert printed == block.code, f"{_where(block)} is not what was printed"
            elif not block.mark:
                printed = _run(block, vars(module))


def _run(block: Block, namespace: dict[str, object]) -> str:
    """Run a block; its line numbers are the page's."""
    source = "\n" * (block.line - 1) + block.code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, block.page, "exec", dont_inherit=True), namespace)  # noqa: S102 - our own pages
    return printed.getvalue()


def _marked(mark: str) -> list[Block]:
    return [b for page in pages() for b in blocks(page, "python") if b.mark == mark]


@pytest.mark.parametrize("block", _marked("pytest"), ids=_where)
def test_test_files_pass(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "test_example.py"
    path.write_text(block.code, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
    done = subprocess.run(
        [*command, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_every_mark_is_known() -> None:
    marks = {block.mark for page in pages() for block in blocks(page, "python")}
    assert marks <= {"", "pytest", "recipe"}
    languages = {
        match
        for page in pages()
        for match in re.findall(r"^ *```(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert languages <= {"python", "js", "output", "toml", "console", "mermaid", "text", "sql"}


@pytest.mark.parametrize("page", _with("toml"), ids=_name)
def test_toml_examples_are_fleets(page: Path) -> None:
    for block in blocks(page, "toml"):
        assert parse_fleet(block.code, name=_where(block)) != Fleet()


@pytest.mark.parametrize("page", _with("console"), ids=_name)
def test_console_examples_name_what_exists(page: Path) -> None:
    for block in blocks(page, "console"):
        for line in _commands(block):
            _check_command(line, f"{_where(block)}: {line}")


def _commands(block: Block) -> Iterator[str]:
    assert block.code.startswith("$ "), f"{_where(block)}: no command"
    for line in block.code.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield line.removeprefix("$ ").partition("  #")[0]


def _check_command(line: str, where: str) -> None:
    """Fail unless the shell could run each command of the line's pipe."""
    for part in line.split(" | "):
        _check_part(part, where)


def _check_part(line: str, where: str) -> None:
    for inner in re.findall(r"\$\((promptfleet [^)]*)\)", line):
        _check_part(inner, where)
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        _check_variable(words.pop(0).partition("=")[0], where)
    match words:
        case []:
            pass
        case ["make", *rest]:
            targets = set(_TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
            assert {word for word in rest if "=" not in word} <= targets, where
        case ["promptfleet", *rest]:
            _parse(rest, where)
        case ["celery", *_]:
            processes = honcho.environ.parse_procfile(
                (ROOT / "Procfile").read_text(encoding="utf-8")
            ).processes
            known = [shlex.split(command)[:4] for command in processes.values()]
            assert words[:4] in known, where
        case ["kubectl", *rest]:
            _check_kubectl(rest, where)
        case ["export", assignment]:
            _check_variable(assignment.partition("=")[0], where)
        case [program, *_]:
            assert program in _OTHERS, where


def _check_kubectl(words: list[str], where: str) -> None:
    """Fail unless the files, the objects and the command within a container are ours."""
    for flag, path in itertools.pairwise(words):
        if flag in {"-f", "-k"}:
            assert (ROOT / path).exists(), where
    manifests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "infra/k8s").glob("*.yaml"))
    for name in re.findall(r"\b(?:deploy|svc|job)[/ ]([\w-]+)", " ".join(words)):
        assert f"\n  name: {name}\n" in manifests, where
    if "--" in words:
        program, *rest = words[words.index("--") + 1 :]
        assert program == "promptfleet", where
        _parse(rest, where)


def _check_variable(name: str, where: str) -> None:
    if name.startswith("PROMPTFLEET_"):
        known = {f"PROMPTFLEET_{field.upper()}" for field in Settings.model_fields}
        assert name in known | CLI_VARIABLES, where


def _parse(words: list[str], where: str) -> None:
    """Let the command line's own parser judge the words; runs nothing."""
    command = _without_effects(typer.main.get_command(app))
    complaint = io.StringIO()
    with (
        contextlib.redirect_stderr(complaint),
        contextlib.redirect_stdout(complaint),
        pytest.raises(SystemExit) as ended,
    ):
        command.main(words)
    assert ended.value.code == 0, f"{where}\n{complaint.getvalue()}"


def _without_effects(command: Any) -> Any:
    """The same command, or group of commands, that parses its words and no more."""
    children = getattr(command, "commands", None)
    if children is None:
        command.callback = lambda **_: None
    else:
        for child in children.values():
            _without_effects(child)
    return command


def test_a_wrong_example_is_found() -> None:
    for wrong in ("promptfleet enqeue x", "promptfleet status --jsn", "make tset", "wget x"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            _check_command(wrong, "here")


def test_docstrings_are_the_source_of_the_reference() -> None:
    """Each public option is told in the Python reference."""
    from promptfleet import PromptOptions

    page = (ROOT / "docs/reference/python-api.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in PromptOptions.__annotations__)
    assert inspect.getdoc(PromptOptions)
