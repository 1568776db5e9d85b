"""Rows of files and hub sets as sequences: formats, filters, limits, splits, mixes; what cannot be used is counted and named."""

import json
import tracemalloc
from pathlib import Path

import pytest
from conftest import MIRROR

from harness import builtin, sources
from harness.data import SPLITS, Sequence, split_of
from harness.data_stage import what_became
from harness.dialogues import RowError, render_messages
from harness.errors import DataError
from harness.schema_data import SOURCES, Builtin, Hub, Jsonl, Mix, RandomTokens
from harness.sources import Surroundings, TextSource, find_source, identity
from harness.store import Store
from harness.token_store import StoredSequences, TokenWriter

EOS = {1}
HEX = "0" * 39 + "1"


def made(tmp_path, tokenizer, section, parts=(), name="rows"):
    """The splits of a section, and the record of its stage."""
    source = find_source(name, {name: section}, Store(tmp_path / "cache"))
    return written(tmp_path, tokenizer, source, parts)


def written(tmp_path, tokenizer, source: TextSource, parts=()):
    folder = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    given = Surroundings(tokenizer, EOS, list(parts), generate=lambda *arguments: {})
    with TokenWriter(folder, salt=f"{source.section.seed} ") as writer:
        record = sources.write_source(source, writer, given)
    return {split: StoredSequences(folder, split) for split in SPLITS}, record | {"splits": writer.counts}


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(splits, tokenizer) -> list[str]:
    return [tokenizer.decode(s.token_ids) for stored in splits.values() for s in stored]


def responses(sequence: Sequence, tokenizer) -> str:
    return tokenizer.decode([t for t, r in zip(sequence.token_ids, sequence.is_response, strict=True) if r])


QUESTIONS = [
    {"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}.", "subject": "maths" if i % 3 else "code"}
    for i in range(60)
]
PAIRS = {"prompt": "question", "response": "answer"}


def pairs(tmp_path, rows=QUESTIONS, name="pairs.jsonl", **keys):
    return Jsonl(source="jsonl", path=jsonl(tmp_path / name, rows), **(PAIRS | keys))


# the token store


def test_a_store_gives_back_what_was_appended_in_an_order_by_hash(tmp_path):
    sequences = [Sequence(tuple(range(i, i + n)), tuple(k % 2 == 0 for k in range(n))) for i, n in enumerate((5, 1, 9, 3))]
    with TokenWriter(tmp_path) as writer:
        for sequence in sequences:
            writer.append("train", sequence)
    found = StoredSequences(tmp_path, "train")
    assert sorted(found, key=lambda s: s.token_ids[0]) == sequences
    assert found.lengths.tolist() == [len(s) for s in found]
    assert found[1:3] == [found[1], found[2]] and found[-1] == found[3]
    assert list(StoredSequences(tmp_path, "train", 2)) == found[:2]
    assert writer.counts["train"] == {"sequences": 4, "tokens": 18, "response_tokens": 3 + 1 + 5 + 2}
    assert len(StoredSequences(tmp_path, "validation")) == 0
    with pytest.raises(IndexError):
        found[4]


def test_another_salt_is_another_order_of_the_same_sequences(tmp_path):
    orders = []
    for salt in ("0 ", "1 "):
        folder = tmp_path / salt.strip()
        folder.mkdir()
        with TokenWriter(folder, salt=salt) as writer:
            for i in range(50):
                writer.append("train", Sequence((i,), (True,)))
        orders.append([s.token_ids[0] for s in StoredSequences(folder, "train")])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))


