"""The suite parser: all mistakes at once, each with file, key, what was found, what is allowed, the nearest spelling."""

import re
from pathlib import Path

import pytest

from harness.errors import SuiteError
from harness.outline import outline
from harness.plan import make_plan
from harness.policy import load_policy
from harness.store import Store
from harness.suite import load_suite

REPOSITORY = Path(__file__).parent.parent
SUITES = sorted(
    path
    for path in REPOSITORY.glob("suites/**/*.toml")
    if path.parent.name not in ("gates", "nightly") and path.name != "claims.toml"
)


def mistakes_of(path: Path, text: str) -> list[str]:
    path.write_text(text)
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


@pytest.mark.parametrize("policy", sorted(REPOSITORY.glob("suites/gates/*.toml")), ids=lambda p: p.stem)
def test_the_policies_of_the_repository_are_legal(policy):
    assert load_policy(policy).task


@pytest.mark.parametrize("suite", SUITES, ids=lambda p: p.stem)
def test_the_suites_of_the_repository_are_legal(suite):
    assert load_suite(suite).variants[0].method == "bf16"


@pytest.mark.parametrize(
    ("path", "what"),
    [("nightly/paper.toml", "is a list of suites, which harness nightly"), ("gates/release.toml", "is a release policy")],
)
def test_another_file_than_a_suite_is_told_in_one_line(path, what):
    with pytest.raises(SuiteError) as caught:
        load_suite(REPOSITORY / "suites" / path)
    assert what in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_variants_are_made_in_the_order_bf16_ptq_qad_qat_whatever_the_file_says(tiny_suite):
    text = tiny_suite.read_text()
    head, *variants = re.split(r"(?=\[\[variant\]\])", text)
    last, rest = variants[-1].split("[[task]]", 1)
    tiny_suite.write_text(head + last + "".join(reversed(variants[:-1])) + "[[task]]" + rest)
    assert [v.method for v in load_suite(tiny_suite).variants] == ["bf16", "ptq", "qad", "qat"]


