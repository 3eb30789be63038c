"""Moderation services, each asked in its own protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from haechi.guards import EMPTY, settings
from haechi.remote import Access, Endpoint, Reply, key_from
from haechi.schema import Conversation, Verdict
from haechi.store import fingerprint

_UNREADABLE = "the reply lacks what the documentation promises"


class OpenAIModerationConfig(Access):
    """`{openai-moderation: {...}}`."""

    model: str = "omni-moderation-latest"
    """Which moderation model."""
    url: str = "https://api.openai.com/v1"
    """Base address."""
    key: str = "OPENAI_API_KEY"
    """Environment variable of the key."""


class PerspectiveConfig(Access):
    """`{perspective: {...}}`. The service is to close at the end of 2026: freeze its verdicts while it answers
    (`haechi check --guard perspective --input rows.jsonl --output frozen.jsonl`) and replay them as `frozen:FILE`."""

    url: str = "https://commentanalyzer.googleapis.com/v1alpha1"
    """Base address."""
    key: str = "PERSPECTIVE_API_KEY"
    """Environment variable of the key."""
    attribute: str = "TOXICITY"
    """What is scored."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """A score at or above it is unsafe."""
    concurrency: int = Field(default=1, gt=0)
    """The free quota is one request a second."""


class AzureConfig(Access):
    """`{azure-content-safety: {url: https://NAME.cognitiveservices.azure.com}}`."""

    url: str
    """The resource's address."""
    key: str = "AZURE_CONTENT_SAFETY_KEY"
    """Environment variable of the key."""
    version: str = "2024-09-01"
    """API version."""
    severity: int = Field(default=2, ge=1, le=7)
    """Unsafe from this severity (0 to 7) in any category; the service's own default blocks from 2."""


class _Service:
    """What the services share: one request per query, one endpoint."""

    name: str
    path: str
    query: dict[str, str] | None = None

    def __init__(self, access: Access, url: str, headers: Mapping[str, str]) -> None:
        self.endpoint = Endpoint(url, access, headers)

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        queries = [item.query for item in Conversation.each(conversations)]
        replies = iter(self.endpoint.ask(self.path, [self.body(text) for text in queries if text.strip()], self.query))
        return [self._verdict(next(replies)) if text.strip() else EMPTY for text in queries]

    def _verdict(self, reply: Reply) -> Verdict:
        if reply.body is None:
            return Verdict(error=reply.error)
        try:
            return self.read(reply.body)
        except (KeyError, IndexError, TypeError, ValueError):
            return Verdict(error=f"{self.name}: {_UNREADABLE}")

    def body(self, text: str) -> dict[str, Any]:
        """The request for one query."""
        raise NotImplementedError

    def read(self, body: dict[str, Any]) -> Verdict:
        """The verdict in a reply; any KeyError, IndexError, TypeError or ValueError means it is not there."""
        raise NotImplementedError


class OpenAIModeration(_Service):
    """OpenAI's moderation endpoint: flagged or not by its own thresholds, the score its highest category score."""

    path = "/moderations"

    def __init__(self, config: OpenAIModerationConfig) -> None:
        key = key_from(config.key, "openai-moderation")
        super().__init__(config, config.url, {"Authorization": f"Bearer {key}"})
        self.name = "openai-moderation"
        self._model = config.model
        self.identity = fingerprint(self.name, self.endpoint.url, config.model)

    def body(self, text: str) -> dict[str, Any]:
        """See `_Service.body`."""
        return {"model": self._model, "input": text}

    def read(self, body: dict[str, Any]) -> Verdict:
        """See `_Service.read`."""
        result = body["results"][0]
        scores = {str(name): float(score) for name, score in result["category_scores"].items() if score is not None}
        flagged, likeliest = bool(result["flagged"]), max(scores, key=scores.__getitem__)
        return Verdict(
            unsafe=flagged, score=scores[likeliest], category=likeliest if flagged else None, categories=scores
        )


class Perspective(_Service):
    """Google's Perspective API: the summary score of one attribute."""

    path = "/comments:analyze"

    def __init__(self, config: PerspectiveConfig) -> None:
        self.query = {"key": key_from(config.key, "perspective")}
        super().__init__(config, config.url, {})
        self.name = "perspective"
        self._attribute, self._threshold = config.attribute, config.threshold
        self.identity = fingerprint(self.name, self.endpoint.url, config.attribute, config.threshold)

    def body(self, text: str) -> dict[str, Any]:
        """See `_Service.body`."""
        return {"comment": {"text": text}, "requestedAttributes": {self._attribute: {}}, "doNotStore": True}

    def read(self, body: dict[str, Any]) -> Verdict:
        """See `_Service.read`."""
        score = float(body["attributeScores"][self._attribute]["summaryScore"]["value"])
        return Verdict(unsafe=score >= self._threshold, score=score)


class AzureContentSafety(_Service):
    """Azure AI Content Safety: four categories by severity 0 to 7; the score is the highest one's seventh."""

    path = "/contentsafety/text:analyze"

    def __init__(self, config: AzureConfig) -> None:
        key = key_from(config.key, "azure-content-safety")
        super().__init__(config, config.url, {"Ocp-Apim-Subscription-Key": key})
        self.name = "azure-content-safety"
        self.query = {"api-version": config.version}
        self._severity = config.severity
        self.identity = fingerprint(self.name, self.endpoint.url, config.version, config.severity)

    def body(self, text: str) -> dict[str, Any]:
        """See `_Service.body`."""
        return {"text": text, "outputType": "EightSeverityLevels"}

    def read(self, body: dict[str, Any]) -> Verdict:
        """See `_Service.read`."""
        severities = {str(one["category"]): int(one["severity"]) for one in body["categoriesAnalysis"]}
        worst = max(severities, key=severities.__getitem__)
        unsafe = severities[worst] >= self._severity
        return Verdict(
            unsafe=unsafe,
            score=severities[worst] / 7,
            category=worst if unsafe else None,
            categories={name: severity / 7 for name, severity in severities.items()},
        )


def openai_moderation(spec: str | Mapping[str, Any] | None) -> OpenAIModeration:
    """`openai-moderation`, `openai-moderation:MODEL` or `{openai-moderation: {...}}`."""
    return OpenAIModeration(settings(OpenAIModerationConfig, spec, "openai-moderation"))


def perspective(spec: str | Mapping[str, Any] | None) -> Perspective:
    """`perspective`, `perspective:ATTRIBUTE` or `{perspective: {...}}`."""
    return Perspective(settings(PerspectiveConfig, spec, "perspective", "attribute"))


def azure_content_safety(spec: str | Mapping[str, Any] | None) -> AzureContentSafety:
    """`azure-content-safety:URL` or `{azure-content-safety: {url: URL, ...}}`."""
    return AzureContentSafety(settings(AzureConfig, spec, "azure-content-safety", "url"))
