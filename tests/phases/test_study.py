from __future__ import annotations

import shutil

import pytest

from nano_think.errors import UserError
from nano_think.evals.audit.run import CHECKS
from nano_think.evals.study_record import MODELS, StudyRecord
from nano_think.phases import study_fits
from nano_think.phases.expert import expert_maker
from nano_think.phases.mla import mla_maker
from nano_think.phases.study_costs import planned_tokens
from nano_think.phases.study_fits import make_all
from nano_think.phases.study_models import model_facts
from nano_think.phases.study_plan import EXPERTS, FAMILIES, SINGLE, Plan
from nano_think.phases.study_record import by_hand, portable

LIMITS = ("study.expert_tokens=6400", "study.fusion_tokens=1600", "study.evidence_tokens=2000")
SHORT = tuple(f"++training.{name}.max_steps=4" for name in EXPERTS)
SHORT += tuple(f"++training.mla.stage_{stage}.max_steps=3" for stage in ("7b", "7c", "7d"))
QUICK = (
    "study.seeds=[1,2]",
    "study.tuning.factors=[0.01, 1.0]",
    "study.tuning.fusion_factors=[1.0]",
    "study.tuning.dropouts=[0.0, 0.9]",
    "study.tuning.horizons=[0.5, 1.0]",
    "study.pool=2",
)
UNFROZEN = "unfrozen: {what: experts learn too, overrides: ['training.mla.unfreeze=all']}"
TRIED = (f"study.ablations={{{UNFROZEN}}}", "study.widths=[48]")


@pytest.fixture(scope="module")
def plan(tmp_path_factory, shared_project):
    with shared_project(tmp_path_factory.mktemp("plan")) as project:
        plan = Plan(project.new("phase=study", *LIMITS), seed=3, domains=2)
        assert plan.trained  # described once, while there is something to compose with
    return plan


def layers(maker):
    return maker.spec["network"]["num_layers"]


def test_single_transformers_are_the_nearest_to_the_mixture(plan):
    costs, mixture = plan.costs, plan.costs.mixture()
    for family, measure in {
        "equal_parameters": costs.parameters,
        "equal_inference_flops": costs.inference_flops,
    }.items():
        chosen = layers(plan.fit(family))

        def distance(num_layers, measure=measure):
            return abs(measure(costs.lone("transformer", num_layers=num_layers)) - measure(mixture))

        assert distance(chosen) <= min(distance(chosen - 1), distance(chosen + 1)), family
        assert chosen > layers(plan.fit("transformer"))


def test_equal_training_flops_takes_what_the_whole_mixture_took(plan):
    costs = plan.costs
    spent = {name: costs.training(name, plan.fit(name)) for name in EXPERTS}
    spent |= {stage: costs.training(stage, plan.trained[f"fused_{stage}"]) for stage in ("7a", "7b", "7c")}
    assert all(value > 0 for value in spent.values())
    alone = plan.fit("equal_training_flops")
    step = costs.training("transformer", alone) / alone.spec["fit"]["max_steps"]
    assert abs(costs.training("transformer", alone) - sum(spent.values())) <= step
    # the cached stage costs less than the one whose gradients pass through the experts
    tokens = {stage: planned_tokens(plan.trained[f"fused_{stage}"].spec["fit"]) for stage in ("7b", "7c")}
    assert spent["7b"] / tokens["7b"] < spent["7c"] / tokens["7c"]


def test_experts_that_7c_trains_too_are_paid_for(plan, project):
    run = project.new("phase=study", *LIMITS, "training.mla.unfreeze=all")
    flops = [
        one.costs.training("7c", mla_maker(one.run_of("fused_7c"), "7c"))
        for one in (plan, Plan(run, plan.seed, plan.domains))
    ]
    assert flops[0] < flops[1]


