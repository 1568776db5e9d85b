"""Text that the model writes itself: seeds, scorers, what is kept, resuming, budgets; and the sampling of the hf engine."""

import json
import shutil
from dataclasses import replace
from itertools import count

import pytest
import torch
from test_end_to_end import harness

from harness.data import SPLITS, split_of
from harness.dialogues import Turn
from harness.engines import Request, Sampling
from harness.engines.hf import HfEngine, SeededDraws
from harness.engines.scripted import ScriptedEngine
from harness.errors import DataError, EngineError
from harness.generation import Ask, bos_asks, generate, row_asks, seed_of, turn_ask
from harness.journal import Journal
from harness.rows import FilteredRows
from harness.schema_data import Bos, Jsonl, Teacher
from harness.scorers import score_gsm8k, score_mini_math
from harness.token_store import StoredSequences, TokenWriter

END = "<|end|>"


def teacher(**keys) -> Teacher:
    return Teacher(source="teacher", prompts="asked", engine="hf", **({"max_tokens": 40} | keys))


def generated(tmp_path, engine, section, asks, folder="stage"):
    """The splits of what is generated, and the record."""
    target = tmp_path / folder
    target.mkdir(exist_ok=True)
    with Journal(tmp_path / "journals", {"weights": "w", "task": "data"}) as journal, TokenWriter(target) as writer:
        record = generate("made", section, iter(asks), writer, engine=engine, journal=journal, on_progress=lambda *n: None)
    return {split: StoredSequences(target, split) for split in SPLITS}, record["responses"]


def sums(tokenizer, n=20) -> list[Ask]:
    return [turn_ask(i, Turn(f"What is {i} + 1?", f"#### {i + 1}"), tokenizer) for i in range(1, n + 1)]


def number_in(prompt: str) -> int:
    return int(prompt.split("What is ")[1].split(" ")[0])


# scorers


@pytest.mark.parametrize(
    ("reference", "response", "score"),
    [
        ("48/2 = 24\n#### 72", "The answer is 72.", True),
        ("#### 72", "#### 72 of 100", False),
        ("#### 72", "We get 71. #### 72", True),
        ("#### 1,024", "It costs $1024", True),
        ("#### 5", "It is 5.0", True),
        ("#### -3", "it is -3 degrees", True),
        ("#### 72", "no idea", False),
        ("72", "72", None),
        ("#### unknown", "72", None),
    ],
)
def test_gsm8k_is_scored_by_its_last_number(reference, response, score):
    assert score_gsm8k(reference, response) is score


@pytest.mark.parametrize(
    ("reference", "response", "score"),
    [
        ("12", "so \\boxed{12}", True),
        ("7 + 5 = 12. The answer is \\boxed{12}.", "\\boxed{ 12 }", True),
        ("12", "12", False),
        ("12", "\\boxed{13}", False),
        ("The capital of France is Paris.", "\\boxed{12}", None),
    ],
)
def test_mini_math_is_scored_by_its_box(reference, response, score):
    assert score_mini_math(reference, response) is score


# generation over a scripted engine


def test_a_sequence_is_the_rendered_prompt_and_the_response_with_its_end_of_turn(tmp_path, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "Fine." if number_in(prompt) % 2 else "on and on " * 50)
    splits, counts = generated(tmp_path, engine, teacher(), sums(tiny_tokenizer))
    assert (counts["kept"], counts["ended_by_the_model"], counts["cut_at_max_tokens"]) == (20, 10, 10)
    for split, stored in splits.items():
        for sequence in stored:
            text = tiny_tokenizer.decode(sequence.token_ids)
            prompt, _, response = text.partition("<|start|>assistant\n")
            assert prompt.startswith("<|start|>user\nWhat is ")
            masked = [t for t, r in zip(sequence.token_ids, sequence.is_response, strict=True) if r]
            assert tiny_tokenizer.decode(masked) == response
            assert response.endswith("Fine." + END) == (number_in(text) % 2 == 1)
            assert split == split_of(f"What is {number_in(text)} + 1?")


@pytest.mark.parametrize(("keep", "n"), [("correct", 5), ("incorrect", 10)])
def test_responses_are_kept_by_a_scorer_against_the_reference(tmp_path, tiny_tokenizer, keep, n):
    asks = [*sums(tiny_tokenizer, 15), turn_ask(99, Turn("What is 99 love?", "no number"), tiny_tokenizer)]
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: f"It is {number_in(prompt) + (number_in(prompt) % 3 == 0)}")
    splits, counts = generated(tmp_path, engine, teacher(keep=keep, scorer="gsm8k"), asks)
    assert counts["kept"] == sum(map(len, splits.values())) == n
    assert (counts["correct"], counts["incorrect"], counts["without_reference"]) == (5, 10, 1)


