"""Anything may come: no crash, no hang, nothing without bound. `make fuzz` says more of it."""

from hypothesis import given, settings

from tests.frontend.edge.fuzz import Step, play, steps


@settings(max_examples=150, deadline=None)
@given(steps())
def test_no_client_can_break_a_connection(script: list[Step]) -> None:
    play(script)
