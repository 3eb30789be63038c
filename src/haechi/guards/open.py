"""Open-weight guards, each asked and read as its authors document: through transformers in this process, or behind an
OpenAI-compatible server (vLLM and the like) that holds it. docs/guards.md lists what each needs, and its traps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import Field

from haechi.config import Config, parse, read_yaml
from haechi.errors import ConfigError, MissingExtra
from haechi.guards import EMPTY, settings
from haechi.llm import Chat, ChatModel, Completion, share
from haechi.schema import Conversation, Verdict
from haechi.store import fingerprint
from haechi.taxonomy import load_taxonomy


class Asked(NamedTuple):
    """What a guard model is given: chat messages for its template, or a raw prompt."""

    messages: tuple[dict[str, Any], ...] = ()
    """Turns; empty when there is a raw prompt."""
    template: Mapping[str, Any] = {}
    """Arguments of the chat template."""
    prompt: str = ""
    """A raw prompt, special tokens in it included; the tokenizer adds its beginning token."""
    open: bool = True
    """Whether the template is to open the model's turn."""


class Writer(Protocol):
    """What writes a guard model's words."""

    identity: str
    """Which model, where."""

    def write(self, asked: Sequence[Asked], tokens: int) -> list[Completion]:
        """One completion per prompt, at most `tokens` long, special tokens kept."""


class OpenConfig(Config):
    """`{FAMILY: {model: ..., ...}}`."""

    model: str | None = None
    """Hugging Face name or folder, or the name at the server; default the family's best known one."""
    url: str | None = None
    """Base address of an OpenAI-compatible server, up to `/v1`; None: load it in this process."""
    server: dict[str, Any] = Field(default_factory=dict)
    """How the server is asked; see `haechi.llm.ChatModel`."""
    name: str | None = None
    """What tables call it; default the specification."""
    reading: str | None = None
    """qwen3guard: `strict` (controversial is unsafe) or `loose`; aegis: `defensive` (needs caution is unsafe) or
    `permissive`."""
    version: str | None = None
    """llama-guard `1` to `4`, granite-guardian `3.0` to `4.1`; None: told from the model's name."""
    taxonomy: Path | None = None
    """Policy for families that take one (`llama-guard-ic`, `gpt-oss-safeguard`); default the built-in one."""
    prompt: Path | None = None
    """aegis: a file with the categories' full text, as in the model card; None: their names alone."""
    batch: int = Field(default=8, gt=0)
    """Queries run at once in this process."""
    device: str | None = None
    """In this process: `cpu`, `cuda`, ...; None: a GPU when there is one."""


class Reading(NamedTuple):
    """What a text says."""

    unsafe: bool
    """The verdict."""
    category: str | None = None
    """The model's own name or code for the harm."""


class Family(NamedTuple):
    """How the models of one family are asked and read."""

    model: str
    """The best known one."""
    ask: Callable[[OpenConfig, str], list[Asked]]
    """Prompts for one query; several where a model judges one policy at a time, and the worst counts."""
    read: Callable[[OpenConfig, str], Reading | None]
    """The verdict in a written text; None when there is none."""
    tokens: int = 16
    """Most tokens it may need."""
    after: str = ""
    """What stands before the deciding token."""
    yes: Callable[[OpenConfig], Sequence[str]] = lambda config: ["unsafe"]
    """Words that mean unsafe there."""
    no: Callable[[OpenConfig], Sequence[str]] = lambda config: ["safe"]
    """Words that mean safe there."""
    readings: tuple[str, ...] = ()
    """Values of `reading`, the default first."""