def test_samples_of_a_prompt_have_distinct_seeds_and_stay_in_one_split(tmp_path, tiny_tokenizer):
    asked: list[Request] = []

    class Watched(ScriptedEngine):
        def answer(self, batch):
            asked.extend(batch)
            return super().answer(batch)

    engine = Watched(tiny_tokenizer, lambda prompt: "Fine.")
    splits, counts = generated(tmp_path, engine, teacher(samples_per_prompt=4, n_prompts=10, seed=5), sums(tiny_tokenizer))
    assert counts["asked"] == len({request.seed for request in asked}) == 40
    assert {request.seed for request in asked} == {seed_of(5, number, i) for number in range(1, 11) for i in range(4)}
    assert all(0 <= seed < 2**63 for seed in (r.seed for r in asked))
    assert all(len(stored) % 4 == 0 for stored in splits.values())


def test_an_interrupted_generation_asks_only_for_what_the_journal_lacks(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("harness.generation.ROUND", {"hf": 16, "vllm": 16})

    class Failing(ScriptedEngine):
        def answer(self, batch):
            if self.n_batches == 3:
                raise KeyboardInterrupt
            return super().answer(batch)

    asks = sums(tiny_tokenizer, 40)
    first = Failing(tiny_tokenizer, lambda prompt: f"It is {number_in(prompt)}")
    with pytest.raises(KeyboardInterrupt):
        generated(tmp_path, first, teacher(), asks, "interrupted")
    second = ScriptedEngine(tiny_tokenizer, lambda prompt: f"It is {number_in(prompt)}")
    resumed, _ = generated(tmp_path, second, teacher(), asks, "resumed")
    assert (first.n_batches, second.n_batches) == (3, 2)
    whole, _ = generated(tmp_path / "resumed", second, teacher(), asks, "whole")
    assert {k: list(v) for k, v in resumed.items()} == {k: list(v) for k, v in whole.items()}


def test_a_budget_ends_generation_and_what_is_missing_is_said(tmp_path, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "Fine.")
    splits, _counts = generated(tmp_path, engine, teacher(tokens=200), sums(tiny_tokenizer))
    lengths = [n for stored in splits.values() for n in stored.lengths.tolist()]
    assert 200 <= sum(lengths) < 200 + max(lengths)
    with pytest.raises(
        DataError, match=r"data\.made\.tokens: .* hold [\d,]+ tokens, [\d,]+ of the 9,999 asked for are missing"
    ):
        generated(tmp_path, engine, teacher(tokens=9_999), sums(tiny_tokenizer), "short")


def test_nothing_kept_is_an_error_that_says_what_became_of_the_responses(tmp_path, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "It is 0")
    with pytest.raises(DataError, match=r"data\.made: no response was kept \(asked 20, .*incorrect 20"):
        generated(tmp_path, engine, teacher(keep="correct", scorer="gsm8k"), sums(tiny_tokenizer))


def test_rows_give_the_turns_before_the_first_answer_and_failed_ones_are_counted(tiny_tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    section = Jsonl(source="jsonl", path="x", messages="m", max_failed=0.5)
    rows = FilteredRows("asked", section, [{"m": chat}, {"m": None}])
    (ask,) = row_asks(rows, tiny_tokenizer)
    assert tiny_tokenizer.decode(ask.token_ids) == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nOne?<|end|>\n<|start|>assistant\n"
    )
    assert (ask.text, ask.reference) == ("One?", "1")
    assert rows.counts.failures == ['row 2: the field "m" holds no list of messages']


def test_prompts_that_a_filter_leaves_none_of_are_named_as_such(tmp_path, tiny_tokenizer):
    section = Jsonl(source="jsonl", path="x", prompt="q", response="a", where={"s": ("b",)})
    rows = FilteredRows("asked", section, [{"q": "1", "a": "2", "s": "c"}])
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "x")
    with pytest.raises(DataError, match=r"data\.asked\.where\.s: no row of 1 passes"):
        generated(tmp_path, engine, teacher(), row_asks(rows, tiny_tokenizer))


def test_prompts_too_long_to_answer_are_failed_rows(tmp_path, tiny_tokenizer):
    section = Jsonl(source="jsonl", path="x", prompt="q", response="a")
    rows = FilteredRows("asked", section, [{"q": "why " * 300, "a": "2"}])
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "x")
    with pytest.raises(DataError, match=r"data\.made: no response was kept \(.*prompt_too_long 1\)"):
        generated(tmp_path, engine, teacher(), row_asks(rows, tiny_tokenizer))
    (failure,) = rows.counts.failures
    assert failure.startswith("row 1: ") and failure.endswith("prompt tokens leave no room to answer")


