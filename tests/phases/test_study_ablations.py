"""What else a study tries: which fits an override reaches, equal FLOPs of widths, and what is refused at once."""

from __future__ import annotations

import dataclasses

import pytest

from nano_think.errors import UserError
from nano_think.phases.data import load_shards, shards_maker
from nano_think.phases.expert import expert_maker
from nano_think.phases.mla import mla_maker
from nano_think.phases.study_ablated import ablation_maker
from nano_think.phases.study_ablations import Ablated, ablations, changed_experts
from nano_think.phases.study_plan import EXPERTS, Plan

LIMITS = ("study.expert_tokens=6400", "study.fusion_tokens=1600")
# name -> overrides; the experts that are not the study's own
TRIED = {
    "next_embed": (["experts.diffuser.target=next_embed"], ["diffuser"]),
    "unfreeze": (["training.mla.unfreeze=adapters"], list(EXPERTS)),
    "prob": (["model.fusion.space=prob"], []),
    "token_router": (["model.router.pool=cummean+token"], []),
    "own_text": (
        [f"prereq.{name}.data.train_part={part}" for part, name in enumerate(EXPERTS)],
        ["diffuser", "state_space"],
    ),
    "more_text": (["prereq.expert.data.train_tokens=19200"], list(EXPERTS)),
    "memory": (
        ["model.mla.slot_reader=own", "model.retrieval.granularity=token", "model.retrieval.chunk=4"],
        [],
    ),
}


def asked(**tried):
    """`study.ablations` as an override."""
    stage = {"memory": ", stage: 7d"}
    each = (
        f"{name}: {{what: {name} is tried, overrides: {lines!r}{stage.get(name, '')}}}"
        for name, lines in tried.items()
    )
    return f"study.ablations={{{', '.join(each)}}}"


@pytest.fixture(scope="module")
def text(tmp_path_factory, shared_project):
    """(project, its shards)."""
    with shared_project(tmp_path_factory.mktemp("text")) as project:
        run = project.new("phase=study", *LIMITS)
        run.obtain(shards_maker(run), named=True)
        shards = load_shards(run, shards_maker(run))
    return project, shards


@pytest.fixture(scope="module")
def describe(text, tmp_path_factory, shared_project):
    """`describe(names, widths)`: (the study's own mixture, name -> (ablation, its plan)), all of it described."""

    def all_of(names, *widths):
        lines = {name: TRIED[name][0] for name in names}
        with shared_project(tmp_path_factory.mktemp("planned")) as project:
            run = project.new("phase=study", *LIMITS, asked(**lines), f"study.widths={list(widths)}")
            plan = Plan(run, seed=3, domains=2)
            plan.chosen = {"diffuser": {"rate": 0.004, "dropout": 0.2}, "fused_7c": {"rate": 0.0007}}
            found = {
                one.name: (one, Ablated(plan, one.overrides, one.stage)) for one in ablations(plan, text[1])
            }
            own = Ablated(plan, (), "7d")
            assert own.trained
            assert all(ablated.trained and ablated.mixture_flops for _, ablated in found.values())
        return own, found

    return all_of


@pytest.fixture(scope="module")
def planned(describe):
    return describe(["next_embed", "unfreeze"], 48)


@pytest.fixture(scope="module")
def others(describe):
    return describe(["own_text", "prob", "token_router", "more_text", "memory"], 80)


def check_fits(planned, names):
    """What holds for every ablation: its own experts and no others, another model, and what tuning chose."""
    own, found = planned
    for name in names:
        one, ablated = found[name]
        assert one.what == f"{name} is tried"
        assert changed_experts(own, ablated) == TRIED[name][1], name
        theirs = own.trained[f"fused_{one.stage}"]
        assert ablated.model.kind == theirs.kind == f"mla_{one.stage}"
        assert ablated.model.recipe.hash != theirs.recipe.hash
        assert ablated.trained["fused_7c"].spec["fit"]["lr"] == 0.0007
        assert ablated.trained["diffuser"].spec["network"]["dropout"] == 0.2


def test_overrides_reach_the_fits_that_they_name_and_no_other(planned):
    own, found = planned
    assert list(found) == ["next_embed", "unfreeze", "width_48"]
    check_fits(planned, ["next_embed", "unfreeze"])
    trained = {name: ablated.trained for name, (_, ablated) in found.items()}
    assert trained["next_embed"]["diffuser"].spec["network"]["target"] == "next_embed"
    assert trained["unfreeze"]["fused_7c"].spec["unfreeze"] == "adapters"
    assert trained["unfreeze"]["fused_7b"].recipe.hash == own.trained["fused_7b"].recipe.hash


def test_what_an_ablation_is_asked_is_part_of_it_only_where_it_is_asked(planned):
    """Records of before keep their ablations."""
    own, found = planned
    ablation = found["next_embed"][0]
    plain = ablation_maker(own, ablation)
    assert plain.spec.keys() == {"rows", "stage", "alone"}
    asked_more = ablation_maker(own, dataclasses.replace(ablation, evidence=("steps_curve",)))
    assert asked_more.spec == {**plain.spec, "evidence": ["steps_curve"], "tokens": 40_000}
    assert asked_more.needs["fused_7c"].recipe.hash == plain.needs["fused_7c"].recipe.hash


