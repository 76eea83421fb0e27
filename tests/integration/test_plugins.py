"""Providers of users' own: a distribution as pip leaves it, found by its entry points."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.docs.pages import ROOT, blocks

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import Deployment, TimeoutOptions
from promptfleet_shared.jobs import JobKind
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.protocol import Call, Completion

Install = Callable[..., None]
PAGE = ROOT / "docs/howto/write-a-provider.md"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution's files where Python finds them, as an installer does."""
    monkeypatch.syspath_prepend(tmp_path)

    def installed(name: str, points: str, **modules: str) -> None:
        metadata = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(points)
        for module, code in modules.items():
            (tmp_path / f"{module}.py").write_text(code)

    return installed


def deployment(provider: str, **more: object) -> Deployment:
    values = {"name": "mine", "provider": provider, "base_url": "http://127.0.0.1:9/v1", **more}
    return Deployment.model_validate(values)


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.aclose()


async def test_the_documented_provider_works_once_it_is_installed(
    install: Install, client: HttpClient
) -> None:
    code = blocks(PAGE, "python")[0].code
    install("acme-llm", "[promptfleet.providers]\nacme = acme_llm:AcmeProvider\n", acme_llm=code)
    provider = build_provider(deployment("acme", options={"greeting": "Hello"}), client)

    call = Call(
        kind=JobKind.CHAT,
        model="m",
        requests=['{"messages":[{"content":"you","role":"user"}]}'],
        input_tokens=[1],
        timeouts=TimeoutOptions(),
    )
    (answer,) = await provider.call(call)
    assert isinstance(answer, Completion)
    assert answer.text == "Hello, you"
    await provider.aclose()


async def test_an_unknown_name_is_told_what_exists(install: Install, client: HttpClient) -> None:
    install("acme-llm", "[promptfleet.providers]\nacme = acme_there:X\n", acme_there="")
    with pytest.raises(ConfigurationError) as caught:
        build_provider(deployment("acmee"), client)
    assert str(caught.value) == (
        "deployment 'mine': provider: 'acmee' is none of anthropic, gemini, openai, nor an entry "
        "point of promptfleet.providers (acme)"
    )


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "raise ImportError('no such library')",
            "can't be imported (ImportError: no such library)",
        ),
        ("", "can't be imported (AttributeError"),
        ("def X(deployment, client): return 5", "makes nothing with call and aclose"),
        ("X = 5", "makes nothing with call and aclose"),
    ],
)
async def test_what_is_no_provider_is_named(
    install: Install, client: HttpClient, code: str, says: str
) -> None:
    module = f"acme_{abs(hash(code))}"
    install("acme-llm", f"[promptfleet.providers]\nacme = {module}:X\n", **{module: code})
    with pytest.raises(ConfigurationError, match="deployment 'mine': provider") as caught:
        build_provider(deployment("acme"), client)
    assert says in str(caught.value)


async def test_two_distributions_of_one_name_are_a_mistake(
    install: Install, client: HttpClient
) -> None:
    install("acme-one", "[promptfleet.providers]\nacme = one_llm:X\n", one_llm="")
    install("acme-two", "[promptfleet.providers]\nacme = two_llm:X\n", two_llm="")
    with pytest.raises(ConfigurationError, match=r"more than once .* by acme-one, acme-two"):
        build_provider(deployment("acme"), client)
