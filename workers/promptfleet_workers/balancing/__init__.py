"""Load balancing: which of a model's deployments a job goes to."""
