"""What a resume token says, and how it is sealed and opened: no I/O.

A token carries all that admission decided and where each choice runs, so that any frontend which
shares the keys can go on. Its holder can neither read meaning into it nor change it: it is signed
with HMAC-SHA256, and bound to one tenant and one request by that request's digest. Whoever opens it
learns that it is genuine or that it is not, never which part was wrong.
"""

import hashlib
import hmac
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from google.protobuf.message import DecodeError

from frontend.continuation import Abilities
from frontend.stream import Life, Past, Standing
from unbroken.errors import Reason, UnbrokenError
from unbroken.outcome import ContinuationClass, ContinuationPolicy
from unbroken.v1 import inference_service_pb2 as pb
from unbroken.v1 import resume_token_pb2

VERSION: Final = 1
TOKEN_BYTES_MAX: Final = 8 * 1024
"""Of a token, made or taken."""
CLOCK_SLACK_S: Final = 300.0
"""So much may the clocks of two frontends differ before a token that is still good seems to have
expired; for tokens of a shorter lifetime, as long as that."""
CLOCK_STEP_S: Final = 30.0
"""If the time of day moves so much more or less than time passes, somebody has set the clock."""
_DOMAIN: Final = b"unbroken.v1.ResumeToken"
_WAYS: Final = frozenset(map(int, ContinuationClass))
_POLICIES: Final = frozenset(map(int, ContinuationPolicy))


@dataclass(frozen=True, slots=True)
class Keyring:
    """Keys by id. All verify; the last one signs."""

    keys: Mapping[str, bytes]

    def __post_init__(self) -> None:
        assert self.keys, "a mesh without keys has no tokens"


@dataclass(frozen=True, slots=True)
class Resolved:
    """What was decided at admission, once and for all."""

    tenant: str
    request_id: str
    request_digest: bytes
    model: str
    tokenizer_fingerprint: str
    prompt_digest: bytes
    seed: int | None
    """Of choice 0; None when greedy."""
    max_tokens: int
    policy: ContinuationPolicy
    migrations_max: int


@dataclass(frozen=True, slots=True)
class ChoiceClaim:
    """Where one choice stood, and a digest of what was delivered when its attempt began."""

    standing: Standing
    base_digest: bytes


@dataclass(frozen=True, slots=True)
class Claims:
    """A genuine token's content."""

    resolved: Resolved
    choices: tuple[ChoiceClaim, ...]
    expires_at: float

    @property
    def epoch(self) -> int:
        """The highest of the choices; a new owner's are above it."""
        return max((one.standing.epoch for one in self.choices), default=0)


@dataclass(frozen=True, slots=True)
class Minting:
    """When a token was made: monotonic seconds, and the time of day in seconds since 1970."""

    now: float
    time_of_day: float

    def is_due(self, now: float, time_of_day: float, lifetime_s: float) -> bool:
        """Whether another token should replace it.

        Half of its lifetime has passed; or the clock was set since, so the token says a wrong time.
        """
        passed_s = now - self.now
        set_s = time_of_day - self.time_of_day - passed_s
        return passed_s >= lifetime_s / 2 or abs(set_s) > CLOCK_STEP_S


def request_digest(request: pb.GenerateRequest, request_id: str) -> bytes:
    """What makes two requests the same: all that is in them, under the id given or assigned."""
    canonical = pb.GenerateRequest()
    canonical.CopyFrom(request)
    canonical.DiscardUnknownFields()
    canonical.request_id = request_id
    return hashlib.sha256(canonical.SerializeToString(deterministic=True)).digest()


def ids_digest(token_ids: Sequence[int]) -> bytes:
    """Of token ids, 4 bytes each; empty for none."""
    if not token_ids:
        return b""
    ids = array("I", token_ids)
    assert ids.itemsize == 4, "as on every platform that Python has wheels for"
    return hashlib.sha256(ids.tobytes()).digest()


def seal(
    resolved: Resolved,
    choices: Sequence[ChoiceClaim],
    keyring: Keyring,
    *,
    now: float,
    lifetime_s: float,
) -> bytes:
    """A token. `now` is the time of day, in seconds since 1970.

    At most `TOKEN_BYTES_MAX`: with very long names, it does without those of the workers, and
    whoever resumes replays.
    """
    token = _signed(_claims(resolved, choices, now, lifetime_s), keyring)
    if len(token) > TOKEN_BYTES_MAX:
        bare = _claims(resolved, choices, now, lifetime_s)
        for choice in bare.choices:
            choice.ClearField("worker")
            choice.ClearField("base_digest")
        token = _signed(bare, keyring)
    assert len(token) <= TOKEN_BYTES_MAX, "all names are bounded at admission"
    return token


