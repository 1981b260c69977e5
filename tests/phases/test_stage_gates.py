"""Gates of a run: figures by hand, what is shown and kept, and where the line stops."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nano_think.artifacts import provenance
from nano_think.artifacts.checkpoint import load_checkpoint
from nano_think.artifacts.memory import load_memory
from nano_think.errors import UserError
from nano_think.evals.bootstrap import paired_difference
from nano_think.evals.losses import DocumentLosses
from nano_think.evals.memory_modes import MemoryModes
from nano_think.evals.oracles import static_losses
from nano_think.evals.pools import SharedForward, expert_outputs
from nano_think.files import write_json
from nano_think.ops.layout import Layout
from nano_think.ops.pooling import fit_static_weights
from nano_think.phases import mla
from nano_think.phases.fit import Fit
from nano_think.phases.mla import mla_maker, stages_of
from nano_think.phases.stage_gates import CAUSES, LOSSES, Judge, gain_in_words, pass_gates

STEPS = ("trainer.max_steps=6", "++prereq.expert.trainer.max_steps=6")


@pytest.fixture(scope="module")
def paths(built):
    """Where the stages of the built project lie, by name."""
    return {
        stage: maker.recipe.path(built.first.artifacts)
        for stage, maker in stages_of(mla_maker(built.first, "7d"))
    }


@pytest.fixture(scope="module")
def results(built, paths):
    """What they recorded."""
    return {stage: built.first.result_of(path) for stage, path in paths.items()}


def test_every_stage_keeps_its_gain_with_its_cause(paths, results):
    before = "7a"
    for stage in ("7b", "7c", "7d"):
        gain, path = results[stage]["gain"], paths[stage]
        assert (gain["cause"], gain["over"]) == (CAUSES[stage], before)
        own, other = (DocumentLosses.load(p / LOSSES) for p in (path, paths[before]))
        want = paired_difference(own, other)
        assert (gain["difference"], gain["low"], gain["high"]) == (want.estimate, want.low, want.high)
        assert own.loss() == pytest.approx(results[stage]["val_loss"], abs=1e-3)
        before = stage
    assert results["7a"]["gain"]["cause"] == "ensemble effect"


def test_the_gate_after_7a_has_the_figures_of_the_fit(results):
    result = results["7a"]
    usefulness, static = result["gates"]
    assert (usefulness["name"], static["name"]) == ("G4 usefulness", "G4 static gain")
    assert usefulness["figures"]["gap"] == result["gap"]
    assert static["figures"]["gain"] == pytest.approx(
        min(result["loss_per_expert"].values()) - result["loss"], abs=1e-4
    )
    assert result["gain"]["difference"] == pytest.approx(-static["figures"]["gain"])
    assert 0 < static["figures"]["standard_error"] < 0.2


def test_later_gates_answer_what_is_known_and_leave_the_rest_open(results):
    [router], [training], [memory] = (results[stage]["gates"] for stage in ("7b", "7c", "7d"))
    assert (router["name"], training["name"], memory["name"]) == ("G5", "G6", "G7")
    assert 0 <= router["figures"]["information"] <= np.log(2)
    assert 0 < router["figures"]["p_value"] <= 1
    assert training["figures"]["over_router"] == results["7c"]["gain"]["difference"]
    assert training["figures"]["over_finetuned"] is None
    assert training["passed"] is not True
    assert memory["figures"]["over_none"] == results["7d"]["gain"]["difference"]
    assert memory["passed"] is (memory["reason"].endswith(": better"))


def test_memory_is_judged_against_itself_shuffled(built, paths, results):
    checkpoint, data = load_checkpoint(paths["7d"]), _data(built)
    model, memory = checkpoint.model, load_memory(paths["7d"] / "memory")
    modes = MemoryModes(memory)
    nll = {"real": 0.0, "shuffled": 0.0}
    for number, batch in enumerate(data.val_dataloader()):
        layout = Layout(batch["positions"], batch["segments"])
        for name in nll:
            slots = modes.slots(batch, number)[name]
            with torch.no_grad():
                nll[name] += float(model.token_nll(batch["tokens"], batch["labels"], layout, slots).sum())
    tokens = DocumentLosses.load(paths["7d"] / LOSSES).num_tokens.sum()
    figures = results["7d"]["gates"][0]["figures"]
    assert figures["over_shuffled"] == pytest.approx((nll["real"] - nll["shuffled"]) / tokens, abs=1e-5)
    assert figures["over_shuffled"] != 0


def test_gates_are_shown_and_stand_in_the_result_and_the_manifest(built, printed):
    said, result = printed(built.first), built.result
    answers = {True: "passed", False: "failed", None: "open"}
    names = [gate["name"] for gate in result["gates"]]
    assert names == ["G4 usefulness", "G4 static gain", "G5", "G6", "G7"]
    for gate in result["gates"]:
        assert f"gate {gate['name']} after {gate['stage']}: {answers[gate['passed']]}." in said
        assert gate["reason"] in said
    manifest = json.loads((built.first.dir / "manifest.json").read_text())
    assert list(manifest["gates"]) == ["7a", "7b", "7c", "7d"]
    for cause in CAUSES.values():
        assert cause in said


def test_losses_of_a_stage_that_kept_none_are_measured_again(built, paths, tmp_path):
    """And of one that was made with another validation pass."""
    start, data = load_checkpoint(paths["7b"]), _data(built)
    judge = Judge(start.model, data, start.tokenizer, tmp_path)
    own, weights = judge.measure()
    kept = DocumentLosses.load(paths["7b"] / LOSSES)
    np.testing.assert_allclose(own.sum_nll, kept.sum_nll, rtol=1e-4)
    assert weights.uid.tolist() == own.uid.tolist()
    assert weights.sum_weights.sum(1) == pytest.approx(own.num_tokens, rel=1e-5)
    for stored in (None, "others"):
        before = SimpleNamespace(path=tmp_path / str(stored), provenance={"kind": "mla_7a"})
        before.path.symlink_to(paths["7a"]) if stored is None else _without_half(paths["7a"], before.path)
        found = judge._losses_before(before, own)
        want = DocumentLosses.load(paths["7a"] / LOSSES)
        np.testing.assert_allclose(found.sum_nll, want.sum_nll, rtol=1e-4)


def _without_half(stage, path):
    """7a with the losses of fewer documents beside it."""
    path.mkdir()
    for file in stage.iterdir():
        (path / file.name).symlink_to(file)
    (path / LOSSES).unlink()
    every = vars(DocumentLosses.load(stage / LOSSES))
    half = {k: v[::2] if isinstance(v, np.ndarray) else v for k, v in every.items()}
    DocumentLosses(**half).save(path / LOSSES)
    made = provenance.read(stage)
    (path / provenance.FILE).unlink()
    write_json(path / provenance.FILE, {**made, "files": provenance.fingerprints(path)})


def _data(built, *more):
    run = built.new("phase=mla", "expert=all", *STEPS, *more)
    numbers = {"lr": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "batch_size": 8, "accumulate": 1}
    numbers |= {"max_epochs": 1, "max_steps": None, "patience": 0}
    shards = mla_maker(run, "7a").needs["shards"]
    return Fit(run, shards, numbers, "x", "fusion_train", "training.mla").data()


@pytest.mark.parametrize("space", ["hidden", "prob"])
def test_losses_of_the_fitted_pool_are_those_of_the_model_under_its_weights(space, built, paths):
    model = load_checkpoint(paths["7a"]).model
    model.fusion = space
    batches = list(_data(built).dataloader("fusion_train", rows=4))
    sample = expert_outputs(model, batches)
    fitted = fit_static_weights(sample.hidden, sample.heads, sample.labels, space)
    lengths = np.ones(model.vocab_size)
    pool, alone = static_losses(sample, fitted, space, lengths, 2)
    shared = SharedForward(model)
    uid = torch.cat([b["doc_uid"][b["labels"] >= 0] for b in batches]).numpy()
    for found, nll in [
        (pool, shared.pooled(fitted.weights.float())),
        *((alone[name], shared.expert(name)) for name in alone),
    ]:
        tokens = torch.cat([nll(b)[b["labels"] >= 0] for b in batches]).double().numpy()
        want = [tokens[uid == one].sum() for one in found.uid]
        np.testing.assert_allclose(found.sum_nll, want, rtol=1e-4)
        assert found.num_tokens.sum() == len(uid)


def _alike(built, paths, tmp_path):
    """What 7a would have found had its experts been one and the same."""
    checkpoint, data = load_checkpoint(paths["7a"]), _data(built)
    model = checkpoint.model
    first = next(iter(model.experts.values()))
    for name in list(model.experts):
        model.experts[name] = first
    sample = expert_outputs(model, data.dataloader("fusion_train", rows=8))
    fitted = fit_static_weights(sample.hidden, sample.heads, sample.labels)
    zeros = dict.fromkeys(model.experts, 0.0)
    figures = {"gap": zeros, "mean_kl": zeros, "reference": "transformer"}
    return Judge(model, data, checkpoint.tokenizer, tmp_path).static(sample, fitted, figures)


def test_equal_experts_fail_their_gates_and_stop_the_line_where_asked_to(built, paths, tmp_path, printed):
    result = _alike(built, paths, tmp_path)
    assert result["gain"]["difference"] == pytest.approx(0, abs=1e-6)
    assert [gate["passed"] for gate in result["gates"]] == [False, False]
    stop = built.new("phase=mla", "expert=all", "gates=stop")
    with pytest.raises(
        UserError, match=r"stops after 7a.*G4 static gain: gain .*standard_error=.*gates=warn"
    ):
        pass_gates(stop, "7a", result)
    assert json.loads((stop.dir / "manifest.json").read_text())["gates"]["7a"] == result["gates"]
    warn = built.new("phase=mla", "expert=all")
    assert [gate["stage"] for gate in pass_gates(warn, "7a", result)] == ["7a", "7a"]
    assert "going on after 7a all the same" in printed(warn)


def test_a_stopped_run_leaves_what_it_made_and_warn_goes_on_from_there(built, monkeypatch, printed):
    """Every expert is the Transformer: 7a is made and kept, 7b is not begun; with warn it is."""
    assemble = mla._assemble

    def alike(maker, experts):
        model, spec = assemble(maker, experts)
        for name in list(model.experts)[1:]:
            model.experts[name].forward = model.experts["transformer"].forward
        return model, spec

    monkeypatch.setattr(mla, "_assemble", alike)
    settings = ("phase=mla", "expert=all", "trainer.max_steps=1", "++prereq.expert.trainer.max_steps=6")
    # a number of its own, so that no other test meets this 7a
    settings += ("++training.mla.static_tokens=513", "stage=7b")
    with pytest.raises(UserError, match=r"gates=stop: the line stops after 7a.*G4 static gain"):
        built.go(*settings, "gates=stop")
    run = built.new(*settings)
    there = {s: m.recipe.exists(run.artifacts) for s, m in stages_of(mla_maker(run, "7b"))}
    assert there == {"7a": True, "7b": False}
    result, run = built.go(*settings)
    assert "reused mla_7a" in printed(run)
    assert set(result["stages"]) == {"7b"}
    assert [gate["passed"] for gate in result["gates"][:2]] == [False, False]


def test_a_single_expert_has_a_gain_and_no_gates(built, paths, tmp_path):
    checkpoint, data = load_checkpoint(paths["7a"]), _data(built)
    model = checkpoint.model
    for name in list(model.experts)[1:]:
        del model.experts[name]
    model.expert_gain = torch.nn.Parameter(model.expert_gain[:1].detach())
    for name in ("weight", "bias"):
        parameter = getattr(model.router, name)
        setattr(model.router, name, torch.nn.Parameter(parameter[:1].detach()))
    judge = Judge(model, data, checkpoint.tokenizer, tmp_path)
    own, _ = judge.measure()
    before = SimpleNamespace(path=tmp_path, provenance={"kind": "mla_7a"})
    own.save(tmp_path / LOSSES)
    result = judge.trained("7c", before)
    assert result["gates"] == []
    assert result["gain"]["difference"] == 0
    batch = next(iter(data.val_dataloader()))
    layout = Layout(batch["positions"], batch["segments"])
    assert model(batch["tokens"], layout).weights.unique().tolist() == [1.0]


def test_a_stage_without_gates_says_so(built, printed):
    run = built.new("phase=mla", "expert=all", "gates=stop")
    assert pass_gates(run, "7b", {"val_loss": 3.0}) == []
    assert "7b was made without its gates" in printed(run)
    assert gain_in_words(None) == "–"
    gain = {
        "difference": -0.0123,
        "low": -0.02,
        "high": -0.004,
        "documents": 9,
        "over": "7a",
        "verdict": "better",
    }
    assert gain_in_words(gain) == "-0.0123 [-0.0200, -0.0040] over 7a: better"
    assert gain_in_words(gain | {"low": None, "high": None}) == "-0.0123 over 7a: better"