def test_the_builtin_source_keeps_the_order_in_which_it_is_made(tmp_path, tiny_tokenizer, monkeypatch):
    turns, documents = builtin.generated_turns(0)[:150], builtin.natural_texts()[:15]
    monkeypatch.setattr(builtin, "generated_turns", lambda seed: turns)
    monkeypatch.setattr(builtin, "natural_texts", lambda: documents)
    direct = builtin.builtin_sequences(tiny_tokenizer, seq_len=128, seed=0, eos_ids=EOS)
    assert all(direct.values())
    given = Surroundings(tiny_tokenizer, EOS, [], generate=lambda *arguments: {})
    with TokenWriter(tmp_path) as writer:
        sources.write_source(TextSource("text", Builtin(source="builtin", seq_len=128), 128), writer, given)
    assert {split: list(StoredSequences(tmp_path, split)) for split in SPLITS} == direct


def test_what_became_of_rows_is_one_line_and_nothing_for_a_source_without_rows(tmp_path, tiny_tokenizer):
    long = {"question": "word " * 200, "answer": "no", "subject": "maths"}
    cut = {"question": "Say it.", "answer": "word " * 200, "subject": "maths"}
    rows = [{"question": "a", "subject": "maths"}, {"answer": "b", "subject": "maths"}, *QUESTIONS, long, cut]
    section = pairs(tmp_path, rows, where={"subject": ("maths",)}, too_long="truncate", seq_len=64, max_failed=0.1)
    _, record = made(tmp_path, tiny_tokenizer, section)
    assert what_became(record) == (
        "rows: read 64, filtered out 20, used 44, failed 2, too long 1, truncated 1, too short 0 "
        '(the first failed: row 1: the field "answer" is missing; row 2: the field "question" is missing)'
    )
    _, record = made(tmp_path, tiny_tokenizer, RandomTokens(source="random_tokens", tokens=1000))
    assert what_became(record) is None


# formats


def test_prompt_and_response_become_one_chat_turn(tmp_path, tiny_tokenizer):
    splits, record = made(tmp_path, tiny_tokenizer, pairs(tmp_path))
    assert record["rows"]["used"] == sum(map(len, splits.values())) == 60
    for stored in splits.values():
        for sequence in stored:
            answer = responses(sequence, tiny_tokenizer)
            assert answer.startswith("It is ") and answer.endswith(".<|end|>")
            assert tiny_tokenizer.decode(sequence.token_ids).startswith("<|start|>user\nWhat is ")


@pytest.mark.parametrize("has_template", [True, False])
def test_without_a_template_or_with_chat_off_they_are_concatenated(tmp_path, tiny_model, has_template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if not has_template:
        tokenizer.chat_template = None
    splits, _ = made(tmp_path, tokenizer, pairs(tmp_path, QUESTIONS[:1], **({"chat": False} if has_template else {})))
    (text,) = texts(splits, tokenizer)
    assert text == "What is 0 plus 0?It is 0.<|end|>"
    (sequence,) = [s for stored in splits.values() for s in stored]
    assert responses(sequence, tokenizer) == "It is 0.<|end|>"


def test_every_assistant_turn_of_a_chat_counts_and_nothing_after_the_last_one(tmp_path, tiny_tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2", "reasoning_content": None},
        {"role": "user", "content": "Three?"},
    ]
    section = Jsonl(source="jsonl", path=jsonl(tmp_path / "a.jsonl", [{"chat": chat}]), messages="chat")
    splits, _ = made(tmp_path, tiny_tokenizer, section)
    (sequence,) = splits[split_of("One?")]
    assert responses(sequence, tiny_tokenizer) == "1<|end|>2<|end|>"
    assert "Three?" not in tiny_tokenizer.decode(sequence.token_ids)


def test_plain_text_is_cut_in_pieces_and_a_document_stays_in_one_split(tmp_path, tiny_tokenizer):
    from harness.builtin import natural_texts

    documents = natural_texts()[:30]
    section = Jsonl(source="jsonl", path=jsonl(tmp_path / "a.jsonl", [{"t": d} for d in documents]), text="t", seq_len=64)
    splits, record = made(tmp_path, tiny_tokenizer, section)
    by_text = {tiny_tokenizer.decode(s.token_ids): split for split, stored in splits.items() for s in stored}
    for document in documents:
        found = {split for text, split in by_text.items() if text in document}
        assert found <= {split_of(document.strip())}
    assert all(all(s.is_response) and 32 <= len(s) <= 64 for stored in splits.values() for s in stored)
    assert record["rows"]["too_short"] > 0


def test_parquet_gives_the_same_sequences_as_jsonl(tmp_path, tiny_tokenizer):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(QUESTIONS), tmp_path / "rows.parquet")
    one, _ = made(tmp_path, tiny_tokenizer, pairs(tmp_path))
    other, _ = made(tmp_path, tiny_tokenizer, Jsonl(source="jsonl", path=str(tmp_path / "rows.parquet"), **PAIRS))
    assert {k: list(v) for k, v in one.items()} == {k: list(v) for k, v in other.items()}