def unseal(token: bytes, keyring: Keyring, *, now: float) -> Claims:
    """What a genuine token says. Raises RESUME_TOKEN_INVALID or RESUME_TOKEN_EXPIRED.

    `now` is the time of day here; the token tells that of the frontend which made it.
    """
    if not 0 < len(token) <= TOKEN_BYTES_MAX:
        raise invalid()
    outer = resume_token_pb2.ResumeToken()
    try:
        outer.ParseFromString(token)
    except DecodeError:
        raise invalid() from None
    # A key that nobody has takes as long as one that does not fit.
    key = keyring.keys.get(outer.key_id)
    expected = _signature(key or b"\0" * 32, outer.key_id, outer.claims)
    if not hmac.compare_digest(expected, outer.signature) or key is None:
        raise invalid()
    message = resume_token_pb2.ResumeClaims()
    try:
        message.ParseFromString(outer.claims)
    except DecodeError:
        raise invalid() from None
    if message.version != VERSION:
        raise UnbrokenError(
            Reason.NOT_IMPLEMENTED,
            f"expected a resume token of version {VERSION}, got {message.version}",
        )
    expires_at = message.expires_at.ToNanoseconds() / 1e9
    lifetime_s = expires_at - message.issued_at.ToNanoseconds() / 1e9
    if now >= expires_at + min(lifetime_s, CLOCK_SLACK_S):
        raise UnbrokenError(Reason.RESUME_TOKEN_EXPIRED, "the resume token has expired")
    return _read(message, expires_at)


def check_bound(claims: Claims, request: pb.GenerateRequest) -> None:
    """That the token is for this request of this tenant. Raises RESUME_TOKEN_INVALID."""
    resolved = claims.resolved
    digest = request_digest(request, request.request_id)
    is_bound = hmac.compare_digest(digest, resolved.request_digest)
    if not (
        is_bound
        and request.request_id == resolved.request_id
        and request.tenant == resolved.tenant
        and (request.num_choices or 1) == len(claims.choices)
    ):
        raise invalid()


def past(claim: ChoiceClaim, position: pb.ResumePosition | None) -> Past:
    """What a stream begins with that goes on from this position of its client."""
    standing = claim.standing
    token_ids = position.token_ids if position is not None else ()
    base = standing.base
    is_checked = base <= len(token_ids) and hmac.compare_digest(
        ids_digest(token_ids[:base]), claim.base_digest
    )
    if base and base <= len(token_ids) and claim.base_digest and not is_checked:
        raise UnbrokenError(
            Reason.RESUME_MISMATCH,
            f"the first {base} tokens are not those that this stream delivered",
            metadata={"offset": "0"},
        )
    logprob_sum = None
    if position is not None and position.HasField("cumulative_logprob"):
        logprob_sum = position.cumulative_logprob
    return Past(
        token_ids=token_ids,
        num_text_bytes=position.num_text_bytes if position is not None else 0,
        num_trusted=base if is_checked else 0,
        life=standing.life,
        started_epoch=standing.started_epoch,
        way=standing.way,
        first_offset=standing.first_offset,
        base=base,
        serving=standing.serving,
        began_with=standing.began_with,
        num_begun=standing.num_begun,
        num_losses=standing.num_losses,
        is_inexact=standing.is_inexact,
        logprob_sum=logprob_sum,
    )


def invalid() -> UnbrokenError:
    """The one answer to every token that is not right."""
    return UnbrokenError(
        Reason.RESUME_TOKEN_INVALID, "expected a resume token of this mesh for this request"
    )


# Its bytes.


def _signed(claims: resume_token_pb2.ResumeClaims, keyring: Keyring) -> bytes:
    key_id, key = list(keyring.keys.items())[-1]
    data = claims.SerializeToString()
    return resume_token_pb2.ResumeToken(
        key_id=key_id, claims=data, signature=_signature(key, key_id, data)
    ).SerializeToString()


def _signature(key: bytes, key_id: str, claims: bytes) -> bytes:
    return hmac.digest(key, b"\0".join((_DOMAIN, key_id.encode(), claims)), "sha256")


