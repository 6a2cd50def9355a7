"""Measurements, each with one line of JSON at its end; see docs/BENCHMARKS.md."""

# What it sets has to be set before gRPC is imported.
import unbroken as unbroken
