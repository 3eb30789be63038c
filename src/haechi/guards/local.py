"""Guard models through transformers in this process: generating ones for `haechi.guards.open`, and any classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from haechi.config import Config
from haechi.errors import ConfigError, ModelError
from haechi.guards import EMPTY, settings
from haechi.guards.open import Asked
from haechi.llm import Completion, Step
from haechi.schema import Conversation, Verdict
from haechi.store import fingerprint

_TOP = 20
_HARMLESS = {"safe", "benign", "neutral", "normal", "clean", "none", "ok", "label_0"}
"""Label names that mean nothing is wrong, beside those that begin with `non` or `not`."""


class LocalWriter:
    """A causal LM that writes a few greedy tokens."""

    def __init__(self, model: str, batch: int, device: str | None) -> None:
        """Raises ModelError for a model that cannot be loaded."""
        self._name, self._batch = model, batch
        self._tokenizer, self._model, self._device = _loaded(AutoModelForCausalLM, model, device)
        # Rows of a batch end together, where the next token is written.
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.identity = fingerprint("local", model, getattr(self._model.config, "_commit_hash", None))

    def write(self, asked: Sequence[Asked], tokens: int) -> list[Completion]:
        """See `Writer.write`."""
        rendered = [self._rendered(one) for one in asked]
        done = {index: Completion(None, error=one) for index, one in enumerate(rendered) if isinstance(one, str)}
        ids = {index: one for index, one in enumerate(rendered) if not isinstance(one, str)}
        order = sorted(ids, key=lambda index: len(ids[index]))
        for start in range(0, len(order), self._batch):
            part = order[start : start + self._batch]
            done |= zip(part, self._written([ids[index] for index in part], tokens), strict=True)
        return [done[index] for index in range(len(asked))]

    def _rendered(self, asked: Asked) -> list[int] | str:
        """Input ids, or what is wrong."""
        if asked.prompt:
            return list(self._tokenizer(asked.prompt).input_ids)
        if not self._tokenizer.chat_template:
            raise ModelError(f"{self._name} has no chat template to put a query into")
        text = self._tokenizer.apply_chat_template(
            list(asked.messages), tokenize=False, add_generation_prompt=asked.open, **asked.template
        )
        # A template that expects another form of content renders nothing, without a word.
        if not all(part.strip() in text for turn in asked.messages for part in _texts(turn["content"])):
            return f"the chat template of {self._name} lost the query"
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    @torch.inference_mode()
    def _written(self, ids: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
        inputs = self._tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self._device)
        output = self._model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        fresh = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        tops = [torch.log_softmax(logits.float(), -1).topk(min(_TOP, logits.shape[-1])) for logits in output.logits]
        ends = self._model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        completions = []
        for row, written in enumerate(fresh):
            kept = written[: next((at for at, id in enumerate(written) if id in ends), len(written))]
            steps = tuple(
                Step(self._tokenizer.decode([id]), self._named(top.indices[row], top.values[row]))
                for id, top in zip(kept, tops, strict=False)
            )
            text = self._tokenizer.decode(kept, skip_special_tokens=False)
            completions.append(
                Completion(text, steps) if text.strip() else Completion(None, error=f"{self._name} wrote nothing")
            )
        return completions

    def _named(self, ids: torch.Tensor, logprobs: torch.Tensor) -> dict[str, float]:
        return {self._tokenizer.decode([id]): value for id, value in zip(ids.tolist(), logprobs.tolist(), strict=True)}


class ClassifierConfig(Config):
    """`{hf-classifier: {model: NAME, ...}}`."""

    model: str
    """Hugging Face name or folder of a text-classification model."""
    unsafe: tuple[str, ...] | None = None
    """Labels that mean harm; None: all but those whose names say otherwise (`safe`, `BENIGN`, `LABEL_0`, `non-...`)."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """A score at or above it is unsafe."""
    length: int | None = Field(default=None, gt=8)
    """Most tokens at once; a longer query is judged in overlapping windows, the worst counts. None: the model's own."""
    batch: int = Field(default=32, gt=0)
    """Windows run at once."""
    device: str | None = None
    """`cpu`, `cuda`, ...; None: a GPU when there is one."""
    name: str | None = None
    """What tables call it; default `hf-classifier:MODEL`."""