def _claims(
    resolved: Resolved, choices: Sequence[ChoiceClaim], now: float, lifetime_s: float
) -> resume_token_pb2.ResumeClaims:
    message = resume_token_pb2.ResumeClaims(
        version=VERSION,
        tenant=resolved.tenant,
        request_id=resolved.request_id,
        request_digest=resolved.request_digest,
        model=resolved.model,
        tokenizer_fingerprint=resolved.tokenizer_fingerprint,
        prompt_digest=resolved.prompt_digest,
        seed=resolved.seed,
        max_tokens=resolved.max_tokens,
        continuation=cast("pb.ContinuationPolicy.ValueType", int(resolved.policy)),
        migrations_max=resolved.migrations_max,
    )
    message.issued_at.FromNanoseconds(int(now * 1e9))
    message.expires_at.FromNanoseconds(int((now + lifetime_s) * 1e9))
    engines: dict[Abilities, int] = {}
    for choice in choices:
        standing = choice.standing
        entry = message.choices.add(
            epoch=max(0, standing.epoch),
            continuation_class=cast("pb.ContinuationClass.ValueType", int(standing.way)),
            first_offset=standing.first_offset,
            base=standing.base,
            base_digest=choice.base_digest,
            engine=_number(engines, standing.serving),
            first_engine=_number(engines, standing.began_with),
            num_attempts=standing.num_begun,
            num_losses=standing.num_losses,
            is_inexact=standing.is_inexact,
            started_epoch=standing.started_epoch,
        )
        if standing.life is not None:
            entry.worker.worker_id = standing.life.worker_id
            entry.worker.incarnation = standing.life.incarnation
            entry.engine_incarnation = standing.life.engine_incarnation
    message.engines.extend(_engine(one) for one in engines)
    return message


def _read(message: resume_token_pb2.ResumeClaims, expires_at: float) -> Claims:
    """What we signed ourselves, or a later version of us: still, no index goes astray."""
    engines = [_abilities(one) for one in message.engines]

    def engine(number: int) -> Abilities | None:
        return engines[number - 1] if 0 < number <= len(engines) else None

    if message.continuation not in _POLICIES:
        raise invalid()
    choices: list[ChoiceClaim] = []
    for entry in message.choices:
        if entry.continuation_class not in _WAYS:
            raise invalid()
        life = None
        if entry.HasField("worker"):
            worker = entry.worker
            life = Life(worker.worker_id, worker.incarnation, entry.engine_incarnation)
        standing = Standing(
            epoch=entry.epoch,
            life=life,
            started_epoch=entry.started_epoch,
            way=ContinuationClass(entry.continuation_class),
            first_offset=entry.first_offset,
            base=entry.base,
            serving=engine(entry.engine),
            began_with=engine(entry.first_engine),
            num_begun=entry.num_attempts,
            num_losses=entry.num_losses,
            is_inexact=entry.is_inexact,
        )
        choices.append(ChoiceClaim(standing, entry.base_digest))
    resolved = Resolved(
        tenant=message.tenant,
        request_id=message.request_id,
        request_digest=message.request_digest,
        model=message.model,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        prompt_digest=message.prompt_digest,
        seed=message.seed if message.HasField("seed") else None,
        max_tokens=message.max_tokens,
        policy=ContinuationPolicy(message.continuation),
        migrations_max=message.migrations_max,
    )
    return Claims(resolved, tuple(choices), expires_at)


def _number(engines: dict[Abilities, int], abilities: Abilities | None) -> int:
    """Its index in the token plus 1; 0 for none."""
    return 0 if abilities is None else engines.setdefault(abilities, len(engines) + 1)


def _engine(abilities: Abilities) -> resume_token_pb2.ResumeEngine:
    return resume_token_pb2.ResumeEngine(
        numerics_id=abilities.numerics_id,
        invariant=abilities.is_invariant,
        native_resume=abilities.has_native_resume,
        seeds=abilities.has_seeds,
        positional_random=abilities.has_positional_random,
        repetition_penalty_counts_prompt=abilities.repetition_penalty_counts_prompt,
        logit_bias=abilities.has_logit_bias,
    )


def _abilities(engine: resume_token_pb2.ResumeEngine) -> Abilities:
    return Abilities(
        numerics_id=engine.numerics_id,
        is_invariant=engine.invariant,
        has_native_resume=engine.native_resume,
        has_seeds=engine.seeds,
        has_positional_random=engine.positional_random,
        repetition_penalty_counts_prompt=engine.repetition_penalty_counts_prompt,
        has_logit_bias=engine.logit_bias,
    )
