"""What is left of a deadline for the next hop: no I/O.

Deadlines travel as durations, never as times of day, so nobody's clock has to be right. Each hop
takes its margin off, because the end of the work has to travel back in time. On the way a deadline
only grows later, by what the message takes; docs/decisions/deadlines.md has the sum.
"""


def left_for_next_hop(left_s: float, margin_s: float) -> float:
    """Of so much time: all but the margin; half of it if that is more."""
    left_s = max(0.0, left_s)
    return left_s - min(margin_s, left_s / 2)
