"""Every record that is stored or sent: frozen, unknown fields refused, each field documented in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Label = Literal["safe", "unsafe"]


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(Record):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said, as typed."""


class Conversation(Record):
    """What a guard judges: the messages so far, the last one from the user."""

    turns: tuple[Turn, ...]
    """Oldest first."""
    id: str | None = None
    """The caller's name for it; carried into files, never judged."""

    @classmethod
    def from_query(cls, query: str, id: str | None = None) -> Conversation:
        """A conversation of one user message."""
        return cls(turns=(Turn(role="user", content=query),), id=id)

    @classmethod
    def of(cls, item: Conversation | str) -> Conversation:
        """A conversation as it is, or one made of a query."""
        return cls.from_query(item) if isinstance(item, str) else item

    @classmethod
    def each(cls, items: Sequence[Conversation | str]) -> list[Conversation]:
        """The conversations of a batch. Raises TypeError for a bare text, whose letters would each be judged."""
        if isinstance(items, str):
            raise TypeError("a guard takes a list of queries: write [query]")
        return [cls.of(item) for item in items]

    @property
    def query(self) -> str:
        """The last user message, empty when there is none: the text the paper's task is defined on."""
        return next((turn.content for turn in reversed(self.turns) if turn.role == "user"), "")


class Verdict(Record):
    """A guard's judgement of one conversation."""

    unsafe: bool | None = None
    """True or False; None when the guard gave no answer (see `error`): never to be read as safe."""
    score: float | None = Field(default=None, ge=0, le=1)
    """Probability that the query is unsafe, calibrated where the guard is; None when there is none."""
    category: str | None = None
    """The most likely category's code when unsafe."""
    categories: dict[str, float] = Field(default_factory=dict)
    """Probability of each category given that the query is unsafe; empty when the guard names none."""
    error: str | None = None
    """Why there is no verdict, in one line."""


class Answer(Record):
    """What to show the user instead of, or from, the large model."""

    verdict: Verdict
    """The judgement made from the same prefill as the text."""
    text: str | None = None
    """The written answer; None when there is none (see `verdict.error`)."""
    language: str | None = None
    """ISO 639-1 code of the answer's language."""
    finished: bool = False
    """Whether the model ended its answer by itself rather than at the length limit."""


class Example(Record):
    """One row of a data set: a query, what is known of it, and perhaps an answer."""

    id: str
    """Stable and unique within its set."""
    lang: str
    """ISO 639-1 code of the query."""
    query: str
    """What a user typed."""
    label: Label | None = None
    """Whether it asks for harm under the policy; None when nobody said."""
    category: str | None = None
    """The taxonomy's code, for a safe row the category it borders on; or a public set's own label."""
    kind: str | None = None
    """How the row makes its point (SPEC of the corpus), if known."""
    response: str | None = None
    """A reference answer."""
    source: str | None = None
    """Set or author it comes from."""
    license: str | None = None
    """SPDX name or short description."""
    group: str | None = None
    """Rows of one contrast share a group and are never split between training and validation."""