def test_everybody_reads_what_it_may(plan):
    def read(maker):
        return maker.spec["fit"]["loader"]["train_tokens"], maker.spec["fit"]["split"]

    trained = plan.trained
    for name in (*EXPERTS, "seed_pool_1"):
        assert read(trained[name]) == (6400, "expert_train")
    for name in SINGLE:
        assert read(trained[name]) == (6400 + 1600, "expert_train")
    for name in ("fused_7b", "fused_7c", "fused_7d", "finetuned_transformer"):
        assert read(trained[name]) == (1600, "fusion_train")
    assert trained["fused_7a"].spec["static_tokens"] == 1600
    # memory: 6,400 tokens of two domains in rows of 64
    assert trained["fused_7d"].spec["store"]["rows"] == 50


def test_a_study_without_memory_ends_with_7c(project):
    plan = Plan(project.new("phase=study", *LIMITS, "model.retrieval.k=0"), seed=3, domains=2)
    assert "fused_7d" not in plan.trained
    facts = model_facts(plan)
    assert "fused_7d" not in facts
    assert facts["fused_7c"]["inference_flops_per_token"] > facts["static"]["inference_flops_per_token"]


def test_the_mixture_is_made_of_the_experts_that_are_compared(plan):
    needs = plan.trained["fused_7a"].needs
    assert {name: needs[name].recipe.hash for name in EXPERTS} == {
        name: plan.trained[name].recipe.hash for name in EXPERTS
    }
    seeds = {name: maker.spec["fit"]["seed"] for name, maker in plan.trained.items() if "fit" in maker.spec}
    assert seeds.pop("seed_pool_1") == 1003
    assert seeds.pop("seed_pool_2") == 2003
    assert set(seeds.values()) == {3}


def test_rates_reach_their_own_family_and_the_experts_below_a_mixture(plan):
    chosen = {name: {"rate": 0.001 * (number + 1)} for number, name in enumerate(FAMILIES)}
    pre_trained = [name for name, where in FAMILIES.items() if where.phase == "expert"]
    for number, name in enumerate(pre_trained):
        chosen[name]["dropout"] = 0.05 * (number + 1)
    tuned = Plan(plan.run, plan.seed, plan.domains, chosen)
    for family in FAMILIES:
        assert tuned.fit(family).spec["fit"]["lr"] == pytest.approx(chosen[family]["rate"]), family
    for family in pre_trained:
        assert tuned.fit(family).spec["network"]["dropout"] == pytest.approx(chosen[family]["dropout"]), (
            family
        )
    experts = tuned.trained["fused_7a"].needs
    for name in EXPERTS:
        assert experts[name].recipe.hash == tuned.trained[name].recipe.hash
    # a plan for a quarter of a budget has a quarter of the steps
    steps = tuned.fit("equal_training_flops").spec["fit"]["max_steps"]
    chosen["equal_training_flops"]["horizon"] = 0.25
    short = Plan(plan.run, plan.seed, plan.domains, chosen).fit("equal_training_flops").spec["fit"]
    assert short["max_steps"] == pytest.approx(steps / 4, abs=1)
    assert short["lr"] == pytest.approx(chosen["equal_training_flops"]["rate"])


def test_the_optimizer_of_a_study_is_that_of_all_its_fits(plan, project):
    run = project.new("phase=study", *LIMITS, "study.optimizer=muon")
    plans = (plan, Plan(run, plan.seed, plan.domains))
    for key in plan.trained:
        specs = [one.trained[key].spec for one in plans]
        if "fit" in specs[0]:
            assert [spec["fit"]["optimizer"]["_target_"].rpartition(".")[2] for spec in specs] == [
                "adamw",
                "muon",
            ]
    needs = plans[1].trained["fused_7a"].needs
    assert all(needs[name].recipe.hash == plans[1].trained[name].recipe.hash for name in EXPERTS)


def test_a_command_makes_the_very_artefact(plan, project):
    """The report prints these commands, and fits beside each other are started by them."""
    for key in ("diffuser", "equal_parameters", "fused_7c", "finetuned_transformer"):
        maker = plan.trained[key]
        words = maker.command.split()[2:]
        run = project.new(
            *[word for word in words if not word.startswith(("size=", "data.root=", "run.root="))]
        )
        if key in ("diffuser", "equal_parameters"):
            again = expert_maker(run, "diffuser" if key == "diffuser" else "transformer")
        else:
            again = mla_maker(run, "7c")
        assert again.recipe.hash == maker.recipe.hash, key


