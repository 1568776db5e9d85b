"""Null calibration: the same model asked again, never with the answers of the first time, and never mistaken for the baseline."""

import contextlib
import json
import random
import re

import pytest
from test_suite import mistakes_of
from typer.testing import CliRunner

from harness.answering import dealt_anew
from harness.cli import app
from harness.engines import Request, Sampling
from harness.engines.scripted import ScriptedEngine
from harness.null_variants import baseline_of, twin_of, without_nulls
from harness.plan import make_plan
from harness.records import read_samples
from harness.store import Store
from harness.suite import load_suite
from tests.asking import evaluate

NULL = '[[variant]]\nname = "again"\nmethod = "bf16"\nsampling_seed = 1\n\n'


def with_null(text: str, null: str = NULL) -> str:
    """`text` with another variant before its first one: the order of a file decides nothing."""
    return text.replace("[[variant]]", f"{null}[[variant]]", 1)


# what a suite may say


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('method = "bf16"', 'method = "bf16"\nsampling_seed = 1', "variant: with sampling_seed, bf16 shows what chance does, and nothing"),
        ("[[variant]]", NULL.replace("sampling_seed = 1\n", "") + "[[variant]]", "variant: again and bf16 are one BF16 model, asked alike"),
        ("[[variant]]", NULL + NULL.replace("again", "third") + "[[variant]]", "variant: again and third are one BF16 model, asked alike"),
        ("[[variant]]", NULL.replace("= 1", "= 0") + "[[variant]]", 'variant "again": sampling_seed: found 0, the seed that answers to mini_math'),
        ("[[variant]]", NULL.replace("= 1", "= -1") + "[[variant]]", r"variant\[0\].sampling_seed: found -1"),
        ("[[variant]]", NULL.replace("= 1", "= 1.5") + "[[variant]]", r"variant\[0\].sampling_seed: found 1.5"),
    ],
)  # fmt: skip
def test_a_null_that_measures_nothing_is_refused_with_what_to_do(tiny_suite, old, new, message):
    (line,) = mistakes_of(tiny_suite, tiny_suite.read_text().replace(old, new, 1))
    assert re.match(message, line), line


def test_a_sampling_seed_without_a_task_has_no_effect(tiny_suite):
    text = with_null(tiny_suite.read_text())
    text = text[: text.index("[[task]]")] + text[text.index("[engine]") :]
    assert mistakes_of(tiny_suite, text) == ['variant "again": sampling_seed: has no effect: no task is asked; remove it']


def test_the_null_comes_after_the_baseline_and_is_none(tiny_suite):
    tiny_suite.write_text(with_null(tiny_suite.read_text()))
    suite = load_suite(tiny_suite)
    assert [variant.name for variant in suite.variants] == ["bf16", "again", "ptq", "qad", "qat"]
    assert suite.baseline.name == "bf16"


def test_a_null_may_be_asked_of_the_same_server_and_nothing_else_may(tiny_suite):
    endpoint = 'endpoint = { url = "http://a:8000/v1", model = "m" }'
    text = tiny_suite.read_text()
    text = text[: text.index("[quantization]")] + f'[[variant]]\nname = "bf16"\nmethod = "bf16"\n{endpoint}\n\n'
    text += '[[task]]\nname = "mini_math"\n[engine]\nkind = "server"\n'
    tiny_suite.write_text(with_null(text, NULL.strip() + f"\n{endpoint}\n\n"))
    suite = load_suite(tiny_suite)
    stages = make_plan(suite, Store(tiny_suite.parent / "cache")).stages
    assert len({stage.key for stage in stages if stage.kind == "evaluate"}) == 2
    alike = NULL.replace("sampling_seed = 1\n", "").strip() + f"\n{endpoint}\n\n"
    assert any(
        'the same server and model as of variant "again"' in line for line in mistakes_of(tiny_suite, with_null(text, alike))
    )


# keys


def test_a_null_changes_no_key_of_the_others_and_has_answers_of_its_own_and_no_new_diagnostics(tiny_suite, tmp_path):
    text = tiny_suite.read_text()
    before = make_plan(load_suite(tiny_suite), Store(tmp_path / "cache")).stages
    assert all(
        set(stage.sections) == {"engine", "repeats", "seed"} and stage.sections["seed"] == 0
        for stage in before
        if stage.kind == "evaluate"
    )
    tiny_suite.write_text(with_null(text))
    after = make_plan(load_suite(tiny_suite), Store(tmp_path / "cache")).stages
    added = [stage for stage in after if stage.variant is not None and stage.variant.name == "again"]
    assert [stage.key for stage in after if stage not in added] == [stage.key for stage in before]
    known = {stage.key: stage.kind for stage in before}
    assert {stage.kind: known.get(stage.key) for stage in added} == {
        "evaluate": None,
        "score": None,
        "diagnostics": "diagnostics",
    }
    tiny_suite.write_text(with_null(text, NULL.replace("= 1", "= 2")))
    other = make_plan(load_suite(tiny_suite), Store(tmp_path / "cache")).stages
    differs = {stage.kind for stage, now in zip(after, other, strict=True) if stage.key != now.key}
    assert differs == {"evaluate", "score"}