def test_text_from_the_bos_token_alone_masks_every_token_but_the_first(tmp_path, tiny_tokenizer):
    numbers = count()
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: f"Once upon a time {next(numbers)}")
    section = Bos(source="bos", engine="hf", max_tokens=60, tokens=2_000)
    splits, counts = generated(tmp_path, engine, section, bos_asks("made", tiny_tokenizer))
    assert counts["kept"] > 20
    for split, stored in splits.items():
        for sequence in stored:
            assert sequence.token_ids[0] == tiny_tokenizer.bos_token_id
            assert sequence.is_response == (False,) + (True,) * (len(sequence) - 1)
            text = tiny_tokenizer.decode(sequence.token_ids[1:-1])
            assert sequence.token_ids[-1] == tiny_tokenizer.eos_token_id and split_of(text) == split


def test_a_model_that_writes_nothing_after_bos_is_an_error_and_no_endless_loop(tmp_path, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "")
    section = Bos(source="bos", engine="hf", max_tokens=60, tokens=2_000)
    with pytest.raises(DataError, match=r"hold 0 tokens, 2,000 of the 2,000 .*empty 128"):
        generated(tmp_path, engine, section, bos_asks("made", tiny_tokenizer))


def test_a_tokenizer_without_a_bos_token_is_refused(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = None
    with pytest.raises(DataError, match=r'data\.free: the tokenizer has no beginning-of-text token, from which source = "bos"'):
        bos_asks("free", tokenizer)


# the hf engine


@pytest.fixture(scope="module")
def engine(tiny_model, tiny_tokenizer):
    from harness.loading import load_model

    loaded = load_model(tiny_model, trust_remote_code=False, device=torch.device("cpu"))
    return HfEngine(loaded, tiny_tokenizer, eos_ids={1}, args={"batch_size": 8})


SAMPLED = Sampling(max_tokens=12, until=(), temperature=1.0)


def requests_of(tokenizer, sampling, seeds) -> list[Request]:
    return [
        Request(token_ids=tuple(tokenizer(f"word {i % 2}")["input_ids"]), sampling=sampling, seed=seed)
        for i, seed in enumerate(seeds)
    ]


def test_a_sampled_answer_repeats_by_its_seed_and_differs_by_it(engine, tiny_tokenizer):
    batch = requests_of(tiny_tokenizer, SAMPLED, [1, 2, 3, 4])
    first, again = ([a.token_ids for _, a in engine.answer(batch)] for _ in range(2))
    other = [a.token_ids for _, a in engine.answer(requests_of(tiny_tokenizer, SAMPLED, [5, 6, 7, 8]))]
    assert first == again
    assert not set(first) & set(other)


def test_the_draws_of_a_row_do_not_depend_on_the_other_rows(engine, tiny_tokenizer):
    torch.manual_seed(0)
    scores = torch.randn(4, 300)
    seeds = [11, 12, 13, 14]
    whole = SeededDraws(SAMPLED, seeds)
    drawn = [whole(None, scores).argmax(dim=1) for _ in range(5)]
    for row, seed in enumerate(seeds):
        alone = SeededDraws(SAMPLED, [seed])
        assert [int(alone(None, scores[row : row + 1]).argmax()) for _ in range(5)] == [int(d[row]) for d in drawn]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({}, 6),
        ({"temperature": 0.5}, 6),
        ({"top_k": 2}, 2),
        ({"top_p": 0.7}, 2),
        ({"top_p": 0.71}, 3),
        ({"top_p": 0.9, "top_k": 2}, 2),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(sampling, allowed):
    probabilities = torch.tensor([0.03, 0.5, 0.07, 0.2, 0.15, 0.05], dtype=torch.float64)
    chosen = Sampling(max_tokens=1, until=(), **({"temperature": 1.0} | sampling))
    n = 5_000
    draws = SeededDraws(chosen, range(n))
    found = draws(None, probabilities.log().float().expand(n, -1)).argmax(dim=1)
    wanted = probabilities ** (1 / chosen.temperature)
    wanted[wanted.argsort(descending=True)[allowed:]] = 0
    wanted /= wanted.sum()
    share = torch.bincount(found, minlength=6) / n
    assert torch.all((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / n).sqrt() + 1e-12), (share, wanted)


def test_a_flat_distribution_is_drawn_from_beyond_the_shortlist():
    scores = torch.zeros(1, 4000)
    scores[0, :2000] = 1.0
    found = {int(SeededDraws(replace(SAMPLED, top_p=0.7), [seed])(None, scores).argmax()) for seed in range(1500)}
    assert max(found) < 2000  # e / (e + 1) = 0.73 of the probability lies there
    assert len(found) > 900
    everywhere = {int(SeededDraws(replace(SAMPLED, top_p=0.99), [seed])(None, scores).argmax()) for seed in range(300)}
    assert max(everywhere) > 2000


def test_greedy_answers_are_what_they_were_without_a_processor_of_logits(engine, tiny_tokenizer):
    greedy = Sampling(max_tokens=12, until=())
    batch = requests_of(tiny_tokenizer, greedy, [None] * 2)
    ids = torch.tensor([r.token_ids for r in batch])
    plain = engine.model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=[1], pad_token_id=1)
    wanted = [tuple(row[ids.shape[1] :].tolist()) for row in plain]
    found = [a.token_ids for _, a in engine.answer(batch)]
    assert [w[: len(f)] for w, f in zip(wanted, found, strict=True)] == found and all(found)
    tiny_heat = Sampling(max_tokens=12, until=(), temperature=1e-4)
    assert [a.token_ids for _, a in engine.answer(requests_of(tiny_tokenizer, tiny_heat, [1, 2]))] == found


