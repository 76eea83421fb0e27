"""Write a row and enqueue its prompt in one transaction, then keep the answer with the row.

Run a fleet with `promptfleet dev`, then, in another terminal:

    eval "$(promptfleet env)"
    python examples/in_a_transaction.py
"""

from __future__ import annotations

import os
import uuid

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from promptfleet import enqueue_prompt, wait_for_result


class Base(DeclarativeBase):
    """The tables of this app."""


class Article(Base):
    """A text with a summary that comes later."""

    __tablename__ = "example_articles"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    summary: Mapped[str | None]
    summary_job: Mapped[uuid.UUID | None]


def publish(session: Session, text: str) -> Article:
    """Add an article whose summary is asked for if, and only if, it is committed."""
    article = Article(text=text)
    session.add(article)
    session.flush()
    job = enqueue_prompt(
        f"Summarize in one sentence: {text}",
        tier="basic",
        max_tokens=60,
        metadata={"article": article.id},
        idempotency_key=f"summary-of-article-{article.id}",
        session=session,
    )
    article.summary_job = job.id
    return article


def main() -> None:
    """Publish one article, and fail to publish another."""
    url = sa.make_url(os.environ["PROMPTFLEET_DATABASE_URL"])
    engine = sa.create_engine(url.set(drivername="postgresql+psycopg"))
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        publish(session, "Postgres is the truth, Redis is the doorbell.")
    with Session(engine) as session:
        publish(session, "This one is rolled back, and nobody asks for its summary.")
        session.rollback()
    with Session(engine) as session, session.begin():
        for waiting in session.scalars(sa.select(Article).where(Article.summary.is_(None))):
            if waiting.summary_job is not None:
                waiting.summary = wait_for_result(waiting.summary_job, timeout=120).text
                print(f"article {waiting.id}: {waiting.summary}")
    engine.dispose()


if __name__ == "__main__":
    main()
