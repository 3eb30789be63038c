"""Extend a WordPiece vocabulary by a language it lacks, and start the new embeddings from the pieces they replace.

MiniLM's own tokenizer splits Hangul into conjoining jamo, about 2.5 pieces a syllable. The extended one composes
(NFC) after BERT's lower-casing and knows whole Korean pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

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


def extend(tokenizer: Tokenizer, pieces: Iterable[str]) -> tuple[Tokenizer, dict[int, list[int]]]:
    """The tokenizer with `pieces` added and Hangul composed, and for each new id the old ids its text used to be."""
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    origin: dict[int, list[int]] = {}
    for piece in pieces:
        if piece not in vocabulary:
            origin[len(vocabulary)] = tokenizer.encode(piece.removeprefix("##"), add_special_tokens=False).ids
            vocabulary[piece] = len(vocabulary)
    spec["normalizer"] = {"type": "Sequence", "normalizers": [spec["normalizer"], {"type": "NFC"}]}
    return Tokenizer.from_str(json.dumps(spec)), origin
