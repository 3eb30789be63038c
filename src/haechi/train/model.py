"""Any Hugging Face causal LM as a base: its tokens added, its vocabulary extended, its adapters merged."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from haechi.errors import ModelError
from haechi.modelfolder import EMBEDDED, default_model
from haechi.store import fingerprint, read_json, write_json
from haechi.taxonomy import Taxonomy
from haechi.template import EXPL, PRED, Template, TemplateSettings, special_tokens
from haechi.train.config import Lora, Prompt, TrainConfig, Vocabulary
from haechi.train.data import characters, read_rows
from haechi.train.restore import restored
from haechi.train.shrink import embedding_tables, shrunk
from haechi.train.vocabulary import extend, learn_pieces, read_glossary

_ENCODERS = {"bert", "roberta", "electra", "camembert", "xlm-roberta"}
"""Encoder architectures that transformers also runs as decoders."""


class Base(NamedTuple):
    """A model ready for its first stage."""

    model: Any
    """A `PreTrainedModel` with a language-model head, perhaps wrapped by peft."""
    tokenizer: PreTrainedTokenizerFast
    """With every special token."""
    template: Template
    """How the model reads."""
    counterparts: dict[int, list[int]]
    """Ids of words and those of the words that mean the same in the other language, by the glossary; both ways."""


def load_base(config: TrainConfig, taxonomy: Taxonomy) -> Base:
    """Load the base, add the tokens and start their embeddings from the words of their names.

    Raises ModelError when the base is missing or has no fast tokenizer.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, tokenizer = _loaded(config)
    if config.shrink:
        model = shrunk(model, config.shrink)
    shape = model.config
    origin: dict[int, list[int]] = {}
    counterparts: dict[int, list[int]] = {}
    if config.vocabulary:
        glosses = read_glossary(config.vocabulary.glossary) if config.vocabulary.glossary else {}
        if config.vocabulary.pieces:
            tokenizer, origin = _extended(tokenizer, _pieces(config.vocabulary, config.output), glosses)
        counterparts = _counterparts(tokenizer, glosses)
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # A base of ours knows the tokens, perhaps of another policy; what it learnt of them stays.
    special = special_tokens(taxonomy.codes)
    words = {token: token.strip("<|>").replace("_", " ") for token in special if plain.token_to_id(token) is None}
    plain.no_truncation()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in words])
    for token, text in words.items():
        origin[tokenizer.convert_tokens_to_ids(token)] = plain.encode(text, add_special_tokens=False).ids
    if shape.model_type in _ENCODERS:
        # An encoder has read every text up to its separator: what asks for a verdict or an answer starts as that.
        origin |= {
            tokenizer.convert_tokens_to_ids(token): [tokenizer.sep_token_id] for token in (PRED, EXPL) if token in words
        }
    _grow_embeddings(model, len(tokenizer), origin)
    settings = _settings(tokenizer, shape, config.prompt)
    template = Template(backend(tokenizer), taxonomy.codes, settings)
    if config.lora:
        model = _adapters(model, config.lora, [template.id(token) for token in special])
    return Base(model, tokenizer, template, counterparts)


def _loaded(config: TrainConfig) -> tuple[Any, PreTrainedTokenizerFast]:
    name = locate(config.base)
    if (Path(name) / "model.onnx").is_file():
        return restored(Path(name), config.dropout)
    try:
        shape = AutoConfig.from_pretrained(name)
        if shape.model_type in _ENCODERS:
            shape.is_decoder = True
        if config.dropout is not None:
            _set_dropout(shape, config.dropout)
        model = AutoModelForCausalLM.from_pretrained(name, config=shape, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the base model {config.base!r}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"the base model {config.base!r} has no fast tokenizer")
    return model, tokenizer


def backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the fast tokenizer's core, without the truncation and padding its folder may prescribe."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_truncation()
    core.no_padding()
    return core


def merged(model: Any) -> Any:
    """The plain Hugging Face model, adapters merged into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


class NarrowHead:
    """Lets a model's head score only the positions and ids that a loss needs, until `free`.

    The model then returns logits [positions, ids]. With an offset of log(others / drawn) on ids drawn at random the
    softmax's sum stays unbiased: importance sampling as in Jean et al. 2015 (arXiv 1412.2007), section 3.
    """

    positions: torch.Tensor
    """[positions] places in the flattened batch."""
    candidates: torch.Tensor | None = None
    """[ids] to score; None: the whole vocabulary."""
    offsets: torch.Tensor | None = None
    """[ids] added to the candidates' logits."""

    def __init__(self, model: Any) -> None:
        self._head = model.get_output_embeddings()
        self._whole = self._head.forward
        self._head.forward = self._forward

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.flatten(0, 1)[self.positions]
        if self.candidates is None or self.offsets is None:
            logits: torch.Tensor = self._whole(hidden)
            return logits
        bias = self.offsets if self._head.bias is None else self._head.bias[self.candidates] + self.offsets
        return F.linear(hidden, self._head.weight[self.candidates], bias.to(hidden.dtype))

    def free(self) -> None:
        """Give the model its head back."""
        self._head.forward = self._whole


