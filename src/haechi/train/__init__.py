"""`haechi train CONFIG`: one model, two tasks, trained progressively (arXiv 2405.19795): general text and instructions
first, then both safety tasks together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from haechi import spelling
from haechi.calibration import calibrated, scored
from haechi.casing import learn
from haechi.errors import DataError
from haechi.guards.slm import load
from haechi.modelfolder import DEFAULT_POINT, Sheet, sealed, write_sheet
from haechi.normalise import Reader
from haechi.sets import data_folder
from haechi.spelling import read_words, write_words
from haechi.store import digest
from haechi.taxonomy import load_taxonomy
from haechi.train.config import Stage, TrainConfig
from haechi.train.data import Both, RowSource, Source, Switched, TextSource, documents, read_rows
from haechi.train.loop import Loop
from haechi.train.model import Base, load_base, locate, merged

__all__ = ["Stage", "TrainConfig", "run"]


def run(config: TrainConfig, report: Callable[[str], None] = print) -> Path:
    """Train every stage and write the finished model folder; returns it. A killed run goes on when run again."""
    taxonomy = load_taxonomy(config.taxonomy)
    loop = Loop(config, lambda: load_base(config, taxonomy), report)
    loop.load_finished()
    with loop.first():
        words = _words(loop.base, config)
    read = Reader(words) if config.normalise else str
    measured: dict[str, Any] = {}
    for index, stage in enumerate(config.stages):
        done = loop.measured(stage)
        if done is None:
            with loop.first():
                train, valid = _sources(stage, loop.base, config, read)
            done = loop.run(index, stage, train, valid)
        measured[stage.name] = done
    folder, base = config.output / "model", loop.base
    if loop.accelerator.is_main_process:
        merged(base.model).save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        sheet = Sheet(
            name=config.output.name,
            base=config.base,
            taxonomy=taxonomy.model_dump(mode="json"),
            taxonomy_version=taxonomy.version,
            template=base.template.settings,
            casing=_casing(base, config),
            trained_on={stage.name: _provenance(stage) for stage in config.stages},
            metrics={"training": measured},
        )
        if words:
            write_words(folder, words)
        write_sheet(folder, sealed(folder, sheet))
        _calibrate(folder, config, report)
        report(f"model written to {folder}")
    loop.end()
    return folder


def _calibrate(folder: Path, config: TrainConfig, report: Callable[[str], None]) -> None:
    """Fit the operating points on the last labelled stage's validation rows, and keep what they measure there."""
    labelled = [stage.rows for stage in config.stages if stage.rows is not None and "classify" in stage.tasks]
    rows = [row.example for row in read_rows(labelled[-1], "valid")] if labelled else []
    guard = load(folder, engine="torch", normalise=config.normalise)
    try:
        verdicts = guard.check([row.query for row in rows])
        sheet = calibrated(
            guard.sheet, scored([row.label or "safe" for row in rows], verdicts, guard.sheet.temperature)
        )
    except DataError as error:
        report(f"not calibrated: {error}")
        return
    write_sheet(folder, sheet)
    point = sheet.points[DEFAULT_POINT]
    report(
        f"calibrated on {len(rows)} validation rows: temperature {sheet.temperature:.3f}, threshold "
        f"{point.threshold:.3f}, weighted F1 {point.weighted_f1:.3f}, AUROC {sheet.metrics['calibration']['auroc']:.3f}"
    )


def _sources(stage: Stage, base: Base, config: TrainConfig, read: Callable[[str], str]) -> tuple[Source, Source | None]:
    text = TextSource(stage, base.template, config.seed, config.output / "text") if stage.text else None
    rows = valid = None
    if stage.rows is not None:
        steps = len(text) if text else None
        rows = RowSource(read_rows(stage.rows, "train"), stage, base.template, config.seed, read=read, steps=steps)
        valid = RowSource(read_rows(stage.rows, "valid"), stage, base.template, config.seed, read=read, shuffle=False)
    source = Both(text, rows) if text and rows else text or rows
    assert source
    return (Switched(source, base.counterparts, stage, config.seed) if stage.code_switch else source), valid


def _casing(base: Base, config: TrainConfig) -> dict[str, str] | None:
    """How the training answers write the words an uncased tokenizer lowers; None for a tokenizer that keeps case."""
    if base.template.decode(base.template.encode("Aa")) != "aa":
        return None
    folders = [stage.rows for stage in config.stages if stage.rows is not None]
    rows = (row.example.response for folder in folders for row in read_rows(folder, "train"))
    return learn(response for response in rows if response)


def _words(base: Base, config: TrainConfig) -> dict[str, int]:
    """How often the training queries write each word; what the tokenizer, the running text and an exported base know is
    known as well."""
    vocabulary = base.tokenizer.get_vocab()
    # Byte-level and SentencePiece vocabularies mark a word's beginning, WordPiece what goes on within a word.
    begun = [piece[1:] for piece in vocabulary if piece[:1] in ("Ġ", "▁")]
    whole = begun or [piece for piece in vocabulary if not piece.startswith("##")]
    known = Counter(
        {piece: 1 for piece in whole if piece.isascii() and piece.isalpha() and piece.islower() and len(piece) > 1}
    )
    known.update(read_words(Path(locate(config.base))))
    for language in sorted({language for stage in config.stages for language in stage.text or ()}):
        known.update(spelling.common(documents(language)))
    folders = [stage.rows for stage in config.stages if stage.rows is not None]
    return spelling.learn((row.example.query for folder in folders for row in read_rows(folder, "train")), known)


def _provenance(stage: Stage) -> dict[str, Any]:
    """What the stage read, by content hash."""
    read: dict[str, Any] = {}
    if stage.rows is not None:
        read |= {"rows": stage.rows.name, "train": digest(stage.rows / "train.jsonl")}
    if stage.text is None:
        return read
    shards = {
        f"{language}/{shard.name}": digest(shard)
        for language in stage.text
        for shard in sorted((data_folder() / "text" / language).glob("*.txt.xz"))
    }
    return {**read, "text": stage.text, "tokens": stage.tokens, "shards": shards}