def test_a_folder_and_a_pattern_of_files_are_read_in_order(tmp_path, tiny_tokenizer):
    folder = tmp_path / "many"
    folder.mkdir()
    jsonl(folder / "b.jsonl", QUESTIONS[30:])
    jsonl(folder / "a.jsonl", QUESTIONS[:30])
    whole, _ = made(tmp_path, tiny_tokenizer, pairs(tmp_path))
    for path in (folder, folder / "*.jsonl"):
        splits, _ = made(tmp_path, tiny_tokenizer, Jsonl(source="jsonl", path=str(path), **PAIRS))
        assert {k: list(v) for k, v in splits.items()} == {k: list(v) for k, v in whole.items()}


# filters and limits


def test_a_filter_takes_the_rows_of_a_domain(tmp_path, tiny_tokenizer):
    splits, record = made(tmp_path, tiny_tokenizer, pairs(tmp_path, where={"subject": ("code",)}))
    assert (record["rows"]["read"], record["rows"]["filtered_out"], record["rows"]["used"]) == (60, 40, 20)
    assert len(texts(splits, tiny_tokenizer)) == 20


def test_a_filter_that_leaves_nothing_names_field_wanted_and_seen_values(tmp_path, tiny_tokenizer):
    with pytest.raises(
        DataError,
        match=r"data\.rows\.where\.subject: no row of 60 passes.*wanted: 'physics'; the most common values seen: 'maths' \(40\), 'code' \(20\)\. "
        "Give values that rows have .*, or remove the key",
    ):
        made(tmp_path, tiny_tokenizer, pairs(tmp_path, where={"subject": ("physics",)}))


@pytest.mark.parametrize(
    ("keys", "where", "field"),
    [({"prompt": "qestion"}, "prompt", "qestion"), ({"where": {"topic": ("x",)}}, "where.topic", "topic")],
)
def test_a_field_that_no_row_has_is_named_with_the_known_ones(tmp_path, tiny_tokenizer, keys, where, field):
    with pytest.raises(
        DataError, match=rf'data\.rows\.{where}: no row has the field "{field}"; rows have: answer, question, subject'
    ):
        made(tmp_path, tiny_tokenizer, pairs(tmp_path, **keys))


def test_a_field_that_the_first_thousand_rows_lack_ends_an_endless_source(tiny_tokenizer):
    from itertools import repeat

    from harness.rows import FilteredRows

    section = Jsonl(source="jsonl", path="x", text="t", where={"subject": ("a",)})
    rows = FilteredRows("rows", section, repeat({"t": "abc"}))
    with pytest.raises(DataError, match=r'where\.subject: no row has the field "subject"'):
        next(iter(rows))


