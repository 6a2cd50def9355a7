"""Engines of our own, each served by a process of its own."""
