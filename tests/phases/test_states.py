from __future__ import annotations

import pickle
import zipfile

import pytest
import torch

from nano_think.callbacks.newest import NewestState
from nano_think.callbacks.selection import ValidationSelection
from nano_think.errors import UserError
from nano_think.phases.states import TakenUp, cannot_go_on, check_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory, common, expert_lm, shards, trainer):
    """The state of a fit of a Transformer after two steps, and its task."""
    from nano_think.data.module import TokenDataModule
    from nano_think.tasks.next_token import NextTokenTask

    folder = tmp_path_factory.mktemp("state")
    task = NextTokenTask(expert_lm("transformer"), **common())
    callbacks = [ValidationSelection(patience=9), NewestState(folder, every_n_train_steps=2)]
    runner = trainer(
        max_steps=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        enable_checkpointing=True,
        callbacks=callbacks,
    )
    runner.fit(
        task, datamodule=TokenDataModule(shards.directory, seq_len=32, batch_size=2, val_rows=2, seed=1)
    )
    return folder / "newest.ckpt", task


@pytest.fixture
def changed(saved, tmp_path):
    """`changed(change)`: the path of a sound archive of the state as `change` leaves it."""

    def make(change):
        state = torch.load(saved[0], weights_only=True)
        state = change(state) or state
        torch.save(state, tmp_path / "newest.ckpt")
        return tmp_path / "newest.ckpt"

    return make


def test_a_state_as_it_was_saved_is_taken(saved, changed):
    check_state(*saved)
    check_state(changed(lambda state: None), saved[1])


def test_any_flipped_bit_of_its_numbers_and_any_cut_is_noticed(saved, tmp_path):
    """torch itself reads both bits of tensors without a word."""
    path, task = saved
    data, copy = path.read_bytes(), tmp_path / "newest.ckpt"
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if info.file_size]
    for info in infos[:: max(1, len(infos) // 12)]:
        flipped = bytearray(data)
        start = data.index(info.filename.encode()) + len(info.filename)
        flipped[start + 80 + info.file_size // 2] ^= 4
        copy.write_bytes(flipped)
        with pytest.raises(UserError, match="delete it, and the same command begins the fit anew"):
            check_state(copy, task)
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        copy.write_bytes(data[:size])
        with pytest.raises(
            UserError, match=r"no state that this fit can go on from \(it is cut short, or no state\)"
        ):
            check_state(copy, task)


def test_nothing_in_a_state_is_executed(saved, tmp_path):
    class Planted:
        def __reduce__(self):
            return open, (str(tmp_path / "planted"), "w")

    torch.save({"state_dict": Planted()}, tmp_path / "newest.ckpt")
    with pytest.raises(UserError, match="something else than a state"):
        check_state(tmp_path / "newest.ckpt", saved[1])
    (tmp_path / "newest.ckpt").write_bytes(pickle.dumps({"epoch": 0}))
    with pytest.raises(UserError, match="it is cut short, or no state"):
        check_state(tmp_path / "newest.ckpt", saved[1])
    assert not (tmp_path / "planted").exists()


def _first(mapping):
    return next(iter(mapping.values()))


CHANGES = {
    "a list": lambda s: [s],
    "no loops": lambda s: s.pop("loops"),
    "a step of text": lambda s: s.update(global_step="2"),
    "a negative epoch": lambda s: s.update(epoch=-1),
    "an absurd step": lambda s: s.update(global_step=10**30),
    "no optimizer": lambda s: s.update(optimizer_states=[]),
    "batches": lambda s: s["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"].update(processed=None),
    "a tensor among the loops": lambda s: s["loops"]["fit_loop"].update(more=torch.ones(3)),
    "schedule": lambda s: s["lr_schedulers"][0].update(last_epoch=2**70),
    "another width": lambda s: s["state_dict"].update({next(iter(s["state_dict"])): torch.ones(3)}),
    "another network": lambda s: s["state_dict"].pop(next(iter(s["state_dict"]))),
    "another type": lambda s: s["state_dict"].update(
        {name: tensor.double() for name, tensor in s["state_dict"].items()}
    ),
    "moments": lambda s: _first(s["optimizer_states"][0]["state"]).update(exp_avg=torch.ones(3, 3, 3)),
    "groups": lambda s: s["optimizer_states"][0]["param_groups"].pop(),
    "groups of a tensor": lambda s: s["optimizer_states"][0]["param_groups"][0].update(params=torch.ones(2)),
    "of more parameters": lambda s: s["optimizer_states"][0]["state"].update({999: {}}),
    "best weights": lambda s: _first(
        {k: v for k, v in s["callbacks"].items() if "Selection" in k}
    )["weights"].popitem(),
    "history": lambda s: _first({k: v for k, v in s["callbacks"].items() if "Selection" in k}).update(history=[1]),
    "a tensor larger than the file": lambda s: s["callbacks"].update(x={"y": torch.ones(1).expand(10**12)}),
}  # fmt: skip


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_state_of_another_fit_is_refused_in_one_sentence(what, changed, saved):
    def change(state):
        result = CHANGES[what](state)
        return result if what == "a list" else None

    with pytest.raises(UserError, match="delete it, and the same command begins the fit anew") as caught:
        check_state(changed(change), saved[1])
    assert "\n" not in str(caught.value)


def test_what_fails_while_a_state_is_restored_is_up_to_the_state(saved, shards, trainer, changed):
    """Lightning is given a state whose loops it cannot follow: nothing has begun when it fails."""
    from nano_think.data.module import TokenDataModule

    path = changed(lambda s: s["loops"]["fit_loop"].update({"epoch_progress": {"total": {"ready": "two"}}}))
    taken_up = TakenUp()
    runner = trainer(max_steps=3, callbacks=[taken_up])
    with pytest.raises(Exception) as caught:
        runner.fit(
            saved[1],
            datamodule=TokenDataModule(shards.directory, seq_len=32, batch_size=2, val_rows=2, seed=1),
            ckpt_path=path,
            weights_only=True,
        )
    assert not taken_up.begun
    assert "begins the fit anew" in str(cannot_go_on(path, caught.value))
