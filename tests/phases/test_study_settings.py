from __future__ import annotations

import copy

import pytest

from nano_think.errors import UserError
from nano_think.limits import check_study
from nano_think.phases.study_settings import check_ablations, check_text

GOOD = {
    "expert_tokens": 6400, "fusion_tokens": 1600, "evidence_tokens": 2000, "pool": 2, "workers": 1, "rows": None,
    "seeds": [1, 2], "tuning": {"factors": [1.0], "fusion_factors": [0.5, 1], "share": 0.2, "dropouts": [0],
               "horizons": [1]},
    "ablations": {}, "widths": [],
}  # fmt: skip
LOADER = {"mixing": "equal", "temperature": 1.0}


def changed(path, value):
    settings = copy.deepcopy(GOOD)
    *nodes, key = path.split(".")
    node = settings
    for name in nodes:
        node = node[name]
    node[key] = value
    return settings


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seeds", []),
        ("seeds", [1, 2, 1]),
        ("seeds", 1),
        ("seeds", [0.5]),
        ("workers", 0),
        ("workers", True),
        ("pool", 1),
        ("rows", 0),
        ("expert_tokens", 0),
        ("fusion_tokens", 1.5),
        ("evidence_tokens", None),
        ("tuning.factors", []),
        ("tuning.fusion_factors", [1.0, 0]),
        ("tuning.dropouts", [1.0]),
        ("tuning.horizons", [0]),
        ("tuning.share", 0),
        ("tuning.share", 2),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(path, value):
    check_study(GOOD)
    check_study(changed("seeds", [7]))
    with pytest.raises(UserError, match=rf"study\.{path}={str(value)[:4]}".replace("[", r"\[")):
        check_study(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [("widths", [0]), ("widths", [96, 96]), ("widths", None), ("ablations", ["prob"])],
)
def test_widths_and_ablations_that_are_none_are_refused(path, value):
    check_ablations(GOOD)
    with pytest.raises(UserError, match=rf"study\.{path}={str(value)[:4]}".replace("[", r"\[")):
        check_ablations(changed(path, value))


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("Prob", {}, "small letters"),
        ("again_7c", {}, "small letters"),
        ("width_9", {}, "small letters"),
        ("prob", {"what": None}, "has what .*and nothing else"),
        ("prob", {"overrides": []}, "and nothing else"),
        ("prob", {"why": "it helps"}, "and nothing else"),
        ("prob", {"overrides": ["model.fusion.space"]}, "'model.fusion.space' is not a setting"),
        ("prob", {"evidence": "spaces"}, "and nothing else"),
        (
            "prob",
            {"evidence": ["spaces", "denoiser"]},
            "evidence 'denoiser' is not one of spaces, steps_curve",
        ),
        ("prob", {"stage": "7b"}, "stage=7b is not one of 7c, 7d"),
        ("prob", {"against": "prob"}, "against=prob is no other ablation"),
        ("prob", {"against": "other"}, "against=other is no other ablation"),
    ],
)
def test_ablations_that_are_none_are_refused_by_name(name, asked, message):
    good = {"what": "probabilities are mixed", "overrides": ["model.fusion.space=prob"], "stage": "7c"}
    check_ablations(changed("ablations", {"prob": good}))
    with pytest.raises(UserError, match=rf"study\.ablations\.{name}.*{message}"):
        check_ablations(changed("ablations", {name: good | asked}))


class Text:
    """Shards of two domains, tokens by split."""

    domains = ("long", "short")

    def __init__(self, **tokens):
        self.tokens = {"expert_train": (9000, 5000), "fusion_train": (900, 900), "validation": (500, 0)}
        self.tokens |= {"test": (0, 500), **tokens}

    def num_tokens(self, split, domain=None):
        held = dict(zip(self.domains, self.tokens[split], strict=True))
        return sum(held.values()) if domain is None else held[domain]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        # 6,400 + 1,600 for the single Transformers, half of it of each domain
        (
            {"expert_train": (9000, 3000)},
            r"expert_train .*: short \(3,000 of 4,000\)\. Lower study\.expert_tokens",
        ),
        ({"fusion_train": (700, 90)}, r"fusion_train .*: long \(700 of 800\), short \(90 of 800\)"),
        # a domain of one document has it in one split
        ({"fusion_train": (900, 0)}, "fusion_train: no text to draw from in domain short"),
        ({"expert_train": (0, 0)}, "expert_train: no text to draw from"),
        ({"validation": (0, 0)}, "validation split holds no text"),
        ({"test": (0, 0)}, "test split holds no text"),
    ],
)
def test_text_that_does_not_suffice_is_refused_before_anything_is_trained(tokens, message):
    check_text(Text(), GOOD, LOADER, 64)
    with pytest.raises(UserError, match=message):
        check_text(Text(**tokens), GOOD, LOADER, 64)


def test_the_phase_checks_first(project):
    with pytest.raises(UserError, match=r"study\.workers=0"):
        project.go("phase=study", "study.workers=0")
    with pytest.raises(UserError, match="reads more tokens of expert_train"):
        project.go("phase=study", "study.expert_tokens=999999")
    assert not list((project.root / "artifacts").glob("transformer/*"))
