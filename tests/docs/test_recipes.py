"""The recipes for web frameworks run as they stand in the docs, on a real Postgres and Valkey."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import django
import django.conf
import openai
import pytest
import sqlalchemy as sa
from django.db import connection, connections, transaction
from django.test import RequestFactory
from fastapi.testclient import TestClient
from tests.docs.pages import ROOT, blocks
from tests.rows import claim_one, job_row, outcome

from promptfleet import (
    Client,
    JobNotFoundError,
    Prompt,
    default_client,
    enqueue_prompt,
    enqueue_prompts,
)
from promptfleet.django import django_session
from promptfleet.postgres import PostgresBackend
from promptfleet.testing import fake_fleet
from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.settings import Settings
from promptfleet_shared.signing import new_secret
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.keys import create_key
from promptfleet_shared.store.tables import jobs

HOWTO = ROOT / "docs/howto"


class Bell:
    """Keeps what was rung for."""

    def __init__(self) -> None:
        self.rung: list[uuid.UUID] = []

    def ring(self, doorbells: Iterable[Doorbell]) -> None:
        self.rung += [doorbell.job_id for doorbell in doorbells]

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture(autouse=True)
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFLEET_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("PROMPTFLEET_BROKER_URL", settings.broker_url.get_secret_value())


@pytest.fixture(autouse=True)
def client(settings: Settings, bell: Bell, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """The client behind the functions, with a bell that can be looked at."""
    with Client(settings) as made:
        made._servers = PostgresBackend(settings, bell=bell)
        monkeypatch.setattr(default_client._default, "_client", made)
        yield made


def recipe(page: str) -> ModuleType:
    """The recipe of a page as a module; its lines are the page's."""
    module = ModuleType(page.removesuffix(".md").replace("-", "_"))
    found = [block for block in blocks(HOWTO / page, "python") if block.mark == "recipe"]
    assert found
    for block in found:
        source = "\n" * (block.line - 1) + block.code
        exec(compile(source, block.page, "exec", dont_inherit=True), vars(module))  # noqa: S102 - our own pages
    return module


def job_ids(database: sa.Engine) -> set[uuid.UUID]:
    with database.connect() as reading:
        return set(reading.execute(sa.select(jobs.c.id)).scalars())


def answer(database: sa.Engine, job_id: uuid.UUID, text: str) -> None:
    """End the job as a worker would."""
    done = outcome(claim_one(database, job_id), text=text)
    with database.begin() as writing:
        finish(writing, [done])


def test_every_recipe_runs() -> None:
    """Here, or where a test has more servers."""
    others = (ROOT / "tests/integration").glob("test_openai_*.py")
    told = "".join(path.read_text(encoding="utf-8") for path in [Path(__file__), *others])
    for page in HOWTO.glob("*.md"):
        if any(block.mark == "recipe" for block in blocks(page, "python")):
            assert page.name in told


# -- Django ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def django_ready() -> None:
    if not django.conf.settings.configured:
        django.conf.settings.configure(DATABASES={}, LOGGING_CONFIG=None, USE_TZ=True)
        django.setup()


@pytest.fixture
def site(django_ready: None, settings: Settings, database: sa.Engine) -> Iterator[Any]:
    """The recipe, with Django on this test's database and the recipe's table in it."""
    with _database(settings.database_url.get_secret_value()):
        _forget_models()
        site = recipe("use-with-django.md")
        with connection.schema_editor() as editor:
            editor.create_model(site.Article)
        yield site


@contextmanager
def _database(url: str, **others: Any) -> Iterator[None]:
    at = sa.make_url(url)
    connections.settings = connections.configure_settings(
        {
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": at.database,
                "USER": at.username,
                "PASSWORD": at.password,
                "HOST": at.host,
                "PORT": str(at.port),
            },
            **others,
        }
    )
    try:
        yield
    finally:
        for alias in ("default", *others):
            connections[alias].close()
            del connections[alias]


def atomic(*names: str) -> AbstractContextManager[None]:
    """Django's own, whose decorator form makes type checkers doubt that it is one of these."""
    block: Any = transaction.atomic
    entered: AbstractContextManager[None] = block(*names)
    return entered


def _forget_models() -> None:
    """The recipe is made anew for each test, and Django would warn of a second Article."""
    from django.apps import apps

    apps.all_models.pop("articles", None)
    apps.clear_cache()


def test_django_commits_the_job_with_the_row(site: Any, database: sa.Engine, bell: Bell) -> None:
    with atomic():
        article = site.publish("A long text")  # an inner block is a savepoint
        assert not bell.rung
        assert job_ids(database) == set()  # seen by nobody before the commit
    assert bell.rung == [article.summary_job]
    assert job_row(database, article.summary_job)["metadata"] == {"article": article.pk}
    assert site.Article.objects.get().summary_job == article.summary_job


def test_django_takes_the_job_back_with_the_row(site: Any, database: sa.Engine, bell: Bell) -> None:
    def interrupted() -> None:
        with atomic():
            site.publish("A long text")
            raise LookupError

    with pytest.raises(LookupError):
        interrupted()
    assert job_ids(database) == set()
    assert bell.rung == []
    assert site.Article.objects.count() == 0


def test_django_takes_back_what_a_savepoint_held(
    site: Any, database: sa.Engine, bell: Bell
) -> None:
    def interrupted() -> None:
        with atomic():
            site.publish("Two")
            raise LookupError

    with atomic():
        first = site.publish("One")
        with pytest.raises(LookupError):
            interrupted()
        third = site.publish("Three")
    kept = [first.summary_job, third.summary_job]
    assert job_ids(database) == set(kept)
    assert bell.rung == kept


