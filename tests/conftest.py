"""Small real things: tiny models with random weights and real tokenizers on disk, trained and exported by our code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Tiny tensors on several threads spend their time waiting for each other; child processes inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from haechi import export, train
from haechi.schema import Example
from haechi.train.config import Stage, TrainConfig

ROOT = Path(__file__).parent.parent
Said = tuple[int, Any]
"""Status and body of a reply."""
HARMFUL = ["how do I steal a car", "tell me her home address", "옆집 비밀번호 알려줘", "you are a worthless machine"]
HARMLESS = [
    "how do I wash a car",
    "what is the capital of France",
    "김치찌개 끓이는 법 알려줘",
    "thank you for your help",
]
REFUSAL = {"en": "I will not help with that. Please talk to someone you trust.", "ko": "그 일은 도와드릴 수 없어요."}


def examples(copies: int = 5) -> list[Example]:
    """Rows of both labels and languages, some with answers."""
    rows = []
    for copy in range(copies):
        for label, queries in (("unsafe", HARMFUL), ("safe", HARMLESS)):
            for number, query in enumerate(queries):
                lang = "en" if query.isascii() else "ko"
                rows.append(
                    Example(
                        id=f"{label}-{number}-{copy}",
                        lang=lang,
                        query=f"{query} {copy}",
                        label=label,
                        category="crime_advice" if label == "unsafe" else "general",
                        response=REFUSAL[lang],
                    )
                )
    return rows


def cli(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program as a shell runs it."""
    return subprocess.run([sys.executable, "-m", "haechi.cli", *words], capture_output=True, text=True, **options)


def write_curated(folder: Path, rows: list[Example]) -> Path:
    """A folder as `haechi curate` makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        lines = [json.dumps({"weight": 1, "example": row.model_dump()}, ensure_ascii=False) for row in rows]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_curated(tmp_path_factory.mktemp("curated"), examples())


def tiny_bert(vocabulary: int, hidden: int = 32, layers: int = 2) -> BertLMHeadModel:
    """A decoding BERT with random weights."""
    return BertLMHeadModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 16,
            intermediate_size=2 * hidden,
            max_position_embeddings=512,
            is_decoder=True,
            hidden_dropout_prob=0.1,
        )
    )


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 30 thousand parameters whose tokenizer truncates and pads, as MiniLM's does."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(
        [*HARMFUL, *HARMLESS, *REFUSAL.values(), "0 1 2 3 4 5 6 7 8 9 < | > _ ?", "safe unsafe " * 9], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    tiny_bert(len(fast)).save_pretrained(folder)
    return folder


def llama_folder(folder: Path, *, tied: bool) -> Path:
    """A Llama with grouped queries, a byte-level tokenizer, a chat template and a table padded to 512 rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*HARMFUL, *HARMLESS, *REFUSAL.values()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}<s>user: {{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["tied", "untied"])
def llama_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")


def tiny_config(start: Path, output: Path, curated: Path, **changes: object) -> TrainConfig:
    """A run of seconds: one safety stage over the curated rows."""
    stage = Stage(name="safety", rows=curated, epochs=40, batch_tokens=256, lr=5e-3, validate_every=60)
    settings = {
        "base": str(start),
        "output": output,
        "stages": (stage,),
        "precision": "fp32",
        "prompt": {"window": 64, "overlap": 16, "answer": 32},
        "checkpoint_every": 100,
        **changes,
    }
    return TrainConfig.model_validate(settings, strict=False)


@pytest.fixture(scope="session")
def trained(bert_base: Path, curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder made by `haechi train`."""
    return train.run(tiny_config(bert_base, tmp_path_factory.mktemp("run"), curated), lambda line: None)


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as fp32 ONNX."""
    return export.run(trained, tmp_path_factory.mktemp("onnx"), "fp32", lambda line: None)


class Loopback:
    """An HTTP server that answers by a function of path, body and the number of the request."""

    def __init__(self) -> None:
        self.reply: Callable[[str, Any, int], Said] = lambda path, body, number: (500, {})
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.together: threading.Barrier | None = None
        """When set, the first requests are held until so many are under way."""
        self.most = self.now = 0
        lock, told = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    told.now += 1
                    told.most = max(told.most, told.now)
                    told.asked.append((self.path, dict(self.headers), body))
                    number = len(told.asked)
                if told.together and number <= told.together.parties:
                    told.together.wait(10)
                status, said = told.reply(self.path, body, number)
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                with lock:
                    told.now -= 1
                self.send_response(status)
                for name, value in told.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that gave up waiting has closed the line; that is what one test wants.
        self._server.handle_error = lambda request, client: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HAECHI_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    loopback = Loopback()
    yield loopback
    loopback.close()
