"""Several processes of one frontend: one port, one identity towards clients, metrics in one place.

    clients ──▶ parent ──connections──▶ process 1 ══ links of its own to all sidecars
                                   └──▶ process 2 ══ the same
                process 1 ◀──calls about requests that the other has──▶ process 2

docs/decisions/processes.md says why it is done so.
"""
