"""The Celery app of a good blog post: one task a prompt, its rows read and written by the ORM.

It is tuned as its authors would recommend. One `httpx.Client` a process keeps its connections
alive, and its limits fit the concurrency (httpx keeps only 20 of 100 by default). The engine's
pool gives each task a connection at once. `acks_late` keeps the prompts of a worker that dies,
results go to the app's own table and not to a result backend, and no events are sent. The session
stays open across the call to the provider, which saves a transaction a prompt and is the faster
way while the provider answers at once.
"""

from __future__ import annotations

import datetime as dt
import os
from typing import Any

import httpx
from celery import Celery
from sqlalchemy import ForeignKey, MetaData, create_engine, func
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

DATABASE_URL = os.environ.get("HAND_ROLLED_DATABASE_URL", "postgresql+psycopg://localhost/prompts")
BROKER_URL = os.environ.get("HAND_ROLLED_BROKER_URL", "redis://localhost:6379/0")
PROVIDER_URL = os.environ.get("HAND_ROLLED_PROVIDER_URL", "http://localhost:8000")
CONCURRENCY = int(os.environ.get("HAND_ROLLED_CONCURRENCY", "20"))

app = Celery("hand_rolled", broker=BROKER_URL)
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_default_queue="hand_rolled",
    task_ignore_result=True,
    task_acks_late=True,
    # 1, the usual advice for long tasks, is slower for short ones; with gevent the worker then
    # fetches no more than a pool full of tasks every 2 s.
    worker_prefetch_multiplier=16,
    broker_connection_retry_on_startup=True,
    # kombu's default of 10 is too few for gevent, where each greenlet acknowledges by itself:
    # acknowledgements fail, and the worker fills up with tasks that it believes unfinished.
    broker_transport_options={"max_connections": CONCURRENCY + 10},
)

# Neither connects before its first use, so the children of a prefork worker share no socket.
engine = create_engine(DATABASE_URL, pool_size=CONCURRENCY, max_overflow=0)
client = httpx.Client(
    base_url=PROVIDER_URL,
    timeout=60,
    limits=httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY),
)


class Base(DeclarativeBase):
    """The app's own tables, in a schema of their own."""

    metadata = MetaData(schema="hand_rolled")


class Prompt(Base):
    """What a user asked."""

    __tablename__ = "prompts"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Result(Base):
    """What the provider answered."""

    __tablename__ = "results"
    # Nobody reads finished_at back: no RETURNING.
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012  # as SQLAlchemy declares it

    prompt_id: Mapped[int] = mapped_column(ForeignKey(Prompt.id), primary_key=True)
    text: Mapped[str]
    input_tokens: Mapped[int]
    output_tokens: Mapped[int]
    finished_at: Mapped[dt.datetime] = mapped_column(server_default=func.clock_timestamp())


@app.task(
    name="hand_rolled.run_prompt",
    autoretry_for=(httpx.HTTPError,),
    retry_backoff=True,
    retry_jitter=True,
    max_retries=5,
)
def run_prompt(prompt_id: int) -> None:
    """Ask the provider for one prompt's answer and store it."""
    with Session(engine) as session:
        prompt = session.get_one(Prompt, prompt_id)
        answer = ask(prompt.text)
        usage = answer["usage"]
        session.add(
            Result(
                prompt_id=prompt_id,
                text=answer["choices"][0]["message"]["content"],
                input_tokens=usage["prompt_tokens"],
                output_tokens=usage["completion_tokens"],
            )
        )
        session.commit()


def ask(text: str) -> dict[str, Any]:
    """One chat completion."""
    response = client.post(
        "/v1/chat/completions",
        json={"model": "simulated", "messages": [{"role": "user", "content": text}]},
    )
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer
