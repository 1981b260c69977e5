"""What coarse weights save and what they cost, in the report of an evaluation with `quantize=`."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from nano_think.artifacts.checkpoint import Checkpoint
from nano_think.engine.generate import generate
from nano_think.engine.quantized import generate_quantized
from nano_think.engine.sampling import SamplingConfig
from nano_think.evals.bootstrap import paired_difference
from nano_think.evals.losses import DocumentLosses
from nano_think.evals.report import Report, Table
from nano_think.nn.quantized import Kind, weight_bytes
from nano_think.phases.machine import versions

if TYPE_CHECKING:
    from nano_think.phases.evaluate import Evaluation

# Behind the name of a model that stands beside its coarse self.
FULL = ", fp32"
# The share of its perplexity that a model may lose.
BOUND = 0.005
TIMED_TOKENS, UNTIMED_TOKENS, REPEATS = 160, 32, 3


def quantization(evaluation: Evaluation, losses: dict[str, DocumentLosses]) -> None:
    """Bytes, decoding speed and perplexity of every model as saved and as evaluated, with `quantize=` alone."""
    kind = evaluation.quantize
    if kind is None:
        return
    names = [name for name in evaluation.full if name == evaluation.checkpoint.name]
    names += [name for name in evaluation.alone if name not in names]
    figures = {name: _figures(evaluation, name, kind, losses) for name in names}
    table = quantization_table(kind, figures)
    worst = max(figures, key=lambda name: figures[name]["perplexity_lost"])
    lost = figures[worst]["perplexity_lost"]
    bound = "within" if lost <= BOUND else "**beyond**"
    text = (
        f"Every model was read with its matrices in {kind}; activations, sums, norms, the router and what keeps "
        f"time in a state space are fp32. The most perplexity is lost by {worst}, {lost:+.3%}, {bound} "
        f"the {BOUND:.1%} that coarse weights may cost. Intervals are paired: the same documents, read by "
        "both. Speed is that of "
        f"greedy decoding, one row, median of {REPEATS}; what is done once before it is not in it."
    )
    run, made = evaluation.run, versions()
    source = {
        "checkpoint": evaluation.checkpoint.provenance.get("hash"),
        "split": evaluation.settings["split"],
        "command": run.command(phase=run.cfg.phase.name, expert=run.cfg.expert.name),
        "code": made["commit"],
        "machine": made["machine"],
    }
    own = Report(f"Weights in {kind}").text(text).table(table).json({"kind": kind, "models": figures})
    own.table(["", "made with"], [list(pair) for pair in source.items()]).json(source)
    folder = evaluation.run.dir / "quantization"
    folder.mkdir(exist_ok=True)
    own.write(folder)
    evaluation.report.heading("Quantisation").text(text).table(table).json({"quantization": figures})


def quantization_table(kind: Kind, figures: dict[str, dict[str, Any]]) -> Table:
    """Two lines a model."""
    rows: list[list[Any]] = []
    for name, f in figures.items():
        rows.append([name, "fp32", f["bytes_full"] / 1e6, f["speed_full"], f["perplexity_full"], ""])
        low, high = f["perplexity_lost_interval"]
        change = f"{f['perplexity_lost']:+.3%} [{low:+.3%}, {high:+.3%}]"
        rows.append([name, kind, f["bytes"] / 1e6, f["speed"], f["perplexity"], change])
    headers = ["model", "weights", "MB", "tokens a CPU second", "perplexity", "perplexity lost"]
    return Table(headers, rows, formats=["", "", ",.1f", ",.0f", ".3f", ""], title="Size, speed, perplexity")


def _figures(
    evaluation: Evaluation, name: str, kind: Kind, losses: dict[str, DocumentLosses]
) -> dict[str, Any]:
    full = evaluation.full[name]
    coarse = evaluation.checkpoint if name == evaluation.checkpoint.name else evaluation.alone[name]
    difference = paired_difference(
        losses[name], losses[name + FULL], n_resamples=evaluation.settings["resamples"]
    )
    return {
        "bytes_full": weight_bytes(full.model),
        "bytes": weight_bytes(coarse.model),
        "speed_full": decoding_speed(full, None),
        "speed": decoding_speed(full, kind),
        "perplexity_full": losses[name + FULL].perplexity(),
        "perplexity": losses[name].perplexity(),
        "perplexity_lost": math.expm1(difference.estimate),
        "perplexity_lost_interval": [math.expm1(difference.low), math.expm1(difference.high)],
    }


def decoding_speed(checkpoint: Checkpoint, kind: Kind | None) -> float:
    """Tokens a CPU second of one greedy row, from its 32nd token on: weights are packed by then."""
    length = min(TIMED_TOKENS, checkpoint.spec["seq_len"] - 1)
    skipped = min(UNTIMED_TOKENS, length // 2)
    rates = []
    for _ in range(REPEATS):
        moments: list[float] = []
        note = lambda row, token, weights: moments.append(time.process_time())  # noqa: E731, B023
        settings = SamplingConfig(temperature=0.0)
        start = [[checkpoint.tokenizer.bos_id]]
        if kind is None:
            generate(checkpoint.model, start, length, settings, on_token=note, logprobs=False)
        else:
            generate_quantized(checkpoint.model, kind, start, length, settings, on_token=note, logprobs=False)
        rates.append((length - skipped) / max(moments[-1] - moments[skipped - 1], 1e-9))
    return median(rates)
