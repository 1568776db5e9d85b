"""The leaderboard in headless Chromium, from file://: it sorts, filters and opens runs, executes nothing of a run's text, asks for nothing.

Needs an installed Chromium; skipped with its reason without. Nothing is downloaded.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from harness import accepted
from harness.leaderboard.build import build_leaderboard
from harness.leaderboard.site import run_id

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements-dev.lock")
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "<img src=x onerror=window.owned=1>"
SECRET = "Which gated question is this? The answer is forty-two."
REPOSITORY = Path(__file__).parent.parent


def load_maker():
    spec = importlib.util.spec_from_file_location("leaderboard_scale", REPOSITORY / "bench" / "leaderboard_scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_run


make_run = load_maker()


def rename(path, pairs):
    text = path.read_text()
    for old, new in pairs.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    path.write_text(text)


def make_hostile(run):
    """Names that are markup, in every place where a name can stand, and a verdict that says so, too."""
    names = {
        "qad": HOSTILE,
        "task_0": f"{HOSTILE}&amp;",
        "org/a-model": f"<script>window.owned=1</script>{HOSTILE}",
        "hub:abc": HOSTILE,
    }
    for path in (run / "run.json", run / "tasks.jsonl", run / "diagnostics.jsonl"):
        rename(path, names)
    about = json.loads((run / "run.json").read_text())
    about["suite"] = f"{HOSTILE}-suite"
    about["stages"] = []
    about["provenance"]["cpu"] = HOSTILE
    about["resolved"]["engine"]["args"] = {"__proto__": HOSTILE, HOSTILE: HOSTILE}
    about["variants"][3]["method"] = f"'\"></td>{HOSTILE}"
    (run / "run.json").write_text(json.dumps(about))
    checks = [{"name": HOSTILE, "kind": "task", "tier": "critical", "verdict": "FAIL", "reasons": [HOSTILE], "figures": {}}]
    candidate = {"candidate": HOSTILE, "baseline": "bf16", "verdict": "NO-GO", "reasons": [f"task {HOSTILE}"], "checks": checks}
    (run / "verdict.json").write_text(
        json.dumps({"schema": 1, "suite": about["suite"], "run": run.name, "verdict": "NO-GO", "candidates": [candidate]})
    )


def make_gated(run):
    """The text of a question that must not be published, wherever a run holds text."""
    (run / "samples").mkdir()
    (run / "samples" / "qad.task_0.jsonl.zst").write_text(SECRET)
    (run / "tasks" / "task_0").mkdir(parents=True)
    (run / "tasks" / "task_0" / "docs.jsonl.zst").write_text(SECRET)
    about = json.loads((run / "run.json").read_text())
    about["gaps"] = [{"variant": "qad", "task": "task_0", "n_missing": 1, "reason": SECRET}]
    (run / "run.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    results = tmp_path_factory.mktemp("leaderboard") / "results"
    runs = [make_run(results, number, tasks=3, questions=12) for number in range(30)]
    make_hostile(make_run(results, 100, suite="hostile", tasks=2, questions=12))
    make_gated(make_run(results, 101, tasks=3, questions=12))
    (make_run(results, 102, tasks=3) / "run.json").write_text('{"schema": 1, "sui')
    accepted.invalidate(runs[3], reason=f"wrong weights {HOSTILE}")
    build_leaderboard(results, results / "site")
    return results / "site"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, site):
    """An open page; at its end: nothing was executed, no error was logged, and every request was for a file of the site."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: said.append(f"error: {error}"))
    opened.on("request", lambda request: asked.append(request.url))
    visit(opened, site)
    yield opened
    assert opened.evaluate("window.owned") is None
    assert opened.locator("main img, main script, main iframe").count() == 0
    assert said == []
    assert asked
    assert all(url.startswith((site.as_uri() + "/", "data:,")) for url in asked)
    context.close()


def visit(page, site, address=""):
    page.goto("about:blank")
    page.goto(f"{site.as_uri()}/index.html{address}")
    page.wait_for_selector("html[data-ready=yes]")


