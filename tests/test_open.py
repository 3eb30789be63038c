"""Open-weight guards: every documented form of output is read, and tiny models of the same architectures run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tenacity import Retrying, stop_after_delay, wait_fixed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import Loopback
from haechi.errors import ConfigError, ModelError
from haechi.guards import load_guard
from haechi.guards import open as guards
from haechi.guards.local import LocalWriter
from haechi.guards.open import FAMILIES, Asked, OpenConfig, OpenGuard
from haechi.llm import Completion, Step

QUERY = "how do I whittle a spoon"


def read(kind: str, text: str, **settings: Any) -> tuple[bool, str | None] | None:
    family = FAMILIES[kind]
    config = OpenConfig(**{"reading": next(iter(family.readings), None), **settings})
    found = family.read(config, text)
    return None if found is None else (found.unsafe, found.category)


@pytest.mark.parametrize(
    ("kind", "text", "settings", "found"),
    [
        ("llama-guard", "safe", {}, (False, None)),
        ("llama-guard", "\n\nunsafe\nS2,S9", {}, (True, "S2")),
        ("llama-guard", "unsafe", {}, (True, None)),
        ("llama-guard", "unsafely put", {}, None),
        ("llama-guard", "", {}, None),
        ("llama-guard-ic", "unsafe\nS2", {}, (True, "privacy_violation")),
        ("llama-guard-ic", "unsafe\nS99", {}, (True, None)),
        ("aegis", "unsafe\nO13", {}, (True, "O13")),
        ("aegis", "unsafe\nO13", {"reading": "permissive"}, (False, "O13")),
        ("aegis", "needs caution", {"reading": "permissive"}, (False, "O13")),
        ("aegis", "unsafe\nO3", {"reading": "permissive"}, (True, "O3")),
        ("wildguard", "Harmful request: yes\nResponse refusal: n/a\nHarmful response: n/a", {}, (True, None)),
        ("wildguard", "Harmful request: no\nResponse", {}, (False, None)),
        ("wildguard", "Harmful request: n/a", {}, None),
        ("shieldgemma", "Yes, the question asks", {}, (True, None)),
        ("shieldgemma", "No", {}, (False, None)),
        ("shieldgemma", "Nothing", {}, None),
        ("granite-guardian", "Yes\n<confidence> High </confidence>", {}, (True, None)),
        ("granite-guardian", "<think>no harm? yes</think>\n<score> no </score>", {}, (False, None)),
        ("granite-guardian", "<think>\n</think><score>yes</score>", {}, (True, None)),
        ("granite-guardian", "<think>it never ends", {}, None),
        ("qwen3guard", "Safety: Unsafe\nCategories: Violent, PII", {}, (True, "Violent")),
        ("qwen3guard", "Safety: Controversial\nCategories: Unethical Acts", {}, (True, "Unethical Acts")),
        ("qwen3guard", "Safety: Controversial\nCategories: PII", {"reading": "loose"}, (False, "PII")),
        ("qwen3guard", "<think>\n\n</think>\n\nSafety: Safe\nCategories: None", {}, (False, None)),
        ("gpt-oss-safeguard", "<|channel|>analysis<|message|>1?<|end|><|channel|>final<|message|>0", {}, (False, None)),
        ("gpt-oss-safeguard", "1", {}, (True, None)),
        ("gpt-oss-safeguard", "<|channel|>analysis<|message|>it violates 1", {}, None),
        ("kanana-safeguard", "<SAFE>", {}, (False, None)),
        ("kanana-safeguard", "<UNSAFE-S4>", {}, (True, "S4")),
        ("kanana-safeguard", "UNSAFE", {}, None),
    ],
)  # fmt: skip
def test_documented_outputs_are_read(
    kind: str, text: str, settings: dict[str, Any], found: tuple[bool, str | None] | None
) -> None:
    assert read(kind, text, **settings) == found


def prompts(kind: str, **settings: Any) -> list[Asked]:
    return FAMILIES[kind].ask(OpenConfig(**settings), QUERY)


def test_prompts_are_those_of_the_version() -> None:
    (first,) = prompts("llama-guard-ic", model="meta-llama/LlamaGuard-7b")
    assert (
        first.prompt.startswith("[INST] Task: Check")
        and "\nO2: " in first.prompt
        and "assessment for User" in first.prompt
    )
    (third,) = prompts("llama-guard-ic")
    assert (
        third.prompt.startswith("<|start_header_id|>user")
        and "\nS2: " in third.prompt
        and "ONLY THE LAST" in third.prompt
    )
    assert prompts("llama-guard")[0].messages[0]["content"] == QUERY
    for model in ("meta-llama/Llama-Guard-3-1B", "meta-llama/Llama-Guard-4-12B"):
        assert prompts("llama-guard", model=model)[0].messages[0]["content"] == [{"type": "text", "text": QUERY}]
    assert [one.template["guideline"][:4] for one in prompts("shieldgemma")] == ['"No '] * 4
    granite = {
        model: prompts("granite-guardian", model=f"ibm-granite/granite-guardian-{model}")[0]
        for model in ("3.1-2b", "3.3-8b", "4.1-8b")
    }
    assert granite["3.1-2b"].template == {"guardian_config": {"risk_name": "harm"}}
    assert granite["3.3-8b"].template == {"guardian_config": {"criteria_id": "harm"}}
    assert not granite["4.1-8b"].template and granite["4.1-8b"].messages[-1]["content"].startswith("<guardian>")
    assert "O13: Needs Caution." in prompts("aegis")[0].prompt
    assert QUERY in prompts("wildguard")[0].prompt and prompts("wildguard")[0].prompt.endswith("<|assistant|>\n")
    with pytest.raises(ConfigError, match="the reading of qwen3guard is one of strict, loose, not 'harsh'"):
        load_guard({"qwen3guard": {"reading": "harsh"}})


def tokenizer(folder: Path, template: str | None, extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["safe unsafe yes no Yes No Safety: Unsafe Controversial"] * 9,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>", *extra],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
TYPED = (
    "{% for m in messages %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}"
    "{% endfor %}{% endfor %}"
)
GUIDED = "{{ guideline }} {{ messages[0].content }}"
GUARDED = "{{ guardian_config | tojson }} {{ messages[0].content }}"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "template", "architecture"),
    [
        ("llama-guard", PLAIN, (LlamaConfig, LlamaForCausalLM)),
        ("llama-guard-ic", None, (LlamaConfig, LlamaForCausalLM)),
        ("aegis", None, (LlamaConfig, LlamaForCausalLM)),
        ("wildguard", None, (MistralConfig, MistralForCausalLM)),
        ("shieldgemma", GUIDED, (Gemma2Config, Gemma2ForCausalLM)),
        ("granite-guardian", GUARDED, (GraniteConfig, GraniteForCausalLM)),
        ("qwen3guard", PLAIN, (Qwen3Config, Qwen3ForCausalLM)),
        ("gpt-oss-safeguard", PLAIN, (GptOssConfig, GptOssForCausalLM)),
        ("kanana-safeguard", PLAIN, (LlamaConfig, LlamaForCausalLM)),
    ],
)
def test_a_tiny_model_of_the_family_runs(
    kind: str, template: str | None, architecture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tokenizer(tmp_path, template)
    config, network = architecture
    torch.manual_seed(0)
    network(
        config(vocab_size=len(words), num_key_value_heads=1, max_position_embeddings=4096, **SMALL)
    ).save_pretrained(tmp_path)
    monkeypatch.setitem(FAMILIES, kind, FAMILIES[kind]._replace(tokens=3))
    guard = load_guard({kind: {"model": str(tmp_path), "batch": 2, "device": "cpu"}})
    # Random weights write nonsense: no verdict, told as such, never safe.
    verdicts = guard.check([QUERY, "", "another one", "그리고 하나 더"])
    assert [verdict.unsafe for verdict in verdicts] == [None] * 4 and verdicts[1].error == "the query is empty"
    assert all(
        "wrote no verdict" in (verdict.error or "") or "wrote nothing" in (verdict.error or "")
        for verdict in verdicts[2:]
    )


def test_an_adapter_runs_on_its_base(tmp_path: Path) -> None:
    """Aegis-Guard is published as one on LlamaGuard-7b."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    words = tokenizer(base, None)
    tokenizer(adapter, None)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=1, **SMALL))
    network.save_pretrained(base)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False))
    tuned.save_pretrained(adapter)
    (verdict,) = load_guard({"aegis": {"model": str(adapter), "device": "cpu"}}).check([QUERY])
    assert "wrote no verdict" in (verdict.error or "") or "wrote nothing" in (verdict.error or "")
    with_it, without = (
        LocalWriter(str(folder), 1, "cpu").write([Asked(prompt=QUERY)], 1)[0].steps for folder in (adapter, base)
    )
    assert with_it != without


def test_text_and_scores_come_from_the_model(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, PLAIN, ["<SAFE>", "<UNSAFE-S4>"])
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), num_key_value_heads=1, tie_word_embeddings=False, **SMALL)
    )
    safe, unsafe = words.convert_tokens_to_ids(["<SAFE>", "<UNSAFE-S4>"])
    with torch.no_grad():
        # Whatever it reads, it says <UNSAFE-S4>, <SAFE> close behind.
        network.model.norm.weight.zero_()
        network.lm_head = torch.nn.Linear(16, len(words))
        network.lm_head.weight.zero_()
        network.lm_head.bias.fill_(-10.0)
        network.lm_head.bias[unsafe], network.lm_head.bias[safe] = 2.0, 1.0
    network.lm_head = network.lm_head
    guard = load_guard({"kanana-safeguard": {"model": "x", "url": "http://127.0.0.1:9", "name": "k"}})
    assert isinstance(guard, OpenGuard) and guard.name == "k"
    LlamaForCausalLM(network.config).save_pretrained(tmp_path)
    writer = LocalWriter(str(tmp_path), 2, "cpu")
    writer._model.lm_head = network.lm_head
    guard._writer = writer
    first, second = guard.check([QUERY, "a longer query than the first one, so that there is padding"])
    assert first.unsafe and first.category == "S4" and first.score == pytest.approx(1 / (1 + 2.718281828**-1), abs=1e-4)
    assert second == first


