"""The model's text: the only file that knows special tokens, where they go, which ids are supervised, who sees whom.

    classify   query <|pred|> <|safe|>          query <|pred|> <|unsafe|> <|category|>
    answer     query <|expl|> answer <eos>
    force      query <|harm|> <|expl|> answer <eos>

The five tokens are those of "SLM as Guardian" (arXiv 2405.19795, Figure 1); the category token is ours. One row holds
the query once and its branches after it: a branch sees the query and itself, never its siblings, and its position ids
restart where the query ends, so a branch in a shared row computes what it would compute in a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from haechi.config import Config
from haechi.errors import ModelError
from haechi.schema import Label, Verdict
from haechi.store import fingerprint

PRED, EXPL, SAFE, UNSAFE, HARM = "<|pred|>", "<|expl|>", "<|safe|>", "<|unsafe|>", "<|harm|>"
TOKENS = (PRED, EXPL, SAFE, UNSAFE, HARM)

_WORDS = {
    PRED: "Is this request safe or unsafe? It is",
    EXPL: "The reply to it:",
    HARM: "It is unsafe. The reply to it:",
}

IGNORE = -100
"""Label of a position that is not supervised; PyTorch's default `ignore_index`."""

PADDING, QUERY = 0, 1
"""Segments of a row; branches count on from 2."""

NOT_SUPERVISED, VERDICT, CATEGORY, TEXT = 0, 1, 2, 3
"""What a supervised position teaches; losses are weighted by it."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


def category_token(code: str) -> str:
    """The special token that names a category."""
    return f"<|{code}|>"


def special_tokens(codes: Sequence[str]) -> list[str]:
    """Every token a model needs beyond its own vocabulary, in order."""
    return [*TOKENS, *map(category_token, codes)]


class TemplateSettings(Config):
    """How one model reads; saved with it in `haechi.json`."""

    attention: Literal["causal", "prefix"] = "prefix"
    """`prefix`: the query's tokens see each other in both directions; everything after the query is causal."""
    tasks: Literal["tokens", "words"] = "tokens"
    """How a task is asked for and a label given: by the five special tokens, or in plain English, which is what the
    tokens are measured against. Categories have tokens either way."""
    before: str = ""
    """Trusted text before the query, special tokens allowed: a chat template's opening or `[CLS]`."""
    after: str = ""
    """Trusted text between the query and the branch: a chat template's closing."""
    eos: str
    """The token that ends an answer."""
    window: int = 256
    """Most query tokens shown at once; a longer query is judged in overlapping windows."""
    overlap: int = 64
    """Tokens that neighbouring windows share."""
    answer: int = 128
    """Most tokens of an answer."""


class Branch(NamedTuple):
    """What follows a query in one task."""

    ids: list[int]
    """Input tokens."""
    labels: list[int]
    """For each input token the id it must predict next, or IGNORE."""
    kinds: list[int]
    """For each input token VERDICT, CATEGORY, TEXT or NOT_SUPERVISED."""


class Row(NamedTuple):
    """A query and its branches, as ids."""

    query: list[int]
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        """Input tokens in the row."""
        return len(self.query) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True)
class Batch:
    """Rows padded to one rectangle; every array is [rows, columns]."""

    ids: Ints
    positions: Ints
    segments: Ints
    labels: Ints
    kinds: Ints
    split: int
    """The column where the branches of every row start; 0 where rows are not aligned."""