def test_a_study_of_some_experts_is_refused(project):
    with pytest.raises(UserError, match="use expert=all"):
        Plan(project.new("phase=study", "expert=transformer"), 1, 2)


def test_a_fit_that_fails_is_shown(plan, monkeypatch, tmp_path):
    broken = tmp_path / "train.py"
    broken.write_text("import sys; print('out of luck'); sys.exit(3)")
    monkeypatch.setattr(study_fits, "ENTRY", broken)
    with pytest.raises(
        UserError, match=r"transformer \w+ was not made by `python train.py.*(?s:.)*out of luck"
    ):
        make_all(plan.run, [plan.fit("transformer")], workers=2)


@pytest.mark.slow
def test_two_workers_make_what_one_makes(plan, project):
    first = plan.fit("transformer", "++training.transformer.max_steps=2")
    second = plan.fit("transformer", "++training.transformer.max_steps=2", seed=5)
    make_all(plan.run, [first, second], workers=2)
    assert all(maker.recipe.exists(plan.run.artifacts) for maker in (first, second))
    assert plan.result(first)["val_loss"] != plan.result(second)["val_loss"]


# a study, if only of four steps a fit, is some twenty fits
whole = pytest.mark.slow


@pytest.fixture(scope="module")
def studied(tmp_path_factory, shared_project):
    """A study of two seeds with four steps a fit, in a project of its own."""
    with shared_project(tmp_path_factory.mktemp("study")) as project:
        project.result, project.first = project.go("phase=study", *LIMITS, *SHORT, *QUICK, *TRIED)
    return project


@whole
def test_a_study_leaves_a_whole_record_and_a_report(studied, printed):
    out = studied.root / "study"
    record = StudyRecord.load(out)
    assert record.missing() == []
    assert list(record.models) == list(MODELS)
    assert record.facts["test_reads"] == 1  # by each seed
    assert record.digest() == studied.result["digest"]
    for seed in (1, 2):
        audit = record.facts["seeds"][str(seed)]["audit"]
        assert audit["passed"], audit["mark"]
        assert [one["check"] for one in audit["findings"]] == list(CHECKS)
        pools = {key: record.of(key, "test", seed).loss() for key in MODELS}
        assert pools["oracle_token"] <= pools["oracle_document"] <= min(pools[name] for name in EXPERTS)
        worst = max(pools[name] for name in EXPERTS)
        assert pools["uniform_prob"] <= worst
        assert pools["static"] <= worst
    assert (out / "report.md").is_file()
    assert (out / "report.html").is_file()
    text = printed(studied.first)
    assert "report" in text
    assert record.digest() in text


@whole
def test_the_best_rate_on_validation_is_chosen_with_equal_trials(studied):
    trials = StudyRecord.load(studied.root / "study").facts["tuning"]
    for family, where in FAMILIES.items():
        own = [trial for trial in trials if trial["family"] == family]
        rates = [trial for trial in own if trial["dropout"] is None]
        horizons = [trial for trial in own if trial["horizon"] is not None]
        dropouts = [trial for trial in own if trial["dropout"] is not None and trial not in horizons]
        assert (len(rates), len(dropouts)) == ((2, 2) if where.phase == "expert" else (1, 0))
        assert len(horizons) == (2 if family == "equal_training_flops" else 0)
        for tried in filter(None, (rates, dropouts, horizons)):
            assert [trial["chosen"] for trial in tried].count(True) == 1
            assert next(t for t in tried if t["chosen"])["val_loss"] == min(t["val_loss"] for t in tried)
        assert {trial["rate"] for trial in dropouts} <= {trial["rate"] for trial in rates if trial["chosen"]}
        if family in EXPERTS:
            # a fifth of four steps of 8 x 64 tokens, and at least one; then all of them
            assert {trial["tokens"] for trial in rates} == {8 * 64}
            assert {trial["tokens"] for trial in dropouts} == {4 * 8 * 64}