def test_five_mistakes_are_five_lines_with_key_found_allowed_and_nearest(tiny_suite):
    text = tiny_suite.read_text()
    text = text.replace("samples = 8", "smaples = 8").replace('kind = "hf"', 'kind = "hff"')
    text = text.replace("tokens = 6000", 'tokens = "many"').replace('loss_on = "assistant"', 'loss_on = "assistent"')
    text = text.replace('method = "qat"', 'method = "qta"')
    lines = sorted(mistakes_of(tiny_suite, text))
    assert lines == sorted(
        [
            "quantization.calibration.smaples: unknown key; did you mean samples? Known: data, headroom, max_overshoot, max_saturated, samples, skip_first_token",
            "engine.kind: found 'hff'; did you mean hf? Allowed: hf, server, vllm",
            "training.tokens: found 'many'; input should be a valid integer",
            "training.loss_on: found 'assistent'; did you mean assistant? Allowed: all, assistant",
            "variant[2].method: found 'qta'; did you mean qat? Allowed: bf16, checkpoint, ptq, qad, qat",
        ]
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mini_math"', 'name = "mini_mat"', r'task\[0\]\.name: unknown task "mini_mat".*did you mean mini_math\?'),
        ('name = "mini_math"', 'name = "mini_choice"', r'task: the name "mini_choice" is repeated'),
        ('name = "ptq"', 'name = "bf16"', r'variant: the name "bf16" is repeated'),
        (
            "[quantization]",
            "thinking = { template_args = { tokenize = true, enable_thinking = true } }\n[quantization]",
            r"model\.thinking\.template_args: .* tokenize: set by the harness when it renders a prompt.*; remove it",
        ),
        (
            "[quantization]",
            'thinking = { open = "<t>", close = "<t>" }\n[quantization]',
            r"model\.thinking: .*open = '<t>' and close = '<t>' hold one another; give markers that differ",
        ),
        (
            "[quantization]",
            'thinking = { open = "</think>\\n", close = "</think>" }\n[quantization]',
            r"model\.thinking: .*hold one another",
        ),
        ('name = "mini_math"', 'name = "../../evil"', r"task\[0\]\.name: found '\.\./\.\./evil'; string should match pattern"),
        ('name = "mini_math"', 'name = ".hidden"', r"task\[0\]\.name: found '\.hidden'; string should match pattern"),
        (
            'name = "mini_math"',
            'name = "mini_math"\nrepeats = 2',
            r"task\[0\]\.repeats: has no effect on mini_math, whose file is greedy .* set a temperature in \[sampling\]",
        ),
        (
            'name = "mini_choice"',
            'name = "mini_choice"\nrepeats = 2\nsampling = { temperature = 0.6 }',
            r"task\[1\]\.repeats: has no effect on mini_choice, which compares likelihoods",
        ),
        (
            'calibration = { data = "text"',
            'calibration = { data = "txt"',
            r'variant "ptq": quantization\.calibration\.data: unknown data set "txt"; did you mean text\?',
        ),
        ('source = "builtin"', 'source = "bultin"', r"data\.text\.source: found 'bultin'; did you mean builtin\?"),
        ('source = "builtin"', 'source = "hub"', r"data\.text\.path: missing; it is required"),
        ('method = "bf16"', 'method = "ptq"', r'variant: no variant has method = "bf16"'),
        (
            'method = "qad"',
            'method = "qad"\nteacher = "x"',
            r"variant\[3\]\.teacher: found 'x'",
        ),
        (
            'method = "qat"',
            'method = "qat"\nloss = "mse"\nteacher = { path = "x" }',
            r'variant\[2\]\.teacher: has no effect with method = "qat", which trains on cross entropy; remove it',
        ),
        (
            'method = "qad"',
            'method = "qad"\nloss = "mse"\ntemperature = 2.0',
            r'variant\[3\]\.temperature: has no effect with loss = "mse"',
        ),
        ('method = "qad"', 'method = "qad"\nloss = "kl_ce"', r"variant\[3\]\.ce_weight: missing; .*\(1 - ce_weight\) KL"),
        ('method = "qad"', 'method = "qad"\nce_weight = 0.5', r'variant\[3\]\.ce_weight: has no effect with loss = "kl"'),
        ('method = "ptq"', 'method = "ptq"\nseeds = [1]', r'variant\[1\]\.seeds: has no effect with method = "ptq"'),
        (
            'method = "qad"',
            'method = "qad"\nseeds = [1]\ntraining = { seed = 1 }',
            r"variant\[3\]\.training\.seed: has no effect beside seeds",
        ),
        (
            "lr = 1e-3",
            "",
            r'training\.lr: missing; a source recommends one for model\.post_training = "sft" or "rl"',
        ),
        ("lr = 1e-3", "lr = 1e-3\nmicro_batch_size = 5", r"training\.micro_batch_size: found 5, more than batch_size 4"),
        (
            "lr = 1e-3",
            'lr = 1e-3\noptimizer = "adafactor"\nbetas = [0.9, 0.99]',
            r'training\.betas: has no effect with optimizer = "adafactor"',
        ),
        (
            "lr = 1e-3",
            'lr = 1e-3\nselect = "best_of_k"\nvalidate_every = 2\nselect_tasks = ["mini_math", "mini_math"]',
            r'training\.select_tasks: the task "mini_math" is repeated',
        ),
        (
            'method = "qad"',
            'method = "qad"\nquantization = { block_scales = "learned" }\ntraining = { train = "scales", max_saturated = 0.1 }',
            r'variant\[3\]\.training\.max_saturated: has no effect with train = "scales"',
        ),
        (
            'lr = 1e-3\nloss_on = "assistant"',
            'loss_on = "assistant"\noptimizer = "adafactor"',
            r"training\.lr: missing; .*with AdamW",
        ),
        ("lr = 1e-3", 'lr = 1e-3\nselect = "best_val"', r'training\.validate_every: missing; select = "best_val" chooses'),
        (
            "lr = 1e-3",
            'lr = 1e-3\nselect = "best_of_k"\nvalidate_every = 2',
            r'training\.select_tasks: missing; select = "best_of_k" is judged on tasks',
        ),
        (
            "lr = 1e-3",
            'lr = 1e-3\nselect = "best_of_k"\nvalidate_every = 2\nselect_tasks = ["mini_maths"]',
            r'training\.select_tasks: unknown task "mini_maths"; did you mean mini_math\?',
        ),
        ("lr = 1e-3", "lr = 1e-3\ncandidates = 3", r'training\.candidates: has no effect with select = "last"'),
        (
            "lr = 1e-3",
            "lr = 1e-3\nvalidation_samples = 3",
            r"training\.validation_samples: has no effect without validate_every",
        ),
        (
            "lr = 1e-3",
            'lr = 1e-3\ntrain = "scales"',
            r'training\.train: found "scales" with quantization\.block_scales = "recomputed"; .*must be "learned"',
        ),
        (
            'method = "ptq"',
            'method = "ptq"\ntraining = { lr = 1.0 }',
            r'variant\[1\]\.training: has no effect with method = "ptq"',
        ),
        ('method = "ptq"', 'method = "checkpoint"', r"variant\[1\]\.path: missing"),
        (
            'method = "qad"',
            'method = "qad"\ntraining = { lrr = 1.0 }',
            r"variant\[3\]\.training\.lrr: unknown key; did you mean lr\?",
        ),
        ("batch_size = 8 }", "batchsize = 8 }", r"engine\.args\.batchsize: unknown key; did you mean batch_size\?"),
        ("batch_size = 8 }", "batch_size = 0 }", r"engine\.args\.batch_size: found 0; allowed: a positive integer"),
        ('loss_on = "assistant"', "", r"training\.loss_on: missing; it is required"),
        ("schema = 1", "schema = 2", r"schema: found 2; Allowed: 1|schema: found 2"),
        ("[data.text]", '[data.spare]\nsource = "builtin"\n[data.text]', r"data\.spare: nothing uses it"),
        ('path = "', 'revision = "main"\npath = "', r"model\.revision: found 'main'.*40 hex digits"),
        ("lr = 1e-3", "lr = 1e-3\nseed = 99999999999999999999", r"training\.seed: found 99999999999999999999; .*less than"),
        ('method = "qad"', 'method = "qad"\nseeds = [-1]', r"variant\[3\]\.seeds\[0\]: found -1"),
        ("samples = 8 }", "samples = 8, headroom = 1e39 }", r"quantization\.calibration\.headroom: found 1e\+39"),
        ("lr = 1e-3", "lr = nan", r"training\.lr: found nan"),
        (
            "[quantization]",
            '[quantization]\nscale_rule = "msee"',
            r"quantization\.scale_rule: found 'msee'; did you mean mse\?",
        ),
        (
            "[quantization]",
            '[quantization]\nblock_scales = "learnt"',
            r"quantization\.block_scales: found 'learnt'; did you mean learned\?",
        ),
        (
            "[quantization]",
            '[quantization]\nscale_rule = "gptq"\nblock_scales = "recomputed"',
            r'variant\[1\]: quantization\.block_scales: found "recomputed" with scale_rule = "gptq".*allowed: "frozen"',
        ),
        (
            'method = "qad"',
            'method = "qad"\nquantization = { scale_rule = "four_over_six", block_scales = "recomputed" }',
            r'variant\[3\]: quantization\.block_scales: found "recomputed" with scale_rule = "four_over_six"',
        ),
        (
            'method = "ptq"',
            'method = "ptq"\nquantization = { block_scales = "frozen" }',
            r'variant\[1\]\.quantization\.block_scales: has no effect with method = "ptq"',
        ),
        (
            "[quantization]",
            '[quantization]\nscale_weighting = "second_moment"',
            r'variant\[1\]: quantization\.scale_weighting: has no effect with scale_rule = "amax"',
        ),
        (
            "[quantization]",
            "[quantization]\nscale_multiplier = 0.5",
            r"quantization\.scale_multiplier: found 0\.5; .*equal to 1",
        ),
        (
            'name = "mini_choice"',
            'name = "mini_choice"\nsampling = { max_tokens = 8 }',
            r"task\[1\]\.sampling: has no effect on mini_choice, which compares likelihoods; remove it",
        ),
        (
            'name = "mini_math"',
            'name = "mine"\npath = "tasks/mine.yaml"',
            rf"task\[0\]\.path: tasks/mine.yaml: there is no such file or folder; looked for {re.escape(str(Path.cwd()))}/tasks/mine.yaml \(a relative",
        ),
        (
            "samples = 8 }",
            "samples = 8, skip_first_token = true }\nactivations = false",
            r"variant\[1\]: quantization\.calibration\.skip_first_token: has no effect",
        ),
    ],
)
def test_each_mistake_says_where_what_and_what_to_do(tiny_suite, old, new, message):
    text = tiny_suite.read_text()
    assert old in text
    lines = mistakes_of(tiny_suite, text.replace(old, new, 1))
    assert any(re.match(message, line) for line in lines), lines


