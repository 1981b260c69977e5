from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console

from nano_think.artifacts.checkpoint import load_checkpoint
from nano_think.config import checked_overrides
from nano_think.errors import UserError
from nano_think.phases import run as module
from nano_think.phases.data import shards_maker, tokenizer_maker
from nano_think.phases.expert import expert_maker
from nano_think.phases.machine import versions
from nano_think.phases.mla import mla_maker, stages_of
from nano_think.phases.run import Maker, Run

ROOT = Path(module.__file__).resolve().parents[2]
EXPERTS = ("transformer", "diffuser", "state_space")


def _tree(maker, found=None):
    """Every maker that `maker` needs, itself included, by hash."""
    found = {} if found is None else found
    for need in maker.needs.values():
        _tree(need, found)
    found[maker.recipe.hash] = maker
    return found


def _hashes(project, *overrides, stage="7d"):
    """Hash by kind of everything behind `phase=mla`."""
    tree = _tree(mla_maker(project.new("phase=mla", "expert=all", *overrides), stage))
    kinds = {}
    for digest, maker in tree.items():
        assert maker.kind not in kinds, f"two different {maker.kind} in one lineage"
        kinds[maker.kind] = digest
    return kinds


@pytest.fixture(scope="module")
def known():
    """Hashes of the plain run, which do not depend on the folder it writes to."""
    return {}


@pytest.fixture
def plain(project, known):
    if not known:
        known.update(_hashes(project))
    return known


def _changed(project, plain, *overrides):
    other = _hashes(project, *overrides)
    return {kind for kind in plain if plain[kind] != other[kind]}


STAGES = {"mla_7a", "mla_7b", "mla_7c", "mla_7d"}
ALL_EXPERTS = set(EXPERTS)


REACHED = [
    ("trainer.max_steps=7", STAGES - {"mla_7a"}),
    ("++trainer.overfit_batches=1", STAGES - {"mla_7a"}),
    ("optimizer=muon", STAGES - {"mla_7a"}),
    ("training.mla.anchor=0.0", STAGES - {"mla_7a"}),
    ("training.mla.stage_7c.lr=0.5", {"mla_7c", "mla_7d"}),
    ("training.mla.static_tokens=512", STAGES),
    ("model.retrieval.k=3", {"mla_7d"}),
    ("model.router.pool=token", STAGES),
    ("++prereq.expert.trainer.max_steps=7", ALL_EXPERTS | STAGES),
    ("++prereq.expert.optimizer=muon", ALL_EXPERTS | STAGES),
    ("++prereq.transformer.trainer.max_steps=7", ALL_EXPERTS | STAGES),
    ("++prereq.state_space.trainer.max_steps=7", {"state_space"} | STAGES),
    ("++prereq.mla.trainer.max_steps=7", set()),
    ("training.transformer.lr=0.5", ALL_EXPERTS | STAGES),
    ("training.diffuser.ce_weight=0.0", {"diffuser"} | STAGES),
    ("expert.embed=own", {"diffuser", "state_space"} | STAGES),
    ("expert_seed=2", ALL_EXPERTS | STAGES),
    ("data.mode=padded", ALL_EXPERTS | STAGES),
    ("size.vocab_size=310", {"tokenizer", "shards"} | ALL_EXPERTS | STAGES),
    ("++trainer.log_every_n_steps=3", set()),
    ("data.num_workers=2", set()),
    ("data.processes=1", set()),
]
# the same for further settings
MORE_REACHED = [
    ("trainer.max_epochs=7", STAGES - {"mla_7a"}),
    ("trainer.gradient_clip_val=0.1", STAGES - {"mla_7a"}),
    ("++trainer.limit_val_batches=2", STAGES - {"mla_7a"}),
    ("++trainer.fast_dev_run=true", STAGES - {"mla_7a"}),
    ("++optimizer.lr=0.5", STAGES - {"mla_7a"}),
    ("schedule=constant", STAGES - {"mla_7a"}),
    ("training.mla.entropy_token=0.5", STAGES - {"mla_7a"}),
    ("training.mla.entropy_mean=0.5", STAGES - {"mla_7a"}),
    ("training.mla.router_lr_scale=2.0", STAGES - {"mla_7a"}),
    ("training.mla.memory_dropout=0.1", STAGES - {"mla_7a"}),
    ("training.mla.stage_7d.max_steps=3", {"mla_7d"}),
    ("model.retrieval.chunk=8", {"mla_7d"}),
    ("model.store.rows=4", {"mla_7d"}),
    ("model.store.capacity=64", {"mla_7d"}),
    ("model.retrieval.k=0", STAGES),
    ("model.router.floor=0.05", STAGES),
    ("++model.router.pool_includes_memory=true", STAGES),
    ("model.fusion.space=prob", STAGES),
    ("model.expert_input=raw", STAGES),
    ("model.mla.kv=full", STAGES),
    ("++prereq.diffuser.training.diffuser.lr=0.5", {"diffuser"} | STAGES),
    ("training.transformer.warmup_steps=7", ALL_EXPERTS | STAGES),
    ("training.transformer.patience=7", ALL_EXPERTS | STAGES),
    ("training.state_space.weight_decay=0.5", {"state_space"} | STAGES),
    ("training.diffuser.mse_weight=0.5", {"diffuser"} | STAGES),
    ("++training.diffuser.time_sampler=seed", {"diffuser"} | STAGES),
    ("experts.diffuser.target=next_embed", {"diffuser"} | STAGES),
    ("experts.diffuser.dropout=0.3", {"diffuser"} | STAGES),
    ("experts.transformer.dropout=0.3", ALL_EXPERTS | STAGES),
    ("seed=2", ALL_EXPERTS | STAGES),
    ("precision=64-true", ALL_EXPERTS | STAGES),
    ("size.seq_len=32", ALL_EXPERTS | STAGES),
    ("data.mixing=proportional", ALL_EXPERTS | STAGES),
    ("data.val_rows=3", ALL_EXPERTS | STAGES),
    ("trainer.accelerator=cpu", set()),
    ("resume=never", set()),
    ("callbacks.samples.max_new_tokens=9", set()),
    ("eval.rows=3", set()),
]


