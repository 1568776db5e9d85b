"""The findings on the leaderboard: what its files hold, and the page in headless Chromium, which is skipped where none is installed."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from findings_runs import make_run, shares, write_suite
from test_findings import ALONG, LINES, claims_file, comparison

from harness.findings import findings
from harness.leaderboard.build import build_leaderboard, lines
from harness.leaderboard.findings import RECORD

HOSTILE = "<img src=x onerror=window.owned=1>"
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
spec = importlib.util.spec_from_file_location(
    "leaderboard_scale", Path(__file__).parent.parent / "bench" / "leaderboard_scale.py"
)
scale = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scale)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Findings of an experiment beside a run of another suite; text in them is markup wherever it may be."""
    folder = tmp_path_factory.mktemp("findings")
    suite = write_suite(folder, "along", variants=ALONG)
    make_run(
        folder / "results", suite, shares({"bf16": 0.8, "ptq": 0.6, "qat-1": 0.5, "qat-2": 0.3, "qad-1": 0.7, "qad-2": 0.75})
    )
    scale.make_run(folder / "results", 1, tasks=2, questions=12)
    more = 'minus = { candidate = "qat-1", baseline = "ptq" }'
    path = claims_file(
        folder,
        comparison("qad-2", "qat-2", suite="along"),
        comparison("qad-2", "qat-2", "lower", suite="along", more=more),
        ids=["one", "two"],
        tail=LINES,
    )
    text = path.read_text().replace('text = "QAD scores above QAT"', f"text = '{HOSTILE}'", 1)
    path.write_text(text.replace('id = "two"', f"id = \"two\"\nnote = '{HOSTILE}'"))
    findings(path, folder / "results", folder / "docs" / "findings.md")
    build_leaderboard(folder / "results", folder / "results" / "site")
    return folder / "results" / "site"


def view_of(site):
    text = (site / "data" / "findings.js").read_text()
    return json.loads(json.loads(text[text.index(", ") + 2 : -3]))


def copied(site, tmp_path):
    shutil.copytree(site.parent, tmp_path / "results", ignore=shutil.ignore_patterns("site"))
    return tmp_path / "results"


def test_the_site_has_the_rows_of_the_report_and_no_text_of_questions(site):
    view = view_of(site)
    report = (site.parent.parent / "docs" / "findings.md").read_text().replace("\\", "")
    assert [claim["id"] for claim in view["claims"]] == ["one", "two"] and view["counted"] in report
    for claim in view["claims"]:
        for row in claim["rows"]:
            assert "| " + " | ".join(row) + " |" in report
    assert not [path for path in site.rglob("*") if path.is_file() and b"What is 3 plus 3?" in path.read_bytes()]


def test_the_text_of_the_leaderboard_leads_to_the_findings(site):
    text = (site.parent / "LEADERBOARD.md").read_text()
    assert "[Findings](site/index.html#/findings): 2 comparisons in 2 claims: " in text


def test_the_same_results_give_the_same_site(site, tmp_path):
    results = copied(site, tmp_path)
    build_leaderboard(results, results / "site")
    assert (results / "site" / "data" / "findings.js").read_bytes() == (site / "data" / "findings.js").read_bytes()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:100], "findings.json: cannot be read"),
        (lambda text: text.replace('"schema": 1', '"schema": 7', 1), "schema 7, this version reads 1"),
        (lambda text: text.replace('"comparisons"', '"compared"'), "not of this version, or damaged (KeyError 'comparisons')"),
        (lambda text: text.replace('"n_units": 60', '"n_units": NaN', 1), "NaN is no figure"),
    ],
)
def test_damaged_findings_are_left_out_and_named(site, tmp_path, damage, said):
    results = copied(site, tmp_path)
    path = results / RECORD
    path.write_text(damage(path.read_text()))
    built = build_leaderboard(results, results / "site")
    assert any(line.startswith(f"left out {RECORD}") and said in line for line in lines(built))
    assert view_of(results / "site") is None and built.n_runs == 2


def test_without_findings_there_is_no_page_of_them(site, tmp_path):
    results = copied(site, tmp_path)
    (results / RECORD).unlink()
    built = build_leaderboard(results, results / "site")
    assert built.left_out == [] and view_of(results / "site") is None
    assert "Findings" not in (results / "LEADERBOARD.md").read_text()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements-dev.lock")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, site):
    """An open page; at its end nothing was executed, no error was logged, and every request was for a file of the site."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    said, asked = [], []
    opened.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: said.append(f"error: {error}"))
    opened.on("request", lambda request: asked.append(request.url))
    visit(opened, site)
    yield opened
    assert opened.evaluate("window.owned") is None and opened.locator("main img, main script").count() == 0
    assert said == [] and all(url.startswith((site.as_uri() + "/", "data:,")) for url in asked)
    context.close()


def visit(page, site, address=""):
    page.goto("about:blank")
    page.goto(f"{site.as_uri()}/index.html{address}")
    page.wait_for_selector("html[data-ready=yes]")


def test_the_page_shows_claims_verdicts_rows_and_trajectories(page, site):
    page.locator("#findings-link").click()
    page.wait_for_selector("h2#verdicts")
    assert page.title() == "Findings – Leaderboard" and page.locator("h1").inner_text() == "Findings"
    view = view_of(site)
    table = page.get_by_role("region", name="Comparisons of one")
    assert [cell.inner_text() for cell in table.locator("tbody tr").first.locator("th, td").all()] == view["claims"][0]["rows"][
        0
    ]
    assert table.locator("thead th").all_inner_texts() == view["heads"]
    assert page.locator("section[aria-labelledby=verdicts] .badge").all_inner_texts() == [c["verdict"] for c in view["claims"]]
    assert page.locator("figure canvas").count() == 2
    chart = page.locator("figure").first
    assert "QAT from" in chart.get_by_role("img").get_attribute("aria-label")
    chart.locator("summary").click()
    chart.locator("tbody tr").first.wait_for()
    assert chart.locator("tbody tr").count() == 9, "three budgets of two methods and a level"
    assert page.locator("main").inner_text().count(HOSTILE) >= 3


def test_a_verdict_leads_to_its_claim_and_a_run_to_its_page(page, site):
    visit(page, site, "#/findings")
    page.locator("section[aria-labelledby=verdicts] a").last.click()
    assert page.evaluate("document.activeElement.dataset.claim") == "two"
    page.locator("section[aria-labelledby=made] a").click()
    page.wait_for_selector("h2#provenance")


def test_an_experiment_is_not_the_first_board_and_says_what_it_is(page):
    assert page.locator("h1").inner_text() == "nightly"
    labels = page.locator("#board option").evaluate_all("all => all.map(each => [each.value, each.textContent])")
    (value,) = [value for value, text in labels if text.endswith("· findings")]
    page.select_option("#board", value)
    page.wait_for_selector(f"main[data-address='#/board/{value}']")
    assert "Its scores say nothing beside another board's" in page.locator(".notice").inner_text()
    page.locator(".notice a").click()
    page.wait_for_selector("h2#verdicts")


def test_without_findings_the_link_is_hidden_and_the_address_says_how_to_make_them(browser, site, tmp_path):
    results = copied(site, tmp_path)
    (results / RECORD).unlink()
    build_leaderboard(results, results / "site")
    page = browser.new_page()
    visit(page, results / "site", "#/findings")
    assert page.locator("#findings-link").is_hidden()
    assert "harness findings suites/windtunnel/claims.toml" in page.locator("main").inner_text()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser, site, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    visit(page, site, "#/findings")
    page.wait_for_selector("h2#verdicts")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
