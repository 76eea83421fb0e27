"""Submit many prompts at once, and use the answers as they come.

Run a fleet with `promptfleet dev`, then, in another terminal:

    eval "$(promptfleet env)"
    python examples/batch_of_prompts.py
"""

from __future__ import annotations

from promptfleet import Client

REVIEWS = [
    "The kettle boils fast, but the lid broke after a week.",
    "Arrived late. The colour is lovely.",
    "It does what it says.",
    "Arrived late. The colour is lovely.",  # equal requests share one call
]


def main() -> None:
    """Ask for a verdict on each review."""
    with Client() as client:
        jobs = client.enqueue_prompts(
            [
                {"prompt": review, "metadata": {"review": number}}
                for number, review in enumerate(REVIEWS)
            ],
            tier="basic",
            system="Is this review positive, negative or mixed? Answer in one word.",
            max_tokens=5,
            deadline=120,
        )
        for result in client.as_completed([job.id for job in jobs], timeout=120):
            verdict = result.text if result.succeeded else result.error
            print(f"review {result.metadata['review']}: {verdict} ({result.cache})")
        results = client.get_results(job.id for job in jobs)
    tokens = sum(result.usage.input + result.usage.output for result in results.values())
    print(f"{len(results)} reviews, {tokens} tokens")


if __name__ == "__main__":
    main()