@pytest.mark.slow
def test_more_overrides_reach_their_fits(others, text):
    own, found = others
    check_fits(others, [name for name in found if name != "width_80"])
    trained = {name: ablated.trained for name, (_, ablated) in found.items()}
    parts = [trained["own_text"][name].spec["fit"]["loader"]["train_part"] for name in EXPERTS]
    assert parts == [0, 1, 2]
    # the text that the diffuser's teacher reads is the Transformer's
    teacher = trained["own_text"]["diffuser"].needs["transformer"]
    assert teacher.recipe.hash == own.trained["transformer"].recipe.hash
    assert_commands_make(text[0], found, ("own_text", "diffuser"), ("own_text", "fused_7c"))
    assert trained["prob"]["fused_7a"].spec["model"]["fusion"] == {"space": "prob"}
    assert trained["token_router"]["fused_7a"].spec["model"]["router"]["pool"] == "cummean+token"
    assert trained["memory"]["fused_7d"].spec["retrieval"]["granularity"] == "token"
    assert {trained["more_text"][name].spec["fit"]["loader"]["train_tokens"] for name in EXPERTS} == {19200}
    assert trained["more_text"]["fused_7c"].spec["fit"]["loader"]["train_tokens"] == 1600


def check_width(planned, width):
    """The FLOPs of the study's own width, and shapes that have grown with it; the Transformer's steps."""
    own, ablated = planned[0], planned[1][f"width_{width}"][1]
    fit = ablated.trained["state_space"].spec["fit"]
    last = ablated.costs.training("state_space", ablated.trained["state_space"]) / fit["max_steps"]
    assert abs(ablated.mixture_flops - own.mixture_flops) <= last / 2 * 1.0001
    network = ablated.trained["diffuser"].spec["network"]
    assert (network["d_model"], network["num_heads"], network["ffn_dim"]) == (width, width // 16, width)
    mla = ablated.trained["fused_7a"].spec["model"]["mla"]
    assert (mla["d_model"], mla["num_heads"]) == (width, width // 16)
    assert ablated.trained["state_space"].spec["network"]["d_inner"] == 2 * width
    # the fusion reads what it reads in the study
    assert ablated.trained["fused_7c"].spec["fit"]["max_steps"] is None
    return ablated.trained["transformer"].spec["fit"]["max_steps"]


def test_widths_take_the_flops_of_the_study_to_half_a_step(planned):
    assert check_width(planned, 48) > 25  # of two epochs of 13 steps at 64


@pytest.mark.slow
def test_a_wider_mixture_takes_fewer_steps(others):
    assert check_width(others, 80) < 25


def assert_commands_make(project, found, *which):
    """The commands of these fits make the very fits."""
    for name, key in which:
        maker = found[name][1].trained[key]
        words = [
            w for w in maker.command.split()[2:] if not w.startswith(("size=", "data.root=", "run.root="))
        ]
        if key == "diffuser":
            assert not any("state_space" in word for word in words)
        run = project.new(*words)
        again = mla_maker(run, "7c") if key == "fused_7c" else expert_maker(run, key)
        assert again.recipe.hash == maker.recipe.hash, name


def test_a_command_makes_the_very_fit_of_an_ablation(planned, text):
    assert_commands_make(text[0], planned[1], ("next_embed", "diffuser"), ("width_48", "state_space"))


def slow(*values):
    """Values of a test that composes some more settings, a third of a second each."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["experts.diffuser.targt=x"], r"bad: there is no setting 'experts\.diffuser\.targt': did you mean"),
        (
            ["prereq.diffusor.data.train_part=1"],
            r"bad: 'prereq\.diffusor\.data\.train_part' hands nothing on",
        ),
        (["optimizer=adamv"], "bad: optimizer=adamv does not exist"),
        (["training.mla.unfreeze=some"], r"bad: training\.mla\.unfreeze=some is unknown"),
        (["training.mla.unfreeze=none"], "bad: its overrides change nothing that leads to 7c"),
        slow(["experts.diffuser.target=else"], r"bad: experts\.diffuser: .*target"),
        slow(["tokenizer.vocab_size=310"], "bad: it reads another corpus or other tokens"),
        slow(["prereq.diffuser.data.train_part=9"], r"bad: data\.train_part=9 does not exist"),
        slow(
            ["prereq.expert.data.train_tokens=640000"], "bad: it reads more tokens of expert_train than these"
        ),
        slow(["data.train_tokens=null"], "bad: a study says how much text every fit reads"),
        slow(["training.mla.stage_7c.max_flops=1e9"], "bad: a study plans the FLOPs of every fit itself"),
    ],
)
def test_what_cannot_be_is_refused_with_the_name_of_the_ablation(text, lines, message):
    project, shards = text
    plan = Plan(project.new("phase=study", *LIMITS, asked(bad=lines)), seed=3, domains=2)
    with pytest.raises(UserError, match=rf"study\.ablations\.{message}"):
        ablations(plan, shards)


@pytest.mark.parametrize(
    ("widths", "message"),
    [("[64]", "64 is the width of the study"), ("[40]", r"do not divide 40; give multiples of 16"),
     slow("[8192]", "take the FLOPs of the study's own: give smaller")],
)  # fmt: skip
def test_widths_that_cannot_be_are_refused(text, widths, message):
    project, shards = text
    plan = Plan(project.new("phase=study", *LIMITS, f"study.widths={widths}"), seed=3, domains=2)
    with pytest.raises(UserError, match=message):
        ablations(plan, shards)


def test_a_study_without_memory_has_no_7d_to_ablate(text):
    project, shards = text
    plan = Plan(
        project.new("phase=study", *LIMITS, "model.retrieval.k=0", asked(memory=TRIED["memory"][0])), 3, 2
    )
    with pytest.raises(UserError, match=r"study\.ablations\.memory: this study has no memory"):
        ablations(plan, shards)


def test_a_study_with_such_an_ablation_trains_nothing(text):
    project, _ = text
    with pytest.raises(UserError, match=r"study\.ablations\.bad: there is no setting"):
        project.go("phase=study", *LIMITS, asked(bad=["model.rooter.pool=ema"]))
    assert not list((project.root / "artifacts").glob("transformer/*"))
