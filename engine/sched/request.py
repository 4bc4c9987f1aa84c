"""A request, what comes back of it, and its life in the scheduler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from engine.cache.radix import NONE, as_key
from engine.cache.sequence import SequenceCache
from engine.errors import RadixmeshError
from engine.sampling import SamplingParams
from engine.sched.grammar import Grammar
from engine.sched.scores import Scores
from engine.sched.stop import Finish, Stopper

if TYPE_CHECKING:
    from engine.sched.masks import Masks

KEY_BYTES = 4
"""Of a token in a key of the tree."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt to be completed. tokens: the prompt's ids. seed: 64-bit, params.seed or one that was drawn.

    eos: ids that end a text unless params.ignore_eos. stopper: finds stop strings; the loop's side makes
    it. grammar: masks the vocabulary. bad_words: params.bad_words as ids (Tokenizer.sequences).
    arrival: seconds on the caller's clock. deadline: when the request ends whatever it has made, on the loop's clock
    (time.monotonic); None is never. priority: larger is sooner. namespace: keeps prefix caches apart (adapter, tenant
    salt, weight version). group: answers to one prompt, submitted together, have one name here and share all that was
    computed of the prompt but its last token; "" is none.
    """

    rid: str
    tokens: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    eos: frozenset[int] = frozenset()
    stopper: Stopper | None = None
    grammar: Grammar | None = None
    arrival: float = 0.0
    deadline: float | None = None
    priority: int = 0
    namespace: Hashable = ()
    group: str = ""
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(
    slots=True, kw_only=True
)  # not frozen, nor is Row: one is made for each row of each step, in a third of the time
class Output:
    """News of a request: tokens committed since the last, and how it ended, if it did. cached_tokens: prompt tokens
    that came from the prefix cache. logprobs: of these tokens; prompt_logprobs: of the prompt, all at once with the
    first token; None where they weren't asked for. version: of the weights that made the last token, with finish."""

    rid: str
    tokens: tuple[int, ...] = ()
    finish: Finish | None = None
    cached_tokens: int = 0
    error: RadixmeshError | None = None
    logprobs: Scores | None = None
    prompt_logprobs: Scores | None = None
    version: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """A request's life: waiting, seated in a slot, and again waiting when it was preempted.

    rank: its place among those that wait, lowest first (engine.sched.policy.rank). steady: its decoding rows are alike
    from step to step, and `row` is the one that they all are. ends: ids that end it; watched: other things may, too.
    most: tokens that it may make. space: what shares its prefixes: its namespace, or its group where nobody else may.
    masks: what bounds its vocabulary. scores: of the prompt, as far as they came.

    epoch: counts its seatings; results of another epoch are never taken. fill: what must be fed before new tokens are
    made, the prompt and, after a preemption, the output so far; length: of fill; key: of fill, as the tree compares.
    hint: cached tokens when last looked up, -1 = never.

    fed: tokens of `fill` planned. settled: positions in the cache by collected steps; lower and upper: bounds that
    count the steps in flight. flying: rows in flight that make tokens. pending: rows in flight; verifying: those with
    drafts; newest: step of the last; these three leave out rows that are `row`. begun: a row of it was sent to the
    device. cold: the pool held it alone only without the prefix cache, which it uses no more. alone_until: after a
    device failure, run alone up to this position.

    leader: the run that computes a prefix which this one waits for; waits: how often it did. followers: those that wait
    for this one, with the positions that they need. stops: positions of `fill` where a chunk must end for them.
    """

    request: Request
    order: int
    rank: tuple[float, int]
    most: int
    ends: frozenset[int]
    steady: bool
    watched: bool
    space: Hashable = ()
    masks: Masks | None = None
    epoch: int = 0
    state: Literal["waiting", "seated", "ended"] = "waiting"
    slot: int = -1
    cache: SequenceCache | None = None
    fill: Sequence[int] = ()
    length: int = 0
    key: bytes = b""
    hint: int = -1
    start: int = -1
    fed: int = 0
    settled: int = 0
    lower: int = 0
    upper: int = 0
    pending: int = 0
    newest: int = -1
    flying: int = 0
    verifying: int = 0
    cached: int = 0
    begun: bool = False
    cold: bool = False
    alone_until: int = 0
    row: Row | None = None
    leader: Run | None = None
    waits: int = 0
    followers: dict[Run, int] = field(default_factory=dict)
    stops: set[int] = field(default_factory=set)
    out: list[int] = field(default_factory=list)
    checkpoints: dict[int, dict[int, int]] = field(default_factory=dict)
    scores: Scores = field(default_factory=Scores)

    def refill(self) -> None:
        """From now on prompt and committed output must be fed."""
        self.fill = [*self.request.tokens, *self.out]
        self.length, self.fed, self.hint = len(self.fill), 0, -1
        self.key = as_key(self.fill)

    def prefix(self, length: int) -> bytes:
        """The first `length` positions as the tree compares them; no more than are committed."""
        if length <= self.length:
            return self.key[: length * KEY_BYTES]
        before = len(self.request.tokens)
        return self.key + as_key(self.out[self.length - before : length - before])

    @property
    def decoding(self) -> bool:
        """Whether all of `fill` has been planned."""
        return self.fed == self.length

    @property
    def made(self) -> int:
        """Tokens made before the next row's first, at least: committed ones and one for each row in flight."""
        return len(self.out) + self.flying

    @property
    def masked(self) -> bool:
        """Whether the next row's token has a mask. Such a row has no drafts, so `made` is exact as long as it has."""
        return self.masks is not None and self.masks.binds(self.made)

    @property
    def scored(self) -> bool:
        """Whether all of the prompt's logprobs that are wanted have come."""
        return self.unscored == len(self.request.tokens)

    def scores_alike(self, other: Run) -> bool:
        """Whether another with the same prompt wants the same logprobs of it."""
        a, b = self.request.params, other.request.params
        return (a.prompt_logprobs, a.logprob_start_len) == (b.prompt_logprobs, b.logprob_start_len)

    @property
    def unscored(self) -> int:
        """The first position of the prompt whose logprob is wanted and has not come; the prompt's length if none is."""
        params, prompt = self.request.params, len(self.request.tokens)
        if params.prompt_logprobs is None:
            return prompt
        return min(prompt, params.logprob_start_len + 1 + len(self.scores))


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One row of a step. tokens: what is fed; drafts: guesses among them; makes: whether it makes tokens; end: for a
    row of `fill`, how much of it is fed afterwards. start: where it seats its slot, -1 = goes on. following: the
    literal after this chunk. read: by group, the state page to start from. history: (token, is_output) to be sent.
    made: Run.made, before it. score: the first position of the prompt that it scores, -1 = none."""

    run: Run
    epoch: int
    tokens: Sequence[int]
    drafts: int = 0
    makes: bool = True
    end: int = 0
    start: int = NONE
    following: int = NONE
    read: Sequence[int] = ()
    history: Sequence[tuple[int, bool]] = ()
    made: int = 0
    score: int = NONE

    @property
    def masked(self) -> bool:
        """Whether its token has a mask."""
        return self.makes and self.run.masks is not None and self.run.masks.binds(self.made)
