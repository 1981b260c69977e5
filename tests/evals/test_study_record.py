import json
import math
import subprocess

import numpy as np
import pytest

from nano_think.errors import UserError
from nano_think.evals import study_record
from nano_think.evals.losses import DocumentLosses
from nano_think.evals.study_record import MODELS, StudyLosses, StudyRecord


def test_a_record_comes_back_as_it_was_saved(make_study, tmp_path):
    record = make_study()
    digest = record.save(tmp_path)
    again = StudyRecord.load(tmp_path)
    assert again.facts == record.facts
    assert again.losses.keys() == record.losses.keys()
    for (split, seed), part in record.losses.items():
        for model in MODELS:
            ours, theirs = record.of(model, split, seed), again.of(model, split, seed)
            for name in ("uid", "domain", "sum_nll", "num_tokens", "num_bytes"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            assert theirs.num_domains == 2
        assert part.nll.dtype == np.float32
    assert again.digest() == record.digest() == digest
    assert again.missing() == []
    assert again.changed == ()
    assert again.scored_seeds("fused_7c") == [1, 2]


def test_anyone_can_check_the_hashes_and_saving_twice_gives_the_same_bytes(make_study, tmp_path):
    make_study().save(tmp_path / "a")
    make_study().save(tmp_path / "b")
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path / "a", check=True
    )
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["study.json", "losses/test_seed1.npz", "losses/val_seed2.npz"])
def test_one_changed_file_changes_the_digest_and_is_named(make_study, tmp_path, name):
    before = make_study().save(tmp_path)
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(path.read_text() + "\n")
    else:
        part = StudyLosses.from_bytes(path.read_bytes())
        part.nll[0, 0] += 1
        path.write_bytes(part.to_bytes())
    record = StudyRecord.load(tmp_path)
    assert record.digest() != before
    assert record.changed == (name,)


def test_numbers_stay_on_one_line_and_missing_values_become_null(make_study, tmp_path):
    make_study(audit="[\n 1\n]", extra={"x": math.nan, "list": [1, 2]}).save(tmp_path)
    text = (tmp_path / "study.json").read_text()
    assert '"list": [1, 2]' in text
    assert json.loads(text)["extra"] == {"x": None, "list": [1, 2]}
    assert json.loads(text)["audit"] == "[\n 1\n]"


def test_too_large_a_record_is_refused_before_anything_is_written(make_study, tmp_path, monkeypatch):
    monkeypatch.setattr(study_record, "MAX_BYTES", 20_000)
    with pytest.raises(UserError, match=r"more than the 0.02 MB that may be committed"):
        make_study().save(tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_seed_that_the_record_no_longer_holds_leaves_no_file(make_study, tmp_path):
    make_study().save(tmp_path)
    make_study(seeds=(1,)).save(tmp_path)
    assert sorted(p.name for p in (tmp_path / "losses").iterdir()) == ["test_seed1.npz", "val_seed1.npz"]
    assert StudyRecord.load(tmp_path).changed == ()


def test_a_partial_study_says_what_is_missing(make_study):
    whole = make_study()
    facts = whole.facts | {
        "models": {key: facts for key, facts in whole.models.items() if key != "oracle_token"},
        "settings": {"seeds": [1, 2, 3]},
    }
    part = whole.losses["test", 1]
    kept = [index for index, key in enumerate(part.models) if key not in ("oracle_token", "seed_pool")]
    fewer = StudyLosses(
        part.uid,
        part.domain,
        part.num_tokens,
        part.num_bytes,
        tuple(part.models[i] for i in kept),
        part.nll[kept],
    )
    record = StudyRecord(facts, {("test", 1): fewer})
    assert record.missing() == [
        "seed 3: not run",
        "never built: oracle_token",
        "seed 1: no losses on val",
        "seed 1: not scored on test: seed_pool",
        "seed 2: no losses on val",
        "seed 2: no losses on test",
    ]
    assert record.scored_seeds("seed_pool") == []
    with pytest.raises(KeyError, match="seed_pool"):
        record.of("seed_pool", "test", 1)


def broken(name, change):
    def apply(folder):
        path = folder / name
        if name == "study.json":
            facts = json.loads(path.read_text())
            change(facts)
            path.write_text(json.dumps(facts))
        else:
            part = StudyLosses.from_bytes(path.read_bytes())
            path.write_bytes(StudyLosses(**(vars(part) | change(part))).to_bytes())

    return apply


LOSSES = "losses/test_seed2.npz"
MISTAKES = {
    "no folder": (lambda folder: (folder / "study.json").unlink(), "holds no study.json"),
    "no json": (lambda folder: (folder / "study.json").write_text("{"), "is no JSON"),
    "no data": (broken("study.json", lambda facts: facts.pop("data")), "must hold data, models and seeds"),
    "no domains": (broken("study.json", lambda facts: facts["data"].pop("domains")), "names no domains"),
    "unknown model": (
        broken("study.json", lambda facts: facts["models"].update({"gpt": {}})),
        "models that a study does not have: gpt. Known: unigram",
    ),
    "undescribed model": (
        broken("study.json", lambda facts: facts["models"].pop("bigram")),
        "that study.json does not have: bigram",
    ),
    "unknown seed": (broken("study.json", lambda facts: facts["seeds"].pop("2")), "knows no seed 2"),
    "bad seed": (broken("study.json", lambda facts: facts["seeds"].update(x={})), "'x' is no seed"),
    "one domain": (broken("study.json", lambda facts: facts["data"].update(domains=["a"])), "outside the 1"),
    "damaged": (lambda folder: (folder / LOSSES).write_bytes(b"PK\x03\x04"), "cannot be used"),
    "infinite": (broken(LOSSES, lambda part: {"nll": part.nll * np.inf}), "not finite"),
    "unsorted": (broken(LOSSES, lambda part: {"uid": part.uid[::-1]}), "sorted by uid"),
    "ragged": (broken(LOSSES, lambda part: {"domain": part.domain[1:]}), "equally long"),
    "shape": (broken(LOSSES, lambda part: {"nll": part.nll[1:]}), r"shape \(\d+, 60\)"),
    "other documents": (broken(LOSSES, lambda part: {"uid": part.uid + 1}), "on other documents"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_that_cannot_be_right_is_refused_in_one_line(make_study, tmp_path, mistake):
    make_study().save(tmp_path)
    damage, message = MISTAKES[mistake]
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        StudyRecord.load(tmp_path)
    assert "\n" not in str(error.value)


def test_models_of_one_file_must_be_scored_on_the_same_tokens():
    one = np.ones(3, dtype=np.int64)
    losses = DocumentLosses(np.arange(3), one * 0, one * 2.0, one, one * 4, 1)
    more_tokens = DocumentLosses(np.arange(3), one * 0, one * 2.0, one * 2, one * 4, 1)
    with pytest.raises(ValueError, match="b and a were not scored on the same"):
        StudyLosses.collect({"a": losses, "b": more_tokens})
    with pytest.raises(ValueError, match="at least one"):
        StudyLosses.collect({})