class ClassifierGuard:
    """Any text-classification model: Prompt Guard, toxicity models. The score is the probability of the harmful labels
    together, of the likeliest one where the model's labels are independent of each other."""

    def __init__(self, config: ClassifierConfig) -> None:
        """Raises ConfigError for labels the model lacks, or when none of them means harm."""
        self._tokenizer, self._model, self._device = _loaded(
            AutoModelForSequenceClassification, config.model, config.device
        )
        self.name = config.name or f"hf-classifier:{config.model}"
        labels: dict[int, str] = self._model.config.id2label
        wanted = config.unsafe or tuple(name for name in labels.values() if not _harmless(name))
        if unknown := set(wanted) - set(labels.values()):
            raise ConfigError(f"{config.model} has no label {unknown.pop()!r}; known: {', '.join(labels.values())}")
        if not wanted or (len(wanted) == len(labels) > 1 and not self._independent()):
            raise ConfigError(
                f"name the labels of {config.model} that mean harm: unsafe: [...] of {', '.join(labels.values())}"
            )
        self._labels = {id: name for id, name in labels.items() if name in wanted}
        self._threshold, self._batch = config.threshold, config.batch
        self._length = config.length or min(self._tokenizer.model_max_length, self._positions())
        self.identity = fingerprint("hf-classifier", config.model, sorted(wanted), config.threshold, self._length)

    def _independent(self) -> bool:
        shape = self._model.config
        return bool(shape.problem_type == "multi_label_classification" or shape.num_labels == 1)

    def _positions(self) -> int:
        # RoBERTa's positions begin after its padding id.
        return int(getattr(self._model.config, "max_position_embeddings", 512)) - 2

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        queries = [item.query for item in Conversation.each(conversations)]
        windows = [(index, ids) for index, query in enumerate(queries) if query.strip() for ids in self._windows(query)]
        worst: dict[int, dict[str, float]] = {}
        for (index, _), scores in zip(windows, self._scores([ids for _, ids in windows]), strict=True):
            if index not in worst or self._total(scores) > self._total(worst[index]):
                worst[index] = scores
        return [self._verdict(worst[index]) if index in worst else EMPTY for index in range(len(queries))]

    def _windows(self, query: str) -> list[list[int]]:
        encoded = self._tokenizer(
            query, truncation=True, max_length=self._length, stride=self._length // 8, return_overflowing_tokens=True
        )
        windows: list[list[int]] = encoded.input_ids
        return windows

    @torch.inference_mode()
    def _scores(self, windows: Sequence[list[int]]) -> Iterator[dict[str, float]]:
        for start in range(0, len(windows), self._batch):
            inputs = self._tokenizer.pad({"input_ids": list(windows[start : start + self._batch])}, return_tensors="pt")
            logits = self._model(**inputs.to(self._device)).logits.float()
            shares = logits.sigmoid() if self._independent() else logits.softmax(-1)
            for row in shares.tolist():
                yield {name: row[id] for id, name in self._labels.items()}

    def _total(self, scores: Mapping[str, float]) -> float:
        return max(scores.values()) if self._independent() else min(1.0, sum(scores.values()))

    def _verdict(self, scores: dict[str, float]) -> Verdict:
        score = self._total(scores)
        unsafe = score >= self._threshold
        return Verdict(unsafe=unsafe, score=score, category=max(scores, key=scores.__getitem__) if unsafe else None)


def classifier(spec: str | Mapping[str, Any] | None) -> ClassifierGuard:
    """`hf-classifier:MODEL` or `{hf-classifier: {model: MODEL, ...}}`."""
    if spec is None:
        raise ConfigError("name the model: hf-classifier:MODEL")
    return ClassifierGuard(settings(ClassifierConfig, spec, "hf-classifier"))


def _harmless(name: str) -> bool:
    return name.lower() in _HARMLESS or name.lower().startswith(("non", "not"))


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _loaded(kind: Any, model: str, device: str | None) -> tuple[Any, Any, torch.device]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        tokenizer = AutoTokenizer.from_pretrained(model)
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        network, told = kind.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot load the guard model {model!r}: {reason}") from None
    if absent := sorted(told["missing_keys"]):
        raise ModelError(f"{model!r} is another kind of model: it has no weights for {absent[0]}")
    return tokenizer, network.to(place).eval(), place
