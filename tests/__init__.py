"""Tests; see CONTRIBUTING.md."""

# What it sets has to be set before gRPC is imported.
import unbroken as unbroken