def test_two_samples_files_of_one_name_are_refused(tiny_suite):
    text = tiny_suite.read_text().replace('name = "ptq"', 'name = "bf16.a"')
    lines = mistakes_of(
        tiny_suite, text.replace('name = "mini_math"', 'name = "a.b"').replace('name = "mini_choice"', 'name = "b"')
    )
    assert lines == [
        "task: task a.b of bf16 and task b of bf16.a would both write samples/bf16.a.b.jsonl.zst; give a variant another name"
    ]


def test_repeats_of_a_greedy_task_are_accepted_with_a_temperature(tiny_suite):
    tiny_suite.write_text(
        tiny_suite.read_text().replace("limit = 8", "limit = 8\nrepeats = 2\nsampling = { temperature = 0.6 }", 1)
    )
    assert load_suite(tiny_suite).tasks[0].repeats == 2


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ('protocol = "qad-paper"', "length of answers: 32 tokens, as the task's own file says"),
        ('protocol = "qad-paper"\nmax_tokens = 99', None),
        ('protocol = "open-r1"', None),
    ],
)
def test_plan_says_whose_length_of_answers_holds_where_a_protocol_is_silent(tiny_suite, sampling, said):
    tiny_suite.write_text(tiny_suite.read_text().replace("[engine]", f"[sampling]\n{sampling}\n\n[engine]"))
    (line,) = [line for line in outline(tiny_suite) if "protocol" in line]
    assert line.startswith("mini_math: protocol")
    assert line.endswith(said) if said else "length of answers:" not in line


