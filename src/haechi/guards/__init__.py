"""Guards by name. All of them are used through `Guard.check`; those that can also write have `answer`.

A guard is named by `kind:argument` (`slm:runs/haechi-mini/model`, `judge:gpt-4-turbo`), by its kind and settings
(`{judge: {model: gpt-4-turbo, concurrency: 2}}`), or built from others (`{any_of: ["keyword:words.txt", slm]}`), so one
line of YAML is enough in every configuration. A model with several operating points is named with one of them as
`slm@strict:FOLDER`; `slm@strict` is the embedded model.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from haechi.config import C, parse
from haechi.errors import ConfigError, MissingExtra, did_you_mean
from haechi.schema import Answer, Conversation, Verdict

if TYPE_CHECKING:
    from haechi.remote import Endpoint

_SOME = 8
"""So many rows without a decision of the endpoint are no accident."""

EMPTY = Verdict(error="the query is empty")
"""What every guard says of a blank query."""


@runtime_checkable
class Guard(Protocol):
    """Judges conversations."""

    name: str
    """What tables call it."""
    identity: str
    """What decides its rows: those that a guard of equal identity gave may be taken for its own."""

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """One verdict per conversation, in order. A conversation it cannot judge gets `error`, never an exception."""
        ...


@runtime_checkable
class AnsweringGuard(Guard, Protocol):
    """Judges, and writes what to show the user."""

    def answer(self, conversations: Sequence[Conversation | str], force: bool = False) -> list[Answer]:
        """One answer per conversation, in order; a safe query gets none unless `force`d."""
        ...


_KINDS = {
    "slm": "haechi.guards.slm:named",
    "keyword": "haechi.guards.keyword:load",
    "frozen": "haechi.guards.frozen:load",
    "judge": "haechi.guards.judge:judge",
    "judge-ic": "haechi.guards.judge:judge_in_context",
    "refusal": "haechi.guards.judge:refusal",
    "openai-moderation": "haechi.guards.services:openai_moderation",
    "perspective": "haechi.guards.services:perspective",
    "azure-content-safety": "haechi.guards.services:azure_content_safety",
    "hf-classifier": "haechi.guards.local:classifier",
    "llama-guard": "haechi.guards.open:load:llama-guard",
    "llama-guard-ic": "haechi.guards.open:load:llama-guard-ic",
    "aegis": "haechi.guards.open:load:aegis",
    "wildguard": "haechi.guards.open:load:wildguard",
    "shieldgemma": "haechi.guards.open:load:shieldgemma",
    "granite-guardian": "haechi.guards.open:load:granite-guardian",
    "qwen3guard": "haechi.guards.open:load:qwen3guard",
    "gpt-oss-safeguard": "haechi.guards.open:load:gpt-oss-safeguard",
    "kanana-safeguard": "haechi.guards.open:load:kanana-safeguard",
}
_WITH_POINTS = {"slm"}
_WITHOUT_SETTINGS = {"keyword"}
_COMPOSITIONS = {
    "cascade": "haechi.guards.compose:cascade",
    "any_of": "haechi.guards.compose:any_of",
    "threshold": "haechi.guards.compose:threshold",
    "normalised": "haechi.guards.compose:normalised",
}


def load_guard(spec: str | Mapping[str, Any]) -> Guard:
    """The guard a specification names. Raises ConfigError with a suggestion for an unknown kind."""
    if isinstance(spec, str):
        head, _, argument = spec.partition(":")
        kind, at, point = head.partition("@")
        load = _lookup(kind, _KINDS)
        if at and kind not in _WITH_POINTS:
            raise ConfigError(f"a {kind} guard has no operating points: {kind!r}, not {head!r}")
        guard: Guard = load(argument or None, point=point) if at else load(argument or None)
        return guard
    if not isinstance(spec, Mapping):
        raise ConfigError(f"a guard is a text such as 'keyword:FILE' or a mapping, not {spec!r}")
    if len(spec) != 1:
        raise ConfigError(
            f"a guard is a mapping of one key, its kind or one of {', '.join(_COMPOSITIONS)}, not {dict(spec)!r}"
        )
    ((key, argument),) = spec.items()
    kind = str(key)
    if kind in _WITHOUT_SETTINGS:
        raise ConfigError(f"a {kind} guard is named in one text, '{kind}:ARGUMENT', not by a mapping")
    if kind in _KINDS and not isinstance(argument, Mapping):
        raise ConfigError(f"the settings of a {kind} guard are a mapping, not {argument!r}")
    made: Guard = _lookup(kind, _KINDS if kind in _KINDS else _COMPOSITIONS)(argument)
    return made


def settings(kind: type[C], spec: str | Mapping[str, Any] | None, name: str, main: str = "model") -> C:
    """The settings of a guard named as `name`, `name:ARGUMENT` (its setting `main`) or `{name: {...}}`."""
    return parse(kind, {} if spec is None else {main: spec} if isinstance(spec, str) else spec, f"the guard {name}")


def endpoints(guard: Guard) -> Iterator[Endpoint]:
    """The addresses a guard, or one it is made of, asks."""
    if hasattr(guard, "endpoint"):
        yield guard.endpoint
    for member in getattr(guard, "members", ()):
        yield from endpoints(member)


def rows_at_once(guard: Guard) -> int:
    """How many rows are judged and written down together: few behind an endpoint, where a kill would lose replies that
    were paid for."""
    busiest = max((endpoint.access.concurrency for endpoint in endpoints(guard)), default=None)
    return 256 if busiest is None else 4 * busiest


def judged(guard: Guard, conversations: Sequence[Conversation | str]) -> list[Verdict]:
    """What `guard` says of each conversation. Raises ConfigError when it breaks its word: another number of verdicts
    than conversations. So it does when going on behind an endpoint would be in vain: it is closed to us, has never
    answered, or decides nothing any more."""
    addresses = list(endpoints(guard))
    before = sum(endpoint.decided for endpoint in addresses)
    verdicts = guard.check(conversations)
    if len(verdicts) != len(conversations):
        raise ConfigError(f"{guard.name} gave {len(verdicts)} verdicts for {len(conversations)} rows")
    if not addresses:
        return verdicts
    pairs = zip(Conversation.each(conversations), verdicts, strict=True)
    asked = [verdict for item, verdict in pairs if item.query.strip()]
    failed = [verdict for verdict in asked if verdict.error]
    if not failed:
        return verdicts
    closed = any(endpoint.closed for endpoint in addresses)
    if closed and len(failed) < len(asked):
        raise ConfigError(f"{guard.name} stopped answering after {len(asked) - len(failed)} rows: {failed[0].error}")
    if closed or (len(failed) == len(asked) and _in_vain(addresses, before, len(asked))):
        raise ConfigError(f"{guard.name} answered none of {len(asked)} rows: {failed[0].error}")
    return verdicts


def _in_vain(addresses: Sequence[Endpoint], before: int, asked: int) -> bool:
    """Whether rows that all failed are the endpoint's fault and not their own."""
    answered = sum(endpoint.usage.requests + endpoint.usage.cached for endpoint in addresses)
    decided = sum(endpoint.decided for endpoint in addresses) - before
    return not answered or (not decided and asked >= _SOME)


def _lookup(kind: str, table: Mapping[str, str]) -> Any:
    if kind not in table:
        raise ConfigError(f"unknown guard {kind!r}{did_you_mean(kind, [*_KINDS, *_COMPOSITIONS])}")
    module, attribute, *bound = table[kind].split(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        if (error.name or "").startswith("haechi"):
            raise
        raise MissingExtra("train", f"the guard {kind!r}") from None
    return partial(found, *bound)