def test_a_sampled_request_without_a_seed_is_refused(engine, tiny_tokenizer):
    with pytest.raises(EngineError, match="carries no seed"):
        list(engine.answer(requests_of(tiny_tokenizer, SAMPLED, [None])))


# the whole, by the command


SECTIONS = """[data.asked]
source = "jsonl"
path = "rows.jsonl"
prompt = "q"
response = "a"
where = { kind = ["sum"] }

[data.written]
source = "teacher"
prompts = "asked"
engine = "hf"
max_tokens = 12
seq_len = 96
samples_per_prompt = 2
engine_args = { batch_size = 64 }

[data.noise]
source = "random_tokens"
tokens = 12000
seq_len = 96

[data.text]
source = "mix"
parts = [{ data = "written", weight = 0.5 }, { data = "noise", weight = 0.5 }]
"""


def records(tmp_path) -> dict[str, dict]:
    """What the stored data stages say of themselves, by label."""
    found = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "stages").glob("*/stage.json")]
    return {record["label"]: record for record in found if record["kind"] == "data"}


def test_a_mix_with_generated_text_trains_and_a_second_run_does_nothing(tiny_suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"What is {i} + {i}?", "a": str(2 * i), "kind": "sum" if i % 4 else "other"} for i in range(160)]
    rows[5]["q"] = " "
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head, *variants = tiny_suite.read_text().replace("tokens = 6000", "tokens = 1000").split("[[variant]]")
    old = '[data.text]\nsource = "builtin"\nseq_len = 512\n'
    assert old in head
    kept = [
        v.split("[[task]]")[0].replace('"qad"\n\n', '"qad"\ndata = "text"\n\n') for v in variants if "bf16" in v or "qad" in v
    ]
    end = '[engine]\nkind = "hf"\n\n[diagnostics]\ndata = "text"\nsamples = 4\n'
    tiny_suite.write_text("[[variant]]".join([head.replace(old, SECTIONS), *kept]) + end)
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 0, capsys.readouterr().err
    before = records(tmp_path)
    assert before.keys() == {"data written", "data noise", "data text"}
    written = before["data written"]["result"]
    assert (written["responses"]["asked"], written["rows"]["filtered_out"]) == (238, 40)
    printed = capsys.readouterr().out
    assert (
        "data written: rows: read 160, filtered out 40, used 120, failed 1, too long 0, truncated 0, too short 0 (the first failed: "
        'row 6: the field "q" is empty); responses: asked 238, ' in printed
    )
    (about,) = (tmp_path / "results").glob("*/*/run.json")
    assert json.loads(about.read_text())["data"] == {label.removeprefix("data "): r["result"] for label, r in before.items()}
    ours, noise = before["data text"]["result"]["tokens_of_parts"]["train"]
    assert abs(ours - noise) <= 2 * 96
    capsys.readouterr()
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 0
    assert "nothing to do" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache")  # the journal alone gives the same text again
    monkeypatch.setattr(HfEngine, "answer", lambda *arguments: pytest.fail("the model was asked again"))
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results", "--only", "bf16") == 0
    again = records(tmp_path)
    assert {label: record["digest"] for label, record in again.items()} == {label: r["digest"] for label, r in before.items()}


def test_a_split_too_short_says_how_much_is_missing(tiny_suite, tmp_path, monkeypatch, capsys):
    text = tiny_suite.read_text().replace('source = "builtin"', 'source = "random_tokens"\ntokens = 20000')
    tiny_suite.write_text(text.replace("samples = 12", "samples = 1200"))
    assert harness(monkeypatch, "run", tiny_suite, "--results", tmp_path / "results") == 2
    error = capsys.readouterr().err
    assert "data text: the diagnostics split has" in error
    assert "1200 are asked for" in error and "are missing, about" in error
