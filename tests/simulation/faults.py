"""What can go wrong, and how often each kind of it had an effect."""

from collections import Counter
from enum import StrEnum, auto

from tests.support.world import World


class Fault(StrEnum):
    """A kind of trouble. It counts when it took effect, not when it was tried."""

    # Whole processes and links, each at a time of its own.
    ENGINE_CRASH = auto()
    """An engine died under running attempts; its sidecar says so, with exact last offsets."""
    PROCESS_RESET = auto()
    """Sidecar and engine died; the connection was reset."""
    PROCESS_SILENT = auto()
    """Sidecar and engine died without a word."""
    LINK_RESET = auto()
    """The connection broke, and both ends live."""
    PARTITION = auto()
    """The link fell silent, the frontend gave the worker up, and the worker went on."""
    TWO_DEATHS = auto()
    """Two workers died at the same instant."""
    STALL = auto()
    """The engine said that it lives, and made no step."""
    HANG = auto()
    """The engine's process stood still: it said nothing and read nothing."""
    DRAIN = auto()
    """The worker handed its streams over."""
    THEFT = auto()
    """Another frontend took a stream over; this one must let go."""
    FRONTEND_DEATH = auto()
    """A frontend died, and its clients resumed at another one."""
    FRONTEND_DRAIN = auto()
    """A frontend sent its clients to another one, and left; only in a rush."""
    CLIENT_MOVES = auto()
    """Clients resumed at another frontend, while theirs still ran their streams."""
    ADOPTED = auto()
    """The thief took the running attempt itself."""
    RELEASED = auto()
    """A frontend let go of attempts that it had left behind on an earlier call."""
    CANCEL = auto()
    DEADLINE = auto()
    PAUSE = auto()
    """A stream was paused, as for one of a higher priority."""
    PROCEED = auto()
    """It went on."""
    PAUSE_LOST = auto()
    """Its worker or its link was lost instead, or did not end the attempt in time."""
    CLOCK_STEP = auto()
    """The time of day was set on the host of a frontend that had streams, or of a worker."""

    CALLED_STALLED = auto()
    """The sidecar noticed by itself that its engine stood still."""
    RESTARTED = auto()
    """An engine that stood still for too long was ended and began its next life."""

    # Whatever happens may come out wrong.
    SLOW_PREFILL = auto()
    """A prompt took longer than a hung engine is given."""
    LOST_GOODBYE = auto()
    """A worker died after the last token of an output and before its goodbye."""
    DUPLICATE_LOSS = auto()
    """The loss of an attempt was reported twice."""
    DUPLICATE_TOKENS = auto()
    DUPLICATE_END = auto()
    GAP = auto()
    """Tokens were missing."""
    OVERLOAD = auto()
    """A worker had no room for an attempt."""
    PREEMPTION = auto()
    """A worker gave up an attempt for lack of room."""
    REJECTION = auto()
    """The engine refused the request itself."""
    ENGINE_ERROR = auto()
    DIVERGENCE = auto()
    """A prefix that was generated again was not the one delivered."""
    JUMP = auto()
    """A worker left out the prefix that it had to generate again."""
    SHORT = auto()
    """An attempt that generates again ended before what was delivered."""

    # What follows from the above, from chance, or from clients.
    LATE_NEWS = auto()
    """Something came from an attempt that was over."""
    FENCED = auto()
    """An attempt was meant for a life of the engine that was over."""
    NEW_INCARNATION = auto()
    """A stream went on at a worker that had died before."""
    SAME_WORKER = auto()
    """A stream went on at a worker that had failed it."""
    SLOW_CLIENT = auto()
    """A window was full."""
    NO_WORKER = auto()
    """A stream waited for a worker."""
    PLACEMENT_TIMEOUT = auto()
    """It waited in vain."""
    QUEUED = auto()
    """A stream that lost its worker waited in the resume queue, though one was there."""
    HELD_BACK = auto()
    """A new stream waited because others had lost their worker."""
    FLEET_LOSS = auto()
    """A new stream was refused because much of the fleet was lost at once."""
    EXHAUSTED = auto()
    """A stream lost more workers than it may."""
    CUT_STOP_STRING = auto()
    """An attempt ended in the middle of what became a stop string."""
    CUT_CHARACTER = auto()
    """An attempt ended in the middle of a character."""
    AFTER_THE_END = auto()
    """News came for a stream that was settled."""
    RELINK = auto()
    """A link came back, and its stream adopted its attempt."""
    ADOPTION = auto()
    """A stream that was resumed adopted an attempt of the frontend before."""
    RESUME_BY_REPLAY = auto()
    """A stream that was resumed could not."""
    NOT_ADOPTED = auto()
    """A worker did not give an attempt away."""
    LOST_MESSAGES = auto()
    """A client resumed that had not received all that it was sent."""
    CLOCK_BEHIND = auto()
    """A stream was resumed where it was earlier than where its epoch had begun."""
    OUTBID = auto()
    """A worker knew a higher epoch of a stream than that of its new owner, who asked above it."""
    OVERTAKEN = auto()
    """An owner had to give way to another one who may have come later, or did not; its client
    resumed again."""
    EXPIRY = auto()
    """A clock was so wrong that a resume token seemed to have expired."""
    FORGERY = auto()
    """A client claimed tokens that it never received."""
    FORGERY_FOUND = auto()
    """That was noticed."""

    RIDE = auto()
    """A token went to its client in a convoy."""
    NEXT_TOKENS = auto()
    """A sidecar said no more of a step than its tokens."""

    # How streams went on.
    APPEND = auto()
    REGENERATE = auto()
    NATIVE = auto()
    INEXACT = auto()