class OpenGuard:
    """One open-weight guard. The score is the share of the unsafe words where the model decides."""

    def __init__(self, kind: str, family: Family, config: OpenConfig) -> None:
        reading = config.reading or next(iter(family.readings), None)
        if reading is not None and reading not in family.readings:
            known = f"one of {', '.join(family.readings)}" if family.readings else "left out"
            raise ConfigError(f"the reading of {kind} is {known}, not {reading!r}")
        self._family, self._config = family, config.model_copy(update={"reading": reading})
        model = config.model or family.model
        self.name = config.name or (f"{kind}:{config.model}" if config.model else kind)
        if config.reading and not config.name:
            self.name += f" ({config.reading})"
        self._writer: Writer = _Served(model, config) if config.url else _local(model, config)
        if isinstance(self._writer, _Served):
            self.endpoint = self._writer.chat.endpoint
        self.identity = fingerprint(
            "open",
            kind,
            self._writer.identity,
            self._config.model_dump(mode="json", exclude={"server", "batch", "device"}),
        )

    def check(self, conversations: Sequence[Conversation | str]) -> list[Verdict]:
        """See `Guard.check`."""
        queries = [item.query for item in Conversation.each(conversations)]
        asked = [self._family.ask(self._config, query) if query.strip() else [] for query in queries]
        written = iter(self._writer.write([prompt for prompts in asked for prompt in prompts], self._family.tokens))
        return [self._worst([self._verdict(next(written)) for _ in prompts]) for prompts in asked]

    def _verdict(self, completion: Completion) -> Verdict:
        if completion.text is None:
            return Verdict(error=completion.error)
        reading = self._family.read(self._config, completion.text)
        if reading is None:
            return Verdict(error=f"{self.name} wrote no verdict: {' '.join(completion.text.split())[:80]!r}")
        family = self._family
        score = share(completion, family.after, family.yes(self._config), family.no(self._config))
        return Verdict(unsafe=reading.unsafe, score=score, category=reading.category if reading.unsafe else None)

    def _worst(self, verdicts: Sequence[Verdict]) -> Verdict:
        """Unsafe when one is, without an answer when one is and none is unsafe."""
        if not verdicts:
            return EMPTY
        rank = {True: 2, None: 1, False: 0}
        return max(verdicts, key=lambda verdict: (rank[verdict.unsafe], verdict.score or 0.0))


_KEEP_SPECIAL = {"skip_special_tokens": False}
"""Some verdicts are special tokens, which vLLM otherwise leaves out of the text; servers without it refuse the name."""


class _Served:
    """A model behind an OpenAI-compatible server, which applies the model's chat template itself."""

    def __init__(self, model: str, config: OpenConfig) -> None:
        settings = parse(ChatModel, {**config.server, "model": model, "url": config.url}, "server")
        self.chat = Chat(settings)
        self.identity = fingerprint(self.chat.served)

    def write(self, asked: Sequence[Asked], tokens: int) -> list[Completion]:
        """See `Writer.write`."""
        if asked and asked[0].prompt:
            return self.chat.go_on([one.prompt for one in asked], tokens, logprobs=True, **_KEEP_SPECIAL)
        if not asked:
            return []
        # The template's arguments are equal for all prompts but ShieldGemma's, which come in turns.
        done: dict[int, Completion] = {}
        groups: dict[str, list[int]] = {}
        for index, one in enumerate(asked):
            groups.setdefault(repr((one.template, one.open)), []).append(index)
        for indices in groups.values():
            first = asked[indices[0]]
            more: dict[str, Any] = {**_KEEP_SPECIAL}
            if first.template:
                more["chat_template_kwargs"] = dict(first.template)
            if not first.open:
                more["add_generation_prompt"] = False
            batch = [asked[index].messages for index in indices]
            done |= zip(indices, self.chat.complete(batch, tokens, logprobs=True, **more), strict=True)
        return [done[index] for index in range(len(asked))]


def _local(model: str, config: OpenConfig) -> Writer:
    try:
        from haechi.guards.local import LocalWriter
    except ImportError:
        raise MissingExtra("train", f"running {model} in this process") from None
    return LocalWriter(model, config.batch, config.device)


@cache
def _prompts() -> dict[str, Any]:
    with resources.as_file(resources.files("haechi") / "data" / "prompts" / "open.yaml") as path:
        prompts: dict[str, Any] = read_yaml(path)
    return prompts


def _user(query: str) -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": query},)


def _plain(config: OpenConfig, query: str) -> list[Asked]:
    return [Asked(_user(query))]


def _first_line(config: OpenConfig, text: str) -> Reading | None:
    """`safe`, or `unsafe` and codes on the next line."""
    lines = text.strip().splitlines()
    verdict = lines[0].strip().lower() if lines else ""
    if verdict not in ("safe", "unsafe"):
        return None
    codes = lines[1].split(",") if len(lines) > 1 else []
    return Reading(verdict == "unsafe", codes[0].strip() or None if codes else None)


