"""A resume token is good for one request of one tenant, for a while, and cannot be made up."""

import os
from pathlib import Path

import pytest

from frontend import resume_keys
from frontend.continuation import Abilities
from frontend.resume_keys import ResumeKeys, make_once
from frontend.resume_token import (
    CLOCK_SLACK_S,
    CLOCK_STEP_S,
    TOKEN_BYTES_MAX,
    ChoiceClaim,
    Keyring,
    Minting,
    Resolved,
    check_bound,
    ids_digest,
    past,
    request_digest,
    seal,
    unseal,
)
from frontend.secret_file import LOOK_INTERVAL_S
from frontend.stream import Life, Standing
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import ContinuationClass, ContinuationPolicy
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import resume_token_pb2

NOW = 1_800_000_000.0
OLD, NEW = b"o" * 32, b"n" * 32
KEYS = Keyring({"old": OLD, "new": NEW})
DELIVERED = [5, 6, 7]


def request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id="r", tenant="t", text="hello", **fields)  # pyright: ignore[reportArgumentType]


def resolved() -> Resolved:
    return Resolved(
        tenant="t",
        request_id="r",
        request_digest=request_digest(request(), "r"),
        model="m",
        tokenizer_fingerprint="f",
        prompt_digest=ids_digest([1, 2]),
        seed=7,
        max_tokens=100,
        policy=ContinuationPolicy.ALLOW_INEXACT,
        migrations_max=3,
    )


def claim(worker_id: str = "w1", numerics_id: str = "n") -> ChoiceClaim:
    abilities = Abilities(numerics_id, has_positional_random=True)
    standing = Standing(
        epoch=12,
        life=Life(worker_id, 3, 4),
        started_epoch=11,
        way=ContinuationClass.NATIVE,
        first_offset=3,
        base=3,
        serving=abilities,
        began_with=abilities,
        num_begun=2,
        num_losses=1,
        is_inexact=False,
    )
    return ChoiceClaim(standing, ids_digest(DELIVERED))


def token(keyring: Keyring = KEYS, *, choices: int = 1, lifetime_s: float = 60.0) -> bytes:
    return seal(resolved(), [claim()] * choices, keyring, now=NOW, lifetime_s=lifetime_s)


def reason_of(data: bytes, keyring: Keyring = KEYS, *, now: float = NOW) -> Reason:
    with pytest.raises(UnbrokenError) as raised:
        unseal(data, keyring, now=now)
    return raised.value.reason


def test_what_was_said_is_read_again() -> None:
    claims = unseal(token(choices=2), KEYS, now=NOW)
    assert claims.resolved == resolved()
    assert claims.choices == (claim(), claim())
    assert claims.epoch == 12
    check_bound(unseal(token(), KEYS, now=NOW), request())


def test_the_last_key_signs_and_all_verify() -> None:
    outer = resume_token_pb2.ResumeToken.FromString(token())
    assert outer.key_id == "new"
    before = token(Keyring({"old": OLD}))
    assert unseal(before, KEYS, now=NOW).resolved == resolved()
    assert reason_of(token(), Keyring({"old": OLD})) is Reason.RESUME_TOKEN_INVALID
    assert reason_of(before, Keyring({"new": NEW})) is Reason.RESUME_TOKEN_INVALID


def test_a_key_of_the_same_name_is_not_the_same_key() -> None:
    assert reason_of(token(Keyring({"new": OLD}))) is Reason.RESUME_TOKEN_INVALID


def test_no_bit_can_be_changed() -> None:
    genuine = token()
    told: set[str] = set()
    for index in range(len(genuine) * 8):
        changed = bytearray(genuine)
        changed[index // 8] ^= 1 << index % 8
        with pytest.raises(UnbrokenError) as raised:
            unseal(bytes(changed), KEYS, now=NOW)
        assert raised.value.reason is Reason.RESUME_TOKEN_INVALID
        told.add(f"{raised.value.detail} {raised.value.metadata}")
    assert len(told) == 1, "which part was wrong is not told"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 32, os.urandom(200), b"\xff" * 200, b"x" * (TOKEN_BYTES_MAX + 1)],
    ids=["nothing", "zeros", "chance", "no message", "too much"],
)
def test_what_was_never_a_token_is_none(data: bytes) -> None:
    assert reason_of(data) is Reason.RESUME_TOKEN_INVALID


def test_claims_without_a_signature_are_not_read() -> None:
    outer = resume_token_pb2.ResumeToken.FromString(token())
    for signature in (b"", outer.signature[:31], outer.signature + b"\0", b"\0" * 32):
        forged = resume_token_pb2.ResumeToken(
            key_id=outer.key_id, claims=outer.claims, signature=signature
        )
        assert reason_of(forged.SerializeToString()) is Reason.RESUME_TOKEN_INVALID


def test_a_token_expires() -> None:
    for lifetime_s, slack_s in ((60.0, 60.0), (3600.0, CLOCK_SLACK_S)):
        due = NOW + lifetime_s + slack_s
        assert unseal(token(lifetime_s=lifetime_s), KEYS, now=due - 0.1)
        assert reason_of(token(lifetime_s=lifetime_s), now=due) is Reason.RESUME_TOKEN_EXPIRED