def test_too_long_rows_are_dropped_or_truncated_and_counted(tmp_path, tiny_tokenizer):
    rows = [*QUESTIONS[:10], {"question": "Why?", "answer": "Because " * 100}, {"question": "Why " * 100, "answer": "So."}]
    splits, record = made(tmp_path, tiny_tokenizer, pairs(tmp_path, rows, seq_len=64))
    assert (record["rows"]["too_long"], sum(map(len, splits.values()))) == (2, 10)
    splits, record = made(tmp_path, tiny_tokenizer, pairs(tmp_path, rows, seq_len=64, too_long="truncate"))
    assert (record["rows"]["truncated"], record["rows"]["too_long"], sum(map(len, splits.values()))) == (1, 1, 11)
    assert max(len(s) for stored in splits.values() for s in stored) == 64


def test_min_tokens_and_max_rows_limit(tmp_path, tiny_tokenizer):
    splits, record = made(tmp_path, tiny_tokenizer, pairs(tmp_path, max_rows=7, where={"subject": ("maths",)}))
    assert (record["rows"]["used"], sum(map(len, splits.values()))) == (7, 7)
    lengths = sorted(len(s) for stored in splits.values() for s in stored)
    _, record = made(tmp_path, tiny_tokenizer, pairs(tmp_path, min_tokens=lengths[-1], max_rows=60))
    assert 0 < record["rows"]["too_short"] < 60


# rows that fail


def test_failed_rows_are_counted_and_named_up_to_a_limit(tmp_path, tiny_tokenizer):
    rows = [*QUESTIONS, {"question": "And?"}, {"question": "", "answer": "x"}, {"question": ["a"], "answer": "x"}]
    splits, record = made(tmp_path, tiny_tokenizer, pairs(tmp_path, rows, max_failed=0.05))
    assert record["rows"]["failures"] == [
        'row 61: the field "answer" is missing',
        'row 62: the field "question" is empty',
        'row 63: the field "question" is no text',
    ]
    assert sum(map(len, splits.values())) == 60
    with pytest.raises(
        DataError, match=r"data\.rows: 3 of 63 rows failed, more than the share max_failed = 0\.01.*row 61: the field"
    ):
        made(tmp_path, tiny_tokenizer, pairs(tmp_path, rows))


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        ("{{ raise_exception('no system turns') }}", ["a", "b"], "the chat template fails: no system turns"),
        ("{{ messages[0]['content'] + 1 }}", ["a", "b"], "the chat template fails: "),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            ["a", "b", "c", "d"],
            "renders the beginning of a dialogue differently once it goes on",
        ),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
            ["question", "response"],
            "leaves out the content of 1 of 1 assistant turns",
        ),
        (
            "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}<|end|>{% endfor %}",
            ["a", "<think>a thought</think>b"],
            "leaves out the reasoning of 1 of 1 assistant turns",
        ),
        (None, ["a"], "no assistant turn, so that nothing is a response"),
    ],
)
def test_a_template_that_fails_forgets_or_masks_nothing_is_a_counted_reason(tmp_path, tiny_model, template, chat, reason):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template or tokenizer.chat_template
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(chat)]
    section = Jsonl(source="jsonl", path=jsonl(tmp_path / "a.jsonl", [{"m": messages}] * 3), messages="m")
    with pytest.raises(DataError, match="3 of 3 rows failed.*row 1: .*") as caught:
        made(tmp_path, tokenizer, section)
    assert reason in str(caught.value)


def test_a_response_that_the_tokenizer_merges_with_its_prompt_is_named_as_that(tiny_model):
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens([AddedToken("\n\n\n", normalized=False)])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}]
    with pytest.raises(RowError, match="the tokenizer merges the beginning of a response with the end of its prompt"):
        render_messages(tokenizer, messages, EOS)


def test_reasoning_that_stays_in_the_text_is_part_of_the_response(tmp_path, tiny_tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>hm, a thought</think>b"}]
    section = Jsonl(source="jsonl", path=jsonl(tmp_path / "a.jsonl", [{"m": messages}]), messages="m")
    splits, _ = made(tmp_path, tiny_tokenizer, section)
    (sequence,) = splits[split_of("a")]
    assert responses(sequence, tiny_tokenizer) == "<think>hm, a thought</think>b<|end|>"


def test_separate_reasoning_that_a_template_never_reads_is_a_failed_row(tmp_path, tiny_tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "a long thought"}]
    section = Jsonl(source="jsonl", path=jsonl(tmp_path / "a.jsonl", [{"m": messages}]), messages="m")
    with pytest.raises(DataError, match="leaves out the reasoning of 1 of 1"):
        made(tmp_path, tiny_tokenizer, section)


