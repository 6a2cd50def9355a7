"""What the command line shows of the ledger of a mesh, and who cannot be asked."""

import asyncio
import json

import pytest

from unbroken import terminal
from unbroken.holdings import Holding, Kind, told
from unbroken.mesh_ledger import worker_ledger
from unbroken.terminal import Output
from unbroken.v1 import holding_pb2 as pb
from unbroken.v1 import worker_pb2

HELD = [
    Holding(Kind.ATTEMPT, ("acme", "r", 1), 90.0, epoch=3, detail="decode"),
    Holding(Kind.KV_BLOCKS, None, amount=7, detail="of no sequence"),
]


def processes() -> list[pb.ProcessHoldings]:
    return [
        told(pb.PROCESS_ROLE_FRONTEND, "f1", 1, [], now=100.0, listed_max=10),
        told(pb.PROCESS_ROLE_ENGINE, "w1", 2, HELD, now=100.0, listed_max=10),
    ]


def test_people_see_who_holds_what_for_whom_and_for_how_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal.show_ledger(Output.TEXT, processes())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["PROCESS", "KIND", "REQUEST", "CHOICE", "EPOCH", "AMOUNT", "AGE", "DETAIL"],
        ["engine/w1", "kv-blocks", "-", "0", "-", "7", "-", "of", "no", "sequence"],
        ["engine/w1", "attempt", "acme/r", "1", "3", "1", "10.0s", "decode"],
    ]


def test_what_is_not_listed_or_not_told_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    one = told(pb.PROCESS_ROLE_ENGINE, "w1", 2, HELD, now=100.0, listed_max=1, detail="half")
    terminal.show_ledger(Output.TEXT, [one])
    assert capsys.readouterr().err == "1 more are not listed\nengine/w1: half\n"


def test_scripts_get_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_ledger(Output.JSON, processes())
    facts = json.loads(capsys.readouterr().out)
    assert facts["held"] == 2
    assert [process["name"] for process in facts["processes"]] == ["f1", "w1"]
    assert facts["processes"][1]["totals"][1] == {
        "kind": "HOLDING_KIND_KV_BLOCKS",
        "num": "1",
        "amount": "7",
    }


def test_a_worker_that_cannot_be_asked_is_no_empty_one() -> None:
    record = worker_pb2.WorkerRecord(address="127.0.0.1:1")
    record.identity.worker_id = "gone"
    (process,) = asyncio.run(worker_ledger(record))
    assert process.name == "gone"
    assert process.detail.startswith("UNREACHABLE: ")