@whole
def test_what_models_cost_adds_up(studied):
    record = StudyRecord.load(studied.root / "study")
    models, fits = record.models, record.facts["seeds"]["1"]["fits"]

    def of(name):
        return {key: facts[name] for key, facts in models.items()}

    flops, trained, parameters = (of(name) for name in ("training_flops", "trained_parameters", "parameters"))
    experts = sum(fits[name]["planned_flops"] for name in EXPERTS)
    assert flops["uniform_prob"] == pytest.approx(experts)
    spent = flops["static"]
    assert spent > experts
    for stage in ("fused_7b", "fused_7c"):
        spent += fits[stage]["planned_flops"]
        assert flops[stage] == pytest.approx(spent)
    # the memory was written by a pass over 6,400 tokens of its own, and a token that reads it costs more
    assert flops["fused_7d"] > spent + fits["fused_7d"]["planned_flops"]
    # B7: as many FLOPs as the mixture up to 7c, or the share of them that was better, to half a step
    alone, one = flops["equal_training_flops"], fits["equal_training_flops"]
    assert alone == one["planned_flops"]
    chosen = next(
        trial["horizon"] for trial in record.facts["tuning"] if trial["horizon"] and trial["chosen"]
    )
    assert abs(alone - chosen * spent) <= alone / (one["planned_tokens"] / (8 * 64))
    token = of("inference_flops_per_token")
    assert token["uniform_prob"] == pytest.approx(sum(token[name] for name in EXPERTS))
    assert token["static"] == token["uniform_hidden"] < token["uniform_prob"]
    assert token["uniform_hidden"] < token["fused_7b"] == token["fused_7c"] < token["fused_7d"]
    assert token["seed_pool"] == 2 * token["transformer"]
    assert parameters["static"] < parameters["fused_7b"] == parameters["fused_7d"]
    assert trained["transformer"] == parameters["transformer"]
    assert trained["diffuser"] < parameters["diffuser"]  # the table is the Transformer's
    assert trained["fused_7b"] < trained["fused_7c"] < parameters["fused_7c"]


@whole
def test_a_study_that_is_run_again_reads_no_test_text(studied):
    before = (studied.root / "study" / "study.json").read_bytes()
    result, run = studied.go("phase=study", *LIMITS, *SHORT, *QUICK, *TRIED)
    assert (studied.root / "study" / "study.json").read_bytes() == before
    assert not any("building" in line for line in run.console.file.getvalue().splitlines())
    assert result["digest"] == studied.result["digest"]


@whole
def test_a_report_is_drawn_from_the_record_alone(studied, project, tmp_path):
    copy = tmp_path / "kept"
    shutil.copytree(studied.root / "study", copy)
    drawn = (copy / "report.md").read_bytes()
    for path in (copy / "report.md", copy / "report.html"):
        path.unlink()
    project.go("phase=study", "study.redraw=true", f"study.out={copy}")
    assert (copy / "report.md").read_bytes() == drawn


def test_notes_are_read_and_checked(tmp_path):
    assert by_hand(tmp_path) == {"tries": []}
    notes = tmp_path / "notes.yaml"
    notes.write_text("tries: [{what: more data, why: it helps, val_before: 2.0, val_after: 1.9, kept: true}]")
    assert by_hand(tmp_path)["tries"][0]["what"] == "more data"
    for wrong in ("tries: more data", "trials: []", "- more data"):
        notes.write_text(wrong)
        with pytest.raises(UserError, match=r"notes\.yaml holds tries"):
            by_hand(tmp_path)


def test_commands_name_no_folder_of_this_machine():
    typed = (
        "python train.py phase=study 'data.root=/home/me/my texts' seed=2 run.root=/tmp/x study.out=/tmp/y"
    )
    assert portable(typed) == "python train.py phase=study data.root=$DATA seed=2"