def test_plan_names_the_keys_that_are_not_set_here(tiny_suite, monkeypatch):
    text = tiny_suite.read_text()
    for name in ("bf16", "ptq"):
        text = text.replace(
            f'method = "{name}"\n',
            f'method = "{name}"\nendpoint = {{ url = "http://h:1/v1", model = "{name}", api_key_env = "KEY_OF_H" }}\n',
        )
    text = text[: text.index("[training]")] + text[text.index("[[variant]]") :]
    for name in ("qat", "qad"):
        text = text.replace(f'[[variant]]\nname = "{name}"\nmethod = "{name}"\n', "")
    text = text[: text.index("[engine]")] + '[engine]\nkind = "server"\n'
    tiny_suite.write_text(text)
    wanted = "KEY_OF_H is not set here; harness run needs the key in it"
    monkeypatch.delenv("KEY_OF_H", raising=False)
    assert outline(tiny_suite).count(wanted) == 1
    monkeypatch.setenv("KEY_OF_H", "secret")
    assert wanted not in outline(tiny_suite)


def test_a_wrong_data_set_is_named_although_a_later_variant_names_another(tiny_suite):
    text = tiny_suite.read_text().replace('calibration = { data = "text"', 'calibration = { data = "nope"')
    text = text.replace('method = "qad"', 'method = "qad"\nquantization = { calibration = { data = "text" } }')
    lines = mistakes_of(tiny_suite, text)
    assert [line for line in lines if line.startswith('variant "ptq": quantization.calibration.data: unknown data set "nope"')]


