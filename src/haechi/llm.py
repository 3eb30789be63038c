"""Chat completions from any OpenAI-compatible endpoint: hosted models, vLLM, llama.cpp, `transformers serve`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from pydantic import Field

from haechi.remote import Access, Endpoint, Reply, key_from

_HOSTED = "https://api.openai.com/v1"
_UNFIT = (400, 422)
"""How endpoints refuse a request for what is in it."""
_TOP = 20
"""How many of the likeliest first tokens are asked for; the most that hosted models give."""


def _without(word: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda body: {name: value for name, value in body.items() if word not in name}


_ALTERNATIVES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "logprobs": _without("logprobs"),
    "max_completion_tokens": lambda body: {
        "max_completion_tokens" if name == "max_tokens" else name: value for name, value in body.items()
    },
    "temperature": _without("temperature"),
    "skip_special_tokens": _without("skip_special_tokens"),
}
"""What a model that refuses a request by a parameter's name is asked instead."""

Messages = Sequence[Mapping[str, str]]


class ChatModel(Access):
    """A model and where it is served."""

    model: str
    """Its name at the endpoint."""
    url: str | None = None
    """Base address up to `/v1`; None: the environment variable OPENAI_BASE_URL, else OpenAI's own."""
    key: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; only a hosted endpoint must have one."""
    seed: int = 0
    """Passed on, for endpoints that honour it."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Most tokens to write, thoughts included; None: what the guard needs. Reasoning models need hundreds."""


class Step(NamedTuple):
    """One written token."""

    token: str
    """Its text."""
    likeliest: dict[str, float]
    """Log-probabilities of the likeliest tokens at its place, by their text."""


class Completion(NamedTuple):
    """What a model wrote."""

    text: str | None
    """None when there is no answer, see `error`."""
    steps: tuple[Step, ...] = ()
    """Its tokens; empty where the endpoint gives no log-probabilities."""
    filtered: bool = False
    """Whether a content filter of the endpoint stopped the request or the answer."""
    error: str | None = None
    """Why there is no answer, in one line."""


def share(completion: Completion, after: str, yes: Sequence[str], no: Sequence[str]) -> float | None:
    """Probability of `yes` against `no` where the model decides: at the first written token that is not blank and
    follows `after` (empty: the beginning). Tokens count by what they begin with, so that pieces of a word count for it.
    None without log-probabilities, or when neither is among the likeliest tokens."""
    written = ""
    for step in completion.steps:
        if step.token.strip() and written.strip().lower().endswith(after.lower()):
            if after or not written.strip():
                return _share(step.likeliest, yes, no)
            return None
        written += step.token
    return None


def _share(likeliest: Mapping[str, float], yes: Sequence[str], no: Sequence[str]) -> float | None:
    sums = [0.0, 0.0]
    for token, logprob in likeliest.items():
        start = token.strip().lower()
        for index, words in enumerate((yes, no)):
            if start and any(word.startswith(start) for word in words):
                sums[index] += math.exp(logprob)
    return sums[0] / sum(sums) if sum(sums) > 0 else None


def prompt(name: str) -> str:
    """A text of `data/prompts`."""
    return (resources.files("haechi") / "data" / "prompts" / name).read_text(encoding="utf-8")