def test_a_trained_variant_asked_again_is_not_trained_again(tiny_suite, tmp_path):
    text = tiny_suite.read_text()
    tiny_suite.write_text(with_null(text, '[[variant]]\nname = "qad-again"\nmethod = "qad"\nsampling_seed = 1\n\n'))
    plan = make_plan(load_suite(tiny_suite), Store(tmp_path / "cache"))
    assert plan.checkpoint_of["qad"] is plan.checkpoint_of["qad-again"]
    assert sum(stage.kind == "train" for stage in plan.stages) == 2


def test_answers_that_diagnostics_measure_on_are_those_of_the_baseline(tiny_suite, tmp_path):
    text = tiny_suite.read_text().replace('data = "text"\nsamples = 12', 'on = "answers"\nsamples = 12')
    tiny_suite.write_text(with_null(text))
    stages = make_plan(load_suite(tiny_suite), Store(tmp_path / "cache")).stages
    given = {s.inputs["answers mini_math"].key for s in stages if s.kind == "diagnostics"}
    assert given == {s.key for s in stages if s.label == "bf16: mini_math"}


def test_the_records_of_a_run_know_the_baseline_and_what_was_asked_again():
    ptq = {"method": "ptq", "quantization": {"scale_rule": "amax"}}
    variants = [
        {"name": "again", "method": "bf16", "sampling_seed": 1},
        {"name": "bf16", "method": "bf16", "sampling_seed": None},
        {"name": "ptq", **ptq},
        {"name": "ptq-again", **ptq, "sampling_seed": 1},
        {"name": "other", **ptq, "quantization": {"scale_rule": "mse"}, "sampling_seed": 1},
    ]
    assert baseline_of(variants) == "bf16" and baseline_of(variants[:1]) is None
    twins = [None if (twin := twin_of(variant, variants)) is None else twin["name"] for variant in variants]
    assert twins == ["bf16", None, None, "ptq", None]
    assert [variant["name"] for variant in without_nulls(variants)] == ["bf16", "ptq", "other"]


# batches


def asked(n: int, *, seed: int | None = None, continuation: tuple[int, ...] | None = None) -> Request:
    sampling = None if continuation else Sampling(max_tokens=4, until=())
    return Request(token_ids=(1, n), sampling=sampling, continuation=continuation, seed=seed)


def test_batches_keep_their_sizes_and_kinds_and_what_draws_keeps_its_place():
    requests = (
        [asked(i) for i in range(20)] + [asked(i, continuation=(5,)) for i in range(6)] + [asked(i, seed=i) for i in range(4)]
    )
    batches = [list(range(8)), list(range(8, 16)), [16, 17, 18, 19, 26, 27], [20, 21, 22], [23, 24, 25, 28, 29]]
    assert dealt_anew(batches, requests, None) == batches
    found = dealt_anew(batches, requests, 1)
    assert sorted(i for members in found for i in members) == list(range(30))
    kinds = [[(requests[i].sampling is None, requests[i].seed) for i in members] for members in batches]
    assert [[(requests[i].sampling is None, requests[i].seed) for i in members] for members in found] == kinds
    assert set(found[0]) != set(batches[0]) and set(found[1]) != set(batches[1])
    assert found != dealt_anew(batches, requests, 2)


def test_the_order_follows_from_the_seed_and_the_requests_alone():
    requests = [asked(i) for i in range(40)]
    order = [requests[i] for i in dealt_anew([list(range(40))], requests, 7)[0]]
    left = random.Random(0).sample(requests, 25)  # what a killed run left to ask, in whatever order
    again = [left[i] for i in dealt_anew([list(range(25))], left, 7)[0]]
    assert again == [request for request in order if request in left]


# answers and journals


def prompts_of(engine: ScriptedEngine) -> list[tuple[int, ...]]:
    return [request.token_ids for request in engine.asked]


@pytest.mark.parametrize("depends", [True, False])
@pytest.mark.parametrize("name", ["mini_recall", "mini_choice"])
def test_greedy_answers_and_likelihoods_are_asked_anew_in_another_order_and_kept_apart(name, depends, tiny_tokenizer, tmp_path):
    def engine() -> ScriptedEngine:
        return ScriptedEngine(tiny_tokenizer, lambda prompt: "x", batch_size=8, answers_depend_on_batch=depends)

    first, null, again = engine(), engine(), engine()
    plain = evaluate(name, first, tmp_path, limit=20)
    other = evaluate(name, null, tmp_path, limit=20, batch_plan=1)
    assert len(null.asked) == len(first.asked)  # nothing came from the journal of the first
    assert prompts_of(null) != prompts_of(first) and sorted(prompts_of(null)) == sorted(prompts_of(first))
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2
    protocols = [json.loads(path.read_text().splitlines()[0])["protocol"] for path in tmp_path.rglob("*.jsonl")]
    assert sorted(protocol.get("batch_plan", 0) for protocol in protocols) == [0, 1]
    assert all(row["batch_plan"] == 1 for row in other.samples) and not any("batch_plan" in row for row in plain.samples)
    assert [row["requests"] for row in other.samples] == [row["requests"] for row in plain.samples]
    assert evaluate(name, again, tmp_path, limit=20, batch_plan=1).samples == other.samples and not again.asked


