"""Training: resumes to the bit after kill -9, adapters merge, embeddings stay right, two processes agree."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import ROOT, examples, llama_folder, tiny_bert, tiny_config, write_curated
from haechi import answers, export, train
from haechi.errors import ConfigError, DataError, ModelError
from haechi.guards.slm import load
from haechi.modelfolder import read_sheet
from haechi.normalise import normalise
from haechi.schema import Example
from haechi.taxonomy import load_taxonomy
from haechi.template import Row, pack
from haechi.train.config import Lora, Shrink, Stage, TrainConfig, Vocabulary
from haechi.train.data import Both, RowSource, Source, Switched, TextSource, Weighted, read_rows
from haechi.train.loop import learning_rate
from haechi.train.model import NarrowHead, load_base
from haechi.train.shrink import shrunk


def quiet(line: str) -> None:
    pass


def shown(source: Source) -> list[Row]:
    """Every row a source shows, in order."""
    return [row for step in range(len(source)) for rows in source.passes(step) for row in rows]


def command(config: TrainConfig, folder: Path, launcher: tuple[str, ...] = ("-m", "haechi.cli")) -> list[str]:
    """A training process of its own over `config`."""
    file = folder / "config.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(config.model_dump_json(), encoding="utf-8")
    return [sys.executable, *launcher, "train", str(file)]


def test_a_killed_run_ends_with_the_same_bits(bert_base: Path, curated: Path, tmp_path: Path) -> None:
    stages = (
        Stage(
            name="first", rows=curated, epochs=8, batch_tokens=256, forward_tokens=128, lr=3e-3, vocabulary_sample=300
        ),
        Stage(
            name="second", rows=curated, epochs=8, batch_tokens=128, lr=3e-3, validate_every=7, average=0.9, keep=0.3
        ),
    )
    whole, cut = (
        tiny_config(bert_base, tmp_path / name, curated, stages=stages, checkpoint_every=2, dropout=0.1)
        for name in ("whole", "cut")
    )
    expected = load_file(train.run(whole, quiet) / "model.safetensors")
    progress = cut.output / "checkpoint" / "progress.json"
    for stage in (0, 1):
        process = subprocess.Popen(command(cut, tmp_path / "files"), cwd=ROOT, stderr=subprocess.DEVNULL)
        # Kill as soon as the stage has a checkpoint: between two moments nobody chose.
        while process.poll() is None:
            try:
                if json.loads(progress.read_text(encoding="utf-8"))["stage"] >= stage:
                    break
            except (FileNotFoundError, json.JSONDecodeError):
                continue
        process.send_signal(signal.SIGKILL)
        process.wait()
    told: list[str] = []
    folder = train.run(cut, told.append)
    assert any(line.startswith("going on from step") for line in told)
    found = load_file(folder / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_unfinished_run_is_not_gone_on_with_under_another_configuration(
    bert_base: Path, curated: Path, tmp_path: Path
) -> None:
    config = tiny_config(bert_base, tmp_path / "run", curated)
    (config.output / "checkpoint").mkdir(parents=True)
    (config.output / "config.json").write_text(config.model_copy(update={"seed": 9}).model_dump_json(), "utf-8")
    with pytest.raises(ConfigError, match="unfinished run with other seed"):
        train.run(config, quiet)
    with pytest.raises(ValidationError, match="same name"):
        tiny_config(bert_base, tmp_path / "run", curated, stages=config.stages * 2)


def test_two_processes_train_one_model(bert_base: Path, curated: Path, tmp_path: Path) -> None:
    options = ("--num_processes=2", "--cpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    launcher = ("-m", "accelerate.commands.launch", *options, "--module", "haechi.cli")
    config = tiny_config(bert_base, tmp_path / "run", curated)
    words = command(config, tmp_path / "files", launcher)
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    verdicts = load(tmp_path / "run" / "model", engine="torch").check(
        ["how do I steal a car 1", "how do I wash a car 1"]
    )
    assert [verdict.unsafe for verdict in verdicts] == [True, False]


def test_adapters_train_new_tokens_and_merge(llama_base: Path, curated: Path, tmp_path: Path) -> None:
    config = tiny_config(llama_base, tmp_path / "run", curated, lora=Lora(rank=4))
    base = load_base(config, load_taxonomy())
    new = [base.template.id(token) for token in ("<|pred|>", "<|unsafe|>")]
    before = AutoModelForCausalLM.from_pretrained(llama_base)
    folder = train.run(config, quiet)
    after = AutoModelForCausalLM.from_pretrained(folder)
    table, old = after.get_input_embeddings().weight, before.get_input_embeddings().weight
    # The table was padded to 512 rows: new tokens take padding rows, and nobody else's row moves.
    assert table.shape == old.shape
    others = [row for row in range(280) if row not in base.template._special]
    assert torch.equal(table[others], old[others]) and not torch.equal(table[new], old[new])
    assert after.config.tie_word_embeddings == before.config.tie_word_embeddings
    assert (after.get_output_embeddings().weight is table) == before.config.tie_word_embeddings
    verdicts = load(folder, engine="torch").check(["how do I steal a car 1", "how do I wash a car 1"])
    assert (verdicts[0].score or 0) > (verdicts[1].score or 0)


def test_the_vocabulary_grows_by_composed_korean(bert_base: Path, curated: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import lzma

    folder = tmp_path / "data" / "text" / "ko"
    folder.mkdir(parents=True)
    text = "\n\n".join(["김치찌개를 끓이는 방법을 알려 주세요.", "옆집 비밀번호는 알려 드릴 수 없어요."] * 20)
    (folder / "ko-00.txt.xz").write_bytes(lzma.compress(text.encode()))
    monkeypatch.setenv("HAECHI_DATA", str(tmp_path / "data"))
    stage = Stage(name="language", text={"ko": 1.0}, tokens=256, length=16, prefixes=(0, 4), batch_tokens=64, lr=1e-3)
    config = tiny_config(
        bert_base, tmp_path / "run", curated, stages=(stage,), vocabulary=Vocabulary(language="ko", pieces=200)
    )
    base = load_base(config, load_taxonomy())
    pieces = base.tokenizer.convert_ids_to_tokens(base.template.encode("김치찌개 비밀번호"))
    assert all("가" <= piece.removeprefix("##")[0] <= "힣" for piece in pieces), pieces
    assert base.template.decode(base.template.encode("옆집 비밀번호")) == "옆집 비밀번호"
    assert base.model.get_input_embeddings().weight.shape[0] == len(base.tokenizer)
    text = TextSource(stage, base.template, 0, tmp_path / "cache")
    rows = RowSource([Weighted(row, 1) for row in examples()], stage, base.template, 0, steps=len(text))
    both = Both(text, rows)
    # Rows beside text are dealt evenly: none lost, no step with more than its share.
    assert len(both) == len(text) and len(shown(both)) == len(shown(text)) + len(examples())

    def read(**changes: int) -> list[list[int]]:
        """The token rows of the text, sorted."""
        source = TextSource(stage.model_copy(update=changes), base.template, 0, tmp_path / "cache")
        return sorted([*row.query[1:], *row.branches[0].ids, *row.branches[0].labels[-1:]] for row in shown(source))

    assert sorted(read(tokens=128) + read(tokens=128, skip=128)) == read()
    with pytest.raises(DataError, match="ends before 1000016 tokens"):
        read(skip=1_000_000)
    shares = [sum(map(len, rows.passes(step))) for step in range(len(rows))]
    assert max(shares) - min(shares) <= 1
    assert {len(row.query) for row in shown(text)} <= {1, 5}
    assert train.run(config, quiet).is_dir()
    # With a glossary a piece starts as its English words, and queries can be put in the other language by it.
    (tmp_path / "glossary.tsv").write_text("비밀번호\taddress\n끓이는\twash a\n", encoding="utf-8")
    glossed = Vocabulary(language="ko", pieces=200, rows=curated, glossary=tmp_path / "glossary.tsv")
    stage = Stage(name="safety", rows=curated, lr=1e-3, code_switch=1.0)
    config = tiny_config(bert_base, tmp_path / "glossed", curated, stages=(stage,), vocabulary=glossed)
    base = load_base(config, load_taxonomy())
    table = base.model.get_input_embeddings().weight
    korean, english, *two = (base.template.id(word) for word in ("비밀번호", "address", "끓이는", "wash", "a"))
    assert torch.equal(table[korean], table[english]) and base.counterparts == {korean: [english], english: [korean]}
    assert torch.allclose(table[two[0]], table[two[1:]].mean(0))
    rows = RowSource([Weighted(row, 1) for row in examples()], stage, base.template, 0)
    switched = shown(Switched(rows, base.counterparts, stage, 0))
    plain, found = (
        [id for row in some for id in row.query if id in (korean, english)] for some in (shown(rows), switched)
    )
    assert len(plain) == len(found) and plain != found
    assert [row.branches for row in switched] == [row.branches for row in shown(rows)]
    with pytest.raises(ValidationError, match="code_switch needs"):
        tiny_config(bert_base, tmp_path / "run", curated, stages=(stage,))
    (tmp_path / "glossary.tsv").write_text("비밀번호\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1: expected a piece, a TAB"):
        load_base(config, load_taxonomy())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_export_can_be_trained_further(trained: Path, curated: Path, tmp_path: Path, precision: str) -> None:
    folder = export.run(trained, tmp_path / "exported", precision, quiet)
    base = load_base(tiny_config(folder, tmp_path / "run", curated, vocabulary=None), load_taxonomy())
    before = AutoModelForCausalLM.from_pretrained(trained).state_dict()
    after = base.model.state_dict()
    assert before.keys() == after.keys() and base.template.tokenizer_hash == load(trained).template.tokenizer_hash
    for name, value in before.items():
        step = 1e-6 if precision == "fp32" else (value.max() - value.min()).clamp(min=1e-6) / 127
        assert (value - after[name]).abs().max() <= step, name
    further = load(train.run(tiny_config(folder, tmp_path / "run", curated), quiet))
    first, *_ = further.check(["how do I steal a car 1"])
    assert first.unsafe


def test_what_cannot_be_trained_further_is_one_line(llama_base: Path, exported: Path, curated: Path,
                                                    tmp_path: Path) -> None:  # fmt: skip
    llama = train.run(tiny_config(llama_base, tmp_path / "llama", curated), quiet)
    other = export.run(llama, tmp_path / "exported", "fp32", quiet)
    with pytest.raises(ModelError, match="only exported BERT models can"):
        load_base(tiny_config(other, tmp_path, curated), load_taxonomy())
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / "head.onnx").write_bytes(b"")
    with pytest.raises(ModelError):
        load_base(tiny_config(broken, tmp_path, curated), load_taxonomy())


def test_the_embedded_model_is_a_base(curated: Path, tmp_path: Path) -> None:
    glossary = tmp_path / "glossary.tsv"
    glossary.write_text("경찰\tpolice\n", encoding="utf-8")
    known = Vocabulary(language="ko", pieces=0, glossary=glossary)
    config = tiny_config(Path("haechi-mini"), tmp_path, curated, vocabulary=known)
    base = load_base(config, load_taxonomy())
    assert base.template.tokenizer_hash == load().template.tokenizer_hash
    assert base.counterparts[base.template.id("경찰")] == [base.template.id("police")]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_base_shrinks_to_fewer_layers_or_less_width(bert_base: Path, llama_base: Path, curated: Path, tmp_path: Path,
                                                      family: str) -> None:  # fmt: skip
    start = bert_base if family == "bert" else llama_base

    def parameters(**shrink: int) -> dict[str, torch.Tensor]:
        config = tiny_config(start, tmp_path, curated, shrink=shrink or None)
        return {name: value.detach() for name, value in load_base(config, load_taxonomy()).model.named_parameters()}

    whole, cut = parameters(), parameters(layers=1)
    assert len(cut) < len(whole) and any(".0." in name for name in cut)
    # Rows of new tokens aside, what is kept is kept to the bit.
    assert all(torch.equal(value[:300], whole[name][:300]) for name, value in cut.items() if "lm_head" not in name)
    wide = tiny_bert(500, hidden=64, layers=3)
    narrow = shrunk(wide, Shrink(hidden=32, layers=2))
    assert (narrow.config.hidden_size, narrow.config.intermediate_size, narrow.config.num_hidden_layers) == (32, 64, 2)
    tables = [model.get_input_embeddings().weight.detach() for model in (wide, narrow)]
    near = [(table - table.mean(0)) @ (table - table.mean(0)).T for table in tables]
    assert torch.corrcoef(torch.stack([one.flatten() for one in near]))[0, 1] > 0.8
    with pytest.raises(ModelError, match="shrink asks for 9 layers"):
        parameters(layers=9)
    with pytest.raises(ModelError, match="multiple of 32, not 16"):
        parameters(hidden=16)


def test_tasks_may_be_asked_for_in_words(bert_base: Path, curated: Path, llama_base: Path, tmp_path: Path) -> None:
    prompt = {"window": 64, "overlap": 16, "answer": 32, "tasks": "words"}
    folder = train.run(tiny_config(bert_base, tmp_path / "run", curated, prompt=prompt), quiet)
    guard = load(folder, engine="torch")
    assert guard.template.labels == tuple(guard.template.encode("safe unsafe"))
    answers = guard.answer(["how do I steal a car 1", "how do I wash a car 1"])
    assert [answer.verdict.unsafe for answer in answers] == [True, False] and answers[0].verdict.category
    assert answers[0].text
    with pytest.raises(ModelError, match="'safe' and 'unsafe' as one token each"):
        load_base(tiny_config(llama_base, tmp_path / "other", curated, prompt=prompt), load_taxonomy())


def test_a_narrow_head_scores_what_it_is_told_and_can_be_freed(bert_base: Path, curated: Path, tmp_path: Path) -> None:
    base = load_base(tiny_config(bert_base, tmp_path, curated), load_taxonomy())
    ids = torch.tensor([base.template.encode("how do I steal a car")])
    full = base.model(input_ids=ids).logits
    head = NarrowHead(base.model)
    head.positions = torch.tensor([1, 3])
    torch.testing.assert_close(base.model(input_ids=ids).logits, full[0, [1, 3]])
    head.candidates, head.offsets = torch.tensor([5, 9, 30]), torch.tensor([0.0, 0.0, 1.0])
    torch.testing.assert_close(base.model(input_ids=ids).logits, full[0, [1, 3]][:, [5, 9, 30]] + head.offsets)
    head.free()
    assert torch.equal(base.model(input_ids=ids).logits, full)


def test_a_model_of_ours_as_a_base_keeps_what_its_tokens_learnt(trained: Path, curated: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "extends: default\ncategories: [{code: fakes, group: legal, name: {en: F, ko: 가}, definition: {en: d, ko: d}, "
        "examples: {en: [e], ko: [e]}}]",
        encoding="utf-8",
    )
    base = load_base(tiny_config(trained, tmp_path, curated), load_taxonomy(policy))
    before = AutoModelForCausalLM.from_pretrained(trained).get_input_embeddings().weight
    after = base.model.get_input_embeddings().weight
    assert len(after) == len(before) + 1 == base.template.id("<|fakes|>") + 1
    assert torch.equal(after[:-1], before)


def test_early_stopping_keeps_the_best_weights(bert_base: Path, curated: Path, tmp_path: Path) -> None:
    stage = Stage(name="safety", rows=curated, epochs=200, batch_tokens=256, lr=0.3, validate_every=2, patience=2)
    folder = train.run(tiny_config(bert_base, tmp_path / "run", curated, stages=(stage,)), quiet)
    history = read_sheet(folder).metrics["training"]["safety"]["validation"]
    losses = [entry["loss"] for entry in history]
    best = losses.index(min(losses))
    assert len(losses) - best <= 4 and history[-1]["step"] < 200


def test_a_stage_keeps_a_share_of_what_it_began_with(trained: Path, curated: Path, tmp_path: Path) -> None:
    def weights(keep: float) -> dict[str, torch.Tensor]:
        stage = Stage(name="safety", rows=curated, batch_tokens=256, lr=3e-3, keep=keep)
        folder = train.run(tiny_config(trained, tmp_path / str(keep), curated, stages=(stage,)), quiet)
        return load_file(folder / "model.safetensors")

    before, after, kept = load_file(trained / "model.safetensors"), weights(0), weights(0.25)
    assert before.keys() == after.keys() == kept.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in before:
        torch.testing.assert_close(kept[name], 0.25 * before[name] + 0.75 * after[name])


def test_force_share_and_repeats_are_counted_per_row(bert_base: Path, curated: Path, tmp_path: Path) -> None:
    template = load_base(tiny_config(bert_base, tmp_path, curated), load_taxonomy()).template
    rows = [Weighted(row, 1) for row in examples(50)]
    stage = Stage(name="s", rows=curated, lr=1.0, batch_tokens=512)
    source = RowSource(rows, stage, template, 0)
    seen = shown(source)
    forced = sum(any(template.id("<|harm|>") in branch.ids for branch in row.branches) for row in seen)
    assert len(seen) == len(rows) and 0.2 < forced / (len(rows) / 2) < 0.4
    tripled = RowSource([Weighted(row.example, 3) for row in rows[:8]], stage, template, 0)
    rendered = shown(tripled)
    assert len(rendered) == 24 and sum(len(row.branches) > 1 for row in rendered) == 8
    seldom = RowSource([Weighted(row.example, 0.25) for row in rows], stage, template, 0)
    assert 0.15 < len(shown(seldom)) / len(rows) < 0.35


def test_a_step_is_a_random_draw_cut_into_passes_of_like_shape(bert_base: Path, curated: Path, tmp_path: Path) -> None:
    template = load_base(tiny_config(bert_base, tmp_path, curated), load_taxonomy()).template
    draw = random.Random(0)
    rows = [
        Weighted(
            row.model_copy(
                update={"query": row.query * draw.randint(1, 5), "response": draw.choice(("No.", row.response))}
            ),
            1,
        )
        for row in examples(20)
    ]
    stage = Stage(name="s", rows=curated, lr=1.0, batch_tokens=1024, forward_tokens=768)
    source = RowSource(rows, stage, template, 0)
    steps = [source.passes(step) for step in range(len(source))]
    assert len(shown(source)) == len(rows)
    assert all(sum(row.tokens for rows in step for row in rows) <= 1024 for step in steps)
    padded = [pack(rows, align=False).ids.size for step in steps for rows in step]
    assert max(padded) <= 768 and sum(padded) < 1.4 * sum(row.tokens for row in shown(source))
    labels = [{row.branches[0].labels[0] for rows in step for row in rows} for step in steps[:-1]]
    assert all(len(both) == 2 for both in labels)


def test_rows_are_wrapped_and_then_read_as_a_guard_reads_them(trained: Path) -> None:
    template = load(trained, engine="torch").template
    rows = [Weighted(row.model_copy(update={"query": "hоw dо i brеw tea"}), 1) for row in examples(60)]
    stage = Stage(name="s", rows=Path("x"), lr=1.0, wrapped=0.5)

    def queries(*, shuffle: bool) -> list[str]:
        source = RowSource(rows, stage, template, 0, read=normalise, shuffle=shuffle)
        # A tiny model's window cuts the longer wrappers.
        return [template.decode(row.query) for row in shown(source) if len(row.query) < template.settings.window]

    assert set(queries(shuffle=False)) == {template.decode(template.encode("how do i brew tea"))}
    seen = queries(shuffle=True)
    (bare,) = set(queries(shuffle=False))
    assert 0.3 < seen.count(bare) / len(seen) < 0.7 and all(bare in query for query in seen)


def test_harmless_rows_can_learn_to_hand_over(trained: Path) -> None:
    template = load(trained, engine="torch").template
    rows = [Weighted(row, 1) for row in examples(40)]
    stage = Stage(name="s", rows=Path("x"), lr=1.0, defer=0.5, force_share=0.0)
    replies = defaultdict(list)
    for row in shown(RowSource(rows, stage, template, 0)):
        classify, *answer = row.branches
        replies[classify.labels[0]].append(template.decode(answer[0].ids[1:]) if answer else None)
    safe, unsafe = (replies[label] for label in template.labels)
    assert 0.35 < safe.count(None) / len(safe) < 0.65 and None not in unsafe
    expected = {template.decode(template.encode(text)) for lang in ("en", "ko") for text in answers.deferrals(lang)}
    assert len(set(safe) - {None}) > 3 and all(
        any(text.startswith(reply) for text in expected) for reply in set(safe) - {None}
    )


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    stage = Stage(name="s", rows=Path("x"), lr=1.0, warmup=0.1)
    rates = [learning_rate(stage, step, 100) for step in range(100)]
    assert max(rates) == rates[10] == 1.0 and rates[0] == 0.1 and rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_validation_rows_fit_the_operating_point(trained: Path) -> None:
    sheet = read_sheet(trained)
    assert sheet.temperature != 1.0 and list(sheet.points) == ["strict", "balanced", "permissive"]
    assert (sheet.points["balanced"].weighted_f1 or 0) > 0.9 and sheet.metrics["calibration"]["auroc"] > 0.9
    assert sheet.taxonomy_version == load_taxonomy().version and len(sheet.trained_on["safety"]["train"]) == 64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": "no/such-model"}, ModelError, "cannot load the base model 'no/such-model'"),
        ({"base": "package:no_such_package"}, ModelError, "pip install 'haechi"),
        ({"stages": (Stage(name="s", rows=Path("nowhere"), lr=1.0),)}, DataError, "make it with 'haechi curate"),
        ({"prompt": {"window": 500, "overlap": 16, "answer": 32}}, ModelError, "exceeds the base's 512 positions"),
        ({"prompt": {"wrap": "chat"}}, ModelError, "chat template"),
    ],
)
def test_what_cannot_be_trained_is_one_line(bert_base: Path, curated: Path, tmp_path: Path, changes: dict[str, object],
                                            error: type[Exception], message: str) -> None:  # fmt: skip
    with pytest.raises(error) as caught:
        train.run(tiny_config(bert_base, tmp_path / "run", curated, **changes), quiet)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="haechi curate"):
        read_rows(tmp_path, "train")
    row = Example(id="1", lang="en", query="x", label="safe")
    assert read_rows(write_curated(tmp_path / "c", [row]), "train") == [Weighted(row, 1)]


def test_llama_folder_is_what_it_says(tmp_path: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(llama_folder(tmp_path, tied=True)).config.vocab_size == 512
