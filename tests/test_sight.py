"""What a training shows: its live view, its lines, its figure, and what trackers are sent."""

import io
import itertools
import json
import sys
import types

import pytest
from rich.console import Console

from harness import progress, sight
from harness.cli import main
from harness.errors import TrackerError
from harness.plots import plot_training, plot_trainings
from harness.progress import Reporter
from harness.trackers import tracking


class Recorder:
    """A tracker that keeps what it is sent; `fails_at` is the step from which on it raises."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.sent: list[tuple[int, dict]] = []
        self.fails_at, self.is_finished = fails_at, False

    def log(self, step, figures):
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("the server is away")
        self.sent.append((step, figures))

    def finish(self):
        self.is_finished = True


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(sight.time, "monotonic", lambda: self.now)


def step(number: int, **figures) -> dict:
    plain = {"schema": 1, "step": number, "loss": 0.5, "kl": 0.5, "ce": 2.75, "lr": 3e-4, "grad_norm": 1.25, "n_tokens": 640}
    return plain | figures


VALIDATION = {
    "schema": 1,
    "step": 10,
    "validation_kl": 0.4,
    "validation_ce": 2.5,
    "codes_changed": 0.0125,
    "block_scales_changed": 0.5,
}


def shown(steps: int, *, is_terminal: bool, tracker: Recorder | None = None, during=lambda view: None) -> str:
    """What a training of twenty steps prints."""
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=110, record=True)
    opened = (lambda name: tracker) if tracker else None
    with Reporter(console, open_tracker=opened).training("qad: train", 20) as view:
        for number in range(steps):
            view.step(step(number))
        during(view)
    return console.export_text()


def test_the_live_view_shows_every_figure_the_rate_the_memory_and_the_time_left(monkeypatch):
    clock = Clock(monkeypatch)
    view = sight.TrainingView("qad: train", 20, None, say=print, seconds_between_lines=15)
    view.is_live = True
    for number in range(10):
        clock.now += 2
        view.step(step(number))
    view.validation(VALIDATION)
    view.note("checkpoint at step 10")
    console = Console(file=io.StringIO(), force_terminal=True, width=110, record=True)
    console.print(view)
    text = " ".join(console.export_text().split())
    for part in (
        "10/20",
        "0:00:20 passed",
        "0:00:20 left",
        "loss 0.5000",
        "KL 0.5000",
        "CE 2.7500",
        "lr 3.00e-04",
        "tokens/s 320",
    ):
        assert part in text
    assert "GiB" in text and "checkpoint at step 10" in text
    assert "validation after step 10: KL 0.4000, CE 2.5000, codes changed 1.25%, block scales changed 50.00%" in text


def test_a_training_that_goes_on_is_judged_by_its_own_speed(monkeypatch):
    clock = Clock(monkeypatch)
    view = sight.TrainingView("qad: train", 1000, None, say=print, seconds_between_lines=15)
    assert view.seconds_left() is None and view.tokens_per_second() is None
    for number in range(900, 950):
        clock.now += 1 if number < 920 else 4
        view.step(step(number))
    assert view.seconds_left() == pytest.approx(50 * 4)
    assert view.tokens_per_second() == pytest.approx(160)


def test_away_from_a_terminal_there_is_a_line_now_and_then_and_one_for_each_validation(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 15.0)

    def slowly(view):
        for number in range(20):
            clock.now += 2
            view.step(step(number))
        view.validation(VALIDATION)
        view.note("written")

    lines = shown(0, is_terminal=False, during=slowly).splitlines()
    steps = [line for line in lines if "/20, loss" in line]
    assert [line.split(",")[0] for line in steps] == ["  qad: train: 8/20", "  qad: train: 16/20"]
    assert "about 0:00:24 left" in steps[0]
    assert lines[-3].startswith("  qad: train: validation after step 10: KL 0.4000")
    assert lines[-2] == "  qad: train: written"
    assert lines[-1] == "  qad: train: 20/20 steps, loss 0.5000, KL 0.5000, CE 2.7500, 40.0 s"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_last_line_stays_and_figures_that_are_not_there_are_not_shown(is_terminal):
    text = shown(0, is_terminal=is_terminal, during=lambda view: view.step(step(19, kl=None, ce=float("nan"))))
    last = text.strip().splitlines()[-1]
    assert last.strip().startswith("qad: train: 20/20 steps, loss 0.5000, ")
    assert "KL" not in last and "CE" not in last and "nan" not in last


def test_a_tracker_is_sent_numbers_alone_under_their_steps_and_is_finished():
    tracker = Recorder()
    shown(2, is_terminal=True, tracker=tracker, during=lambda view: view.validation(VALIDATION | {"validation_kl": None}))
    assert [number for number, _ in tracker.sent] == [1, 2, 10]
    assert tracker.sent[0][1] == {"loss": 0.5, "kl": 0.5, "ce": 2.75, "lr": 3e-4, "grad_norm": 1.25, "n_tokens": 640}
    assert set(tracker.sent[2][1]) == {"validation_ce", "codes_changed", "block_scales_changed"}
    assert tracker.is_finished


def test_a_tracker_is_finished_when_a_training_fails():
    tracker = Recorder()
    with pytest.raises(ZeroDivisionError):
        shown(1, is_terminal=False, tracker=tracker, during=lambda view: 1 / 0)
    assert tracker.is_finished


def test_a_tracker_that_fails_is_left_out_and_said_and_the_training_goes_on():
    tracker = Recorder(fails_at=2)
    text = shown(5, is_terminal=False, tracker=tracker)
    assert text.count("the tracker failed and is left out from here on (the server is away)") == 1
    assert len(tracker.sent) == 1
    assert "5/20 steps" in text


def fake_package(kind: str, calls: list) -> types.ModuleType:
    """A package with the functions that its adapter needs, which notes its calls."""
    package = types.ModuleType(kind)

    def note(name):
        return lambda *arguments, **options: calls.append((name, arguments, options)) or package

    for name in ("init", "log", "finish", "set_experiment", "start_run", "log_metrics", "end_run"):
        setattr(package, name, note(name))
    return package


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("wandb", ["init", "log", "finish"]),
        ("mlflow", ["set_experiment", "start_run", "log_metrics", "end_run"]),
        ("trackio", ["init", "log", "finish"]),
    ],
)
def test_each_tracker_gets_a_run_a_training_with_its_figures(monkeypatch, kind, expected):
    calls: list = []
    monkeypatch.setitem(sys.modules, kind, fake_package(kind, calls))
    tracker = tracking(kind, project="tiny")("qad: train")
    tracker.log(3, {"loss": 0.5})
    tracker.finish()
    assert [name for name, _, _ in calls] == expected
    everything = json.dumps([[arguments, options] for _, arguments, options in calls])
    assert all(part in everything for part in ('"tiny"', '"qad: train"', '{"loss": 0.5}', '"step": 3'))


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(
        sys, "argv", ["harness", "run", "no suite is read.toml", "--results", str(tmp_path / "results"), "--track", "wandb"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--track wandb: the package cannot be imported" in (said := capsys.readouterr().err)
    assert "pip install 'qad-harness[track]'" in said
    assert not (tmp_path / "results").exists()


def test_a_tracker_that_does_not_start_is_one_message(monkeypatch):
    package = types.ModuleType("trackio")
    package.init = lambda **options: (_ for _ in ()).throw(PermissionError("no key"))
    monkeypatch.setitem(sys.modules, "trackio", package)
    with pytest.raises(TrackerError, match=r"--track trackio: does not start \(no key\)"):
        tracking("trackio", project="tiny")("qad: train")


def rows(n: int, *, with_validation: bool) -> list[dict]:
    found = [step(number, loss=1 / (number + 1)) for number in range(n)]
    if with_validation:
        found += [VALIDATION | {"step": number, "validation_kl": 1 / (number + 1)} for number in range(4, n, 5)]
    return found


def drawn(monkeypatch) -> list:
    """Collects the figures that are drawn."""
    from matplotlib.figure import Figure

    figures: list = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def test_the_figure_draws_what_was_recorded_and_nothing_else(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot_training(rows(20, with_validation=True), tmp_path / "full.svg", title="t", source="s")
    plot_training([{"schema": 1, "step": 0, "loss": 0.5, "lr": 1e-3}], tmp_path / "bare.svg", title="t", source="s")
    full, bare = figures[0], figures[2]
    lines = {line.get_label(): list(line.get_ydata()) for axis in full.axes for line in axis.lines}
    assert lines["loss of a step"] == [1 / (number + 1) for number in range(20)]
    validations = next(line for axis in full.axes for line in axis.lines if line.get_label() == "validation KL")
    assert list(validations.get_xdata()) == [4, 9, 14, 19] and list(full.axes[0].lines[0].get_xdata()) == list(range(1, 21))
    assert lines["validation KL"] == [1 / (number + 1) for number in range(4, 20, 5)]
    assert lines["validation CE"] == [2.5] * 4
    assert {line.get_label() for axis in bare.axes for line in axis.lines} == {"loss of a step", "lr"}
    assert len(bare.axes) == 2


def test_two_validations_that_both_fall_have_a_panel_each_and_hide_nothing(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    found = [row for row in rows(20, with_validation=True) if "loss" in row]
    found += [VALIDATION | {"step": n, "validation_kl": 1 / n, "validation_ce": 2 + 1 / n} for n in (10, 20)]
    plot_training(found, tmp_path / "x.svg", title="t", source="s")
    panels = figures[0].axes
    assert [panel.get_ylabel() for panel in panels] == ["loss", "validation\nKL", "validation\nCE", "lr"]
    assert [[line.get_label() for line in panel.lines] for panel in panels[1:]] == [
        ["validation KL"],
        ["validation CE"],
        ["lr"],
    ]
    assert all(above.get_position().y0 > below.get_position().y1 for above, below in itertools.pairwise(panels))
    assert len({panel.get_xlim() for panel in panels}) == 1


def test_a_long_training_has_a_running_mean(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot_training(rows(90, with_validation=False), tmp_path / "x.svg", title="t", source="s")
    mean = next(line for line in figures[0].axes[0].lines if line.get_label() == "mean of 3 steps")
    assert list(mean.get_xdata())[:2] == [2, 3]
    assert mean.get_ydata()[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_the_same_rows_give_the_same_svg_and_are_drawn_once(tmp_path):
    folder = tmp_path / "tiny" / "run" / "training"
    folder.mkdir(parents=True)
    source = folder / "qad.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(20, with_validation=True)))
    plot_trainings(folder.parent)
    first = (folder / "qad.svg").read_bytes()
    assert (folder / "qad.png").read_bytes().startswith(b"\x89PNG")
    assert b"<dc:date>" not in first
    before = (folder / "qad.svg").stat().st_mtime_ns
    plot_trainings(folder.parent)
    assert (folder / "qad.svg").stat().st_mtime_ns == before
    (folder / "qad.png").unlink()
    plot_trainings(folder.parent)
    assert (folder / "qad.svg").read_bytes() == first and (folder / "qad.png").is_file()
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(21, with_validation=True)))
    plot_trainings(folder.parent)
    assert (folder / "qad.svg").read_bytes() != first


def test_a_run_without_trainings_needs_no_figure(tmp_path):
    plot_trainings(tmp_path)
    assert list(tmp_path.iterdir()) == []