@pytest.mark.parametrize(
    ("override", "reached"),
    [*REACHED, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_REACHED)],
)
def test_what_a_setting_reaches(override, reached, project, plain):
    assert _changed(project, plain, override) == reached


def test_the_corpus_is_known_by_its_content(project, plain, tmp_path):
    copy = tmp_path / "copy"
    for file in project.texts.rglob("*.jsonl"):
        (copy / file.parent.name).mkdir(parents=True)
        (copy / file.parent.name / file.name).write_text(file.read_text())
    assert _changed(project, plain, f"data.root={copy}") == set()
    with open(copy / "prose" / "part.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more document, which nobody has seen before"}) + "\n")
    everything = {"corpus", "tokenizer", "shards", *EXPERTS, *STAGES}
    assert _changed(project, plain, f"data.root={copy}") == everything


def test_the_expert_of_an_mla_run_is_that_of_an_expert_run(project, plain):
    """Two commands that would make the same thing share it."""
    for name in EXPERTS:
        run = project.new("phase=expert", f"expert={name}")
        assert expert_maker(run, name).recipe.hash == plain[name]
    run = project.new("phase=expert", "expert=all")
    assert [expert_maker(run, name).recipe.hash for name in EXPERTS] == [plain[name] for name in EXPERTS]


def test_named_steps_of_an_expert_run_do_not_reach_its_prerequisite(project, plain):
    run = project.new("phase=expert", "expert=diffuser", "trainer.max_steps=7")
    maker = expert_maker(run, "diffuser")
    assert maker.recipe.hash != plain["diffuser"]
    assert maker.needs["transformer"].recipe.hash == plain["transformer"]


def _checked(words):
    """What `train.py` makes of a command line; it composes by itself, which Hydra does one at a time."""
    GlobalHydra.instance().clear()
    arguments = checked_overrides(words, ROOT)
    initialize_config_dir(str(ROOT / "conf"), version_base="1.3")
    return arguments


