"""The composition root: reads the settings, builds everything, exports the Celery app.

`celery -A promptfleet_workers.app worker -Q prompts.basic` starts a worker.
"""

from __future__ import annotations

from promptfleet_shared.fleet import load_fleet
from promptfleet_shared.parking import ParkingLot
from promptfleet_shared.queueing import Ringer, make_celery, publish
from promptfleet_shared.settings import load_settings
from promptfleet_workers import gate, logs, tasks
from promptfleet_workers.assembly import Builder
from promptfleet_workers.worker import FleetWorker

settings = load_settings()
fleet = load_fleet(settings.config_path)
app = make_celery(settings.broker_url.get_secret_value(), fleet.tier_names)
app.conf.update(
    worker_pool="threads",
    # A task waits for its doorbell's jobs and does nothing else, so there may be one for each job
    # that can be in flight; how many doorbells are taken is the gate's business.
    worker_concurrency=sum(
        fleet.batch_options(tier).max_concurrent_calls for tier in fleet.tier_names
    ),
    worker_prefetch_multiplier=1,
    worker_enable_prefetch_count_reduction=False,
    worker_send_task_events=True,
    worker_hijack_root_logger=True,
    task_acks_late=False,
)
lot = ParkingLot()
ringer = Ringer(
    app,
    window_s=settings.doorbell_window_ms / 1000,
    deliver=lot.deliver if fleet.fairness.enabled else publish,
)
worker = FleetWorker(
    Builder(settings, fleet, app=app, lot=lot, ringer=ringer),
    drain_s=settings.drain_s,
    ring=ringer.ring,
)
tasks.register(app, worker.run)
gate.install(app, worker)
logs.install(settings.log_format)
