"""JSON over HTTP for guards that live elsewhere: retries with back-off, a concurrency limit, a disk cache, counts."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from haechi.config import Config
from haechi.errors import ConfigError, MissingExtra
from haechi.store import dumps, fingerprint

_PASSING = {408, 409, 425, 429}
"""Client errors that a later try may not meet; so may any 5xx."""
_HOPELESS = {401, 403, 404}
"""Wrong key, wrong address or unknown model: no request of the batch will fare better."""
_LONGEST_WAIT = 60.0


class Access(Config):
    """How an endpoint is asked; a part of every remote guard's settings."""

    concurrency: int = Field(default=8, gt=0)
    """Most requests under way at once."""
    retries: int = Field(default=5, ge=0)
    """Tries after a first that met 429, 5xx, a broken connection, a timeout or a reply that is not JSON."""
    backoff: float = Field(default=0.5, ge=0)
    """Seconds before the first retry; each further one waits twice as long, with jitter, or as the server asks."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one try."""
    cache: Path | None = None
    """File of replies, kept by address and request; None: the environment variable HAECHI_CACHE, else none are kept."""
    dollars_in: float = Field(default=0.0, ge=0)
    """Price of a million input tokens."""
    dollars_out: float = Field(default=0.0, ge=0)
    """Price of a million output tokens."""


class Reply(NamedTuple):
    """What came of one request."""

    body: dict[str, Any] | None
    """The parsed reply; None when there is none."""
    error: str | None = None
    """Why there is none, in one line."""
    status: int | None = None
    """HTTP status of an error reply."""
    cached: bool = False
    """Whether it came from the cache and cost nothing."""


def percentile(seconds: Sequence[float], share: float) -> float | None:
    """That share of the times is no longer, in milliseconds (nearest rank); None without any."""
    times = sorted(seconds)
    return times[min(len(times) - 1, int(share * len(times)))] * 1000 if times else None


@dataclass
class Usage:
    """What a guard has cost since it was loaded, and before where that was kept."""

    requests: int = 0
    """Answered over the network."""
    cached: int = 0
    """Answered from the cache."""
    retries: int = 0
    """Tries beyond the first."""
    failures: int = 0
    """Requests without an answer."""
    input_tokens: int = 0
    """As the endpoint counts them; cached replies are free."""
    output_tokens: int = 0
    """Likewise."""
    seconds: list[float] = field(default_factory=list)
    """How long each answered request took, its retries included."""

    def take_up(self, before: Mapping[str, Any]) -> None:
        """Count on from an earlier process: `before` is its usage as a mapping."""
        for name, value in before.items():
            setattr(self, name, getattr(self, name) + value)

    def summary(self, url: str, access: Access) -> dict[str, float | int | str | None]:
        """Whose it is, counts, cost in dollars, and latency percentiles in milliseconds."""
        p50, p99 = (percentile(self.seconds, share) for share in (0.5, 0.99))
        return {
            "url": url,
            "requests": self.requests,
            "cached": self.cached,
            "retries": self.retries,
            "failures": self.failures,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "dollars": (self.input_tokens * access.dollars_in + self.output_tokens * access.dollars_out) / 1e6,
            "p50_ms": p50,
            "p99_ms": p99,
        }