QUIRKS = [
    ("seed=3", "expert_seed=5", "optimizer=muon", "trainer.max_steps=7"),
    ("++prereq.expert.trainer.max_steps=7", "++prereq.transformer.optimizer=muon"),
    ("training.mla.anchor=0.5", "experts.transformer.dropout=0.3", "training.diffuser.ce_weight=0.0"),
    ("expert.embed=own", "data.mixing={prose: 0.25, lists: 0.75}", "prerequisites=require"),
    ("++prereq.expert.data.mixing=[0.25, 0.75]", "++prereq.expert.trainer.max_time=null"),
]
ALL_AT_ONCE = tuple(override for quirk in QUIRKS[:3] for override in quirk)
EVERY_KIND = ("tokenizer", "shards", *EXPERTS, "mla_7a", "mla_7d")


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        (ALL_AT_ONCE, ("diffuser", "mla_7c")),
        *(pytest.param(quirk, EVERY_KIND, marks=pytest.mark.slow) for quirk in QUIRKS),
    ],
)
def test_a_printed_command_composes_and_makes_the_same_thing(overrides, kinds, project):
    top = mla_maker(project.new("phase=mla", "expert=all", *overrides), "7d")
    makers = [maker for maker in _tree(top).values() if maker.kind in kinds]
    assert {maker.kind for maker in makers} == set(kinds)
    for maker in makers:
        words = shlex.split(maker.command)
        assert words[:2] == ["python", "train.py"]
        arguments = _checked(words[2:])
        assert not any(word.startswith("prerequisites=") for word in arguments)
        run = Run(compose("config", arguments), arguments, project.root, Console(quiet=True))
        assert run.artifacts == project.root / "artifacts"
        makes = {
            "mla": lambda run=run: mla_maker(run, run.cfg.stage),
            "expert": lambda run=run: expert_maker(run, run.cfg.expert.names[0]),
            "tokenizer": lambda run=run: tokenizer_maker(run),
            "data": lambda run=run: shards_maker(run),
        }
        remade = makes[run.cfg.phase.name]()
        assert (remade.kind, remade.recipe.hash) == (maker.kind, maker.recipe.hash), maker.command


def test_require_refuses_before_anything_is_built_and_names_the_command(project):
    for overrides in (("phase=expert", "expert=state_space"), ("phase=mla", "expert=all")):
        with pytest.raises(UserError, match=r"is missing: make it with `python train.py phase=data "):
            project.go(*overrides, "prerequisites=require")
    assert not list((project.root / "artifacts").glob("*/*"))


def test_require_lets_all_named_stages_be_made_but_not_those_before_a_named_one(built):
    settings = ("phase=mla", "expert=all", "++prereq.expert.trainer.max_steps=6", "trainer.max_steps=1")
    settings += ("++training.mla.anchor=0.7", "prerequisites=require")
    with pytest.raises(UserError, match=r"mla_7b .* is missing: make it with `python train.py phase=mla"):
        built.go(*settings, "stage=7c")
    result, _ = built.go(*settings, "stage=all", "model.retrieval.k=0")
    assert set(result["stages"]) == {"7b", "7c"}


def test_a_second_run_reuses_everything(built, printed):
    result, run = built.go("phase=mla", "expert=all", *_steps())
    assert result == built.result
    assert "building" not in printed(run)
    assert f"reused mla_7d {mla_maker(run, '7d').recipe.hash}" in printed(run)
    assert run.used == {digest: kind for digest, kind in run.used.items() if kind.startswith("mla_7")}


def _steps():
    fits = "prereq.expert.trainer.max_steps", "prereq.mla.trainer.max_steps"
    return ("trainer.max_steps=6", *(f"++{key}=6" for key in fits))


def test_another_seed_reuses_data_alone(built, printed):
    run = built.new("phase=expert", "expert=transformer", "seed=2", "trainer.max_steps=6")
    path = run.obtain(expert_maker(run, "transformer"), named=True)
    assert "building transformer" in printed(run)
    assert "reused shards" in printed(run)
    one = load_checkpoint(built.root / "artifacts" / "transformer" / _only(built.first.used, "transformer"))
    two = load_checkpoint(path)
    assert not bool((one.model.embedding.weight == two.model.embedding.weight).all())


def _only(used, kind):
    [digest] = [digest for digest, found in used.items() if found == kind]
    return digest


def test_run_folder_is_complete(built):
    folder = built.phase("phase=expert", "expert=transformer", "trainer.max_steps=6")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["artifacts"] == {_only(built.first.used, "transformer"): "transformer"}
    assert {"command", "seed", "commit", "python", "packages", "machine", "result"} <= set(manifest)
    assert "trainer.max_steps=6" in manifest["command"]
    config = OmegaConf.load(folder / "config.yaml")
    assert config.trainer.max_steps == 6
    assert config.experts.transformer.d_model == 64
    published = load_checkpoint(manifest["result"]["checkpoints"]["transformer"])
    assert published.name == "transformer"
    assert published.provenance["result"]["steps"] == 6


