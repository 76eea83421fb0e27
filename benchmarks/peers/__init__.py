"""Who the fleet is measured against: a hand-rolled Celery app, and a loop without a queue."""