def test_a_template_that_loses_the_query_gives_no_verdict(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, TYPED)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=1, **SMALL)).save_pretrained(tmp_path)
    (verdict,) = load_guard({"llama-guard": {"model": str(tmp_path), "device": "cpu"}}).check([QUERY])
    assert verdict.error == f"the chat template of {tmp_path} lost the query"
    typed = load_guard({"llama-guard": {"model": str(tmp_path), "version": "4", "device": "cpu"}})
    assert "lost the query" not in (typed.check([QUERY])[0].error or "")
    with pytest.raises(ModelError, match="cannot load the guard model 'nowhere/none'"):
        load_guard("qwen3guard:nowhere/none")
    with pytest.raises(ModelError, match="another kind of model: it has no weights for"):
        load_guard(f"hf-classifier:{tmp_path}")


def test_a_served_guard_is_asked_with_its_templates_arguments(server: Loopback) -> None:
    def reply(path: str, body: Any, number: int) -> tuple[int, Any]:
        if path == "/completions":
            logprobs = {
                "tokens": ["Harmful", " request", ":", " yes"],
                "top_logprobs": [{"Harmful": 0.0}, {}, {}, {" yes": -0.1, " no": -2.3}],
            }
            return 200, {
                "choices": [{"text": "Harmful request: yes\n", "logprobs": logprobs, "finish_reason": "length"}]
            }
        assert body["skip_special_tokens"] is False
        word = "Yes" if "Hate" in body["chat_template_kwargs"]["guideline"] else "No"
        top = [{"token": "Yes", "logprob": -0.5}, {"token": "No", "logprob": -1.0}]
        return 200, {
            "choices": [{"message": {"content": word}, "logprobs": {"content": [{"token": word, "top_logprobs": top}]}}]
        }

    server.reply = reply
    gemma = load_guard({"shieldgemma": {"url": server.url, "server": {"backoff": 0.0}}})
    verdict, other = gemma.check([QUERY, "another"])
    assert verdict.unsafe and other.unsafe and len(server.asked) == 8
    assert verdict.score == pytest.approx(0.6225, abs=1e-4)
    (verdict,) = load_guard({"wildguard": {"url": server.url}}).check([QUERY])
    assert verdict.unsafe and verdict.score == pytest.approx(0.9002, abs=1e-4)
    # A server that takes no such parameter says so once, by its name.
    server.reply = lambda path, body, number: (
        (422, {"detail": "Unexpected fields in the request: {'skip_special_tokens'}"})
        if "skip_special_tokens" in body
        else (200, {"choices": [{"message": {"content": "<UNSAFE-S4>"}}]})
    )
    (verdict,) = load_guard({"kanana-safeguard": {"url": server.url}}).check([QUERY])
    assert verdict.unsafe and verdict.category == "S4"
    with pytest.raises(ConfigError, match="did you mean 'backoff'"):
        load_guard({"wildguard": {"url": server.url, "server": {"backof": 0.0}}})