def test_a_failed_run_says_so(project):
    with pytest.raises(UserError):
        project.phase("phase=mla", "expert=all", "prerequisites=require")
    manifest = json.loads((project.root / "runs" / "1" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "make it with" in manifest["error"]


def test_expert_seed_is_the_seed_of_an_expert_run(project, monkeypatch):
    seen = []
    monkeypatch.setattr("nano_think.phases.expert.run", lambda run: seen.append(run.cfg.seed) or {})
    folder = project.phase("phase=expert", "expert=transformer", "seed=1", "expert_seed=7")
    assert seen == [7]
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 7


def test_provenance_names_everything_it_was_made_from(built):
    checkpoint = load_checkpoint(built.result["checkpoint"])
    lineage = checkpoint.provenance
    for _ in range(3):
        lineage = lineage["needs"]["before"]
    assert set(lineage["needs"]) == {"shards", *EXPERTS}
    teacher = lineage["needs"]["diffuser"]["needs"]["transformer"]["hash"]
    assert teacher == lineage["needs"]["transformer"]["hash"] == _only(built.first.used, "transformer")
    stages = [stage for stage, _ in stages_of(mla_maker(built.first, "7d"))]
    assert stages == ["7a", "7b", "7c", "7d"]


def test_publishing_replaces_what_was_there(project, tmp_path):
    run = project.new("phase=data")
    for text in ("one", "two"):
        source = tmp_path / text
        source.mkdir()
        (source / f"{text}.txt").write_text(text)
        target = run.publish(source, "thing")
        assert [file.name for file in target.iterdir()] == [f"{text}.txt"]
    (project.root / "checkpoints" / "thing.new").mkdir()
    (project.root / "checkpoints" / "thing.new" / "left.txt").write_text("of a crash")
    assert [file.name for file in run.publish(tmp_path / "one", "thing").iterdir()] == ["one.txt"]


def test_versions_without_git(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr("nano_think.phases.machine.subprocess.run", missing)
    assert versions()["commit"] is None


BUILD = """
import sys
from pathlib import Path
from hydra import compose, initialize_config_dir
from rich.console import Console
from nano_think.config import register_schema
from nano_think.phases.expert import expert_maker
from nano_think.phases.run import Run

register_schema()
overrides = sys.argv[2:]
with initialize_config_dir(sys.argv[1] + "/conf", version_base="1.3"):
    cfg = compose("config", overrides)
    run = Run(cfg, overrides, Path(cfg.run.root) / "runs" / "x", Console(quiet=True))
    path = run.obtain(expert_maker(run, "transformer"), named=True)
    run.publish(path, "transformer_expert")
    print(path)
"""


@pytest.mark.slow
def test_two_processes_may_build_the_same_artefact_at_once(project):
    overrides = project.overrides("phase=expert", "expert=transformer", "trainer.max_steps=6")
    command = [sys.executable, "-c", BUILD, str(ROOT), *overrides]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=200)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    [path] = paths
    assert load_checkpoint(path).provenance["result"]["steps"] == 6
    assert load_checkpoint(project.root / "checkpoints" / "transformer_expert").name == "transformer"
    left = [p for p in (project.root / "artifacts").rglob(".*") if p.name != ".work"]
    assert left == []
    assert list((project.root / "artifacts" / ".work").iterdir()) == []


def test_an_artefact_that_was_exchanged_is_not_reused(project):
    """Neither another one, nor one with another file, nor one made from what is no longer there."""
    run = project.new("phase=data")

    def maker(kind, text, needs=None):
        def build(path):
            (path / "text").write_text(text)
            return {}

        return Maker(kind, {}, build, needs or {}, "make it")

    first = maker("first", "1")
    second = maker("second", "2", {"first": first})
    path = run.obtain(second)
    content = json.loads((path / "provenance.json").read_text())["needs"]["first"]["content"]
    assert (
        content == json.loads((first.recipe.path(run.artifacts) / "provenance.json").read_text())["content"]
    )
    project.new("phase=data").obtain(second)

    (path / "text").write_text("3")
    with pytest.raises(UserError, match=r"text is not the file that .* was made with"):
        project.new("phase=data").obtain(second)
    (path / "text").write_text("2")

    shutil.rmtree(first.recipe.path(run.artifacts))
    project.new("phase=data").obtain(second)
    project.new("phase=data").obtain(maker("first", "other"))
    with pytest.raises(UserError, match=r"first .* is no longer what second .* was made from"):
        project.new("phase=data").obtain(second)

    shutil.rmtree(path)
    shutil.copytree(first.recipe.path(run.artifacts), path)
    with pytest.raises(
        UserError, match=r"holds first .*, which belongs elsewhere.*`make it` makes the right one"
    ):
        project.new("phase=data").obtain(second)
    shutil.rmtree(path)
    project.new("phase=data").obtain(second)
