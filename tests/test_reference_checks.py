"""Published figures that name a metric their task does not have: said by the suite alone, or once the task is prepared."""

import json
import re

import pytest

from harness import judge
from harness.done import about_stage
from harness.errors import SuiteError
from harness.outline import outline
from harness.plan import make_plan
from harness.reference_checks import JUDGED
from harness.reference_metrics import mistaken_metrics, require_metrics
from harness.store import Store, cache_folder
from harness.suite import load_suite

FIGURE = """
[reference]
source = "a paper"
band = 2.0
figure = [{{ variant = "bf16", task = "{task}", metric = "{metric}", value = 60.0, verified = "first-hand" }}]
"""


def with_figure(suite, task, metric):
    suite.write_text(suite.read_text() + FIGURE.format(task=task, metric=metric))
    return suite


def test_metrics_of_several_repeats_and_of_imported_tasks_are_taken(tiny_suite):
    text = tiny_suite.read_text()
    for task, metric in (
        ("mini_math", "unparsed"),
        ("mini_math", "pass@4"),
        ("scicode", "whatever"),
        ("ifeval", "prompt_strict"),
    ):
        tiny_suite.write_text(
            text.replace('name = "mini_math"\n', 'name = "mini_math"\nrepeats = 4\nsampling = { temperature = 0.7 }\n', 1)
        )
        assert load_suite(with_figure(tiny_suite, task, metric)).reference.figure[0].metric == metric
    tiny_suite.write_text(text)
    with pytest.raises(SuiteError, match=r'mini_math has no metric "pass@4"'):
        load_suite(with_figure(tiny_suite, "mini_math", "pass@4"))


def test_the_metric_of_a_judge_is_one_where_there_is_a_judge(tiny_suite):
    assert JUDGED == judge.METRIC
    tiny_suite.write_text(tiny_suite.read_text().replace('name = "mini_math"', 'name = "aa_lcr"'))
    with pytest.raises(SuiteError, match=r'aa_lcr has no metric "judge_correct"\. Known: exact_match$'):
        load_suite(with_figure(tiny_suite, "aa_lcr", JUDGED))
    section = '\n[judge]\npath = "org/judge"\nrevision = "%s"\nengine = { kind = "hf" }\n' % ("0" * 40)
    tiny_suite.write_text(tiny_suite.read_text() + section)
    assert load_suite(tiny_suite).reference.figure[0].metric == JUDGED


def test_a_metric_that_a_task_of_the_users_lacks_is_said_once_it_is_prepared(tiny_suite, tmp_path, own_cache):
    (tmp_path / "own.yaml").write_text("task: own\n")
    tiny_suite.write_text(tiny_suite.read_text().replace('name = "mini_math"', f'name = "own"\npath = "{tmp_path}/own.yaml"'))
    suite, store = load_suite(with_figure(tiny_suite, "own", "acc_nrm")), Store(cache_folder())
    plan = make_plan(suite, store)
    assert mistaken_metrics(plan, store) == []
    (stage,) = (stage for stage in plan.stages if stage.kind == "prepare" and stage.task.name == "own")
    with store.writing(stage.key, about_stage(stage, store)) as folder:
        (folder / "task.json").write_text(json.dumps({"schema": 1, "n_requests": 3, "metrics": ["acc", "acc_norm"]}))
    line = f'{tiny_suite}: reference.figure[0].metric: own has no metric "acc_nrm"; did you mean acc_norm? Known: acc, acc_norm'
    assert mistaken_metrics(plan, store) == [line]
    missing = []
    outline(tiny_suite, missing=missing)
    assert missing == [line]
    with pytest.raises(SuiteError, match=f"^{re.escape(line)}$"):
        require_metrics(plan, store)