def test_a_token_from_a_clock_that_is_ahead_is_good() -> None:
    assert unseal(token(), KEYS, now=NOW - 10 * 365 * 86400)


def test_a_token_is_replaced_at_half_time_and_when_somebody_has_set_the_clock() -> None:
    minting = Minting(now=10.0, time_of_day=NOW)
    assert not minting.is_due(109.0, NOW + 99, 200.0)
    assert minting.is_due(110.0, NOW + 100, 200.0)
    for set_s in (-3600, -CLOCK_STEP_S - 1, CLOCK_STEP_S + 1, 3600):
        assert minting.is_due(20.0, NOW + 10 + set_s, 3600.0)
    assert not minting.is_due(20.0, NOW + 10 - CLOCK_STEP_S / 2, 3600.0)


def test_an_expired_forgery_is_a_forgery() -> None:
    forged = token(Keyring({"new": b"m" * 32}))
    assert reason_of(forged, now=NOW + 1e6) is Reason.RESUME_TOKEN_INVALID


@pytest.mark.parametrize(
    "other",
    [
        request(priority=1),
        pb.GenerateRequest(request_id="r", tenant="u", text="hello"),
        pb.GenerateRequest(request_id="s", tenant="t", text="hello"),
        pb.GenerateRequest(tenant="t", text="hello"),
        pb.GenerateRequest(request_id="r", tenant="t", text="hello!"),
        request(num_choices=2),
    ],
    ids=["a field", "the tenant", "the id", "no id", "the prompt", "choices"],
)
def test_a_token_is_useless_with_another_request(other: pb.GenerateRequest) -> None:
    with pytest.raises(UnbrokenError) as raised:
        check_bound(unseal(token(), KEYS, now=NOW), other)
    assert raised.value.reason is Reason.RESUME_TOKEN_INVALID


def test_the_order_of_a_map_makes_no_other_request() -> None:
    one, other = request(), request()
    for number in range(20):
        one.params.sampling.logit_bias[number] = 1.0
        other.params.sampling.logit_bias[19 - number] = 1.0
    assert request_digest(one, "r") == request_digest(other, "r")


def test_a_token_of_sixteen_choices_with_long_names_is_small_enough() -> None:
    many = [claim(f"{'w' * 120}{n}", f"{'n' * 100}{n}") for n in range(16)]
    sealed = seal(resolved(), many, KEYS, now=NOW, lifetime_s=60)
    assert len(sealed) <= TOKEN_BYTES_MAX
    assert unseal(sealed, KEYS, now=NOW).choices == tuple(many)
    monstrous = [claim("w" * 600)] * 16
    sealed = seal(resolved(), monstrous, KEYS, now=NOW, lifetime_s=60)
    assert len(sealed) <= TOKEN_BYTES_MAX
    assert all(one.standing.life is None for one in unseal(sealed, KEYS, now=NOW).choices)


def test_delivered_tokens_are_trusted_as_far_as_the_token_vouches_for_them() -> None:
    assert past(claim(), pb.ResumePosition(token_ids=[*DELIVERED, 9])).num_trusted == 3
    assert past(claim(), pb.ResumePosition(token_ids=DELIVERED[:2])).num_trusted == 0
    with pytest.raises(UnbrokenError) as raised:
        past(claim(), pb.ResumePosition(token_ids=[5, 6, 8, 9]))
    assert raised.value.reason is Reason.RESUME_MISMATCH


# Keys in a file.


def write(path: Path, *keys: tuple[str, bytes]) -> None:
    path.write_text("".join(f"{key_id} {key.hex()}\n" for key_id, key in keys))


def test_frontends_that_start_together_make_one_key_that_nobody_else_reads(tmp_path: Path) -> None:
    paths = {make_once(tmp_path) for _ in range(3)}
    (path,) = paths
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(tmp_path.iterdir()) == [path]
    assert len(resume_keys.read(path).keys) == 1


def test_a_key_that_another_frontend_made_meanwhile_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_once(tmp_path)
    before = path.read_text()

    def is_not_seen(_: Path) -> bool:
        return False

    monkeypatch.setattr(Path, "exists", is_not_seen)
    assert make_once(tmp_path).read_text() == before


def test_keys_are_read_again_when_they_have_changed_and_stay_when_they_are_broken(
    tmp_path: Path,
) -> None:
    path, now = tmp_path / "keys", [0.0]
    write(path, ("old", OLD))
    keys = ResumeKeys(path, clock=lambda: now[0])
    assert list(keys.keyring.keys) == ["old"]
    write(path, ("old", OLD), ("new", NEW))
    now[0] += LOOK_INTERVAL_S
    assert list(keys.keyring.keys) == ["old", "new"]
    path.write_text("new nonsense\n")
    now[0] += LOOK_INTERVAL_S
    assert list(keys.keyring.keys) == ["old", "new"]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "a 00\n", "a b c\n", f"a {'0' * 64}\na {'1' * 64}\n", "\xff" * 9]
)
def test_a_file_without_proper_keys_is_refused_without_showing_them(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected|line \d") as raised:
        ResumeKeys(path)
    assert "0" * 64 not in str(raised.value)