def board_of(page, suite):
    """Choose the board of a suite that has ranks."""
    labels = page.locator("#board option").evaluate_all("all => all.map(each => [each.value, each.textContent])")
    value = next(value for value, text in labels if text.startswith(suite) and "nothing ranked" not in text)
    page.select_option("#board", value)
    page.wait_for_selector(f"main[data-address='#/board/{value}']")


def column(page, head):
    heads = page.locator("section[aria-labelledby=standing] thead th").all_inner_texts()
    place = next(i for i, text in enumerate(heads) if text.strip().startswith(head))
    return [
        row.locator("th, td").nth(place).inner_text().split("\n")[0]
        for row in page.locator("section[aria-labelledby=standing] tbody tr").all()
    ]


def test_the_table_sorts_by_a_button_that_the_keyboard_reaches_and_says_how(page):
    board_of(page, "nightly")
    page.select_option("#show", "all")
    head = page.locator("section[aria-labelledby=standing] thead th", has_text="Mean")
    button = head.get_by_role("button")
    assert head.get_attribute("scope") == "col"
    button.focus()
    page.keyboard.press("Enter")
    playwright.expect(head).to_have_attribute("aria-sort", "descending")  # a click sorts a moment later
    falling = [float(text) for text in column(page, "Mean")]
    assert falling == sorted(falling, reverse=True)
    page.keyboard.press("Enter")
    playwright.expect(head).to_have_attribute("aria-sort", "ascending")
    rising = [float(text) for text in column(page, "Mean")]
    assert rising == sorted(rising)
    assert rising[0] < falling[0]


def test_rows_without_a_figure_sort_last(page):
    board_of(page, "nightly")
    page.select_option("#show", "all")
    head = page.locator("section[aria-labelledby=standing] thead th", has_text="Rank")
    for order in ("ascending", "descending"):
        head.get_by_role("button").click()
        playwright.expect(head).to_have_attribute("aria-sort", order)
        assert column(page, "Rank")[0][0].isdigit()
        assert not column(page, "Rank")[-1][0].isdigit()


def test_the_table_filters_by_words_by_method_and_by_state(page):
    board_of(page, "nightly")
    assert set(column(page, "Variant")) >= {"bf16", "ptq", "qat", "qad"}
    page.get_by_label("Search").first.fill("qat")
    assert {text.split()[0] for text in column(page, "Variant")} == {"qat"}
    page.get_by_label("Search").first.fill("")
    page.select_option("#show", "ranked")
    page.select_option("#method", "ptq")
    assert column(page, "Variant") == ["ptq"]
    page.select_option("#method", "")
    page.select_option("#show", "not ranked")
    assert set(column(page, "Rank")) == {"not ranked"}


def test_a_run_opens_from_the_table_with_its_figures_and_goes_back(page):
    board_of(page, "nightly")
    link = page.locator("section[aria-labelledby=standing] tbody tr a").last
    name = link.inner_text()
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("h2#provenance")
    assert page.locator("h1").inner_text() == name
    for part in ("Scores", "Flips", "Training", "Divergence from BF16", "Configuration", "Provenance"):
        assert page.get_by_role("heading", name=part, exact=True).count() == 1
    assert page.locator("figure canvas").count() >= 2
    page.get_by_text("Which questions").click()
    assert page.locator(".digests code").first.inner_text().isalnum()
    page.locator(".crumbs a").click()
    page.wait_for_selector("h2#standing")


def test_charts_have_a_text_and_their_data_as_a_table(page):
    board_of(page, "nightly")
    chart = page.locator("section[aria-labelledby=history] figure")
    assert chart.locator("canvas").count() == 1
    assert "Line chart" in chart.get_by_role("img").get_attribute("aria-label")
    chart.locator("summary").click()
    chart.locator("tbody tr").first.wait_for()  # made when the table is opened
    assert chart.locator("tbody tr").count() == 25
    before = chart.get_by_role("img").get_attribute("aria-label")
    page.select_option("#measure", label="KL")
    assert page.locator("section[aria-labelledby=history] figure").get_by_role("img").get_attribute("aria-label") != before
    assert "Scatter chart" in page.locator("section[aria-labelledby=scatter]").get_by_role("img").get_attribute("aria-label")


