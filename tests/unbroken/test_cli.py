"""Claims of the command line, run as a process of its own."""

import asyncio
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
from typer.testing import CliRunner

from tests.support.commands import all_commands
from tests.unbroken import pretenders
from tests.unbroken.fake_frontend import (
    FakeFrontend,
    Script,
    finished,
    serving_frontend,
    started,
    tokens,
)
from unbroken import cli, terminal
from unbroken.chaos.processes import is_alive
from unbroken.discovery import FRONTENDS, WORKERS
from unbroken.errors import Reason, UnbrokenError
from unbroken.file_discovery import FileDiscovery
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import worker_pb2


@dataclass(frozen=True)
class Run:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


async def unbroken(*arguments: str, stdin: str = "") -> Run:
    """Run the command line to its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unbroken.cli", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 20)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Run(process.returncode, out.decode(), err.decode())


def run_against(script: Script, *arguments: str, stdin: str = "") -> tuple[Run, FakeFrontend]:
    """Run a command against a frontend that says `script`."""

    async def scenario() -> tuple[Run, FakeFrontend]:
        frontend = FakeFrontend(script)
        async with serving_frontend(frontend) as address:
            run = await unbroken(*arguments, "--frontend", address, stdin=stdin)
        return run, frontend

    return uvloop.run(scenario())


def migrated() -> pb.GenerateResponse:
    """The end of a stream of three tokens that went on elsewhere at token 2."""
    message = finished(3)
    end = message.finished
    end.choices[0].continued = pb.CONTINUED_EXACT
    first = end.attempts.add(epoch=1, end_offset=2, failure=worker_pb2.FAILURE_KIND_CRASH)
    first.worker.worker_id = "w1"
    second = end.attempts.add(epoch=2, first_offset=2, end_offset=3)
    second.worker.worker_id = "w2"
    second.gap.FromMicroseconds(12_300)
    return message


SCRIPT = [started(), tokens(0, 1, 2, text="un"), tokens(2, 3, text="broken"), finished(3)]


def test_text_goes_to_stdout_and_nothing_else_does() -> None:
    run, frontend = run_against([*SCRIPT[:-1], migrated()], "generate", "hello")
    assert (run.status, run.out) == (0, "unbroken\n")
    assert run.err == "moved from w1 (crash) to w2 at token 2, gap 12.3 ms, exact\n"
    assert frontend.requests[0].chat.messages[0].content == "hello"


def test_json_is_one_event_a_line_without_the_secret() -> None:
    script = [started(resume_token=b"secret", seed=7), *SCRIPT[1:]]
    run, _ = run_against(script, "generate", "hello", "-o", "json")
    assert run.status == 0
    assert [event["event"] for event in run.events] == ["started", "piece", "piece", "finished"]
    assert run.events[0]["seed"] == "7"
    assert "resume_token" not in run.events[0]
    assert run.events[1]["token_ids"] == [1, 2]
    assert run.events[2] == {
        "event": "piece",
        "choice_index": 0,
        "offset": 2,
        "token_ids": [3],
        "text": "broken",
    }
    assert run.events[3]["choices"][0]["num_tokens"] == 3


BROKEN = UnbrokenError(Reason.UNREACHABLE, "the connection broke")


def run_over_a_seam(*arguments: str) -> tuple[Run, str, str]:
    """Run a command of whose two frontends the first breaks off; what it did, and the addresses."""

    async def scenario() -> tuple[Run, str, str]:
        first = FakeFrontend([started(resume_token=b"t"), *SCRIPT[1:2], BROKEN])
        second = FakeFrontend((), SCRIPT[2:])
        async with serving_frontend(first) as one, serving_frontend(second) as two:
            run = await unbroken(*arguments, "--frontend", one, "--frontend", two)
        return run, one, two

    return uvloop.run(scenario())


def test_the_loss_of_a_frontend_is_a_note_beside_the_text() -> None:
    run, one, two = run_over_a_seam("generate", "hello")
    assert (run.status, run.out) == (0, "unbroken\n")
    lost = f"lost frontend {one} (unreachable) at token 2, went on at {two}, gap "
    assert run.err.startswith(lost)


def test_the_loss_of_a_frontend_is_an_event() -> None:
    run, one, two = run_over_a_seam("generate", "hello", "-o", "json")
    assert run.status == 0
    names = [event["event"] for event in run.events]
    assert names == ["started", "piece", "resumed", "piece", "finished"]
    resumed = run.events[2]
    assert 0 < resumed.pop("gap_s") < 5
    assert resumed == {
        "event": "resumed",
        "from": one,
        "to": two,
        "reason": "UNREACHABLE",
        "offsets": [2],
    }


def test_an_error_keeps_what_was_said_before_and_the_status_is_one() -> None:
    error = UnbrokenError(Reason.OVERLOADED, "full", retry_after_s=1.5, metadata={"a": "b"})
    run, _ = run_against([*SCRIPT[:-1], error], "generate", "hello")
    assert (run.status, run.out) == (1, "unbroken")
    assert run.err == "error: OVERLOADED: full (try again in 1.5 s)\n"
    run, _ = run_against([*SCRIPT[:-1], error], "generate", "hello", "-o", "json")
    assert run.status == 1
    assert run.events[-1] == {
        "event": "error",
        "reason": "OVERLOADED",
        "detail": "full",
        "metadata": {"a": "b"},
        "retry_after_s": 1.5,
    }


def test_prompts_are_chat_text_or_ids_from_the_line_or_from_stdin() -> None:
    _, frontend = run_against(SCRIPT, "generate", "-", "--raw", stdin="from stdin\n")
    assert frontend.requests[0].text == "from stdin\n"
    _, frontend = run_against(SCRIPT, "generate", "--token-ids", "1, 2,3")
    assert list(frontend.requests[0].token_ids.ids) == [1, 2, 3]
    _, frontend = run_against(SCRIPT, "generate", "hi", "--system", "Be brief.")
    turns = [(m.role, m.content) for m in frontend.requests[0].chat.messages]
    assert turns == [("system", "Be brief."), ("user", "hi")]


def test_flags_reach_the_request() -> None:
    flags = "--max-tokens 9 --temperature 0.5 --seed 7 --stop a --stop b --ignore-eos --regex a+"
    flags += " --continuation require-exact --migrations-max 0 --request-id mine --priority 3"
    _, frontend = run_against(SCRIPT, "generate", "x", "--raw", *flags.split())
    expected = pb.GenerateRequest(
        text="x",
        continuation=pb.CONTINUATION_POLICY_REQUIRE_EXACT,
        migrations_max=0,
        request_id="mine",
        priority=3,
    )
    expected.params.sampling.temperature = 0.5
    expected.params.sampling.seed = 7
    expected.params.stopping.max_tokens = 9
    expected.params.stopping.stop.extend(["a", "b"])
    expected.params.stopping.ignore_eos = True
    expected.params.constraint.regex = "a+"
    assert frontend.requests[0] == expected


def test_several_choices_are_shown_one_after_the_other() -> None:
    script = [
        started(),
        tokens(0, 1, text="one", choice_index=1),
        tokens(0, 2, text="zero"),
        finished(1, 1),
    ]
    run, _ = run_against(script, "generate", "x", "--num-choices", "2")
    assert run.out == "[0] zero\n[1] one\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x", "--raw", "--token-ids"),
        ("generate", "x", "--raw", "--system", "y"),
        ("generate", "x", "--continuation", "always"),
        ("generate", "1,two", "--token-ids"),
        ("up", "--workers", "0"),
        ("up", "--frontends", "0"),
        ("up", "--edge", "grpcio", "--processes", "2"),
        ("up", "--frontends", "2", "--listen", "127.0.0.1:65535"),
        ("up", "--engine", "steam"),
        ("kill",),
        ("dance",),
    ],
)
def test_wrong_usage_is_status_two(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_every_command_takes_output() -> None:
    commands = all_commands()
    assert {"workers", "run", "memory watch"} <= commands.keys()
    assert [
        name
        for name, command in commands.items()
        if not any("--output" in parameter.opts for parameter in command.params)
    ] == []


def test_lists_are_tables_or_json() -> None:
    run, _ = run_against((), "workers")
    assert run.status == 0
    assert [line.split()[0] for line in run.out.splitlines()] == ["WORKER", "w1"]
    run, _ = run_against((), "workers", "-o", "json")
    assert json.loads(run.out)[0]["record"]["identity"]["worker_id"] == "w1"
    run, _ = run_against((), "streams")
    assert [line.split()[0] for line in run.out.splitlines()] == ["REQUEST", "r0", "r1", "r2"]
    run, _ = run_against((), "models")
    assert [line.split()[0] for line in run.out.splitlines()] == ["MODEL", "smol"]


def test_thresholds_are_shown_as_a_table_or_json_with_their_version() -> None:
    run, frontend = run_against((), "thresholds")
    assert run.status == 0
    assert [line.split() for line in run.out.splitlines()] == [
        ["MODEL", "KV-BLOCKS-SHARE", "PREFILL-TOKENS", "PREFILL-SHARE", "SET"],
        ["smol", "off", "1000", "2", "own"],
    ]
    run, frontend = run_against((), "thresholds", "smol", "-o", "json")
    assert json.loads(run.out) == {
        "version": 4,
        "models": [
            {
                "model": "smol",
                "thresholds": {"prefill_tokens": "1000", "prefill_share": 2.0},
                "is_default": False,
            }
        ],
    }
    assert not frontend.set_thresholds


def test_a_changed_threshold_leaves_the_others_and_names_its_version() -> None:
    run, frontend = run_against(
        (),
        *("thresholds", "--set", "kv-blocks-share=0.9", "--set", "prefill_tokens=off"),
        *("-o", "json"),
    )
    assert run.status == 0, run.err
    assert json.loads(run.out)["version"] == 5
    (request,) = frontend.set_thresholds
    wanted = worker_pb2.BusyThresholds(kv_blocks_share=0.9, prefill_share=2.0)
    assert request.thresholds == wanted
    assert request.version == 4
    _, frontend = run_against((), "thresholds", "smol", "--default", "--version", "3")
    (request,) = frontend.set_thresholds
    assert not request.HasField("thresholds")
    assert (request.model, request.version) == ("smol", 3)


@pytest.mark.parametrize(
    "change", ["kv_blocks_share", "kv_blocks_share=much", "prefill_tokens=-1", "speed=1"]
)
def test_a_change_that_is_none_is_wrong_usage(change: str) -> None:
    run, frontend = run_against((), "thresholds", "--set", change)
    assert run.status == 2
    assert not frontend.set_thresholds


def test_cancel_tells_whether_there_was_something_to_cancel() -> None:
    assert run_against((), "cancel", "r0")[0].out == "cancelled r0\n"
    run, _ = run_against((), "cancel", "r9", "-o", "json")
    assert (run.status, json.loads(run.out)) == (0, {"request_id": "r9", "was_running": False})


def test_frontends_are_found_through_discovery(tmp_path: Path) -> None:
    async def scenario() -> None:
        found = FileDiscovery(tmp_path)
        async with serving_frontend(FakeFrontend()) as address:
            registration = await found.register(
                FRONTENDS,
                worker_pb2.FrontendRecord(frontend_id="f1", incarnation=1, address=address),
            )
            run = await unbroken("models", "--discovery", str(tmp_path))
            assert (run.status, run.out.splitlines()[1].split()[0]) == (0, "smol")
            await registration.close()
        run = await unbroken("models", "--discovery", str(tmp_path))
        assert run.status == 1
        assert "start one with: unbroken up" in run.err

    uvloop.run(scenario())


def test_kill_kills_a_worker_that_discovery_knows_and_no_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
        try:
            registration = await FileDiscovery(tmp_path).register(
                WORKERS,
                worker_pb2.WorkerRecord(
                    identity=worker_pb2.WorkerIdentity(worker_id="w1", incarnation=1),
                    engine_pgid=engine.pid,
                ),
            )
            flags = ("--discovery", str(tmp_path), "--what", "engine")
            run = await unbroken("kill", "w2", *flags)
            assert run.status == 1
            assert "expected a worker" in run.err
            run = await unbroken("kill", "w1", *flags)
            assert (run.status, run.out) == (0, "killed engine of w1\n")
            assert await asyncio.wait_for(engine.wait(), 5) == -signal.SIGKILL
            await registration.close()
        finally:
            if engine.returncode is None:
                engine.kill()

    uvloop.run(scenario())


def test_kill_kills_a_frontend(tmp_path: Path) -> None:
    async def scenario() -> None:
        frontend = await asyncio.create_subprocess_exec("sleep", "60")
        try:
            registration = await FileDiscovery(tmp_path).register(
                FRONTENDS,
                worker_pb2.FrontendRecord(frontend_id="f2", incarnation=1, pid=frontend.pid),
            )
            flags = ("--discovery", str(tmp_path))
            assert (await unbroken("kill", "f2", "--what", "engine", *flags)).status == 2
            run = await unbroken("kill", "f2", *flags)
            assert (run.status, run.out) == (0, "killed frontend f2\n")
            assert await asyncio.wait_for(frontend.wait(), 5) == -signal.SIGKILL
            await registration.close()
        finally:
            if frontend.returncode is None:
                frontend.kill()

    uvloop.run(scenario())


def test_a_drain_needs_a_worker_that_is_there_and_a_budget_its_policy(tmp_path: Path) -> None:
    async def scenario() -> None:
        flags = ("--discovery", str(tmp_path))
        run = await unbroken("drain", "w1", *flags, "-o", "json")
        assert run.status == 1
        assert json.loads(run.out)["reason"] == "NO_WORKER"
        run = await unbroken("drain", "w1", *flags, "--policy", "finish", "--budget-s", "1")
        assert run.status == 2
        assert "belongs to --policy budget" in run.err

    uvloop.run(scenario())


def test_colours_are_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.write("\n\x1b[1;31m[SIGKILL: w1]\x1b[0m\n")
    assert capsys.readouterr().out == "\n[SIGKILL: w1]\n"


@pytest.mark.parametrize("is_supervised", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_runs_a_mesh_until_a_signal_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, is_supervised: bool
) -> None:
    pretenders.install(tmp_path, monkeypatch)

    async def scenario() -> None:
        flags = "up --workers 2 --frontends 2 --engine simulated --discovery mesh -o json"
        flags += "" if is_supervised else " --no-restart"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "unbroken.cli", *flags.split()),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            async with asyncio.timeout(20):
                facts = json.loads(await process.stdout.readline())
                assert re.fullmatch(r"127\.0\.0\.1:\d+", facts["frontend"])
                pids = [worker["engine_pgid"] for worker in facts["workers"]]
                pids += [frontend["pid"] for frontend in facts["frontends"]]
                assert len(pids) == 4
                victim = facts["workers"][1]["sidecar_pid"]
                os.kill(victim, signal.SIGKILL)
                await process.stderr.readuntil(b"w2 ended with status -9")
                if is_supervised:
                    await process.stderr.readuntil(b"w2 is started again")
                process.send_signal(number)
                assert await process.wait() == 0
            assert not any(map(is_alive, pids))
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    uvloop.run(scenario())
