"""Chat models as guards: one that is told the policy and judges, one whose own refusals are the verdict."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from haechi.answers import declines
from haechi.errors import ConfigError
from haechi.guards import EMPTY, settings
from haechi.llm import Chat, ChatModel, Completion, prompt, share
from haechi.schema import Conversation, Example, Verdict
from haechi.sets import load_set, measured_only
from haechi.store import fingerprint
from haechi.taxonomy import Taxonomy, load_taxonomy

_IN_CONTEXT = 4


class JudgeConfig(ChatModel):
    """`{judge: {model: ..., ...}}`."""

    name: str | None = None
    """What tables call it; default `judge:MODEL`, or `judge-ic:MODEL` with examples."""
    taxonomy: Path | None = None
    """The policy it is told; default the built-in one."""
    examples: int = Field(default=0, ge=0)
    """Labelled queries of each class put before the query (in-context learning; `judge-ic:MODEL` has 4)."""
    examples_from: tuple[str, ...] = ("train.en", "train.ko")
    """Sets they are drawn from; never one that is measured on."""
    examples_seed: int = 0
    """Of the draw."""


class RefusalConfig(ChatModel):
    """`{refusal: {model: ..., ...}}`."""

    name: str | None = None
    """What tables call it; default `refusal:MODEL`."""
    length: int = Field(default=128, gt=0)
    """Tokens of the answer that are looked at."""


class JudgeGuard:
    """A chat model told the policy, zero-shot or with examples: what "SLM as Guardian" (arXiv 2405.19795) compares with
    as GPT-4-turbo, GPT-4-turbo-IC and the like. Its prompt is ours (`data/prompts/judge.txt`); the paper's is not
    published. The score is the share of `unsafe` among the first token's probabilities, where the endpoint gives them.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.taxonomy = load_taxonomy(config.taxonomy)
        self.name = config.name or f"judge{'-ic' if config.examples else ''}:{config.model}"
        self._chat = Chat(config)
        self._before = [{"role": "system", "content": _instructions(self.taxonomy)}]
        for row in _examples(config):
            line = "safe" if row.label == "safe" else f"unsafe {row.category}"
            self._before += [
                {"role": "user", "content": _quoted(row.query)},
                {"role": "assistant", "content": line},
            ]
        self.identity = fingerprint("judge", self._chat.served, self._before)

    @property
    def endpoint(self) -> Any:
        """Where its counts are."""
        return self._chat.endpoint

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        queries = [item.query for item in Conversation.each(conversations)]
        asked = [query for query in queries if query.strip()]
        batch = [[*self._before, {"role": "user", "content": _quoted(query)}] for query in asked]
        said = iter(self._chat.complete(batch, 16, logprobs=True))
        return [self._verdict(next(said)) if query.strip() else EMPTY for query in queries]

    def _verdict(self, completion: Completion) -> Verdict:
        if completion.text is None:
            return Verdict(error=completion.error)
        text = completion.text.lower()
        found = re.search(r"\b(un)?safe\b", text)
        if found is None:
            return Verdict(
                error=f"{self.name} said neither safe nor unsafe: {' '.join(completion.text.split())[:80]!r}"
            )
        unsafe = found[1] is not None
        named = re.search("|".join(map(re.escape, self.taxonomy.codes)), text[found.end() :]) if unsafe else None
        return Verdict(
            unsafe=unsafe, score=share(completion, "", ["unsafe"], ["safe"]), category=named[0] if named else None
        )


class RefusalGuard:
    """A chat model that is simply asked: the verdict is whether it refused, as XSTest (arXiv 2308.01263) measures
    aligned models. Gives no score. A content filter that stops the request or the answer counts as a refusal."""

    def __init__(self, config: RefusalConfig) -> None:
        self.name = config.name or f"refusal:{config.model}"
        self._chat, self._length = Chat(config), config.length
        self.identity = fingerprint("refusal", self._chat.served, config.length)

    @property
    def endpoint(self) -> Any:
        """Where its counts are."""
        return self._chat.endpoint

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        items = Conversation.each(conversations)
        asked = [item for item in items if item.query.strip()]
        batch = [[{"role": turn.role, "content": turn.content} for turn in item.turns] for item in asked]
        said = iter(self._chat.complete(batch, self._length))
        return [self._verdict(next(said)) if item.query.strip() else EMPTY for item in items]

    def _verdict(self, completion: Completion) -> Verdict:
        if completion.filtered:
            return Verdict(unsafe=True)
        if completion.text is None:
            return Verdict(error=completion.error)
        return Verdict(unsafe=declines(completion.text))


C = TypeVar("C", JudgeConfig, RefusalConfig)


def judge(spec: str | Mapping[str, Any] | None) -> JudgeGuard:
    """`judge:MODEL` or `{judge: {model: MODEL, ...}}`."""
    return JudgeGuard(_config(JudgeConfig, spec, "judge"))


def judge_in_context(spec: str | Mapping[str, Any] | None) -> JudgeGuard:
    """`judge-ic:MODEL` or `{judge-ic: {model: MODEL, ...}}`: with 4 examples of each class unless told otherwise."""
    config = _config(JudgeConfig, spec, "judge-ic")
    return JudgeGuard(config.model_copy(update={"examples": config.examples or _IN_CONTEXT}))


def refusal(spec: str | Mapping[str, Any] | None) -> RefusalGuard:
    """`refusal:MODEL` or `{refusal: {model: MODEL, ...}}`."""
    return RefusalGuard(_config(RefusalConfig, spec, "refusal"))


def _config(kind: type[C], spec: str | Mapping[str, Any] | None, name: str) -> C:
    if spec is None:
        raise ConfigError(f"name the model: {name}:MODEL")
    return settings(kind, spec, name)


def _instructions(taxonomy: Taxonomy) -> str:
    text = prompt("judge.txt")
    kinds = "\n".join(f"- {one.code}: {next(iter(one.definition.values()))}" for one in taxonomy.categories)
    return text.strip().format(categories=kinds, codes=", ".join(taxonomy.codes))


def _quoted(query: str) -> str:
    return f"<query>\n{query}\n</query>"


def _examples(config: JudgeConfig) -> list[Example]:
    """As many rows of each class as asked for, the classes in turn."""
    if not config.examples:
        return []
    if measured := [name for name in config.examples_from if measured_only(name)]:
        raise ConfigError(f"data set {measured[0]!r} is for measuring only: no examples may be drawn from it")
    rows = [row for name in config.examples_from for row in load_set(name)]
    draw = random.Random(config.examples_seed)
    drawn = []
    for label in ("unsafe", "safe"):
        labelled = [row for row in rows if row.label == label]
        if len(labelled) < config.examples:
            raise ConfigError(
                f"{', '.join(config.examples_from)} hold {len(labelled)} {label} rows, not {config.examples}"
            )
        drawn.append(draw.sample(labelled, config.examples))
    return [row for pair in zip(*drawn, strict=True) for row in pair]
