"""The wind tunnel's corpus as training text, as prompts, and what a section of it may say."""

from typing import get_args

import pytest
from pydantic import ValidationError

from harness.data import SPLITS
from harness.data_checks import data_mistakes
from harness.dialogues import RowError, render_plain
from harness.engines.scripted import ScriptedEngine
from harness.errors import DataError, TaskError
from harness.generation import generate
from harness.journal import Journal
from harness.schema_data import Builtin, Domain, Teacher, Tunnel
from harness.scorers import score_boxed
from harness.sources import Surroundings, find_source, identity, write_source
from harness.store import Store
from harness.task_settings import plain_task
from harness.tasks.tunnel import DOMAINS
from harness.tasks.tunnel_tasks import TASKS, questions
from harness.token_store import StoredSequences, TokenWriter

EOS = {1}


def tunnel(**keys) -> Tunnel:
    return Tunnel(source="tunnel", **{"problems": 40, "seq_len": 512, **keys})


def taught(**keys) -> Teacher:
    return Teacher(**{"source": "teacher", "prompts": "asked", "engine": "hf", "max_tokens": 64, "seq_len": 512, **keys})


def made(tmp_path, tokenizer, sections, engine=None, folder="stage"):
    """The sequences of the section "own" by split, and its record."""
    source = find_source("own", sections, Store(tmp_path / "cache"))
    (tmp_path / folder).mkdir()

    def ask(section, asks, writer):
        with Journal(tmp_path / "journals", {"weights": "w", "task": "data"}) as journal:
            return generate("own", section, asks, writer, engine=engine, journal=journal, on_progress=lambda *n: None)

    with TokenWriter(tmp_path / folder, salt="0 ") as writer:
        record = write_source(source, writer, Surroundings(tokenizer, EOS, [], ask))
    return {split: list(StoredSequences(tmp_path / folder, split)) for split in SPLITS}, record


def responses(tokenizer, sequence) -> str:
    ids = [token for token, counts in zip(sequence.token_ids, sequence.is_response, strict=True) if counts]
    return tokenizer.decode(ids)


def test_a_problem_is_a_chat_whose_response_is_the_solution(tmp_path, tiny_tokenizer):
    splits, record = made(tmp_path, tiny_tokenizer, {"own": tunnel()})
    sequences = [each for split in splits.values() for each in split]
    assert len(sequences) == 40
    assert all("\\boxed{" in responses(tiny_tokenizer, each) for each in sequences)
    counts = record["tunnel"]
    assert sum(counts.get(domain, 0) for domain in DOMAINS) == 40
    assert sum(counts.get(style, 0) for style in ("terse", "worked", "slipped")) == 40


def test_no_question_of_a_task_is_in_it_and_none_in_two_splits(tmp_path, tiny_tokenizer):
    splits, record = made(tmp_path, tiny_tokenizer, {"own": tunnel(problems=300)})
    asked = {problem.question for task in TASKS for problem in questions(task)}
    found = {
        split: {tiny_tokenizer.decode(each.token_ids[: each.is_response.index(True)]) for each in sequences}
        for split, sequences in splits.items()
    }
    assert sum(map(len, found.values())) == 300 - record["tunnel"].get("too_long", 0)
    assert not any(question in text for texts in found.values() for text in texts for question in asked)
    assert found["diagnostics"] and not found["train"] & found["diagnostics"]


def test_domains_that_were_not_asked_for_are_not_there(tmp_path, tiny_tokenizer):
    _, record = made(tmp_path, tiny_tokenizer, {"own": tunnel(domains=("word", "context"))})
    assert set(record["tunnel"]) & set(DOMAINS) == {"word", "context"}


def test_another_seed_is_another_corpus(tmp_path, tiny_tokenizer):
    texts = [
        {each.token_ids for each in made(tmp_path, tiny_tokenizer, {"own": tunnel(seed=seed)}, folder=f"{seed}")[0]["train"]}
        for seed in (0, 1)
    ]
    assert texts[0] != texts[1]


def test_what_is_too_long_is_counted_and_all_of_it_an_error(tmp_path, tiny_tokenizer):
    _, record = made(tmp_path, tiny_tokenizer, {"own": tunnel(seq_len=128)})
    assert 0 < record["tunnel"]["too_long"] < 40
    with pytest.raises(DataError, match=r"data\.own\.seq_len: no problem fits 32 tokens; raise it"):
        made(tmp_path, tiny_tokenizer, {"own": tunnel(seq_len=32, domains=("context",))}, folder="short")