class Cache:
    """Replies by request in one SQLite file; safe for threads and for several processes."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when the file cannot be used."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, check_same_thread=False, timeout=30)
            self._base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot keep replies in {path}: {error}") from None
        weakref.finalize(self, self._base.close)
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, Any] | None:
        """A kept reply."""
        with self._lock:
            row = self._base.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def put(self, key: str, reply: Mapping[str, Any]) -> None:
        """Keep a reply at once, so that a kill loses none."""
        with self._lock, self._base:
            self._base.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, dumps(reply)))


class _Passing(Exception):
    """A failure that the next try may not meet."""

    def __init__(self, reply: Reply, after: float | None = None) -> None:
        super().__init__(reply.error)
        self.reply, self.after = reply, after


class Endpoint:
    """One address that takes JSON and gives JSON."""

    def __init__(self, url: str, access: Access, headers: Mapping[str, str] | None = None) -> None:
        """`headers` and anything in them stay out of the cache's keys. Raises MissingExtra without httpx2."""
        try:
            import httpx2
            import tenacity  # noqa: F401
        except ImportError:
            raise MissingExtra("remote", "a guard behind an HTTP endpoint") from None
        self.url, self.access, self.usage = url.rstrip("/"), access, Usage()
        self._client = httpx2.Client(
            headers=dict(headers or {}),
            timeout=access.timeout,
            limits=httpx2.Limits(max_connections=access.concurrency),
        )
        weakref.finalize(self, self._client.close)
        path = access.cache or os.environ.get("HAECHI_CACHE")
        self._cache = Cache(Path(path)) if path else None
        self._lock = threading.Lock()
        self._reached = False
        self.closed: Reply | None = None
        """The failure after which the rest of a batch was not tried: wrong address, key or model."""
        self.decided = 0
        """Requests that met a reply, or were refused for what is in them; a busy or broken endpoint decides nothing."""

    def ask(
        self, path: str, bodies: Sequence[Mapping[str, Any]], query: Mapping[str, str] | None = None
    ) -> list[Reply]:
        """POST every body to `path`; replies in the same order, failures among them. `query` stays out of the cache's
        keys, as an API key may be in it. When the endpoint cannot be reached, refuses the key or does not know the
        model, the rest of the batch is not tried."""
        self.closed = None
        with ThreadPoolExecutor(self.access.concurrency) as pool:
            return list(pool.map(lambda body: self._ask(path, body, query), bodies))

    def _ask(self, path: str, body: Mapping[str, Any], query: Mapping[str, str] | None) -> Reply:
        key = fingerprint(self.url, path, body)
        if self._cache and (kept := self._cache.get(key)) is not None:
            with self._lock:
                self.usage.cached += 1
                self.decided += 1
            return Reply(kept, cached=True)
        if self.closed:
            return self.closed
        started = time.monotonic()
        reply = self._tried(path, body, query)
        with self._lock:
            self.decided += reply.body is not None or _refused(reply)
            if reply.body is None:
                self.usage.failures += 1
                if not self._reached or reply.status in _HOPELESS:
                    self.closed = reply
            else:
                self.usage.requests += 1
                self.usage.seconds.append(time.monotonic() - started)
        if self._cache and reply.body is not None:
            self._cache.put(key, reply.body)
        return reply

    def count_tokens(self, read: int, written: int) -> None:
        """Add what a reply that came over the network says it cost."""
        with self._lock:
            self.usage.input_tokens += read
            self.usage.output_tokens += written

    def _tried(self, path: str, body: Mapping[str, Any], query: Mapping[str, str] | None) -> Reply:
        import tenacity

        doubling = tenacity.wait_random_exponential(multiplier=self.access.backoff, max=_LONGEST_WAIT)

        def wait(state: tenacity.RetryCallState) -> float:
            failure = state.outcome.exception() if state.outcome else None
            asked = failure.after if isinstance(failure, _Passing) else None
            return min(asked, _LONGEST_WAIT) if asked is not None else doubling(state)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(1 + self.access.retries),
            wait=wait,
            retry=tenacity.retry_if_exception_type(_Passing),
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        with self._lock:
                            self.usage.retries += 1
                    return self._post(path, body, query)
        except _Passing as failure:
            return failure.reply
        raise AssertionError("a retry loop ends by a reply or a failure")

    def _post(self, path: str, body: Mapping[str, Any], query: Mapping[str, str] | None) -> Reply:
        """One try. Raises _Passing for what a retry may mend."""
        import httpx2

        try:
            response = self._client.post(self.url + path, json=body, params=query)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            if isinstance(error, httpx2.ReadTimeout):
                self._reached = True
                raise _Passing(Reply(None, f"{self.url} gave no reply within {self.access.timeout:g} s")) from None
            reply = Reply(None, f"cannot reach {self.url}: {str(error) or type(error).__name__}")
            # An address that has never answered is more likely wrong than busy.
            if not self._reached:
                return reply
            raise _Passing(reply) from None
        self._reached = True
        if response.status_code >= 400:
            reply = Reply(None, f"{self.url} said {response.status_code}: {_told(response.text)}", response.status_code)
            if response.status_code in _PASSING or response.status_code >= 500:
                raise _Passing(reply, _seconds(response.headers.get("retry-after")))
            return reply
        try:
            parsed = response.json()
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise _Passing(Reply(None, f"{self.url} gave a reply that is not a JSON object"))
        return Reply(parsed)


def key_from(variable: str, what: str) -> str:
    """An API key from the environment. Raises ConfigError with the command that sets it."""
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"{what} needs a key: export {variable}=...")
    return key


def _refused(reply: Reply) -> bool:
    status = reply.status
    return status is not None and 400 <= status < 500 and status not in _PASSING | _HOPELESS


def _told(text: str) -> str:
    """The message inside an error reply, in one line."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text
    return " ".join(str(message).split())[:200]


def _seconds(header: str | None) -> float | None:
    """A Retry-After header that counts seconds; dates are left to the back-off."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None