def test_django_gets_its_connection_back_as_it_was(site: Any, bell: Bell) -> None:
    site.publish("One")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        before = cursor.fetchone()
    assert connection.get_autocommit()
    handlers = len(connection.connection._notice_handlers)
    with atomic():
        for text in ("Two", "Three"):
            site.publish(text)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            assert cursor.fetchone() == before
    assert len(connection.connection._notice_handlers) == handlers
    assert len(bell.rung) == 3


def test_django_commits_many_jobs_at_once(site: Any, database: sa.Engine, bell: Bell) -> None:
    prompts: list[Prompt] = [
        {"prompt": f"Number {n}", "idempotency_key": str(n)} for n in range(1_500)
    ]
    with atomic():
        enqueue_prompts(prompts, tier="basic", session=django_session())
        again = enqueue_prompts(prompts, tier="basic", session=django_session())
        assert not bell.rung
    assert job_ids(database) == {job.id for job in again}
    assert set(bell.rung) == job_ids(database)


def test_django_outside_of_a_transaction(site: Any, database: sa.Engine, bell: Bell) -> None:
    assert django_session() is None
    job = enqueue_prompt("Hello", tier="basic", session=django_session())
    assert job_ids(database) == {job.id}
    assert bell.rung == [job.id]


def test_django_says_so_when_transactions_are_managed_by_hand(site: Any) -> None:
    connection.ensure_connection()
    connection.set_autocommit(False)
    try:
        with pytest.raises(transaction.TransactionManagementError):
            enqueue_prompt("Hello", tier="basic", session=django_session())
    finally:
        connection.rollback()
        connection.set_autocommit(True)


def test_django_on_another_database(django_ready: None, settings: Settings) -> None:
    sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    url = settings.database_url.get_secret_value()
    with (
        _database(url, other=sqlite),
        atomic("other"),
        pytest.raises(ConfigurationError, match="psycopg 3"),
    ):
        django_session("other")


def test_django_after_the_commit(site: Any, database: sa.Engine, bell: Bell) -> None:
    with atomic():
        site.publish_elsewhere("A long text")
        assert job_ids(database) == set()
    assert job_ids(database) == set(bell.rung)
    assert len(bell.rung) == 1


def test_django_shows_the_answer(site: Any, database: sa.Engine) -> None:
    article = site.publish("A long text")
    request = RequestFactory().get("/")
    assert site.summary(request, article.pk).status_code == 202
    answer(database, article.summary_job, "Short")
    assert b'"summary": "Short"' in site.summary(request, article.pk).content


def test_django_receives_callbacks(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFLEET_CALLBACK_SECRETS", new_secret())
    posted = RequestFactory().post("/", data=b"{}", content_type="application/json")
    assert site.receive(posted).status_code == 400
    assert site.receive(RequestFactory().get("/")).status_code == 405


def test_django_with_the_fake_fleet(site: Any) -> None:
    with fake_fleet() as fleet:
        article = site.publish("A long text")
        assert site.summary(RequestFactory().get("/"), article.pk).status_code == 200

        def interrupted() -> None:
            with atomic():
                lost.append(enqueue_prompt("Hello", tier="basic", session=django_session()))
                raise LookupError

        lost: list[Any] = []
        with pytest.raises(LookupError):
            interrupted()
        with pytest.raises(JobNotFoundError):
            lost[0].state()
        fleet.assert_enqueued(metadata={"article": article.pk}, times=1)


# -- Flask and FastAPI -----------------------------------------------------------------------


def test_flask(database: sa.Engine) -> None:
    web = recipe("use-with-flask.md").app.test_client()
    submitted = web.post("/summaries", json={"text": "A long text"})
    assert submitted.status_code == 202
    path = f"/summaries/{submitted.json['id']}"
    assert web.get(path).status_code == 202
    answer(database, uuid.UUID(submitted.json["id"]), "Short")
    assert web.get(path).json == {"state": "succeeded", "summary": "Short"}
    assert web.get(f"/summaries/{uuid.uuid4()}").status_code == 404


def test_fastapi(database: sa.Engine) -> None:
    with TestClient(recipe("use-with-fastapi.md").app) as web:
        submitted = web.post("/summaries", json={"text": "A long text"})
        assert submitted.status_code == 202
        path = f"/summaries/{submitted.json()['id']}"
        assert web.get(path).json() == {"state": "pending", "summary": None}
        answer(database, uuid.UUID(submitted.json()["id"]), "Short")
        assert web.get(path).json() == {"state": "succeeded", "summary": "Short"}
        assert web.get(f"/summaries/{uuid.uuid4()}").status_code == 404


def test_fastapi_carries_the_api(database: sa.Engine) -> None:
    with database.begin() as writing:
        key = create_key(writing, tenant="default", scopes=("read", "submit"), name="").secret
    (block,) = blocks(HOWTO / "run-the-api.md", "python")
    module = ModuleType("mounting")
    exec(compile(block.code, block.page, "exec", dont_inherit=True), vars(module))  # noqa: S102 - our own page
    with TestClient(module.app) as web:
        sdk = openai.OpenAI(base_url="http://testserver/llm/v1", api_key=key, http_client=web)
        assert "tier/basic" in {model.id for model in sdk.models.list()}
        made = web.post(
            "/llm/v1/jobs",
            json={"prompt": "Hello", "tier": "basic"},
            headers={"authorization": f"Bearer {key}"},
        )
        assert made.headers["location"] == f"/llm/v1/jobs/{made.json()['id']}"
        assert web.get(made.headers["location"]).status_code == 401
