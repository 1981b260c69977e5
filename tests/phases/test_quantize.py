"""`quantize=` in `phase=eval` and `phase=generate`, and the one sentence where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nano_think.artifacts.checkpoint import load_checkpoint, save_expert
from nano_think.config import validate
from nano_think.errors import UserError
from nano_think.phases.audit import marked_quantized
from nano_think.phases.sections_quantized import FULL

EVAL = ("phase=eval", "expert=all", "eval.prompts=0", "eval.resamples=50")


@pytest.fixture(scope="module")
def steps():
    return ("trainer.max_steps=6", "++prereq.expert.trainer.max_steps=6", "++prereq.mla.trainer.max_steps=6")


def test_an_evaluation_of_coarse_weights_says_so_beside_the_saved_ones(built, steps):
    result, run = built.go(*EVAL, *steps, "quantize=int8")
    report = json.loads(Path(result["report"]).with_suffix(".json").read_text())
    assert report["title"] == "Evaluation of fused on test, weights in int8"
    assert report["audit"]["mark"].endswith("of the quantised model: A1, A5")
    assert set(report["quantization"]) == {"fused", "transformer", "diffuser", "state_space"}
    losses = {
        row[0]: row[2]
        for table in report["tables"]
        for row in table["rows"]
        if "bits per byte" in table["headers"]
    }
    for name, figures in report["quantization"].items():
        # the diffuser's maps of noise levels, which stay fp32, weigh most where everything else is tiny
        assert 1.5 < figures["bytes_full"] / figures["bytes"] < 4
        assert figures["speed"] > 0 < figures["speed_full"]
        assert abs(figures["perplexity_lost"]) < 0.1  # of a network this small, six steps old
        ratio = figures["perplexity"] / figures["perplexity_full"] - 1
        assert figures["perplexity_lost"] == pytest.approx(ratio, abs=1e-6)
        assert figures["perplexity"] != figures["perplexity_full"]
        assert losses[name] == pytest.approx(figures["perplexity"])
        assert losses[name + FULL] == pytest.approx(figures["perplexity_full"])
    own = json.loads((run.dir / "quantization" / "report.json").read_text())
    assert own["models"] == report["quantization"]
    assert [row[1] for row in own["tables"][0]["rows"]] == ["fp32", "int8"] * 4


def test_an_evaluation_as_saved_has_no_such_part(built, steps):
    result, run = built.go(*EVAL, *steps)
    text = Path(result["report"]).read_text()
    assert "Quantisation" not in text
    assert FULL not in text
    assert not (run.dir / "quantization").exists()


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_generation_by_coarse_weights(built, steps, kind):
    result, _ = built.go(
        "phase=generate",
        "expert=all",
        *steps,
        f"quantize={kind}",
        "prompt=the old",
        "generate.max_new_tokens=4",
    )
    assert result["quantize"] == kind
    (written,) = json.loads(Path(result["json"]).read_text())
    assert 1 <= len(written["tokens"]) <= 4


@pytest.fixture
def broken(randomise, byte_tokenizer, tmp_path, expert_lm):
    """A checkpoint with a weight that is no number."""
    spec = {"_target_": "nano_think.experts.transformer.TransformerExpert", "d_model": 32, "num_layers": 2}
    spec |= {"num_heads": 2, "ffn_dim": 64}
    model = randomise(expert_lm("transformer"))
    with torch.no_grad():
        model.expert.blocks[0].ffn.up_proj.weight[0, 0] = torch.nan
    save_expert(tmp_path / "broken", "transformer", spec, model, byte_tokenizer, 64)
    return tmp_path / "broken"


def test_weights_that_are_not_finite_are_named(broken, project):
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.up_proj holds weights that are not finite"):
        project.go(
            "phase=generate", f"ckpt={broken}", "prompt=a", "quantize=int8", "generate.max_new_tokens=2"
        )


def test_a_quantised_model_that_leaks_is_marked(built, steps, broken):
    """NaN passes no audit; a model without faults does."""
    run = built.new(*EVAL, *steps, "quantize=int8")
    found = {"passed": True, "mark": "leak audit passed: A1"}
    marked = marked_quantized(run, found, load_checkpoint(broken))
    assert marked["passed"] is False
    assert "these losses mean nothing" in marked["mark"]
    with pytest.raises(UserError, match="audit=require"):
        marked_quantized(built.new(*EVAL, *steps, "audit=require"), found, load_checkpoint(broken))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["phase=eval", "quantize=int4"], "quantize=int4 is not one of none, int8, bf16"),
        (["phase=eval", "quantize=in8"], "did you mean 'int8'"),
        (["phase=mla", "quantize=int8"], "use it with phase=eval or phase=generate"),
    ],
)
def test_what_cannot_be_is_one_sentence(project, typed, said):
    with pytest.raises(UserError, match=said):
        validate(project.new(*typed).cfg)
