"""A tour of the HTTP API with OpenAI's own client, which knows nothing of promptfleet.

Run a fleet with `promptfleet dev`, then, in another terminal:

    eval "$(promptfleet env)"
    pip install openai
    python examples/openai_tour.py

OPENAI_BASE_URL and OPENAI_API_KEY name another fleet; --model asks for another model or tier, and
--lines makes smaller batches: the small model of `promptfleet dev` needs minutes for a thousand
lines, `promptfleet dev --provider simulated` needs seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator

from openai import ConflictError, InternalServerError, NotFoundError, OpenAI
from openai.types import Batch, FileObject

HERE = os.environ.get("PROMPTFLEET_PUBLIC_URL", "http://127.0.0.1:8000")
FINAL = {"completed", "failed", "expired", "cancelled"}
LOOK_EVERY_S = 0.1


def models(client: OpenAI) -> None:
    """A model's name, or tier/<tier>, goes wherever OpenAI takes a model."""
    print("models:", ", ".join(model.id for model in client.models.list()))


def chat(client: OpenAI, model: str) -> None:
    """The answer, and in its headers how it was made."""
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=30,
    )
    answer = raw.parse()
    assert answer.usage is not None
    print(f"chat: {answer.choices[0].message.content!r}")
    print(f"  {answer.usage.total_tokens} tokens, job {raw.headers['x-promptfleet-job']}")


def stream(client: OpenAI, model: str) -> None:
    """The same, piece by piece."""
    pieces = 0
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Count to ten."}],
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    ) as chunks:
        for chunk in chunks:
            pieces += bool(chunk.choices and chunk.choices[0].delta.content)
            if chunk.usage is not None:
                print(f"stream: {chunk.usage.completion_tokens} tokens in {pieces} pieces")


def embeddings(client: OpenAI, model: str) -> None:
    """A vector a text, if the model can: the small one of `promptfleet dev` can't."""
    try:
        made = client.embeddings.create(model=model, input=["a cat", "a dog"])
    except InternalServerError as error:
        print(f"embeddings: none, {error.message}")
        return
    print(f"embeddings: {len(made.data)} of {len(made.data[0].embedding)} numbers")


def files(client: OpenAI) -> None:
    """Upload, look, read, delete."""
    file = client.files.create(file=("notes.jsonl", b'{"note": 1}\n'), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len(client.files.content(file.id).content)
    client.files.delete(file.id)
    try:
        client.files.retrieve(file.id)
    except NotFoundError:
        print(f"files: {file.filename} was written, read and deleted")


def new_batch(client: OpenAI, model: str, lines: int, topic: str) -> Batch:
    """A file with a request a line, and a batch of it."""
    requests = [
        {
            "custom_id": f"line-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [{"role": "user", "content": f"{topic} {n}?"}],
                "max_tokens": 2,
            },
        }
        for n in range(lines)
    ]
    text = "\n".join(json.dumps(request) for request in requests)
    file: FileObject = client.files.create(file=("batch.jsonl", text.encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )


def states(client: OpenAI, batch: Batch) -> Iterator[Batch]:
    """The batch each time that it has moved, until it has ended."""
    told = None
    while True:
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        assert counts is not None
        if told != (batch.status, counts):
            told = batch.status, counts
            print(f"\r  {batch.status}: {counts.completed} of {counts.total} ", end="", flush=True)
            yield batch
        if batch.status in FINAL:
            print()
            return
        time.sleep(LOOK_EVERY_S)


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, object]]:
    """What an output or error file says."""
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def whole_batch(client: OpenAI, model: str, lines: int) -> None:
    """All lines answered."""
    print(f"a batch of {lines} lines:")
    *_, batch = states(client, new_batch(client, model, lines, "What is"))
    answered = lines_of(client, batch.output_file_id)
    failed = lines_of(client, batch.error_file_id)
    assert len(answered) + len(failed) == lines
    print(f"  {len(answered)} answers, {len(failed)} errors")


def cancelled_batch(client: OpenAI, model: str, lines: int) -> None:
    """What was answered before the cancellation is kept; the other lines say why they were not."""
    print(f"a batch of {lines} lines, cancelled in mid-flight:")
    batch = new_batch(client, model, lines, "Where is")
    asked = False
    for batch in states(client, batch):  # noqa: B020  # the newest
        assert batch.request_counts is not None
        if not asked and batch.request_counts.completed >= min(20, lines // 10):
            cancel(client, batch)
            asked = True
    answered = lines_of(client, batch.output_file_id)
    cancelled = lines_of(client, batch.error_file_id)
    assert len(answered) + len(cancelled) == lines
    print(f"  {len(answered)} answers, {len(cancelled)} cancelled")


def cancel(client: OpenAI, batch: Batch) -> None:
    """Ask for it; a batch that was faster has ended."""
    try:
        client.batches.cancel(batch.id)
    except ConflictError as error:
        print(f"\n  too late: {error.message}")


def main() -> None:
    """Go through it all."""
    arguments = argparse.ArgumentParser(description="A tour of the HTTP API.")
    arguments.add_argument("--model", default="tier/basic")
    arguments.add_argument("--embedding-model", default="tier/basic")
    arguments.add_argument("--lines", type=int, default=1_000)
    asked = arguments.parse_args()
    with OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", f"{HERE}/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "this machine needs none"),
    ) as client:
        models(client)
        chat(client, asked.model)
        stream(client, asked.model)
        embeddings(client, asked.embedding_model)
        files(client)
        whole_batch(client, asked.model, asked.lines)
        cancelled_batch(client, asked.model, asked.lines)


if __name__ == "__main__":
    main()