class Template:
    """Renders text to ids and decodes logits to verdicts for one tokenizer, taxonomy and setting."""

    def __init__(self, tokenizer: Tokenizer, codes: Sequence[str], settings: TemplateSettings) -> None:
        self.settings = settings
        self.codes = tuple(codes)
        missing = [token for token in special_tokens(codes) if tokenizer.token_to_id(token) is None]
        if missing:
            raise ModelError(f"the tokenizer lacks the tokens {', '.join(missing)}: it was made for another taxonomy")
        if tokenizer.token_to_id(settings.eos) is None:
            raise ModelError(f"the tokenizer lacks the end token {settings.eos!r}")
        self._tokenizer = tokenizer
        # User text can never become a special token: with this switch on, the tokenizer reads "<|safe|>" as letters.
        self._tokenizer.encode_special_tokens = True
        self._before, self._after = self._trusted(settings.before), self._trusted(settings.after)
        self.eos = self.id(settings.eos)
        self._ask = self._asked()
        self.labels = self._labels()
        self.categories = tuple(self.id(category_token(code)) for code in codes)
        self._special = set(map(self.id, special_tokens(codes))) | {self.eos}

    def _asked(self) -> dict[str, list[int]]:
        """What stands between a query and a verdict, an answer, a forced answer."""
        if self.settings.tasks == "words":
            return {token: self.encode(text) for token, text in _WORDS.items()}
        pred, expl, harm = map(self.id, (PRED, EXPL, HARM))
        return {PRED: [pred], EXPL: [expl], HARM: [harm, expl]}

    def _labels(self) -> tuple[int, int]:
        """The ids of safe and unsafe."""
        if self.settings.tasks == "tokens":
            return self.id(SAFE), self.id(UNSAFE)
        # Where a tokenizer tells a word inside a text from one at its start, it is the one inside that is asked for.
        safe, unsafe = (self.encode(f"a{word}")[len(self.encode("a")) :] for word in (" safe", " unsafe"))
        if len(safe) != 1 or len(unsafe) != 1:
            raise ModelError("tasks: words needs a tokenizer that has 'safe' and 'unsafe' as one token each")
        return safe[0], unsafe[0]

    def id(self, token: str) -> int:
        """The id of a token that is known to exist."""
        id = self._tokenizer.token_to_id(token)
        assert id is not None, token
        return int(id)

    @property
    def tokenizer_hash(self) -> str:
        """What ids made by this tokenizer can be kept under."""
        return fingerprint(self._tokenizer.to_str())

    def _trusted(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = True
        return list(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of user text: never a special token, whatever it spells. Lone surrogates become U+FFFD."""
        readable = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        return list(self._tokenizer.encode(readable, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode_each(self) -> list[str]:
        """The text of every id alone, in order."""
        return list(self._tokenizer.decode_batch([[id] for id in range(self._tokenizer.get_vocab_size())]))

    def wrap(self, ids: Sequence[int]) -> list[int]:
        """A query's ids as the model reads them, between `before` and `after`."""
        return [*self._before, *ids, *self._after]

    def windows(self, query: str) -> list[list[int]]:
        """The query's wrapped ids, cut into overlapping windows when it is longer than the model's window."""
        ids, size = self.encode(query), self.settings.window
        if len(ids) <= size:
            return [self.wrap(ids)]
        step = size - self.settings.overlap
        return [self.wrap(ids[start : start + size]) for start in range(0, len(ids) - self.settings.overlap, step)]

    def classify_branch(self, label: Label, category: str | None = None) -> Branch:
        """Teaches the verdict after `<|pred|>` and, for unsafe queries of a known category, the category after it."""
        safe, unsafe = self.labels
        ask = self._ask[PRED]
        labels, kinds = [IGNORE] * (len(ask) - 1), [NOT_SUPERVISED] * (len(ask) - 1)
        if label == "safe":
            return Branch(ask, [*labels, safe], [*kinds, VERDICT])
        if category not in self.codes:
            return Branch(ask, [*labels, unsafe], [*kinds, VERDICT])
        named = self.id(category_token(category))
        return Branch([*ask, unsafe], [*labels, unsafe, named], [*kinds, VERDICT, CATEGORY])

    def answer_branch(self, answer: str, *, force: bool = False) -> Branch:
        """Teaches the answer after `<|expl|>`; `force` puts `<|harm|>` first (on 30% of harmful training queries)."""
        head = self.answer_prompt(force=force)
        # An answer that is too long is cut before its end token: it must not teach to stop in mid-sentence.
        text = [*self.encode(answer), self.eos][: self.settings.answer]
        labels = [IGNORE] * (len(head) - 1) + text
        kinds = [NOT_SUPERVISED] * (len(head) - 1) + [TEXT] * len(text)
        return Branch([*head, *text[:-1]], labels, kinds)

    def answer_prompt(self, *, force: bool = False) -> list[int]:
        """The ids that ask for an answer."""
        return self._ask[HARM if force else EXPL]

    def verdict_prompt(self) -> list[int]:
        """The ids that ask for a verdict: the last but one gives safe/unsafe, the last the category."""
        return [*self._ask[PRED], self.labels[1]]

    def forbidden(self) -> list[int]:
        """Ids that may not be generated inside an answer (the end token may)."""
        return sorted(self._special - {self.eos})

    def verdict(
        self,
        labels: Floats,
        categories: Floats,
        *,
        temperature: float,
        threshold: float,
        thresholds: Mapping[str, float] | None = None,
    ) -> Verdict:
        """A verdict from logits: `labels` [2] over (safe, unsafe) at `<|pred|>`, `categories` [C] at `<|unsafe|>`.

        `thresholds` takes the place of `threshold` for a query whose likeliest category it names.
        """
        score = float(_softmax(labels / temperature)[1])
        if not np.isfinite(score):
            return Verdict(error="the model returned numbers that are not finite")
        shares = dict(zip(self.codes, map(float, _softmax(categories)), strict=True))
        likeliest = max(shares, key=shares.__getitem__)
        unsafe = score >= (thresholds or {}).get(likeliest, threshold)
        return Verdict(
            unsafe=unsafe,
            score=score,
            category=likeliest if unsafe else None,
            categories=shares,
        )


def language_row(ids: Sequence[int], split: int, before: Sequence[int] = ()) -> Row:
    """Running text as a row: the first `split` ids are the query, the rest a branch that learns to go on from them."""
    text = list(ids[split:])
    branch = Branch(text[:-1], text[1:], [TEXT] * (len(text) - 1))
    return Row([*before, *ids[:split]], (branch,))


def separate(rows: Iterable[Row]) -> list[Row]:
    """The same branches in rows of their own, the query repeated: what shared prefixes save."""
    return [Row(row.query, (branch,)) for row in rows for branch in row.branches]


def pack(rows: Sequence[Row], *, align: bool = True) -> Batch:
    """Pad rows to a rectangle: queries left of `split`, branches right of it; unaligned they follow their query."""
    split = max(len(row.query) for row in rows) if align else 0
    width = max((split or len(row.query)) + row.tokens - len(row.query) for row in rows)
    shape = (len(rows), width)
    ids, positions, segments, kinds = (np.zeros(shape, np.int64) for _ in range(4))
    labels = np.full(shape, IGNORE, np.int64)
    for index, row in enumerate(rows):
        length = len(row.query)
        ids[index, :length], positions[index, :length], segments[index, :length] = row.query, np.arange(length), QUERY
        start = split or length
        for number, branch in enumerate(row.branches):
            columns = slice(start, start + len(branch.ids))
            ids[index, columns], labels[index, columns], kinds[index, columns] = branch
            positions[index, columns] = length + np.arange(len(branch.ids))
            segments[index, columns] = QUERY + 1 + number
            start = columns.stop
    return Batch(ids, positions, segments, labels, kinds, split)


def visible(segments: Ints, attention: str, *, new: int | None = None) -> Bools:
    """Who attends to whom: [rows, new, columns], true where the last `new` columns (default all) see a column.

    Columns see earlier columns of their own segment and the whole query; with `prefix` attention the query's columns
    also see later ones of the query. Padding sees only itself, so that no row of the mask is empty.
    """
    width = segments.shape[1]
    order = np.arange(width)
    rows = slice(width - (width if new is None else new), width)
    query, seer = segments[:, None, :] == QUERY, segments[:, rows, None]
    earlier = order[None, None, :] <= order[None, rows, None]
    same = (seer == segments[:, None, :]) & (seer != PADDING)
    both_ways = query & (seer == QUERY) if attention == "prefix" else np.zeros_like(same)
    itself = np.broadcast_to(order[None, None, :] == order[None, rows, None], same.shape)
    seen: Bools = (same & earlier) | (query & (seer > QUERY)) | both_ways | itself
    return seen


def _softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - np.max(logits))
    return np.asarray(shifted / shifted.sum(), np.float64)