def _version(config: OpenConfig, default: str) -> str:
    """As the configuration says, else as the model's name does, else that of the family's best known model."""
    if config.version:
        return config.version
    if re.search("guard-7b", config.model or "", re.I):
        return "1"
    found = (re.search(r"guard(?:ian)?-(\d(?:\.\d)?)-", name, re.I) for name in (config.model or "", default))
    return next(match[1] for match in found if match)


def _llama_guard(config: OpenConfig, query: str) -> list[Asked]:
    # The templates of 3-1B and of 4 take typed parts; given a plain text they judge an empty conversation.
    typed = _version(config, _LLAMA_GUARD).startswith("4") or "3-1b" in (config.model or _LLAMA_GUARD).lower()
    content: Any = [{"type": "text", "text": query}] if typed else query
    return [Asked(({"role": "user", "content": content},))]


def _llama_guard_prompt(version: str, categories: str, query: str) -> str:
    whom = "User" if version == "1" else "ONLY THE LAST User message"
    body = _prompts()["llama_guard"].format(categories=categories, query=query, whom=whom)
    if version in ("1", "2"):
        return f"[INST] {body} [/INST]"
    start, end, turn = (
        ("<|header_start|>", "<|header_end|>", "<|eot|>")
        if version == "4"
        else ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
    return f"{start}user{end}\n\n{body} {turn}{start}assistant{end}\n\n"


def _llama_guard_in_context(config: OpenConfig, query: str) -> list[Asked]:
    version = _version(config, _LLAMA_GUARD)
    letter = "O" if version == "1" else "S"
    lines = (
        f"{letter}{number}: {next(iter(one.name.values()))}.\n{next(iter(one.definition.values()))}"
        for number, one in enumerate(load_taxonomy(config.taxonomy).categories, 1)
    )
    return [Asked(prompt=_llama_guard_prompt(version, "\n".join(lines), query))]


def _our_code(config: OpenConfig, text: str) -> Reading | None:
    """A first line as Llama Guard writes it, its number that of our category."""
    reading = _first_line(config, text)
    codes = load_taxonomy(config.taxonomy).codes
    number = int(found[0]) if reading and (found := re.search(r"\d+", reading.category or "")) else 0
    return reading._replace(category=codes[number - 1] if 0 < number <= len(codes) else None) if reading else None


def _aegis(config: OpenConfig, query: str) -> list[Asked]:
    if config.prompt is not None:
        try:
            categories = config.prompt.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {config.prompt}: {error}") from None
    else:
        categories = "\n".join(f"O{number}: {name}." for number, name in enumerate(_prompts()["aegis"], 1))
    return [Asked(prompt=_llama_guard_prompt("1", categories, query))]


def _aegis_verdict(config: OpenConfig, text: str) -> Reading | None:
    reading = _first_line(config, text)
    cautious = reading is None and text.strip().lower().startswith("needs caution")
    if cautious or (reading and reading.category == "O13"):
        return Reading(config.reading == "defensive", "O13")
    return reading


def _wildguard(config: OpenConfig, query: str) -> list[Asked]:
    return [Asked(prompt=_prompts()["wildguard"].format(query=query))]


def _wildguard_verdict(config: OpenConfig, text: str) -> Reading | None:
    found = re.match(r"\s*harmful request:\s*(yes|no)\b", text, re.I)
    return Reading(found[1].lower() == "yes") if found else None


def _shieldgemma(config: OpenConfig, query: str) -> list[Asked]:
    return [Asked(_user(query), {"guideline": guideline}) for guideline in _prompts()["shieldgemma"]]


def _granite(config: OpenConfig, query: str) -> list[Asked]:
    version = _version(config, _GRANITE)
    if version.startswith("4"):
        return [Asked((*_user(query), {"role": "user", "content": _prompts()["granite_4"]}))]
    named = "criteria_id" if version == "3.3" else "risk_name"
    return [Asked(_user(query), {"guardian_config": {named: "harm"}})]


def _yes_or_no(config: OpenConfig, text: str) -> Reading | None:
    """`<score> yes </score>` after any thought, else a bare `Yes`."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.S)
    found = re.search(r"<score>\s*(yes|no)\s*</score>", text, re.I) or re.match(r"\s*(yes|no)\b", text, re.I)
    return Reading(found[1].lower() == "yes") if found else None


def _qwen(config: OpenConfig, text: str) -> Reading | None:
    found = re.search(r"Safety:\s*(Safe|Unsafe|Controversial)", text)
    if found is None:
        return None
    named = re.search(r"Categories:\s*([^,\n]+)", text)
    unsafe = found[1] == "Unsafe" or (found[1] == "Controversial" and config.reading == "strict")
    return Reading(unsafe, named[1].strip() if named and named[1].strip() != "None" else None)


def _gpt_oss(config: OpenConfig, query: str) -> list[Asked]:
    kinds = "\n".join(f"- {next(iter(one.definition.values()))}" for one in load_taxonomy(config.taxonomy).categories)
    policy = _prompts()["gpt_oss"].format(categories=kinds)
    return [Asked(({"role": "system", "content": policy}, *_user(query)))]


def _gpt_oss_verdict(config: OpenConfig, text: str) -> Reading | None:
    """The digit in the final channel; where a server has dropped the channel's marks, the text is the digit alone."""
    final = text.rsplit("<|channel|>final<|message|>", 1)
    found = re.fullmatch(r"\s*([01])\s*(?:<\|return\|>|<\|end\|>)?\s*", final[-1])
    return Reading(found[1] == "1") if found else None


def _kanana(config: OpenConfig, query: str) -> list[Asked]:
    # The 8b model judges a pair; for a query alone its card passes an empty answer. The others take the query only.
    answer = () if re.search("siren|prompt", config.model or "") else ({"role": "assistant", "content": ""},)
    return [Asked((*_user(query), *answer), open=False)]


def _kanana_verdict(config: OpenConfig, text: str) -> Reading | None:
    found = re.match(r"\s*<(SAFE|UNSAFE-([A-Z]\d+))>", text)
    return Reading(found[2] is not None, found[2]) if found else None


_LLAMA_GUARD = "meta-llama/Llama-Guard-3-8B"
_GRANITE = "ibm-granite/granite-guardian-3.3-8b"
_YES: Any = {"yes": lambda config: ["yes"], "no": lambda config: ["no"]}
FAMILIES: dict[str, Family] = {
    "llama-guard": Family(_LLAMA_GUARD, _llama_guard, _first_line),
    "llama-guard-ic": Family(_LLAMA_GUARD, _llama_guard_in_context, _our_code),
    "aegis": Family(
        "nvidia/Aegis-AI-Content-Safety-LlamaGuard-Defensive-1.0",
        _aegis,
        _aegis_verdict,
        readings=("defensive", "permissive"),
    ),
    "wildguard": Family("allenai/wildguard", _wildguard, _wildguard_verdict, 32, "harmful request:", **_YES),
    "shieldgemma": Family("google/shieldgemma-9b", _shieldgemma, _yes_or_no, 4, **_YES),
    "granite-guardian": Family(_GRANITE, _granite, _yes_or_no, 32, **_YES),
    "qwen3guard": Family(
        "Qwen/Qwen3Guard-Gen-8B",
        _plain,
        _qwen,
        64,
        "safety:",
        yes=lambda config: ["unsafe", "controversial"] if config.reading == "strict" else ["unsafe"],
        no=lambda config: ["safe"] if config.reading == "strict" else ["safe", "controversial"],
        readings=("strict", "loose"),
    ),
    "gpt-oss-safeguard": Family(
        "openai/gpt-oss-safeguard-20b",
        _gpt_oss,
        _gpt_oss_verdict,
        2048,
        "<|channel|>final<|message|>",
        yes=lambda config: ["1"],
        no=lambda config: ["0"],
    ),
    "kanana-safeguard": Family(
        "kakaocorp/kanana-safeguard-8b",
        _kanana,
        _kanana_verdict,
        1,
        yes=lambda config: [f"<unsafe-{kind}{number}>" for kind in "sia" for number in range(1, 8)],
        no=lambda config: ["<safe>"],
    ),
}


def load(kind: str, spec: str | Mapping[str, Any] | None) -> OpenGuard:
    """`FAMILY`, `FAMILY:MODEL` or `{FAMILY: {model: MODEL, ...}}`."""
    return OpenGuard(kind, FAMILIES[kind], settings(OpenConfig, spec, kind))