@pytest.fixture
def elsewhere(studied, project):
    """A project that has nothing but the record of another one, from which seed 2 was taken away."""
    whole = StudyRecord.load(studied.root / "study")
    facts = {**whole.facts, "seeds": {"1": whole.facts["seeds"]["1"]}}
    losses = {key: part for key, part in whole.losses.items() if key[1] == 1}
    StudyRecord(facts, losses).save(project.root / "study")
    return project


@whole
def test_a_record_is_extended_by_the_seed_it_lacks(studied, elsewhere):
    result, run = elsewhere.go("phase=study", *LIMITS, *SHORT, *QUICK, *TRIED)
    before, after = (StudyRecord.load(project.root / "study") for project in (studied, elsewhere))
    assert after.missing() == []
    assert result["digest"] == after.digest()
    said = run.console.file.getvalue()
    assert "seed 1: measured already" in said
    made = [fit["hash"] for seed in ("1", "2") for fit in before.facts["seeds"][seed]["fits"].values()]
    assert made == [fit["hash"] for seed in ("1", "2") for fit in after.facts["seeds"][seed]["fits"].values()]
    for key in MODELS:
        for seed in (1, 2):
            assert before.of(key, "test", seed).loss() == after.of(key, "test", seed).loss(), (key, seed)
    assert before.facts["tuning"] == after.facts["tuning"]
    # of seed 1 only what 2 shares with it was made
    made = list(elsewhere.root.rglob("study_losses/*/provenance.json"))
    assert len(made) == 2
    # nor were its ablations, which stay as they are
    assert not list(elsewhere.root.rglob("study_ablation/*"))
    assert before.facts["seeds"]["1"]["ablations"] == after.facts["seeds"]["1"]["ablations"]


@whole
def test_ablations_are_measured_where_the_study_is(studied):
    record = StudyRecord.load(studied.root / "study")
    tried, models = record.facts["seeds"]["1"]["ablations"], record.models
    assert list(tried) == record.facts["planned_ablations"] == ["unfrozen", "width_48"]
    assert "ablations" not in record.facts["seeds"]["2"]
    alone = [f"{name}/{expert}" for name in ("unfrozen", "width_48") for expert in EXPERTS]
    rows = record.losses["ablations", 1].models
    assert sorted(rows) == sorted([*tried, *alone])
    # the study's own documents and tokens; another model
    own, other = record.of("fused_7c", "val", 1), record.of("unfrozen", "ablations", 1)
    assert own.pairs_with(other)
    assert own.loss() != other.loss()
    # experts that 7c trained, alone with the table of their pre-training, are no longer what they were
    for expert in EXPERTS:
        was, now = record.of(expert, "val", 1), record.of(f"unfrozen/{expert}", "ablations", 1)
        assert 0 < abs(was.loss() - now.loss()) < 0.5
    assert tried["unfrozen"]["fits"].keys() == {"fused_7c"}
    assert tried["unfrozen"]["trained_parameters"] > models["fused_7c"]["trained_parameters"]
    assert tried["unfrozen"]["training_flops"] > models["fused_7c"]["training_flops"]
    # the FLOPs of the study's own width, to half a step of the state-space expert
    width = tried["width_48"]
    step = width["fits"]["state_space"]["planned_flops"] / width["fits"]["state_space"]["steps"]
    assert abs(width["training_flops"] - models["fused_7c"]["training_flops"]) <= step
    assert width["parameters"] < models["fused_7c"]["parameters"]
    text = (studied.root / "study" / "report.md").read_text()
    assert "## What else was tried" in text


@whole
def test_a_record_of_another_study_is_not_written_over(elsewhere):
    before = (elsewhere.root / "study" / "study.json").read_bytes()
    with pytest.raises(UserError, match=r"another study \(pool=2 and not 3\)"):
        elsewhere.go("phase=study", *LIMITS, *SHORT, *QUICK, "study.pool=3")
    with pytest.raises(UserError, match=r"seed 1 whose .*state_space.* other settings"):
        elsewhere.go("phase=study", *LIMITS, *SHORT, *QUICK, "training.state_space.weight_decay=0.3")
    assert (elsewhere.root / "study" / "study.json").read_bytes() == before
