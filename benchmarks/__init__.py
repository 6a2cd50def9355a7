"""Measurements, each with one line of JSON at its end; see docs/BENCHMARKS.md."""