STRIKES = (
    Fault.ENGINE_CRASH,
    Fault.PROCESS_RESET,
    Fault.PROCESS_SILENT,
    Fault.LINK_RESET,
    Fault.PARTITION,
    Fault.TWO_DEATHS,
    Fault.TWO_DEATHS,
    Fault.STALL,
    Fault.HANG,
    Fault.HANG,
    Fault.DRAIN,
    Fault.THEFT,
    Fault.CANCEL,
    Fault.FRONTEND_DEATH,
    Fault.FRONTEND_DEATH,
    Fault.CLIENT_MOVES,
)
"""Faults that strike at a time."""

MISHAPS = {
    Fault.LOST_GOODBYE: 0.5,
    Fault.SLOW_PREFILL: 0.5,
    Fault.DUPLICATE_LOSS: 0.9,
    Fault.DUPLICATE_TOKENS: 0.04,
    Fault.DUPLICATE_END: 0.9,
    Fault.GAP: 0.03,
    Fault.OVERLOAD: 0.6,
    Fault.PREEMPTION: 0.03,
    Fault.REJECTION: 0.1,
    Fault.ENGINE_ERROR: 0.02,
    Fault.DIVERGENCE: 0.9,
    Fault.JUMP: 0.9,
    Fault.SHORT: 0.6,
    Fault.AFTER_THE_END: 0.9,
    Fault.LOST_MESSAGES: 0.9,
    Fault.FORGERY: 0.5,
}
"""Faults that happen to something else that happens, and how likely at most."""


class Trouble:
    """How hostile one world is.

    Attributes:
        seen: How often each kind took effect.
    """

    def __init__(self, world: World) -> None:
        random = world.random
        self._world = world
        self.seen = Counter[Fault]()
        # Most kinds are absent from most worlds: too much trouble at once hides bugs.
        self._rates = {
            fault: rate_max * random.random()
            for fault, rate_max in MISHAPS.items()
            if random.random() < 0.35
        }
        num_strikes = random.choice((0, 1, 2, 3, 4, 6))
        self.strikes: list[Fault] = random.choices(STRIKES, k=num_strikes)

    def happens(self, fault: Fault) -> bool:
        """Whether a mishap happens now; whoever asks counts it once it takes effect."""
        rate = self._rates.get(fault)
        return rate is not None and self._world.random.random() < rate

    def took_effect(self, fault: Fault) -> None:
        """Count it."""
        self.seen[fault] += 1
        self._world.tell("* %s", fault)