def test_data_sections_of_different_lengths_are_refused_since_their_splits_would_overlap(tiny_suite):
    text = tiny_suite.read_text().replace("[training]", '[data.long]\nsource = "builtin"\nseq_len = 1024\n\n[training]')
    text = text.replace('method = "qad"', 'method = "qad"\ndata = "long"').replace(
        'method = "qat"', 'method = "qat"\ndata = "text"'
    )
    lines = mistakes_of(tiny_suite, text)
    assert lines == ["data: builtin sections differ in seq_len, so their splits would overlap; give all of them one seq_len"]


def test_one_mistake_in_a_variant_is_one_line(tiny_suite):
    lines = mistakes_of(tiny_suite, tiny_suite.read_text().replace('method = "ptq"', 'method = "ptq"\nquantisation = {}'))
    assert len(lines) == 1
    lines = mistakes_of(
        tiny_suite, tiny_suite.read_text().replace('method = "qat"', 'method = "qat"\ntraining = { lr = -1.0 }')
    )
    assert len(lines) == 1


def test_a_missing_suite_is_answered_with_the_nearest_file(tiny_suite):
    with pytest.raises(SuiteError, match=r"tinny\.toml: there is no such suite; did you mean .*tiny\.toml"):
        load_suite(tiny_suite.with_name("tinny.toml"))


def test_a_file_that_is_not_toml_is_refused_with_its_line(tiny_suite):
    (line,) = mistakes_of(tiny_suite, "schema = = 1")
    assert line.startswith("not TOML: ")
    assert "line 1" in line


def test_a_folder_is_not_a_suite(tmp_path):
    with pytest.raises(SuiteError, match="cannot be read"):
        load_suite(tmp_path)


def test_seeds_make_a_variant_each_and_overrides_reach_only_their_variant(tiny_suite):
    text = tiny_suite.read_text().replace('method = "qad"', 'method = "qad"\nseeds = [3, 4]\ntraining = { lr = 0.5 }')
    tiny_suite.write_text(text)
    suite = load_suite(tiny_suite)
    trained = {v.name: v.training for v in suite.variants if v.is_trained}
    assert {name: (t.seed, t.lr) for name, t in trained.items()} == {
        "qat": (0, 1e-3),
        "qad-seed3": (3, 0.5),
        "qad-seed4": (4, 0.5),
    }
    assert [(v.group, v.seed) for v in suite.variants if v.is_trained] == [("qad", 3), ("qad", 4), ("qat", None)]


@pytest.mark.parametrize(("kind", "lr"), [("sft", 1e-6), ("rl", 1e-5)])
def test_post_training_sets_the_recommended_rate_and_plan_says_where_it_comes_from(tiny_suite, kind, lr):
    text = tiny_suite.read_text().replace("lr = 1e-3\n", "").replace("[model]", f'[model]\npost_training = "{kind}"')
    tiny_suite.write_text(text)
    assert {v.training.lr for v in load_suite(tiny_suite).variants if v.is_trained} == {lr}
    defaults = [line for line in outline(tiny_suite) if "default" in line]
    assert sum(f"lr {lr:g} (arXiv 2601.20088" in line for line in defaults) == 2
    assert sum("KL to the model itself" in line for line in defaults) == 1


