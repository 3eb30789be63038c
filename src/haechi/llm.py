"""Chat completions from any OpenAI-compatible endpoint: hosted models, vLLM, llama.cpp, `transformers serve`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from haechi.remote import Access, Endpoint, Reply, key_from

_HOSTED = "https://api.openai.com/v1"
_TOP = 20
"""How many of the likeliest first tokens are asked for; the most that hosted models give."""
_ALTERNATIVES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "logprobs": lambda body: {name: value for name, value in body.items() if "logprobs" not in name},
    "max_completion_tokens": lambda body: {
        "max_completion_tokens" if name == "max_tokens" else name: value for name, value in body.items()
    },
    "temperature": lambda body: {name: value for name, value in body.items() if name != "temperature"},
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


class Completion(NamedTuple):
    """What a chat model said."""

    text: str | None
    """None when there is no answer, see `error`."""
    first: dict[str, float]
    """Log-probability of the likeliest first tokens; empty where the endpoint gives none."""
    filtered: bool
    """Whether a content filter of the endpoint stopped the request or the answer."""
    error: str | None = None
    """Why there is no answer, in one line."""


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

    def complete(self, batch: Sequence[Messages], max_tokens: int, *, logprobs: bool = False) -> list[Completion]:
        """One completion per list of messages, in order; failures among them."""
        bodies = [self._body(messages, max_tokens, logprobs=logprobs) for messages in batch]
        replies = self._asked(bodies)
        # Some models refuse a parameter by its name: learnt from the first refusal, then left out for good.
        while refused := next((name for name in map(self._refusal, replies) if name), None):
            self._refused.append(refused)
            again = [index for index, reply in enumerate(replies) if reply.body is None and reply.status == 400]
            for index, reply in zip(again, self._asked([bodies[index] for index in again]), strict=True):
                replies[index] = reply
        return [self._read(reply) for reply in replies]

    def _asked(self, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
        adapted = []
        for body in bodies:
            for name in self._refused:
                body = _ALTERNATIVES[name](body)
            adapted.append(body)
        return self.endpoint.ask("/chat/completions", adapted)

    def _body(self, messages: Messages, max_tokens: int, *, logprobs: bool) -> dict[str, Any]:
        return {
            "model": self.settings.model,
            "messages": list(messages),
            "temperature": 0,
            "seed": self.settings.seed,
            "max_tokens": self.settings.max_tokens or max_tokens,
            **({"logprobs": True, "top_logprobs": _TOP} if logprobs else {}),
        }

    def _refusal(self, reply: Reply) -> str | None:
        """The parameter a 400 reply complains of, unless it has been left out already."""
        if reply.status != 400 or not reply.error:
            return None
        return next((name for name in _ALTERNATIVES if name in reply.error and name not in self._refused), None)

    def _read(self, reply: Reply) -> Completion:
        if reply.body is None:
            filtered = reply.status == 400 and any(
                word in (reply.error or "") for word in ("content_filter", "content management")
            )
            return Completion(None, {}, filtered, reply.error)
        spent = reply.body.get("usage")
        if isinstance(spent, dict) and not reply.cached:
            self.endpoint.count_tokens(int(spent.get("prompt_tokens") or 0), int(spent.get("completion_tokens") or 0))
        try:
            choice = reply.body["choices"][0]
            text = choice["message"].get("content")
            content = (choice.get("logprobs") or {}).get("content") or []
            first = {
                str(one["token"]): float(one["logprob"]) for one in (content[0]["top_logprobs"] if content else [])
            }
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return Completion(None, {}, False, f"{self.endpoint.url} gave a reply that is not a chat completion")
        if choice.get("finish_reason") == "content_filter":
            return Completion(None, {}, True, "the endpoint's content filter withheld the answer")
        if not isinstance(text, str) or not text.strip():
            refusal = choice["message"].get("refusal")
            if isinstance(refusal, str) and refusal.strip():
                return Completion(refusal, first, False)
            why = (
                "all tokens went into thought: raise max_tokens" if choice.get("finish_reason") == "length" else "empty"
            )
            return Completion(None, first, False, f"{self.settings.model} gave no text ({why})")
        return Completion(text, first, False)
