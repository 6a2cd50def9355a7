"""Measurements, each with one line of JSON at its end; see docs/BENCHMARKS.md."""

import unbroken  # noqa: F401 - What it sets has to be set before gRPC is imported.
