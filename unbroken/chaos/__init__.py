"""Faults on purpose, and the proof that no stream showed them.

    processes   kill, stop, continue, slow down, starve living processes
    proxy       a TCP proxy that delays, swallows, cuts and resets what passes
    recorder    a client in its own process, whose history outlives it
    checker     what the clients recorded against what they had to read
    schedule    a seeded list of faults; play it against a mesh of this machine

Every fault waits until it is seen to have taken effect, and says what was seen. docs/CHAOS.md has
the vocabulary.
"""
