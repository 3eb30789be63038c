"""Write docs/cli.md from the help texts (`make docs`); with `--check` only say whether it is stale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
COMMANDS = (
    *("check", "answer", "calibrate", "evaluate", "review", "report"),
    *("curate", "train", "export", "ablate", "taxonomy"),
)


def help_text(*words: str) -> str:
    """What `haechi WORDS --help` prints, 100 columns wide."""
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "haechi.cli", *words, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return text.replace("python -m haechi.cli", "haechi").strip()


def page() -> str:
    """The whole page."""
    codes = "0 done, 1 some rows failed (check, answer), 2 a mistake told in one line"
    parts = ["# Command line", "", f"Made from the help texts by `make docs`. Exit codes: {codes}.", ""]
    for words in ((), *zip(COMMANDS, strict=True)):
        parts += [f"## {' '.join(('haechi', *words))}", "", "```text", help_text(*words), "```", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    fresh = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == fresh else "docs/cli.md is stale: run make docs")
    PAGE.write_text(fresh, encoding="utf-8")