def locate(base: str) -> str:
    """A folder or hub name; `package:NAME` is the `model` folder inside an installed package."""
    if base == EMBEDDED:
        return str(default_model())
    if not base.startswith("package:"):
        return base
    package = base.removeprefix("package:")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the base {base!r} needs the package {package.replace('_', '-')!r}: pip install 'haechi[mini]'"
        )
    return str(Path(spec.origin).parent / "model")


def _set_dropout(shape: Any, value: float) -> None:
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "resid_pdrop", "dropout"):
        if hasattr(shape, name):
            setattr(shape, name, value)


def _pieces(vocabulary: Vocabulary, output: Path) -> list[str]:
    """The learnt pieces, kept in the run's folder: the learner breaks ties at random, and a resumed run must not."""
    file = output / f"pieces-{fingerprint(vocabulary.model_dump(mode='json'))}.json"
    if not file.exists():
        texts = [*characters(vocabulary.language, vocabulary.characters)]
        if vocabulary.rows is not None:
            rows = [row.example for row in read_rows(vocabulary.rows, "train")]
            texts += [text for row in rows for text in (row.query, row.response) if text] * vocabulary.rows_weight
        write_json(file, learn_pieces(texts, vocabulary.pieces))
    pieces: list[str] = read_json(file)
    return pieces


def _extended(
    tokenizer: PreTrainedTokenizerFast, pieces: Sequence[str], glosses: Mapping[str, str]
) -> tuple[PreTrainedTokenizerFast, dict[int, list[int]]]:
    core, origin = extend(backend(tokenizer), pieces, glosses)
    named = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named), origin


def _counterparts(tokenizer: PreTrainedTokenizerFast, glosses: Mapping[str, str]) -> dict[int, list[int]]:
    """Pieces that begin a word and are glossed by a single id, and those ids."""
    table: dict[int, list[int]] = {}
    vocabulary, core = tokenizer.get_vocab(), backend(tokenizer)
    for piece, gloss in glosses.items():
        meant = core.encode(gloss, add_special_tokens=False).ids
        if piece in vocabulary and not piece.startswith("##") and len(meant) == 1:
            table[vocabulary[piece]] = meant
            table.setdefault(meant[0], []).append(vocabulary[piece])
    return table


def _grow_embeddings(model: Any, tokens: int, origin: dict[int, list[int]]) -> None:
    """Room for `tokens` ids (padded tables that already have it stay), new rows the mean of the rows they replace."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for table in embedding_tables(model):
            mean = table[: min(rows, tokens)].mean(0)
            for new, old in origin.items():
                table[new] = table[old].mean(0) if old else mean


def _settings(tokenizer: PreTrainedTokenizerFast, shape: Any, prompt: Prompt) -> TemplateSettings:
    eos = tokenizer.eos_token or tokenizer.sep_token
    if eos is None:
        raise ModelError("the base model's tokenizer has neither an end nor a separator token")
    before, after = "", ""
    if prompt.wrap == "chat":
        if not tokenizer.chat_template:
            raise ModelError("wrap: chat needs a base with a chat template; this one has none")
        mark = "QUERY"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, after = text.split(mark, 1)
    else:
        start = tokenizer.cls_token if shape.model_type in _ENCODERS else tokenizer.bos_token
        # Models such as Qwen have a BOS token they were never trained to see first; follow what their tokenizer does.
        ids = tokenizer("a").input_ids
        before = start if start and ids and ids[0] == tokenizer.convert_tokens_to_ids(start) else ""
    positions = getattr(shape, "max_position_embeddings", None) or 1 << 30
    used = prompt.window + prompt.answer + 32
    if used > positions:
        raise ModelError(
            f"window {prompt.window} + answer {prompt.answer} + 32 exceeds the base's {positions} positions"
        )
    return TemplateSettings(
        attention=prompt.attention,
        tasks=prompt.tasks,
        before=before,
        after=after,
        eos=eos,
        window=prompt.window,
        overlap=prompt.overlap,
        answer=prompt.answer,
    )


def _adapters(model: Any, lora: Lora, new_ids: list[int]) -> Any:
    """LoRA plus trainable rows for the new tokens; peft keeps tied input and output rows one."""
    from peft import LoraConfig, get_peft_model

    tied = bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    rows: Any = new_ids
    if not tied:
        rows = {names[id(table)]: new_ids for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
            trainable_token_indices=rows,
        ),
    )
