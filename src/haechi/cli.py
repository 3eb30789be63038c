"""The command line: a thin table of verbs. Everything heavy is imported inside the verb that needs it."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haechi.errors import ConfigError, HaechiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.progress import Progress

    from haechi.bulk import Item, Rows
    from haechi.guards import Guard

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
    help="A small language model that judges a query and gives the safeguard answer, in front of your LLM.",
)

Queries = Annotated[list[str] | None, typer.Argument(help="Queries to judge.", show_default=False)]
Model = Annotated[Path | None, typer.Option(help="Model folder; default the embedded haechi-mini.", show_default=False)]
GuardName = Annotated[
    str | None,
    typer.Option("--guard", help="Another guard: keyword:FILE, judge:MODEL, {any_of: [...]}.", show_default=False),
]
Input = Annotated[
    str | None, typer.Option(help='JSONL of {"id","query"} or plain lines; - for standard input.', show_default=False)
]
Output = Annotated[
    str | None,
    typer.Option(help="Write JSONL rows there; - for standard output. Default: readable lines.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per query.")]
PointName = Annotated[
    str | None,
    typer.Option("--point", help="Operating point: strict, balanced or permissive.", show_default=False),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default all.", show_default=False)]
Locale = Annotated[
    str | None,
    typer.Option(help="Whose help lines to show (US, KR); default by the query's language.", show_default=False),
]
AnswersFile = Annotated[
    str | None,
    typer.Option(
        "--answers",
        help="A file of approved answers, or 'written': the model's own words. Default: its approved ones, if any.",
        show_default=False,
    ),
]
TaxonomyFile = Annotated[
    Path | None,
    typer.Option("--taxonomy", help="Refuse a model that was not trained for this policy.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Give a safeguard answer whatever the verdict.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.", show_default=False)
]


@app.command()
def check(
    queries: Queries = None,
    model: Model = None,
    guard: GuardName = None,
    input: Input = None,
    output: Output = None,
    as_json: AsJson = False,
    threads: Threads = None,
    point: PointName = None,
    taxonomy: TaxonomyFile = None,
) -> None:
    """Judge queries: safe or unsafe, how surely, and which category."""
    load = partial(_guard, model, guard, threads, None, taxonomy, point)
    _use(load, queries, input, output, as_json=as_json, answers=False, force=False)


@app.command()
def answer(
    queries: Queries = None,
    model: Model = None,
    input: Input = None,
    output: Output = None,
    force: Force = False,
    as_json: AsJson = False,
    threads: Threads = None,
    locale: Locale = None,
    point: PointName = None,
    taxonomy: TaxonomyFile = None,
    answers: AnswersFile = None,
) -> None:
    """Judge queries and give the safeguard answer to the harmful ones; safe ones are left to your LLM."""
    load = partial(_guard, model, None, threads, locale, taxonomy, point, answers)
    _use(load, queries, input, output, as_json=as_json, answers=True, force=force)


@app.command()
def curate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Mix named data sets into a folder of training rows, clean of every evaluation row."""
    from haechi import curate
    from haechi.config import load_config

    curate.run(load_config(curate.CurateConfig, config, overrides or ()), _say)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a model in stages; run it again after a kill and it goes on."""
    from haechi.config import load_config

    module = _extra("haechi.train", "train", "training")
    module.run(load_config(module.TrainConfig, config, overrides or ()), _say)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A trained model folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    precision: Annotated[str, typer.Option(help="int8 or fp32.")] = "int8",
) -> None:
    """Export a trained model to ONNX, which runs without torch."""
    _extra("haechi.export", "export", "exporting").run(model, output, precision, _say)


@app.command()
def calibrate(
    labelled: Annotated[
        str, typer.Argument(help='JSONL of {"query","label"} (and "category"), or a set by name.', show_default=False)
    ],
    model: Model = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Keep a copy of the model with the new points there; default only show.", show_default=False),
    ] = None,
    recall: Annotated[float, typer.Option(min=0, max=1, help="strict catches this share of the unsafe rows.")] = 0.95,
    false_alarms: Annotated[
        float, typer.Option(min=0, max=1, help="permissive flags at most this share of the safe rows.")
    ] = 0.02,
    per_category: Annotated[bool, typer.Option("--per-category", help="Thresholds for each category.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep (.png, .svg, .pdf).", show_default=False)] = None,
) -> None:
    """Refit a model's operating points (strict, balanced, permissive) on your own labelled queries."""
    module = _extra("haechi.calibrate", "eval", "calibrating")
    aims = module.Aims(recall, false_alarms)
    module.run(labelled, model=model, output=output, aims=aims, per_category=per_category, plot=plot, report=typer.echo)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run guards over labelled sets and write verdicts, metrics with intervals, and tables."""
    from haechi.config import load_config

    module = _extra("haechi.evaluate", "eval", "evaluation")
    module.run(load_config(module.EvaluateConfig, config, overrides or ()), _say)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders that evaluate wrote.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for report.html and report.md.")] = Path("results/report"),
) -> None:
    """Merge evaluations that may be compared into one page with tables and figures, and the same as Markdown."""
    _extra("haechi.page", "eval", "the report").run(results, output, _say)


@app.command()
def ablate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train and measure variants of a recipe over several seeds; run it again and only what is missing is done."""
    from haechi.config import load_config

    module = _extra("haechi.ablate", "train", "ablations")
    module.run(load_config(module.AblateConfig, config, overrides or ()), _say)


