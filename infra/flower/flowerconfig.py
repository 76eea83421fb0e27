"""Flower's configuration: `celery -A promptfleet_workers.app flower --conf=<this file>`.

Every option can be overridden by a flag, or by an environment variable such as FLOWER_PORT.
A login is set by FLOWER_BASIC_AUTH=user:password; Flower then asks its API's callers for it, too.
"""
# ruff: noqa: INP001 - Flower reads it as a script; it is in no package

import os

address = os.environ.get("FLOWER_ADDRESS", "127.0.0.1")
port = int(os.environ.get("FLOWER_PORT", "5555"))

# A doorbell is one task for up to 100 jobs; its arguments are ids, never prompts.
tasks_columns = "name,uuid,state,args,received,started,runtime,worker"
natural_time = False

# A busy fleet rings some hundred doorbells a second. These bounds keep Flower below 200 MB.
max_tasks = 20_000
max_workers = 1_000

# Workers that have gone (a deployment, a scale-down) leave the list after ten minutes.
purge_offline_workers = 600

# A worker answers from between two turns of its loop, which a full batch can hold for a moment.
inspect_timeout = 3_000.0

# Flower only watches. Cancelling goes through `promptfleet cancel`, which knows of leases: a task
# that Flower revoked would leave its jobs queued, and the sweeper would ring for them again.
read_only = True