def test_an_interrupted_null_plans_the_same_batches_again(tiny_tokenizer, tmp_path):
    def run(folder, *, n_batches=None):
        engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "x")
        answer = engine.answer

        def stop(batch):
            if engine.n_batches == n_batches:
                raise KeyboardInterrupt
            return answer(batch)

        engine.answer = stop
        with contextlib.suppress(KeyboardInterrupt):
            evaluate("mini_math", engine, tmp_path / folder, batch_plan=3, limit=64)
        return prompts_of(engine)

    assert run("killed", n_batches=5) + run("killed") == run("whole")


def test_sampled_answers_are_drawn_with_seeds_derived_from_the_nulls_own(tiny_tokenizer, tmp_path):
    settings = {"limit": 6, "repeats": 3, "sampling": {"temperature": 1.0}}
    first, null = (ScriptedEngine(tiny_tokenizer, lambda prompt: "x") for _ in range(2))
    plain = evaluate("mini_math", first, tmp_path, **settings)
    other = evaluate("mini_math", null, tmp_path, seed=1, batch_plan=1, **settings)
    seeds = [{row["seed"] for row in found.samples} for found in (plain, other)]
    assert len(seeds[0]) == len(seeds[1]) == 18 and not seeds[0] & seeds[1]
    assert prompts_of(null) == prompts_of(first)  # what draws is planned as before
    assert not any("batch_plan" in row for row in other.samples)


# the whole way

SUITE = """
schema = 1
name = "null"

[model]
path = "{model}"

[data.text]
source = "builtin"
seq_len = 512

[[variant]]
name = "again"
method = "bf16"
sampling_seed = 5

[[variant]]
name = "bf16"
method = "bf16"

[[task]]
name = "mini_choice"
limit = 6

[[task]]
name = "mini_math"
limit = 6
repeats = 2
sampling = {{ temperature = 1.0, max_tokens = 8 }}

[engine]
kind = "hf"
args = {{ batch_size = 4 }}

[diagnostics]
data = "text"
samples = 4
"""


@pytest.fixture
def ran(tiny_model, tmp_path, text_at_hand):
    """Runs the suite; its run folder, and what was printed."""
    text_at_hand()

    def run():
        (tmp_path / "null.toml").write_text(SUITE.format(model=tiny_model))
        done = CliRunner().invoke(app, ["run", str(tmp_path / "null.toml"), "--results", str(tmp_path / "results")])
        assert done.exit_code == 0, done.output
        (folder,) = [path.parent for path in (tmp_path / "results" / "null").glob("*/run.json")]
        return folder, done.output

    return run


def test_a_run_with_a_null_prints_the_noise_floor_and_measures_the_weights_once(ran, tmp_path):
    folder, printed = ran()
    about = json.loads((folder / "run.json").read_text())
    assert [(v["name"], v["sampling_seed"]) for v in about["variants"]] == [("bf16", None), ("again", 5)]
    measured = [stage["key"] for stage in about["stages"] if stage["kind"] == "diagnostics"]
    assert len(measured) == 2 and len(set(measured)) == 1
    rows = {name: read_samples(folder / "samples" / f"{name}.mini_math.jsonl.zst") for name in ("bf16", "again")}
    assert all(a["seed"] != b["seed"] for a, b in zip(rows["bf16"], rows["again"], strict=True))
    assert [row["response"] for row in rows["bf16"]] != [row["response"] for row in rows["again"]]
    likelihoods = read_samples(folder / "samples" / "again.mini_choice.jsonl.zst")
    assert all(row["batch_plan"] == 5 for row in likelihoods)
    assert len(list((tmp_path / "results" / "journals").rglob("*.jsonl"))) == 4
    (floor,) = json.loads((folder / "table.json").read_text())["noise_floors"]
    assert (floor["variant"], floor["baseline"], floor["sampling_seed"], floor["kl"]) == ("again", "bf16", 5, 0.0)
    for task in ("mini_choice", "mini_math"):
        found = floor["tasks"][task]
        assert found["n_questions"] == 6 and found["low"] < found["delta"] < found["high"]
    note = "Noise floor: again is bf16 asked again (sampling_seed 5), so chance alone is behind these differences in points (95 % intervals): mini_choice "
    assert note in " ".join(printed.split()) and note in (folder / "table.md").read_text()
    assert "KL 0.000" in (folder / "table.md").read_text()
    assert "nothing to do" in ran()[1]
