"""A `sidecar` and a `frontend` that only pretend, for tests of what starts processes."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# An engine that ignores SIGTERM and lives in a process group of its own, as real ones do.
SIDECAR = """
import argparse, asyncio, os, signal, subprocess, sys, time
from pathlib import Path
from unbroken.discovery import WORKERS, connect
from unbroken.v1 import worker_pb2 as pb

parser = argparse.ArgumentParser()
for flag in ("--worker-id", "--discovery", "--listen", "--engine", "--engine-options"):
    parser.add_argument(flag)
options = parser.parse_args()
if options.engine == "broken":
    sys.exit("no such engine")

async def main():
    engine = subprocess.Popen(
        ["/bin/sh", "-c", "trap '' TERM; while true; do sleep 60; done"], start_new_session=True
    )
    found = connect(options.discovery)
    incarnation = await found.new_incarnation(WORKERS, options.worker_id)
    identity = pb.WorkerIdentity(worker_id=options.worker_id, incarnation=incarnation)
    await found.register(WORKERS, pb.WorkerRecord(
        identity=identity, address="127.0.0.1:1", model=options.engine_options or "",
        sidecar_pid=os.getpid(), engine_pgid=engine.pid,
    ))
    await asyncio.Event().wait()

asyncio.run(main())
"""

FRONTEND = """
import argparse, asyncio, os
from unbroken.discovery import FRONTENDS, WORKERS, connect
from unbroken import transport
from unbroken.v1 import admin_service_pb2 as pb, admin_service_pb2_grpc as grpc, worker_pb2

parser = argparse.ArgumentParser()
for flag in ("--frontend-id", "--discovery", "--listen"):
    parser.add_argument(flag)
options = parser.parse_args()
found = connect(options.discovery)

class Admin(grpc.AdminServiceServicer):
    async def ListWorkers(self, request, context):
        return pb.ListWorkersResponse(workers=[
            pb.WorkerInfo(record=record, link="LINK_STATE_UP", engine="ENGINE_STATE_SERVING")
            for record in (await found.snapshot(WORKERS)).values()
        ])

async def main():
    server = transport.make_server()
    grpc.add_AdminServiceServicer_to_server(Admin(), server)
    address = transport.listen(server, options.listen)
    await server.start()
    await found.register(FRONTENDS, worker_pb2.FrontendRecord(
        frontend_id=options.frontend_id, incarnation=1, address=address, pid=os.getpid()
    ))
    await asyncio.Event().wait()

asyncio.run(main())
"""


def install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `python -m sidecar` and `python -m frontend` find the pretenders first.

    They are in `directory`, which becomes the current one.
    """
    for name, text in (("sidecar", SIDECAR), ("frontend", FRONTEND)):
        (directory / name).mkdir()
        (directory / name / "__init__.py").touch()
        (directory / name / "__main__.py").write_text(text)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("PYTHONPATH", f"{directory}:{REPOSITORY}")