def test_more_problems_than_there_are_say_how_many_there_are(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("harness.tunnel_source.MOST_REPEATED", 1)
    with pytest.raises(DataError, match=r"data\.own\.problems: found 99999; there are some \d+ of knowledge: ask for fewer"):
        made(tmp_path, tiny_tokenizer, {"own": tunnel(problems=99_999, domains=("knowledge",))})


def test_a_tokenizer_without_the_words_is_refused(tmp_path, tiny_model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.conftest import CHAT_TEMPLATE

    words = {"<|start|>": 0, "<|end|>": 1, "<unk>": 2}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    changed = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<|start|>", eos_token="<|end|>", extra_special_tokens=[]
    )
    changed.chat_template = CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"data\.own: the tokenizer does not know every word .* or was changed: restore it"):
        made(tmp_path, changed, {"own": tunnel()})


def test_its_questions_may_be_asked_and_answers_kept_by_their_box(tmp_path, tiny_tokenizer):
    engine = ScriptedEngine(tiny_tokenizer, lambda prompt: "\\boxed{A}")
    sections = {"own": taught(keep="correct", scorer="boxed"), "asked": tunnel(domains=("knowledge",))}
    _, record = made(tmp_path, tiny_tokenizer, sections, engine)
    counts = record["responses"]
    assert counts["asked"] == 40 and 0 < counts["incorrect"] < 40
    assert identity(find_source("own", sections, Store(tmp_path / "cache")))["prompts"] == {
        "source": "tunnel",
        "problems": 40,
        "domains": ["knowledge"],
        "seed": 0,
    }


def test_boxes_are_compared_by_what_they_hold():
    assert score_boxed("\\boxed{12}", "3+9=12\n\\boxed{12}") is True
    assert score_boxed("\\boxed{12}", "\\boxed{12}\n\\boxed{21}") is False
    assert score_boxed("\\boxed{12}", "12") is False
    assert score_boxed("12", "\\boxed{12}") is None


def test_the_schema_knows_the_domains_of_the_generator():
    assert get_args(Domain) == tunnel().domains == DOMAINS
    with pytest.raises(ValidationError, match="domains"):
        tunnel(domains=())


def test_domains_may_not_be_named_twice():
    found = list(data_mistakes({"own": tunnel(domains=("word", "word"))}, [("calibration.data", "own")]))
    assert [(where, said) for where, said, _ in found] == [("data.own.domains", '"word" is repeated; name it once')]


# a tokenizer of a closed vocabulary, as the models of the wind tunnel have


@pytest.fixture(scope="module")
def closed_tokenizer():
    from recipes.windtunnel.build import build_tokenizer

    return build_tokenizer()


def test_the_models_of_the_wind_tunnel_write_every_problem(tmp_path, closed_tokenizer):
    splits, record = made(tmp_path, closed_tokenizer, {"own": tunnel(problems=300)})
    assert "too_long" not in record["tunnel"] and sum(map(len, splits.values())) == 300


def test_text_that_a_closed_vocabulary_lacks_is_an_error_with_its_reason(tmp_path, closed_tokenizer):
    lacks = r"the tokenizer cannot write the text \(.+\): its vocabulary is closed"
    with pytest.raises(DataError, match=lacks):
        made(tmp_path, closed_tokenizer, {"own": Builtin(source="builtin")})
    with pytest.raises(DataError, match=f"question 1: {lacks}"):
        made(
            tmp_path,
            closed_tokenizer,
            {"own": taught(), "asked": Builtin(source="builtin")},
            ScriptedEngine(closed_tokenizer, lambda prompt: "\\boxed{A}"),
            folder="asked",
        )
    with pytest.raises(RowError, match=lacks):
        render_plain(closed_tokenizer, "Where is the zebra?", "Here.")


@pytest.mark.parametrize(("task", "is_written"), [("tunnel_math", True), ("mini_math", False)])
def test_a_task_in_other_words_than_the_model_knows_says_so(tmp_path, closed_tokenizer, task, is_written):
    from harness.prompts import prepare

    closed_tokenizer.save_pretrained(tmp_path)
    if is_written:
        assert len(prepare(plain_task(task, None, None), closed_tokenizer, tmp_path).questions) == 200
        return
    with pytest.raises(
        TaskError, match=r"task mini_math: the tokenizer cannot write a prompt \(.+\): its vocabulary is closed"
    ):
        prepare(plain_task(task, None, None), closed_tokenizer, tmp_path)
