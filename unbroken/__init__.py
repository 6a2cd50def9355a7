"""What every process of Unbroken has in common."""

import os

# gRPC's core writes its INFO lines (a peer said goodbye, a child was started) to stderr in a format
# of its own; it reads this once, when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# And it would run handlers in every child between fork and exec: children died there of SIGSEGV,
# one spun for ten minutes, and one of 11,500 that were started beside calls cost its parent a
# connection ("Frame size 5263945"). Without the handlers none of as many did so.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
