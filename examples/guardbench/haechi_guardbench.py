"""Haechi in GuardBench: `python haechi_guardbench.py rows.jsonl`, whose rows have `id`, `query` and `label`.

Without a file GuardBench's own sets are run, which it downloads on first use.
"""

import json
import sys
import tempfile
from pathlib import Path

from guardbench import CustomDataset, benchmark

import haechi

guard = haechi.load()


def moderate(conversations: list[list[dict[str, str]]]) -> list[float]:
    """How unsafe each conversation is; GuardBench calls unsafe what is above 0.5."""
    verdicts = guard.check([haechi.Conversation.model_validate({"turns": turns}) for turns in conversations])
    return [_above_half(verdict) for verdict in verdicts]


def _above_half(verdict: haechi.Verdict) -> float:
    if verdict.unsafe is None or verdict.score is None:
        return float(verdict.unsafe is not False)  # there is no third state: what could not be judged is unsafe
    return (verdict.score + verdict.unsafe) / 2  # the guard's own threshold becomes 0.5, the order stays


def own_set(path: Path) -> str:
    """Make the rows a set GuardBench knows by name."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        with file.open("w", encoding="utf-8") as out:
            for row in rows:
                conversation = [{"role": "user", "content": row["query"]}]
                entry = {"id": row["id"], "label": row["label"] == "unsafe", "conversation": conversation}
                out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        alias: str = CustomDataset(path.stem).load_data(file).alias
    return alias


if __name__ == "__main__":
    benchmark(
        moderate=moderate,
        model_name=guard.name,
        batch_size=32,
        datasets=[own_set(Path(sys.argv[1]))] if len(sys.argv) > 1 else "all",
        metrics=["precision", "recall", "f1", "fpr", "auprc"],
    )