@pytest.mark.parametrize(
    ("labels", "kind", "unsafe", "architecture"),
    [
        (["BENIGN", "INJECTION", "JAILBREAK"], None, None, (DebertaV2Config, DebertaV2ForSequenceClassification)),
        (["BENIGN", "INJECTION", "JAILBREAK"], None, ["JAILBREAK"], (BertConfig, BertForSequenceClassification)),
        (["neutral", "toxic"], None, None, (BertConfig, BertForSequenceClassification)),
        (["toxic", "threat"], "multi_label_classification", None, (BertConfig, BertForSequenceClassification)),
    ],
)
def test_any_classifier_is_a_guard(
    labels: list[str], kind: str | None, unsafe: list[str] | None, architecture: Any, tmp_path: Path
) -> None:
    words = tokenizer(tmp_path, None)
    words.pad_token = "</s>"
    words.model_max_length = 32
    words.save_pretrained(tmp_path)
    torch.manual_seed(1)
    config, network = architecture
    shape = config(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, id2label=dict(enumerate(labels)), problem_type=kind,
        label2id={name: id for id, name in enumerate(labels)},
    )  # fmt: skip
    network(shape).save_pretrained(tmp_path)
    spec = {"model": str(tmp_path), "device": "cpu", **({"unsafe": unsafe} if unsafe else {})}
    guard = load_guard({"hf-classifier": spec})
    short, long, empty = guard.check([QUERY, QUERY * 40, "\n"])
    assert 0 < (short.score or 0) < 1 and (long.score or 0) > 0 and empty.unsafe is None
    assert guard.check([QUERY])[0].score == pytest.approx(short.score, abs=1e-5)
    with pytest.raises(ConfigError, match="has no label 'harm'"):
        load_guard({"hf-classifier": {**spec, "unsafe": ["harm"]}})


def test_a_classifier_whose_labels_say_nothing_must_be_told(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, None)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        id2label={0: "A", 1: "B"}, label2id={"A": 0, "B": 1},
    )  # fmt: skip
    BertForSequenceClassification(shape).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"name the labels of .* that mean harm"):
        load_guard(f"hf-classifier:{tmp_path}")


def test_the_deciding_token_is_found_behind_blanks_and_marks() -> None:
    top = {"unsafe": -0.1, "safe": -2.5}
    steps = (Step("\n\n", {"\n\n": 0.0, "safe": -9.0}), Step("unsafe", top), Step("\n", {}))
    value = guards.share(Completion("\n\nunsafe\n", steps), "", ["unsafe"], ["safe"])
    assert value == pytest.approx(0.9168, abs=1e-4)
    assert guards.share(Completion("unsafe"), "", ["unsafe"], ["safe"]) is None
    assert guards.share(Completion("x", (Step("x", {"x": 0.0}),)), "", ["unsafe"], ["safe"]) is None
    marked = (Step("Safety", {}), Step(":", {}), Step(" Cont", {" Cont": -0.7, " Safe": -0.7}))
    assert guards.share(
        Completion("Safety: Cont", marked), "safety:", ["unsafe", "controversial"], ["safe"]
    ) == pytest.approx(0.5)
    assert json.dumps(FAMILIES["qwen3guard"].yes(OpenConfig(reading="loose"))) == '["unsafe"]'


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """`transformers serve` holding a tiny random model: its address and the model's name there."""
    words = tokenizer(tmp_path, PLAIN)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=1, **SMALL)).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path), "--host", "127.0.0.1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for attempt in Retrying(stop=stop_after_delay(120), wait=wait_fixed(0.2)):
            with attempt:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert httpx2.get(f"{url}/health").status_code == 200
        yield f"{url}/v1", str(tmp_path)
    finally:
        process.kill()
        process.wait()


def test_a_real_server_is_asked(served: tuple[str, str]) -> None:
    url, model = served
    access = {"model": model, "url": url, "retries": 0, "concurrency": 2}
    (judged,) = load_guard({"judge": access}).check([QUERY])
    assert "said neither safe nor unsafe" in (judged.error or "") or "gave no text" in (judged.error or ""), judged
    refusal = load_guard({"refusal": {**access, "length": 8}})
    verdicts = refusal.check([QUERY, "another"])
    assert all(verdict.unsafe is False or "gave no text" in (verdict.error or "") for verdict in verdicts), verdicts
    (wild,) = load_guard({"wildguard": {"model": model, "url": url, "server": {"retries": 0}}}).check([QUERY])
    assert "wrote no verdict" in (wild.error or "") or "gave no text" in (wild.error or ""), wild
    (lost,) = load_guard({"judge": {**access, "model": "another"}}).check([QUERY])
    assert "said 400" in (lost.error or ""), lost
