"""The pure core of frontend and sidecars in virtual time, in a hostile world.

    request ─▶ frontend.Choice ──────────── call ────────────▶ worker.Process
                 real Stream, choose        delays, cuts         real Hub, Link, Ledger
                 and continuation           late news            an engine that is a hash

A seed decides everything: what is asked, what engines can do, what goes wrong and when. The checker
compares with an undisturbed run after every event. Replay a seed, and read what happened in it:

    python -m tests.simulation --seed 17 --trace
"""
