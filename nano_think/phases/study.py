"""`phase=study`: the claim measured fairly. Every expert, stage and baseline for several seeds, in one report.

Everything that is trained or measured is an artefact, so a study that was interrupted goes on where it stood and
one that is run again only draws its report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nano_think.evals.report import Table, render_table
from nano_think.limits import check_study
from nano_think.phases.data import load_shards, loader_settings, shards_maker
from nano_think.phases.run import Run
from nano_think.phases.study_ablated import run_ablations
from nano_think.phases.study_ablations import ablations
from nano_think.phases.study_audit import audited
from nano_think.phases.study_evidence import evidence_maker
from nano_think.phases.study_fits import make_all
from nano_think.phases.study_kept import Kept
from nano_think.phases.study_measure import losses_maker
from nano_think.phases.study_plan import Plan
from nano_think.phases.study_record import draw, record_settings, write_record
from nano_think.phases.study_settings import check_ablations, check_text
from nano_think.phases.study_tuning import Trial, chosen, tune

SPLITS = ("validation", "test")


def run(run: Run) -> dict[str, Any]:
    """Tune on the first seed, train and measure every seed, write the record, draw the report.

    With `study.redraw=true` only the last: the report of the record in `study.out`. A record of this study that
    lies there already is extended: its tuning holds, and its seeds need not be made again. Ablations are of the
    first seed and come last.
    Raises UserError for settings that mean nothing and for text that does not suffice, before anything is trained.
    """
    settings = run.plain(run.cfg.study)
    if settings["redraw"]:
        return {"report": str(draw(Path(settings["out"]), run))}
    check_study(settings)
    check_ablations(settings)
    shards = shards_maker(run)
    run.obtain(shards, named=True)
    text = load_shards(run, shards)
    check_text(text, settings, loader_settings(run), run.cfg.size.seq_len)
    domains, seeds, workers = len(text.domains), settings["seeds"], settings["workers"]
    out, digest, first = Path(settings["out"]), "", Plan(run, seeds[0], domains)
    tried = ablations(first, text)
    kept = Kept(out)
    trials = kept.trials(record_settings(first, seeds)) or tune(first, workers)
    show_trials(run, trials)
    plans = [Plan(run, seed, domains, chosen(trials)) for seed in seeds]
    elsewhere = kept.seeds(plans)
    for plan in plans:
        if plan.seed in elsewhere:
            run.say(f"[bold]seed {plan.seed}[/bold]: measured already, see {out}")
            continue
        run.say(f"[bold]seed {plan.seed}[/bold]")
        make_all(run, plan.trained.values(), workers)
        audited(plan)
        for split in SPLITS:
            run.obtain(losses_maker(plan, split), named=True)
        run.obtain(evidence_maker(plan), named=True)
        done = [other for other in plans if losses_maker(other, "test").recipe.exists(run.artifacts)]
        digest = write_record(out, done, trials, seeds, kept.record)
    digest = run_ablations(plans[0], tried, out, workers) or digest
    report = draw(out, run)
    return {"report": str(report), "digest": digest}


def show_trials(run: Run, trials: list[Trial]) -> None:
    """What each trial came to."""
    rows = [
        [t.family, t.rate, t.dropout, t.horizon, t.tokens, t.val_loss, "chosen" if t.chosen else ""]
        for t in trials
    ]
    headers = ["family", "learning rate", "dropout", "of its budget", "tokens", "validation loss", ""]
    render_table(Table(headers, rows, title="Equal trials for all, on validation text"), run.console)
