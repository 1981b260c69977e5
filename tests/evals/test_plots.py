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


def test_evals_and_metrics_import_no_heavy_package():
    code = (
        "import sys, nano_think.evals.plots, nano_think.evals.report, nano_think.evals.routing, "
        "nano_think.evals.parameters, nano_think.evals.ngram\n"
        "assert not {'matplotlib', 'lightning', 'hydra', 'omegaconf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