def test_a_source_of_which_every_row_fails_ends_early(tiny_tokenizer, tmp_path):
    from itertools import repeat

    from harness.rows import FilteredRows, write_rows

    section = Jsonl(source="jsonl", path="x", messages="m")
    rows = FilteredRows("rows", section, repeat({"m": "no list"}))
    with TokenWriter(tmp_path) as writer, pytest.raises(DataError, match="200 of 200 rows failed"):
        write_rows(rows, writer, tokenizer=tiny_tokenizer, eos_ids=EOS)


# files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": 1}\n{"question', r"line 2 is not JSON"),
        ("[1]\n", r"line 1 is a list; every line is an object"),
        ("", r"data\.rows: the source has no rows"),
        (b"\xff\xfe\n", r"line 1 is not JSON"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, tiny_tokenizer, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        made(tmp_path, tiny_tokenizer, Jsonl(source="jsonl", path=str(path), prompt="question", response="question"))


def test_a_damaged_parquet_file_is_named(tmp_path, tiny_tokenizer):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        made(tmp_path, tiny_tokenizer, Jsonl(source="jsonl", path=str(tmp_path / "a.parquet"), **PAIRS))


@pytest.mark.parametrize(("path", "message"), [("nowhere.jsonl", "there is no such file"), ("a.csv", "neither a .jsonl nor")])
def test_a_path_that_is_no_file_of_rows_is_refused_before_anything_is_done(tmp_path, path, message):
    (tmp_path / "a.csv").write_text("a,b")
    section = Jsonl(source="jsonl", path=str(tmp_path / path), **PAIRS)
    with pytest.raises(DataError, match=rf"data\.rows\.path: .*{message}"):
        find_source("rows", {"rows": section}, Store(tmp_path / "cache"))


# the hub and its mirror


def hub(**keys) -> Hub:
    return Hub(source="hub", path="org/set", **(PAIRS | keys))


def test_the_mirror_is_asked_before_the_hub_and_its_revision_must_agree(tmp_path, tiny_tokenizer, monkeypatch):
    folder = tmp_path / "mirror" / "org" / "set"
    (folder / "extra").mkdir(parents=True)
    jsonl(folder / "train-00000-of-00002.jsonl", QUESTIONS[:30])
    jsonl(folder / "train-00001-of-00002.jsonl", QUESTIONS[30:])
    jsonl(folder / "test.jsonl", QUESTIONS[:3])
    jsonl(folder / "extra" / "train.jsonl", QUESTIONS[:5])
    monkeypatch.setenv("HARNESS_MIRROR", str(tmp_path / "mirror"))
    for keys, n in (({}, 60), ({"split": "test"}, 3), ({"subset": "extra"}, 5), ({"subset": "main"}, 60)):
        _, record = made(tmp_path, tiny_tokenizer, hub(**keys))
        assert record["rows"]["used"] == n, keys
    with pytest.raises(DataError, match=r"no files of the split 'dev' .*test\.jsonl, train-00000"):
        made(tmp_path, tiny_tokenizer, hub(split="dev"))
    (folder / "revision.txt").write_text("f" * 40)
    with pytest.raises(DataError, match=f"at {'f' * 40}, the suite asks for {HEX}"):
        made(tmp_path, tiny_tokenizer, hub(revision=HEX))


def test_without_a_mirror_a_hub_set_needs_its_commit(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(DataError, match=r"data\.rows\.revision: missing; org/set is not in the mirror.*40 hex digits"):
        find_source("rows", {"rows": hub()}, store)
    found = find_source("rows", {"rows": hub(revision=HEX)}, store)
    assert found.files.fingerprint == f"hub:org/set@{HEX}"


def test_a_hub_set_is_streamed_at_its_commit(tmp_path, tiny_tokenizer, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return iter(QUESTIONS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _, record = made(tmp_path, tiny_tokenizer, hub(revision=HEX, subset="main", max_rows=9))
    assert record["rows"]["read"] == 9
    assert asked == [(("org/set", "main"), {"split": "train", "revision": HEX, "streaming": True})]


def test_a_hub_set_that_cannot_be_had_says_what_to_check(tmp_path, tiny_tokenizer):
    with pytest.raises(
        DataError, match=rf"data\.rows: org/set at {HEX} cannot be had from the hub .*or put it under HARNESS_MIRROR"
    ):
        made(tmp_path, tiny_tokenizer, hub(revision=HEX))


@pytest.mark.skipif(not MIRROR or not Path(MIRROR, "openai", "gsm8k").is_dir(), reason="HARNESS_MIRROR holds no openai/gsm8k")
def test_gsm8k_of_the_mirror_becomes_masked_chat_turns(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("HARNESS_MIRROR", MIRROR)
    section = Hub(source="hub", path="openai/gsm8k", subset="main", seq_len=1024, max_rows=500, **PAIRS)
    splits, record = made(tmp_path, tiny_tokenizer, section)
    assert record["rows"]["used"] == 500 and record["rows"]["failed"] == 0
    for stored in splits.values():
        assert all("#### " in responses(s, tiny_tokenizer) for s in stored[:20])


# splits, mixes, random tokens


def test_two_answers_to_one_question_are_in_one_split(tmp_path, tiny_tokenizer):
    rows = [{**row, "answer": f"{row['answer']} {i}"} for row in QUESTIONS for i in range(2)]
    splits, _ = made(tmp_path, tiny_tokenizer, pairs(tmp_path, rows))
    asked = {
        split: {text.split("<|end|>")[0] for text in texts({split: stored}, tiny_tokenizer)} for split, stored in splits.items()
    }
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())) == 60


def mixed(tmp_path, tokenizer, sections: dict, weights, seed=0):
    parts = [made(tmp_path, tokenizer, section, name=name)[0] for name, section in sections.items()]
    mix = Mix(source="mix", seed=seed, parts=tuple({"data": n, "weight": w} for n, w in zip(sections, weights, strict=True)))
    source = TextSource("mix", mix, 256)
    return written(tmp_path, tokenizer, source, parts)


def test_a_mix_holds_its_parts_by_tokens_and_is_the_same_every_time(tmp_path, tiny_tokenizer):
    long = [{"question": f"Tell {i}", "answer": "more and more " * 10} for i in range(200)]
    sections = {"short": pairs(tmp_path), "long": pairs(tmp_path, long, "long.jsonl")}
    splits, record = mixed(tmp_path, tiny_tokenizer, sections, (0.25, 0.75))
    short, tall = record["tokens_of_parts"]["train"]
    longest = int(max(splits["train"].lengths))
    assert abs(short / 0.25 - tall / 0.75) <= longest / 0.25
    assert sum(record["tokens_of_parts"]["train"]) == int(splits["train"].lengths.sum()) == record["splits"]["train"]["tokens"]
    again, _ = mixed(tmp_path, tiny_tokenizer, sections, (0.25, 0.75))
    other, _ = mixed(tmp_path, tiny_tokenizer, sections, (0.25, 0.75), seed=1)
    assert list(again["train"]) == list(splits["train"]) != list(other["train"])
    assert sorted(s.token_ids for s in other["train"]) == sorted(s.token_ids for s in splits["train"])


def test_the_same_text_in_two_parts_of_a_mix_lands_in_one_split(tmp_path, tiny_tokenizer):
    renamed = [
        {"chat": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]} for r in QUESTIONS
    ]
    chats = Jsonl(source="jsonl", path=jsonl(tmp_path / "chats.jsonl", renamed), messages="chat")
    splits, _ = mixed(tmp_path, tiny_tokenizer, {"pairs": pairs(tmp_path), "chats": chats}, (1.0, 1.0))
    seen: dict[str, str] = {}
    doubled = 0
    for split, stored in splits.items():
        for text in texts({split: stored}, tiny_tokenizer):
            doubled += text in seen
            assert seen.setdefault(text, split) == split
    assert doubled >= 50


def test_random_tokens_are_uniform_without_special_ones_and_exactly_as_many_as_asked(tmp_path, tiny_tokenizer):
    section = RandomTokens(source="random_tokens", tokens=50_001, seq_len=128, seed=3)
    splits, record = made(tmp_path, tiny_tokenizer, section)
    drawn = [t for stored in splits.values() for s in stored for t in s.token_ids]
    assert len(drawn) == 50_001 == sum(count["response_tokens"] for count in record["splits"].values())
    n = record["vocabulary"]
    assert n == len(tiny_tokenizer) - 2 and not {0, 1} & set(drawn)
    counts = [drawn.count(t) for t in set(drawn)]
    chi_squared = sum((c - len(drawn) / n) ** 2 for c in counts) / (len(drawn) / n)
    assert abs(chi_squared - (n - 1)) < 5 * (2 * (n - 1)) ** 0.5
    again, _ = made(tmp_path, tiny_tokenizer, section)
    assert {k: list(v) for k, v in again.items()} == {k: list(v) for k, v in splits.items()}
    assert all(split_of(repr(s.token_ids)) == split for split, stored in splits.items() for s in stored)


# keys


def key_of(tmp_path, section, **others):
    return identity(find_source("rows", {"rows": section, **others}, Store(tmp_path / "cache")))


def test_the_same_rows_elsewhere_are_the_same_data_and_other_bytes_are_not(tmp_path):
    first = key_of(tmp_path, pairs(tmp_path))
    assert key_of(tmp_path, pairs(tmp_path, name="copy.jsonl")) == first
    assert key_of(tmp_path, pairs(tmp_path, QUESTIONS[:-1], name="less.jsonl")) != first
    for keys in ({"seed": 1}, {"seq_len": 128}, {"where": {"subject": ("code",)}}, {"too_long": "truncate"}, {"max_rows": 5}):
        assert key_of(tmp_path, pairs(tmp_path, **keys)) != first


def test_finding_a_source_reads_nothing_into_memory_and_no_file_twice(tmp_path, monkeypatch):
    section = pairs(tmp_path)
    key_of(tmp_path, section)
    monkeypatch.setattr("harness.store.sha256", lambda path: pytest.fail("read again"))
    key_of(tmp_path, section)


def test_tokens_go_to_disk_and_not_to_memory(tmp_path):
    n, length = 150, 4_000

    def peak_of(work) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def write() -> None:
        with TokenWriter(tmp_path) as writer:
            for i in range(n):
                writer.append("train", Sequence((i,) * length, (True,) * length))

    stored_bytes = n * length * 5
    assert peak_of(write) < stored_bytes / 10
    assert (tmp_path / "train.tokens").stat().st_size + (tmp_path / "train.response").stat().st_size == stored_bytes
    assert peak_of(lambda: [len(s) for s in StoredSequences(tmp_path, "train")]) < stored_bytes / 10


def test_the_manual_lists_the_keys_of_every_source():
    manual = (Path(__file__).parent.parent / "docs" / "suite.md").read_text()
    listed = manual[manual.index("## Where text comes from") :]
    for source, section in SOURCES.items():
        assert f"| `{source}` |" in listed
        assert not [key for key in section.model_fields if f"`{key}" not in listed], source
