"""Extend a WordPiece vocabulary by a language it lacks, and start the new embeddings from what the base knows.

MiniLM's own tokenizer splits Hangul into conjoining jamo, about 2.5 pieces a syllable. The extended one composes
(NFC) after BERT's lower-casing and knows whole Korean pieces. A piece with a gloss starts as its English words, any
other as the jamo it replaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from haechi.errors import DataError

_NOT_HANGUL = Regex(r"[^가-힣ㄱ-ㆎ]+")


def learn_pieces(texts: Iterable[str], size: int) -> list[str]:
    """`size` WordPiece pieces of the Hangul in `texts`; other scripts are left to the old vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.BertNormalizer(), normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(_NOT_HANGUL, behavior="removed")]
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[UNK]"], limit_alphabet=size // 3, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    return [piece for piece in sorted(vocabulary, key=vocabulary.__getitem__) if piece != "[UNK]"]


def read_glossary(path: Path) -> dict[str, str]:
    """Piece -> gloss of a file of `piece TAB gloss` lines. Raises DataError naming a line that is not one."""
    glosses: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the glossary {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        piece, tab, gloss = line.partition("\t")
        if not (piece and tab and gloss.strip()):
            raise DataError(f"{path} line {number}: expected a piece, a TAB and its gloss")
        glosses[piece] = gloss
    return glosses


def extend(
    tokenizer: Tokenizer, pieces: Iterable[str], glosses: Mapping[str, str]
) -> tuple[Tokenizer, dict[int, list[int]]]:
    """The tokenizer with `pieces` added and Hangul composed, and for each new id the old ids it starts from: those of
    the piece's gloss, else those its text used to be."""
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    origin: dict[int, list[int]] = {}
    for piece in pieces:
        if piece not in vocabulary:
            text = glosses.get(piece, piece.removeprefix("##"))
            origin[len(vocabulary)] = tokenizer.encode(text, add_special_tokens=False).ids
            vocabulary[piece] = len(vocabulary)
    spec["normalizer"] = {"type": "Sequence", "normalizers": [spec["normalizer"], {"type": "NFC"}]}
    return Tokenizer.from_str(json.dumps(spec)), origin
