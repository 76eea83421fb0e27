"""The workers: gather jobs into batches, call the providers, write the results."""
