"""How fast the fleet is, beside what people do today and beside the limit.

`python -m benchmarks.core` runs everything on this machine and prints it; what is measured, and
how, stands in `benchmarks.contest`.
"""
