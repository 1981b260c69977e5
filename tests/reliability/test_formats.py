"""Files that somebody changed: hundreds of each format here, 10,000 of each in the slow lane.

`python -m pytest tests/reliability/test_formats.py -m slow -s` prints the table of docs/reliability.md.
"""

from __future__ import annotations

import pytest

from nano_think.callbacks.newest import NewestState
from nano_think.callbacks.selection import ValidationSelection
from nano_think.data.module import TokenDataModule
from nano_think.data.shards import build_shards
from nano_think.tasks.next_token import NextTokenTask
from tests.reliability import data_formats, model_formats
from tests.reliability.mutations import campaign

TEXTS = {
    split: {
        "a": [f"the {word} of {split} {n}" for n in range(3) for word in ("saw", "axe")],
        "b": ["nail, file and hammer"] * 2,
    }
    for split in ("expert_train", "fusion_train", "validation", "test")
}
NAMES = (
    "weights",
    "spec",
    "provenance",
    "tokenizer",
    "state",
    "store",
    "shards",
    "corpus",
    "sweep",
    "manifest",
)
# What reaches the judgement of its meaning, at least.
REACHED = {"state": 0.4}


@pytest.fixture(scope="module")
def made(tmp_path_factory, lay_out_corpus, byte_tokenizer, expert_lm, common, trainer):
    """`made(name)`: the format of that name over valid files of its own."""
    root = tmp_path_factory.mktemp("formats")

    def shards_below(name):
        found = lay_out_corpus(root / name / "corpus", TEXTS)
        return found, build_shards(found, byte_tokenizer, root / name / "shards", processes=1)

    def make(name):
        if name == "corpus":
            return data_formats.corpus(shards_below(name)[0].path)
        if name == "shards":
            return data_formats.shards(shards_below(name)[1].directory)
        if name == "state":
            data = TokenDataModule(
                shards_below(name)[1].directory, seq_len=16, batch_size=2, val_rows=1, seed=1
            )
            task, folder = (
                NextTokenTask(expert_lm("transformer"), **{**common(), "domains": ["a", "b"]}),
                root / "state",
            )
            callbacks = [ValidationSelection(patience=9), NewestState(folder / "kept", every_n_train_steps=2)]
            steps = {"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
            trainer(**steps, enable_checkpointing=True, callbacks=callbacks).fit(task, datamodule=data)
            return model_formats.state(folder / "kept" / "newest.ckpt", task)
        of_models = hasattr(model_formats, name)
        return getattr(model_formats if of_models else data_formats, name)(root)

    return make


def _try(format, count, seed):
    understood: list[bool] = []
    for control in format.controls:
        format.judge(control, lambda: understood.append(True))
    assert len(understood) == len(format.controls)
    tally = campaign(format.name, format.draw, format.judge, count, seed)
    print("\n" + tally.line())
    for control in format.controls:  # nothing was left behind, in files or in this process
        format.judge(control, lambda: None)
    assert not tally.findings, "\n\n".join(tally.findings)
    assert tally.mutated >= tally.tried / 2
    return tally


@pytest.mark.parametrize("name", NAMES)
def test_hundreds_of_changed_files(made, name):
    tally = _try(made(name), 150, seed=1)
    assert tally.reached >= tally.tried * REACHED.get(name, 0.5)
    assert tally.refused > tally.tried * 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_changed_files(made, name):
    tally = _try(made(name), 10_000, seed=0)
    assert tally.growth_mb < 64
    assert tally.slowest < 30
