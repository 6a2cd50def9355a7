"""Weights and KV blocks that outlive engines: to come."""
