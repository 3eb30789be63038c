"""Guards made of guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from haechi.errors import ConfigError
from haechi.guards import AnsweringGuard, Guard, load_guard
from haechi.normalise import VERSION, normalise
from haechi.schema import Answer, Conversation, Verdict
from haechi.store import fingerprint


class AnyOf:
    """Unsafe when one of its guards says so, safe only when all of them do, else the error of one without an answer."""

    def __init__(self, guards: Sequence[Guard]) -> None:
        self.members = guards
        self.name = f"any_of({', '.join(guard.name for guard in guards)})"
        self.identity = fingerprint("any_of", [guard.identity for guard in guards])

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        columns = zip(*(guard.check(conversations) for guard in self.members), strict=True)
        return [max(verdicts, key=_severity) for verdicts in columns]


class Cascade:
    """Cheap guards first: a score at or below `low` or at or above `high` decides, anything between goes to the next.

    The last guard always decides. A guard that gives an error passes the conversation on.
    """

    def __init__(self, guards: Sequence[Guard], low: float, high: float) -> None:
        self.members, self._low, self._high = guards, low, high
        self.name = f"cascade({', '.join(guard.name for guard in guards)}; {low:g}-{high:g})"
        self.identity = fingerprint("cascade", [guard.identity for guard in guards], low, high)

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        verdicts: list[Verdict] = [Verdict(error="not judged")] * len(conversations)
        open_ = list(range(len(conversations)))
        for guard in self.members:
            if not open_:
                break
            for index, verdict in zip(open_, guard.check([conversations[index] for index in open_]), strict=True):
                # An error of a later guard does not undo an earlier, unsure verdict.
                if verdict.error is None or verdicts[index].error is not None:
                    verdicts[index] = verdict
            open_ = [index for index in open_ if not self._sure(verdicts[index])]
        return verdicts

    def _sure(self, verdict: Verdict) -> bool:
        if verdict.unsafe is None:
            return False
        return verdict.score is None or verdict.score <= self._low or verdict.score >= self._high


class Threshold:
    """Another guard's scores, cut at another place; it answers when that guard does."""

    def __init__(self, guard: Guard, at: float) -> None:
        self._guard, self._at, self.members = guard, at, (guard,)
        self.name = f"{guard.name}@{at:g}"
        self.identity = fingerprint("threshold", guard.identity, at)
        self.taxonomy = getattr(guard, "taxonomy", None)
        if isinstance(guard, AnsweringGuard):
            self.answer = self._answering(guard.answer)

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        return [self._cut(verdict) for verdict in self._guard.check(conversations)]

    def _cut(self, verdict: Verdict) -> Verdict:
        if verdict.error is not None:
            return verdict
        if verdict.score is None:
            return Verdict(error=f"{self._guard.name} gives no score to compare with a threshold")
        unsafe = verdict.score >= self._at
        category = verdict.category
        if unsafe and category is None and verdict.categories:
            category = max(verdict.categories, key=verdict.categories.__getitem__)
        return verdict.model_copy(update={"unsafe": unsafe, "category": category if unsafe else None})

    def _answering(self, answer: Callable[..., list[Answer]]) -> Callable[..., list[Answer]]:
        def cut(conversations: Sequence[Conversation | str], force: bool = False) -> list[Answer]:
            verdicts = self.check(conversations)
            wanted = [index for index, verdict in enumerate(verdicts) if force or verdict.unsafe]
            written = dict(zip(wanted, answer([conversations[index] for index in wanted], True), strict=True))
            return [
                written[index].model_copy(update={"verdict": verdict}) if index in written else Answer(verdict=verdict)
                for index, verdict in enumerate(verdicts)
            ]

        return cut


class Normalised:
    """A guard that is shown the query in plain letters (`haechi.normalise`); it answers when that guard does."""

    def __init__(self, guard: Guard) -> None:
        self._guard, self.members = guard, (guard,)
        self.name = f"normalised({guard.name})"
        self.identity = fingerprint("normalised", VERSION, guard.identity)
        self.taxonomy = getattr(guard, "taxonomy", None)
        if isinstance(guard, AnsweringGuard):
            answer = guard.answer
            self.answer = lambda conversations, force=False: answer(_plain(conversations), force)

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        return self._guard.check(_plain(conversations))


def _plain(conversations: Sequence[Conversation | str]) -> list[Conversation]:
    """The conversations with what the user wrote in plain letters."""
    return [
        item.model_copy(
            update={
                "turns": tuple(
                    turn.model_copy(update={"content": normalise(turn.content)}) if turn.role == "user" else turn
                    for turn in item.turns
                )
            }
        )
        for item in Conversation.each(conversations)
    ]


def _severity(verdict: Verdict) -> tuple[int, float]:
    rank = 2 if verdict.unsafe else 1 if verdict.unsafe is None else 0
    return rank, verdict.score or 0.0


def any_of(specs: Any) -> AnyOf:
    """`{any_of: [GUARD, ...]}`."""
    return AnyOf(_members(specs, "any_of"))


def cascade(spec: Any) -> Cascade:
    """`{cascade: {guards: [GUARD, ...], low: 0.1, high: 0.9}}`."""
    if not isinstance(spec, dict) or set(spec) != {"guards", "low", "high"}:
        raise ConfigError("cascade needs exactly: guards, low, high")
    low, high = _number(spec["low"], "low"), _number(spec["high"], "high")
    if low > high:
        raise ConfigError(f"cascade: low {low} is above high {high}")
    return Cascade(_members(spec["guards"], "cascade"), low, high)


def threshold(spec: Any) -> Threshold:
    """`{threshold: {guard: GUARD, at: 0.8}}`."""
    if not isinstance(spec, dict) or set(spec) != {"guard", "at"}:
        raise ConfigError("threshold needs exactly: guard, at")
    return Threshold(load_guard(spec["guard"]), _number(spec["at"], "at"))


def normalised(spec: Any) -> Normalised:
    """`{normalised: GUARD}`."""
    return Normalised(load_guard(spec))


def _members(specs: Any, name: str) -> list[Guard]:
    if not isinstance(specs, list) or not specs:
        raise ConfigError(f"{name} needs a list of at least one guard")
    return [load_guard(spec) for spec in specs]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a number between 0 and 1, not {value!r}")
    return float(value)