def test_hostile_names_are_shown_as_text_everywhere(page, site):
    board_of(page, HOSTILE)
    assert page.locator("h1").inner_text() == f"{HOSTILE}-suite"
    assert any(text.startswith(HOSTILE) for text in column(page, "Variant"))
    page.locator("details.protocol > summary").click()
    for figure in page.locator("figure summary").all():
        figure.click()
    for button in page.locator("thead [role=button]").all():
        button.click()
    assert "<script>window.owned=1</script>" in page.locator(".lead").inner_text()
    page.locator("section[aria-labelledby=standing] tbody tr a").last.click()
    page.wait_for_selector("h2#provenance")
    for fold in page.locator("main details > summary").all():
        fold.click()
    assert HOSTILE in page.locator("main").inner_text()
    assert page.get_by_role("heading", name=f"{HOSTILE} against bf16").count() == 1
    visit(page, site, "#/run/" + HOSTILE)
    assert page.locator("h1").inner_text() == "Not found"


def test_what_was_left_out_and_withdrawn_is_named(page):
    page.locator("#left-out-link").click()
    said = page.locator("section[aria-labelledby=left-out]").inner_text()
    assert "cannot be read" in said
    assert f"invalidated: wrong weights {HOSTILE}" in said
    assert "Rows are ranked by the mean" in page.locator("section[aria-labelledby=rule]").inner_text()


def test_the_text_of_a_gated_question_is_nowhere_in_the_site(site):
    found = [path for path in site.rglob("*") if path.is_file() and b"gated question" in path.read_bytes()]
    assert found == []
    assert (site / "data" / "runs").is_dir()


def test_a_page_whose_data_file_is_gone_says_so(browser, site, tmp_path):
    copy = shutil.copytree(site, tmp_path / "site")
    name = run_id(f"nightly/{next(path.name for path in sorted((site.parent / 'nightly').iterdir()))}")
    (copy / "data" / "runs" / f"{name}.js").unlink()
    page = browser.new_page()
    visit(page, copy, f"#/run/{name}")
    page.wait_for_selector("h1")
    assert "are not beside the page" in page.locator("main").inner_text()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen_and_text_is_readable(browser, site, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    nightly = sorted((site.parent / "nightly").iterdir())
    for address in ("", f"#/run/{run_id(f'nightly/{nightly[5].name}')}"):
        visit(page, site, address)
        page.wait_for_selector("h2")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        pairs = [(name, page.evaluate(CONTRAST, name)) for name in ("--ink", "--dim", "--accent", "--good", "--bad", "--open")]
        assert all(contrast >= 4.5 for _, contrast in pairs), pairs
    context.close()


CONTRAST = """name => {
  const of = (text) => { const c = text.match(/[0-9a-f]{2}/gi).map(h => parseInt(h, 16) / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
  const style = getComputedStyle(document.documentElement);
  const [a, b] = [of(style.getPropertyValue(name).trim()), of(style.getPropertyValue("--page").trim())].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
}"""


def test_the_theme_button_goes_through_system_light_and_dark(page):
    colours = []
    for name in ("light", "dark", "system"):
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == f"Theme: {name}"
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]


def test_the_policy_of_the_page_stops_markup_that_would_get_through(browser, site):
    page = browser.new_page()
    visit(page, site)
    page.evaluate("""window.stopped = []; document.addEventListener("securitypolicyviolation", event => stopped.push(event.effectiveDirective));
      const made = document.createElement("script"); made.textContent = "window.owned = 1"; document.body.append(made);
      const other = document.createElement("div"); other.innerHTML = '<img src="http://127.0.0.1:9/x" onerror="window.owned = 2">'; document.body.append(other);
      fetch("http://127.0.0.1:9/").catch(() => 0)""")
    page.wait_for_function("new Set(window.stopped).size >= 3")
    assert page.evaluate("window.owned") is None
    assert set(page.evaluate("window.stopped")) >= {"script-src-elem", "img-src", "connect-src"}
    page.close()