def test_a_rate_of_the_suite_is_never_replaced_by_the_recommended_one(tiny_suite):
    tiny_suite.write_text(tiny_suite.read_text().replace("[model]", '[model]\npost_training = "sft"'))
    assert {v.training.lr for v in load_suite(tiny_suite).variants if v.is_trained} == {1e-3}


def test_block_scales_are_frozen_by_default_with_every_rule_but_amax(tiny_suite):
    text = tiny_suite.read_text().replace('method = "qad"', 'method = "qad"\nquantization = { scale_rule = "mse" }')
    tiny_suite.write_text(text)
    chosen = {v.name: v.quantization.block_scales for v in load_suite(tiny_suite).variants if v.quantization}
    assert chosen == {"ptq": "recomputed", "qat": "recomputed", "qad": "frozen"}


def test_block_scales_without_a_trained_variant_have_no_effect_and_are_refused(tiny_suite):
    text = re.sub(r'\[\[variant\]\]\nname = "qa[td]"\nmethod = "qa[td]"\n', "", tiny_suite.read_text())
    text = re.sub(r"\[training\][^\[]*", "", text).replace("[quantization]", '[quantization]\nblock_scales = "frozen"')
    assert mistakes_of(tiny_suite, text) == ["quantization.block_scales: has no effect: no variant is trained; remove it"]


GATE = """
[gate]
kernels = ["w4a4_emulation"]
candidate = "ptq"
task = [{ name = "mini_math", margin = 3.0, tier = "critical" }]
[reference]
source = "a paper"
band = 2.0
figure = [{ variant = "bf16", task = "mini_math", value = 60.0, verified = "first-hand" }]
"""


def test_a_gate_and_published_figures_change_no_stage(tiny_suite, tmp_path):
    before = make_plan(load_suite(tiny_suite), Store(tmp_path))
    tiny_suite.write_text(tiny_suite.read_text() + GATE)
    suite = load_suite(tiny_suite)
    assert suite.gate.task[0].margin == 3.0 and suite.reference.figure[0].value == 60.0
    assert [stage.key for stage in make_plan(suite, Store(tmp_path)).stages] == [stage.key for stage in before.stages]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('candidate = "ptq"', 'candidate = "ptqs"', r'gate.candidate: no variant "ptqs"; did you mean ptq\?'),
        ('candidate = "ptq"', "kernels_allowed = 3", r"gate.kernels_allowed: unknown key; did you mean kernels"),
        ("margin = 3.0", "margin = -3.0", r"gate.task\[0\].margin: .*greater than 0"),
        ("margin = 3.0", "margin = 300.0", r"gate.task\[0\].margin: .*less than or equal to 100"),
        ('"critical"', '"advisory"', r'gate: .*none is "critical", so nothing could ever be GO'),
        ('kernels = ["w4a4_emulation"]', "", r"gate.kernels: missing"),
        ('variant = "bf16"', 'variant = "fp16"', r'reference.figure\[0\].variant: no variant "fp16"; did you mean bf16\?'),
        (
            'task = "mini_math", value',
            'task = "mini_math", metric = "exact_mach", value',
            r'reference.figure\[0\].metric: mini_math has no metric "exact_mach"; did you mean exact_match\? Known: exact_match, unparsed',
        ),
        (
            'task = "mini_math", value',
            'task = "mini_maths", value',
            r'reference.figure\[0\].task: unknown task "mini_maths"; did you mean mini_math\? Known: ',
        ),
        (
            "value = 60.0",
            "value = 0.73",
            r"reference.figure: no value is above 1 \(the largest is 0.73\): .* write 73 for a share",
        ),
        (', verified = "first-hand"', "", r"reference.figure\[0\].verified: missing; it is required"),
        ('"first-hand"', '"first hand"', r"reference.figure\[0\].verified: found 'first hand'; did you mean first-hand\?"),
        ('source = "a paper"\n', "", r"reference.source: missing; it is required"),
        (
            '"mini_math", value = 60.0',
            '"diagnostics", value = 0.3',
            r"reference.figure\[0\]: .*metric: found None; allowed with .*: kl, ce",
        ),
        (
            '"mini_math", value = 60.0',
            '"diagnostics", metric = "ppl", value = 3',
            r"reference.figure\[0\]: .*metric: found 'ppl'; allowed",
        ),
        (
            "}]\n",
            '}, { variant = "bf16", task = "mini_math", value = 61.0, verified = "first-hand" }]\n',
            "bf16 mini_math repeated",
        ),
    ],
)
def test_a_mistake_in_a_gate_is_named(tiny_suite, old, new, message):
    tiny_suite.write_text(tiny_suite.read_text() + GATE.replace(old, new))
    with pytest.raises(SuiteError, match=message):
        load_suite(tiny_suite)