@app.command()
def review(config: ConfigFile, overrides: Overrides = None) -> None:
    """Compare the answers of two sides by rules, by a chat model, and by people on a blind sheet."""
    from haechi.config import load_config

    module = _extra("haechi.review", "eval", "reviewing")
    module.run(load_config(module.ReviewConfig, config, overrides or ()), _say)


@app.command()
def taxonomy(
    file: Annotated[
        Path | None, typer.Argument(help="A policy file; default the built-in policy.", show_default=False)
    ] = None,
) -> None:
    """Check a policy file and print its categories and version."""
    from haechi.taxonomy import load_taxonomy

    policy = load_taxonomy(file)
    typer.echo(f"{policy.name}  version {policy.version}  languages {', '.join(policy.languages)}")
    for category in policy.categories:
        names = " / ".join(category.name[language] for language in policy.languages)
        typer.echo(f"  {category.group:8} {category.code:28} {names}")


def main() -> None:
    """Run the command line: 0 done, 1 some rows failed, 2 a mistake told in one line, 130 interrupted."""
    if hasattr(signal, "SIGPIPE"):
        # When the reader of our output goes (`| head`), end quietly as other tools do.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app(standalone_mode=True)
    except HaechiError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _extra(module: str, extra: str, feature: str) -> Any:
    """Import a verb's module; a missing package becomes the line that installs it."""
    import importlib

    from haechi.errors import MissingExtra

    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and error.name.split(".")[0] == "haechi":
            raise
        raise MissingExtra(extra, feature) from None


def _guard(
    model: Path | None,
    guard: str | None,
    threads: int | None,
    locale: str | None,
    policy: Path | None,
    point: str | None,
    answers: str | None = None,
) -> Guard:
    from haechi.config import parse_yaml
    from haechi.guards import load_guard
    from haechi.guards.slm import load
    from haechi.modelfolder import DEFAULT_POINT
    from haechi.taxonomy import load_taxonomy

    if guard is not None:
        if any(option is not None for option in (model, policy, threads, point)):
            raise ConfigError("--guard cannot be combined with --model, --taxonomy, --threads or --point")
        return load_guard(parse_yaml(guard, "--guard") if guard.lstrip().startswith("{") else guard)
    return load(
        model,
        threads=threads,
        locale=locale,
        taxonomy=load_taxonomy(policy) if policy else None,
        point=point or DEFAULT_POINT,
        answers=answers,
    )


def _use(
    load: Callable[[], Guard],
    queries: Sequence[str] | None,
    input: str | None,
    output: str | None,
    *,
    as_json: bool,
    answers: bool,
    force: bool,
) -> None:
    """The common part of `check` and `answer`: queries from the command line or a file, rows for people or programs."""
    from haechi import bulk

    if (input is None) == (not queries):
        raise ConfigError("give queries as arguments, or --input FILE (not both)")
    if input is None and output is not None:
        raise ConfigError("--output goes with --input; for queries on the command line use --json")
    guard = load()
    work = bulk.judge(guard, answers=answers, force=force)
    if input is not None and output not in (None, "-"):
        key = f"{guard.identity} answers={answers} force={force}"
        if Path(input).exists() and Path(output).exists() and Path(input).samefile(output):
            raise ConfigError("--input and --output are the same file")
        with _Progress() as show:
            outcome = bulk.to_file(input, Path(output), work, key, show)
    else:
        typed: Iterable[Item] = (bulk.Item(number, query, None) for number, query in enumerate(queries or (), 1))
        items = typed if input is None else bulk.read_items(input)
        outcome = bulk.copy(items, work, _print_rows if as_json or output == "-" else _print_lines)
    if outcome.failed:
        _say(f"{outcome.failed} of {outcome.rows} rows have an error")
    raise typer.Exit(1 if outcome.failed else 0)


def _print_rows(_: Sequence[Item], rows: Rows) -> None:
    from haechi.store import dumps

    for row in rows:
        typer.echo(dumps(row))


def _print_lines(items: Sequence[Item], rows: Rows) -> None:
    """Verdicts and answers for a person."""
    from haechi.store import encodable

    for item, row in zip(items, rows, strict=True):
        if row["error"]:
            word, color, detail = "NO VERDICT", "yellow", row["error"]
        else:
            word, color = ("UNSAFE", "red") if row["unsafe"] else ("safe", "green")
            detail = f"{'' if row['score'] is None else format(row['score'], '.3f')}  {row['category'] or ''}".rstrip()
        query = encodable((item.query or "")[:200])
        typer.echo(f"{typer.style(f'{word:7}', fg=color, bold=True)} {detail:32} {query}")
        if row.get("answer"):
            typer.echo(f"        {typer.style(row['answer'], fg='cyan')}")


class _Progress:
    """A line that counts rows on the error stream when that is a terminal, silent elsewhere."""

    def __enter__(self) -> Callable[[int], None]:
        self._bar: Progress | None = None
        if not sys.stderr.isatty():
            return lambda done: None
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn())
        bar = self._bar = Progress(*columns, console=Console(stderr=True))
        bar.start()
        task = bar.add_task("rows", total=None)
        return lambda done: bar.update(task, completed=done)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


if __name__ == "__main__":
    main()