class Chat:
    """One chat model behind an endpoint; greedy."""

    def __init__(self, settings: ChatModel) -> None:
        """Raises ConfigError when a hosted endpoint lacks its key."""
        url = settings.url or os.environ.get("OPENAI_BASE_URL") or _HOSTED
        key = os.environ.get(settings.key)
        if key is None and url == _HOSTED:
            key = key_from(settings.key, f"{settings.model} at {url}")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.settings, self.endpoint = settings, Endpoint(url, settings, headers)
        self._refused: list[str] = []

    @property
    def served(self) -> tuple[str, str, int | None]:
        """What decides the answers: address, model, length."""
        return self.endpoint.url, self.settings.model, self.settings.max_tokens

    def complete(
        self, batch: Sequence[Messages], max_tokens: int, *, logprobs: bool = False, **more: Any
    ) -> list[Completion]:
        """One completion per list of messages, in order; failures among them. `more` goes into each request."""
        bodies = [{"messages": list(messages), **more} for messages in batch]
        wanted = {"logprobs": True, "top_logprobs": _TOP} if logprobs else {}
        return self._completed(
            "/chat/completions", [{**self._settings(max_tokens), **body, **wanted} for body in bodies], _chatted
        )

    def go_on(
        self, prompts: Sequence[str], max_tokens: int, *, logprobs: bool = False, **more: Any
    ) -> list[Completion]:
        """What follows each raw prompt, special tokens in it included: for models that no chat template fits. `more`
        goes into each request."""
        wanted = {"logprobs": _TOP} if logprobs else {}
        bodies = [{**self._settings(max_tokens), "prompt": prompt, **wanted, **more} for prompt in prompts]
        return self._completed("/completions", bodies, _continued)

    def _settings(self, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.settings.model,
            "temperature": 0,
            "seed": self.settings.seed,
            "max_tokens": self.settings.max_tokens or max_tokens,
        }

    def _completed(
        self, path: str, bodies: Sequence[dict[str, Any]], read: Callable[[Any], Completion]
    ) -> list[Completion]:
        replies = self._asked(path, bodies)
        # Some models refuse a parameter by its name: learnt from the first refusal, then left out for good.
        while refused := next((name for name in map(self._refusal, replies) if name), None):
            self._refused.append(refused)
            again = [index for index, reply in enumerate(replies) if reply.body is None and reply.status in _UNFIT]
            for index, reply in zip(again, self._asked(path, [bodies[index] for index in again]), strict=True):
                replies[index] = reply
        return [self._read(reply, read) for reply in replies]

    def _asked(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
        adapted = []
        for body in bodies:
            for name in self._refused:
                body = _ALTERNATIVES[name](body)
            adapted.append(body)
        return self.endpoint.ask(path, adapted)

    def _refusal(self, reply: Reply) -> str | None:
        """The parameter a refusal complains of, unless it has been left out already."""
        if reply.status not in _UNFIT or not reply.error:
            return None
        return next((name for name in _ALTERNATIVES if name in reply.error and name not in self._refused), None)

    def _read(self, reply: Reply, read: Callable[[Any], Completion]) -> Completion:
        if reply.body is None:
            told = reply.error or ""
            filtered = reply.status == 400 and any(word in told for word in ("content_filter", "content management"))
            return Completion(None, filtered=filtered, error=reply.error)
        spent = reply.body.get("usage")
        if isinstance(spent, dict) and not reply.cached:
            self.endpoint.count_tokens(int(spent.get("prompt_tokens") or 0), int(spent.get("completion_tokens") or 0))
        try:
            choice = reply.body["choices"][0]
            completion = read(choice)
            finish = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return Completion(None, error=f"{self.endpoint.url} gave a reply that is not a completion")
        if finish == "content_filter":
            return Completion(None, filtered=True, error="the endpoint's content filter withheld the answer")
        if completion.text is None or not completion.text.strip():
            why = "all tokens went into thought: raise max_tokens" if finish == "length" else "empty"
            return completion._replace(text=None, error=f"{self.settings.model} gave no text ({why})")
        return completion


def _chatted(choice: Any) -> Completion:
    """A choice of /chat/completions; a refusal told apart from content is content."""
    message = choice["message"]
    text = message.get("content") or message.get("refusal")
    steps = tuple(
        Step(str(one["token"]), {str(top["token"]): float(top["logprob"]) for top in one["top_logprobs"]})
        for one in (choice.get("logprobs") or {}).get("content") or []
    )
    return Completion(None if text is None else str(text), steps)


def _continued(choice: Any) -> Completion:
    """A choice of /completions."""
    told = choice.get("logprobs") or {}
    steps = tuple(
        Step(str(token), {str(name): float(value) for name, value in (top or {}).items()})
        for token, top in zip(told.get("tokens") or [], told.get("top_logprobs") or [], strict=True)
    )
    return Completion(str(choice["text"]), steps)