@pytest.mark.parametrize(
    ("engine", "admitted", "candidate", "quantization", "message"),
    [
        (
            'kind = "vllm"\nkernels = "w4a4_emulation"',
            "native",
            "ptq",
            "",
            'engine.kernels = "w4a4_emulation" computes ptq with w4a4_',
        ),
        ('kind = "vllm"\nkernels = "native"', "w4a4_emulation", None, "", 'engine.kernels = "native" computes ptq with native'),
        ('kind = "hf"', "native", "ptq", "", 'engine.kind = "hf" computes ptq with w4a4_emulation'),
        ('kind = "hf"', "w4a4_emulation", "ptq", "{ activations = false }", "activations = false computes ptq with w4a16"),
        ('kind = "vllm"\nkernels = "native"', "native", "qad", "{ activations = false }", None),
        ('kind = "hf"', "w4a4_emulation", None, "{ activations = false }", None),
    ],
)
def test_kernels_with_which_the_gate_could_never_say_go_are_a_mistake(
    tiny_suite, engine, admitted, candidate, quantization, message
):
    text = tiny_suite.read_text().replace('kind = "hf"\nargs = { batch_size = 8 }\n', f"{engine}\n")
    text = text.replace('method = "ptq"', f'method = "ptq"\nquantization = {quantization or "{}"}', 1)
    gate = GATE.replace("w4a4_emulation", admitted).replace(
        'candidate = "ptq"\n', f'candidate = "{candidate}"\n' if candidate else ""
    )
    if message is None:
        tiny_suite.write_text(text + gate)
        assert load_suite(tiny_suite).gate.kernels == (admitted,)
        return
    (line,) = mistakes_of(tiny_suite, text + gate)
    assert line.startswith(f"gate.kernels: found ['{admitted}'], but {message}") and "mini_math could never PASS" in line


def test_kernels_say_nothing_of_a_gate_that_judges_imported_scores_alone(tiny_suite):
    gate = (
        GATE.replace("w4a4_emulation", "native")
        .replace("mini_math", "maths", 1)
        .replace("candidate", "admit_imported = true\ncandidate")
    )
    tiny_suite.write_text(tiny_suite.read_text() + gate)
    assert load_suite(tiny_suite).gate.admit_imported


def test_a_key_that_stands_twice_is_named(tiny_suite):
    text = tiny_suite.read_text().replace("[training]\n", "[training]\nbatch_size = 4\nbatch_size = 8\n", 1)
    (line,) = mistakes_of(tiny_suite, text)
    assert re.search(r'Cannot overwrite a value \(at line \d+, column \d+\): "batch_size" is there twice; remove one$', line)


def test_a_section_that_says_nothing_is_told_in_our_words(tiny_suite):
    text = tiny_suite.read_text().replace("[quantization]\n", "[quantization]\nexclude_layers = {}\n", 1)
    (line,) = mistakes_of(tiny_suite, text)
    assert (
        line.startswith("quantization.exclude_layers: ")
        and "alue error" not in line
        and "it names no layer; give first" in line
    )
