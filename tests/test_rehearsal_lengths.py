"""What a rehearsal finds by counting: prompts, answers and rows that no context holds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from aa_lcr_copy import write_copy

from harness.rehearsal_lengths import MOST_PICTURES, check_lengths, positions_of
from harness.rehearsal_static import _about_length
from harness.suite import load_suite
from harness.twins import write_twin

REPOSITORY = Path(__file__).parent.parent
WORDS = REPOSITORY / "suites" / "models" / "embedded_vlm"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
TEXT = {"text": {"source": "builtin", "seq_len": 64}}


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return write_twin(CONFIG, tmp_path_factory.mktemp("twins") / "text", tokenizer=WORDS).folder


@pytest.fixture
def count(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path))

    def check(stand_in, *tasks, config=CONFIG, model=None, max_model_len=2048, data=TEXT, **sections):
        given = {
            "schema": 1,
            "name": "small",
            "model": {"path": "org/model", "revision": "0" * 40, **(model or {})},
            "task": tasks,
            "variant": [{"name": "bf16", "method": "bf16"}],
            "engine": {"kind": "vllm", "args": {"max_model_len": max_model_len}},
            "data": data,
            "diagnostics": {"data": "text", "samples": 4},
        }
        suite = tmp_path / "small.toml"
        suite.write_text("\n".join(f"{key} = {toml(value)}" for key, value in (given | sections).items() if value != ()))
        (tmp_path / "pictures").mkdir(exist_ok=True)
        found = check_lengths(load_suite(suite), config, stand_in, work=tmp_path / "pictures")
        return {each.what: each for each in found}

    return check


def aime25(mirror: Path, *problems: str) -> None:
    rows = [
        {"problem": problem, "answer": "7"} for problem in (*problems, *(f"What is {i}?" for i in range(30 - len(problems))))
    ]
    (mirror / "yentinglin" / "aime_2025").mkdir(parents=True)
    (mirror / "yentinglin" / "aime_2025" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_all_questions_of_a_task_are_counted_with_their_real_answers(count, twin, tmp_path):
    aime25(tmp_path)
    found = count(twin, {"name": "aime25"}, sampling={"max_tokens": 1000})["task aime25"]
    assert (found.limit.tokens, found.answer, found.left, found.n_questions) == (2047, 1000, 1047, 30)
    assert 50 < found.longest < 1000 and found.n_over == found.over_by == 0 and not found.is_problem


def test_a_prompt_over_the_context_is_found_with_how_many_and_by_how_much(count, twin, tmp_path):
    aime25(tmp_path, "long " * 600, "longer " * 600)
    found = count(twin, {"name": "aime25"}, sampling={"max_tokens": 1000})["task aime25"]
    assert found.n_over == 2 and found.is_problem
    assert found.over_by == found.longest + 1000 - 2047 > 0
    assert "engine.args.max_model_len" in found.limit.key


@pytest.mark.parametrize(("share", "is_problem"), [(0.01, False), (0.04, True)])
def test_prompts_that_a_stand_in_counts_a_little_too_long_may_not_fit_and_are_no_problem(
    share, is_problem, count, twin, tmp_path
):
    aime25(tmp_path, "long " * 600)
    longest = count(twin, {"name": "aime25"}, sampling={"max_tokens": 16})["task aime25"].longest
    asked = 2047 - longest + round(share * longest)
    found = count(twin, {"name": "aime25"}, sampling={"max_tokens": asked})["task aime25"]
    assert found.is_approximate and found.n_over == 1 and found.is_problem == is_problem
    assert f"1 prompts {'do' if is_problem else 'may'} not fit" in _about_length(found)
    assert replace(found, is_approximate=False).is_problem


def test_answers_that_leave_no_room_are_found_without_a_single_row(count, twin):
    found = count(twin, {"name": "aime25"}, sampling={"max_tokens": 2047})["task aime25"]
    assert found.problem == "answers of 2,047 tokens leave no room for a prompt" and found.n_questions == 0
    assert found.note == "not counted: the rows of yentinglin/aime_2025 are not in the mirror"
    assert not count(twin, {"name": "aime25"}, sampling={"max_tokens": 2046})["task aime25"].is_problem


def test_rows_of_the_mirror_that_lack_a_column_are_a_problem(count, twin, tmp_path):
    folder = tmp_path / "yentinglin" / "aime_2025"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"question": "?", "answer": "7"}')
    found = count(twin, {"name": "aime25"}, sampling={"max_tokens": 100})["task aime25"]
    assert "no column 'problem'" in found.problem


def test_counts_of_a_stand_in_are_approximate_and_those_of_the_model_own_words_are_not(count, twin, tmp_path):
    task = {"name": "mini_math", "limit": 3}
    assert count(twin, task)["task mini_math"].is_approximate
    (tmp_path / "org").mkdir()
    write_twin(CONFIG, tmp_path / "org" / "model", tokenizer=WORDS)
    own = count(tmp_path / "nowhere", task)["task mini_math"]
    assert not own.is_approximate and own.n_questions == 3


def test_the_judge_is_counted_with_what_is_left_for_an_answer(count, twin, tmp_path):
    write_copy(tmp_path)
    judge = {"path": "org/judge", "revision": "1" * 40, "engine": {"kind": "vllm", "args": {"max_model_len": 1024}}}
    found = count(twin, {"name": "aa_lcr", "limit": 2}, judge=judge, max_model_len=4096, sampling={"max_tokens": 64})
    judged = found["judge of aa_lcr"]
    assert judged.limit.tokens == 1023 and judged.answer == 64 and 0 < judged.longest < 959 and not judged.is_problem
    assert judged.note.startswith(f"{959 - judged.longest:,} tokens are left for the answer")
    short = {**judge, "engine": {"kind": "vllm", "args": {"max_model_len": 200}}}
    found = count(twin, {"name": "aa_lcr", "limit": 2}, judge=short, max_model_len=4096, sampling={"max_tokens": 64})
    assert found["judge of aa_lcr"].is_problem and found["judge of aa_lcr"].over_by > 0


def test_pictures_are_counted_for_the_first_questions_alone(count, tmp_path):
    twin = write_twin(CONFIG, tmp_path / "seeing", kind="image-text").folder
    found = count(twin, {"name": "mini_chart"}, model={"kind": "image-text"})["task mini_chart"]
    assert found.n_questions == MOST_PICTURES and found.is_approximate and found.longest > 64
    assert found.note == "the first questions alone, pictures as many tokens as the twin makes of them"


def test_a_context_longer_than_the_model_holds_is_a_problem(count, twin):
    found = count(twin, max_model_len=8192)["engine.args.max_model_len"]
    assert found.problem == "8,192 tokens are more than the 4,096 that the model holds; vLLM refuses that"
    assert not count(twin, max_model_len=4096)["engine.args.max_model_len"].is_problem
    stretched = CONFIG | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}}
    assert positions_of(stretched) == 8192
    assert not count(twin, max_model_len=8192, config=stretched)["engine.args.max_model_len"].is_problem


def test_rows_longer_than_the_model_holds_and_texts_longer_than_their_engine_holds_are_problems(count, twin):
    written = {"source": "teacher", "prompts": "text", "engine": "vllm", "max_tokens": 3000, "seq_len": 4096}
    used = {"diagnostics": {"data": "made", "samples": 4}}
    found = count(
        twin,
        data={"text": TEXT["text"] | {"seq_len": 8192}, "made": written | {"engine_args": {"max_model_len": 3001}}},
        **used,
    )
    assert found["data.text"].problem == "seq_len = 8,192 is more than the 4,096 tokens that the model holds"
    assert found["data.made"].problem == "max_tokens = 3,000 leaves no room for a prompt in 3,000 tokens"
    good = count(twin, data={"text": TEXT["text"], "made": written | {"engine_args": {"max_model_len": 4096}}}, **used)
    assert not good["data.made"].is_problem and "data.text" not in good


def test_the_paper_suites_hold_their_rows_and_answers():
    from harness.known_models import known_model

    for path in sorted((REPOSITORY / "suites").glob("*.toml")) + sorted((REPOSITORY / "suites" / "ablations").glob("*.toml")):
        suite = load_suite(path)
        known = known_model(suite.model.path)
        if known is None or suite.model.kind == "image-text":
            continue
        found = check_lengths(suite, known.config, WORDS, work=REPOSITORY)
        assert not [each for each in found if each.is_problem], path
