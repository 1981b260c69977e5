import math
import subprocess
import sys

import numpy as np
import pytest

from nano_think.evals import plots
from nano_think.evals.bootstrap import Interval

DOMAINS = ["academic", "code", "general", "philosophy", "theology"]
EXPERTS = ["T", "D", "S"]
RNG = np.random.default_rng(0)


def interval(value):
    return Interval(value, value - 0.1, value + 0.2, 9)


FIGURES = {
    "loss_curves": lambda path: plots.loss_curves(
        path, {name: (np.arange(2000), RNG.normal(4, 0.3, 2000)) for name in EXPERTS}, title="Loss"
    ),
    "domain_bars": lambda path: plots.domain_bars(
        path,
        {
            **{name: {domain: interval(3.0) for domain in DOMAINS} for name in [*EXPERTS, "fused", "bigram"]},
            "lone": {"code": Interval(2.0, math.nan, math.nan, 1)},
        },
    ),
    "routing_heatmap": lambda path: plots.routing_heatmap(
        path, np.vstack([RNG.dirichlet([1, 1, 1], 4), np.full((1, 3), np.nan)]), EXPERTS, DOMAINS
    ),
    "weight_by_position": lambda path: plots.weight_by_position(
        path,
        RNG.dirichlet([1, 1, 1], 9),
        [(0, 0), (1, 1), *((2**k, 2 ** (k + 1) - 1) for k in range(1, 8))],
        EXPERTS,
    ),
    "denoising_steps": lambda path: plots.denoising_steps(path, {"D": {10: 4.1, 1: 5.0, 2: 4.5, 4: 4.2}}),
    "line_chart": lambda path: plots.line_chart(
        path,
        {name: ([1, 2, 4], [3.0, 2.0, 1.5]) for name in EXPERTS},
        x_label="K",
        y_label="y",
        x_scale="log",
    ),
    "many_lines": lambda path: plots.line_chart(
        path,
        {f"model {i}": ([0, 1], [i, i + 1]) for i in range(16)},
        x_label="x",
        y_label="y",
        ticks=["a", "b"],
    ),
    "interval_bars": lambda path: plots.interval_bars(
        path,
        {"7a ensemble": interval(-0.1), "lone": Interval(2.0, math.nan, math.nan, 1)},
        y_label="y",
        x_label="stage",
    ),
    "intervals": lambda path: plots.intervals(
        path,
        {"a": Interval(-1, -2, -0.5, 9), "b": Interval(0, -1, 1, 9), "c": Interval(2, math.nan, math.nan, 1)},
        x_label="x",
        y_label="y",
    ),
    "error_by_noise": lambda path: plots.error_by_noise(
        path, {"x0": [0.1, 0.3, 0.6, 0.9]}, [(1, 250), (251, 500), (501, 750), (751, 1000)]
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_a_small_png_with_labelled_axes(name, tmp_path, monkeypatch):
    seen = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: seen.append(figure) or save(figure, path))
    path = FIGURES[name](tmp_path / f"{name}.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 60_000
    axes = seen[0].axes[0]
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_lines_show_the_given_values(tmp_path, monkeypatch):
    seen = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: seen.append(figure) or save(figure, path))
    plots.denoising_steps(tmp_path / "k.png", {"D": {10: 4.1, 1: 5.0, 4: 4.2}})
    line = seen[0].axes[0].get_lines()[0]
    assert list(line.get_xdata()) == [1, 4, 10]
    assert list(line.get_ydata()) == [5.0, 4.2, 4.1]


@pytest.fixture
def seen(monkeypatch):
    """The figures as drawn."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_eight_models_differ_in_a_bar_chart_and_their_legend_fits(seen):
    plots.domain_bars("x.png", {f"a model of name {i}": {"code": interval(1.0)} for i in range(8)})
    bars = [container.patches[0] for container in seen[0].axes[0].containers if hasattr(container, "patches")]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 8
    seen[0].draw_without_rendering()
    assert seen[0].legends[0].get_window_extent().x0 >= 0


def test_many_lines_differ(seen):
    plots.line_chart("x.png", {str(i): ([0, 1], [0, i]) for i in range(15)}, x_label="x", y_label="y")
    lines = seen[0].axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 15


def test_few_places_of_a_log_axis_are_named(seen):
    plots.line_chart("x.png", {"a": ([256, 2048], [1, 2])}, x_label="x", y_label="y", x_scale="log")
    assert [text.get_text() for text in seen[0].axes[0].get_xticklabels()] == ["256", "2048"]
    assert seen[0].axes[0].get_xscale() == "log"


def test_intervals_are_coloured_by_their_side_of_zero(seen):
    rows = {
        "below": Interval(-1, -2, -0.5, 9),
        "above": Interval(1, 0.5, 2, 9),
        "both": Interval(0, -1, 1, 9),
    }
    plots.intervals("x.png", rows, x_label="x")
    _, *lines = seen[0].axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines[::2]] == [[-2, -0.5], [0.5, 2], [-1, 1]]
    assert [line.get_color() for line in lines[::2]] == [plots.COLOURS[0], plots.COLOURS[1], "#666666"]


def test_differences_too_small_to_be_claimed_are_grey_and_near_zero(seen):
    rows = {"tiny": Interval(-2e-8, -3e-8, -1e-8, 9), "one": Interval(-4e-4, -5e-4, -3e-4, 9)}
    plots.intervals("x.png", rows, x_label="x", least=5e-4)
    axes = seen[0].axes[0]
    assert {line.get_color() for line in axes.get_lines()[1::2]} == {"#666666"}
    low, high = axes.get_xlim()
    assert low <= -1e-3
    assert high >= 1e-3
    assert axes.get_ylim() == (1.5, -0.5)


def test_a_line_chart_can_be_cut_off_above(seen):
    plots.line_chart("x.png", {"a": ([1, 2], [17.0, 5.0])}, x_label="x", y_label="y", y_most=6.5)
    low, high = seen[0].axes[0].get_ylim()
    assert low < 5 < high == 6.5


def test_a_bar_has_the_ends_of_its_interval(seen):
    plots.interval_bars("x.png", {"a": Interval(1.0, 0.5, 3.0, 9)}, y_label="y")
    (segment,) = seen[0].axes[0].collections[0].get_segments()
    assert segment[:, 1].tolist() == [0.5, 3.0]


@pytest.mark.parametrize("around_zero", [True, False])
def test_a_heatmap_shows_every_value(seen, around_zero):
    table = [[0.5, -2.0], [math.nan, 1.0]]
    plots.heatmap("x.png", table, ["a", "b"], ["c", "d"], label="loss", around_zero=around_zero)
    axes = seen[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.50", "-2.00", "–", "1.00"]
    assert axes.get_title() == "loss"
    assert axes.images[0].get_clim() == ((-2, 2) if around_zero else (-2, 1))
    plots.heatmap("x.png", [[math.nan]], ["a"], ["b"], label="nothing")


def test_evals_and_metrics_import_no_heavy_package():
    code = (
        "import sys, nano_think.evals.plots, nano_think.evals.report, nano_think.evals.routing, "
        "nano_think.evals.parameters, nano_think.evals.ngram\n"
        "assert not {'matplotlib', 'lightning', 'hydra', 'omegaconf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
