"""Adapters: one engine protocol each, behind `base.Engine`."""
