from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import chisquare

from nano_think.data.module import TokenDataModule
from nano_think.errors import UserError

FIELDS = {"tokens", "labels", "positions", "segments", "doc_uid", "cluster"}
TEXTS = {
    split: {
        "code": [f"{split} line {i} of code" for i in range(count)],
        "prose": [f"{split} sentence number {i} is longer than the line" for i in range(2 * count)],
        "verse": [f"{split} {i}" for i in range(count)],
    }
    for split, count in (("expert_train", 12), ("fusion_train", 6), ("validation", 4), ("test", 3))
}


@pytest.fixture
def shards_dir(make_shards):
    return make_shards(TEXTS).directory


@pytest.fixture
def make(shards_dir):
    def build(**changes) -> TokenDataModule:
        return TokenDataModule(shards_dir, **{"seq_len": 16, "batch_size": 4, "seed": 7, **changes})

    return build


def contents(loader) -> list[list[list[int]]]:
    return [batch["tokens"].tolist() for batch in loader]


def as_rank(module: TokenDataModule, rank: int, world: int, processed: int = 0) -> TokenDataModule:
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world, fit_loop=loop)
    return module


class Recorder(L.LightningModule):
    """Notes the tokens of every training batch; one weight, so that there is something to optimise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch, batch_idx: int):
        self.seen.append(batch["tokens"].tolist())
        torch.rand(1)
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: TokenDataModule, root, ckpt_path=None, callbacks=(), **options) -> Recorder:
    model = Recorder()
    trainer = L.Trainer(
        **{"max_epochs": 3, "limit_val_batches": 0, **options},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        default_root_dir=root,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(GPU|num_workers|logging interval|sequential).*")
        trainer.fit(model, module, ckpt_path=ckpt_path)
    return model


def save_every(root, **options) -> ModelCheckpoint:
    return ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("split", ["expert_train", "fusion_train", "validation", "test"])
def test_shapes_of_every_split(make, split: str, mode: str, workers: int) -> None:
    module = make(train_split=split, mode=mode, num_workers=workers, batch_size=5)
    batches = list(module.train_dataloader()) + list(module.dataloader(split))
    for batch in batches:
        rows = len(batch["domain"])
        assert set(batch) == FIELDS | {"domain", "row"}
        assert all(batch[name].shape == (rows, 16) for name in FIELDS)
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert all(len(batch["domain"]) == 5 for batch in module.train_dataloader())


def test_an_epoch_is_the_split_once_in_tokens(make) -> None:
    module = make()
    tokens = sum(len(t.encode()) + 2 for texts in TEXTS["expert_train"].values() for t in texts)
    assert module.steps_per_epoch == int(np.ceil(tokens / (4 * 16))) == len(module.train_dataloader())
    assert len(list(module.train_dataloader())) == module.steps_per_epoch
    assert as_rank(module, 0, 2).steps_per_epoch == int(
        np.ceil(tokens / (4 * 16))
    )  # the batch is that of all


def test_order_depends_on_the_seed_alone(make) -> None:
    torch.manual_seed(0)
    first = contents(make().train_dataloader())
    torch.manual_seed(1)
    module = make()
    before = torch.get_rng_state()
    assert contents(module.train_dataloader()) == first
    assert torch.equal(torch.get_rng_state(), before)  # dropout is not disturbed by loading
    assert contents(make(seed=8).train_dataloader()) != first


def test_zero_and_four_workers_give_the_same_order(make) -> None:
    serial, parallel = make(), make(num_workers=4)
    assert contents(serial.train_dataloader()) == contents(parallel.train_dataloader())
    assert contents(serial.val_dataloader()) == contents(parallel.val_dataloader())


@pytest.mark.parametrize(
    ("mixing", "weights"),
    [("equal", [1, 1, 1]), ("proportional", None), ({"code": 1, "prose": 2, "verse": 7}, [1, 2, 7])],
    ids=["equal", "proportional", "weights"],
)
def test_shares_of_ten_thousand_rows_on_two_ranks_and_after_a_resume(make, mixing, weights) -> None:
    options = {"batch_size": 200, "seq_len": 8, "mixing": mixing}
    ranks = [as_rank(make(**options), rank, 2, processed=3) for rank in range(2)]
    if weights is None:
        weights = [ranks[0].shards.num_tokens("expert_train", name) for name in ranks[0].domains]
    shares = np.array(weights) / np.sum(weights)
    total = np.zeros(3)
    for module in ranks:
        batches = module.train_dataloader().dataset
        drawn = torch.cat([batches[number]["domain"] for number in range(3, 53)])
        counts = np.bincount(drawn.numpy(), minlength=3)
        assert chisquare(counts, shares * 5_000).pvalue > 0.01
        total += counts
    assert total.sum() == 10_000
    assert chisquare(total, shares * 10_000).pvalue > 0.01


def test_ranks_get_disjoint_shares_of_the_same_sequence(make) -> None:
    single = contents(make().train_dataloader())
    ranks = [contents(as_rank(make(), rank, 2).train_dataloader()) for rank in (0, 1)]
    assert all(len(batch) == 2 for rank in ranks for batch in rank)
    assert [
        [row for pair in zip(*both, strict=True) for row in pair] for both in zip(*ranks, strict=True)
    ] == single
    with pytest.raises(UserError, match="a batch of 4 rows cannot be divided among 3 processes"):
        as_rank(make(), 0, 3).train_dataloader()


@pytest.mark.parametrize("val_rows", [1, 2, 3], ids=["fewer rows than places", "even", "odd"])
def test_ranks_share_an_evaluation_and_take_equally_many_steps(make, val_rows) -> None:
    def batches(rank: int, world: int) -> list[list[list[int]]]:
        loader = as_rank(make(batch_size=world * 2, val_rows=val_rows), rank, world).val_dataloader()
        masked = [bool((batch["labels"] == -100).all()) for batch in loader]
        rows = [batch["tokens"].tolist() for batch in loader]
        assert not any(masked[:-1])  # only the last step may have nothing to do
        return [*rows[: len(rows) - masked[-1]], *[[]] * masked[-1]]

    for world in (2, 4):
        whole = contents(as_rank(make(batch_size=world * 2, val_rows=val_rows), 0, 1).val_dataloader())
        ranks = [batches(rank, world) for rank in range(world)]
        assert {len(rank) for rank in ranks} == {len(whole)}
        for number, batch in enumerate(whole):
            parts = [rank[number] for rank in ranks]
            assert [parts[place % world][place // world] for place in range(len(batch))] == batch
            assert sum(map(len, parts)) == len(batch)


def test_evaluation_covers_each_token_once_and_keeps_the_last_batch(make) -> None:
    module = make(batch_size=5)
    batches = list(module.val_dataloader())
    assert {len(batch["domain"]) for batch in batches[:-1]} == {5}
    assert 0 < len(batches[-1]["domain"]) < 5
    labels: dict[int, list[int]] = {}
    for batch in batches:
        for row in range(len(batch["domain"])):
            valid = batch["labels"][row] != -100
            for uid, label in zip(batch["doc_uid"][row][valid], batch["labels"][row][valid], strict=True):
                labels.setdefault(int(uid), []).append(int(label))
    texts = sorted(text for texts in TEXTS["validation"].values() for text in texts)
    assert sorted(bytes(ids[:-1]).decode() for ids in labels.values()) == texts
    assert all(ids[-1] == 257 for ids in labels.values())
    assert contents(module.val_dataloader()) == contents(make(batch_size=5, seed=99).val_dataloader())


def test_evaluation_interleaves_domains_and_can_be_capped(make) -> None:
    module = make(val_rows=2, batch_size=3)
    first = next(iter(module.val_dataloader()))
    assert sorted(first["domain"].tolist()) == [0, 1, 2]
    capped = torch.cat([batch["domain"] for batch in module.val_dataloader()])
    assert torch.bincount(capped).tolist() == [2, 2, 2]
    prose = [
        b["doc_uid"][b["domain"] == 1].unique().tolist() for b in module.dataloader("validation", rows=2)
    ]
    every = {
        int(uid) for b in module.dataloader("validation") for uid in b["doc_uid"][b["domain"] == 1].unique()
    }
    chosen = sorted(uid for batch in prose for uid in batch)
    assert chosen[0] == min(every - {-1})
    assert chosen[-1] > np.median(sorted(every))  # spread over the split, not its first rows
    assert len(contents(module.test_dataloader())) > len(contents(module.dataloader("test", rows=1)))
    assert all(len(b["domain"]) <= 2 for b in module.dataloader("test", batch_size=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_and_resumed_equals_uninterrupted(make, tmp_path, workers: int) -> None:
    callback = save_every(tmp_path / "all")
    whole = fit(make(num_workers=workers), tmp_path, callbacks=[callback]).seen
    steps = make().steps_per_epoch
    assert len(whole) == 3 * steps
    assert whole[:steps] != whole[steps : 2 * steps]
    # In the first epoch, around the first border, inside the second epoch, at its end.
    stops = (1, steps - 1, steps, steps + 1, 2 * steps - 2, 2 * steps)
    for step in stops if workers == 0 else stops[1:4]:
        resumed = fit(make(num_workers=workers), tmp_path, ckpt_path=tmp_path / "all" / f"step={step}.ckpt")
        assert resumed.seen == whole[step:], f"resumed at step {step}"


def test_resume_with_a_limit_of_steps_and_validation(make, tmp_path) -> None:
    steps = make().steps_per_epoch
    options = {"max_epochs": -1, "max_steps": 2 * steps + 5, "limit_val_batches": 1, "val_check_interval": 3}
    whole = fit(make(), tmp_path, callbacks=[save_every(tmp_path / "all")], **options).seen
    for step in (3, 4, steps, steps + 2):
        path = tmp_path / "all" / f"step={step}.ckpt"
        assert fit(make(), tmp_path, ckpt_path=path, **options).seen == whole[step:], f"at step {step}"


def test_resume_from_the_end_of_an_epoch(make, tmp_path) -> None:
    callback = ModelCheckpoint(
        tmp_path / "ends", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    whole = fit(make(), tmp_path, callbacks=[callback]).seen
    for epoch in (0, 1):
        resumed = fit(make(), tmp_path, ckpt_path=tmp_path / "ends" / f"epoch={epoch}.ckpt")
        assert resumed.seen == whole[(epoch + 1) * make().steps_per_epoch :]


def test_resume_under_gradient_accumulation(make, tmp_path) -> None:
    options = {"accumulate_grad_batches": 2}
    whole = fit(make(), tmp_path, callbacks=[save_every(tmp_path / "all")], **options)
    per_epoch = make().steps_per_epoch
    optimizer_steps = -(-per_epoch // 2)
    for step in (1, optimizer_steps, optimizer_steps + 1):
        path = tmp_path / "all" / f"step={step}.ckpt"
        epochs, rest = divmod(step, optimizer_steps)
        resumed = fit(make(), tmp_path, ckpt_path=path, **options)
        assert resumed.seen == whole.seen[epochs * per_epoch + 2 * rest :]
        assert torch.equal(resumed.weight, whole.weight)


def test_a_step_that_was_broken_off_is_done_again(make, tmp_path) -> None:
    class Interrupted(Recorder):
        def training_step(self, batch, batch_idx: int):
            if len(self.seen) == 5:
                self.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise RuntimeError("stopped inside a step")
            return super().training_step(batch, batch_idx)

    whole = fit(make(), tmp_path).seen
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(RuntimeError, match="inside a step"):
        trainer.fit(Interrupted(), make(num_workers=2))
    assert fit(make(), tmp_path, ckpt_path=tmp_path / "stopped.ckpt").seen == whole[5:]


def test_resuming_gives_no_warning_about_the_loader(make, tmp_path) -> None:
    fit(make(), tmp_path, callbacks=[save_every(tmp_path / "all")], max_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make(), tmp_path, ckpt_path=tmp_path / "all" / "step=2.ckpt", max_steps=4)
    assert not [w for w in caught if "not resumable" in str(w.message)]


def test_resume_with_other_data_settings_is_refused(make, tmp_path) -> None:
    fit(make(), tmp_path, callbacks=[save_every(tmp_path / "all")], max_steps=2)
    path = tmp_path / "all" / "step=2.ckpt"
    with pytest.raises(UserError, match="trained with batch_size=4, this run has 8"):
        fit(make(batch_size=8), tmp_path, ckpt_path=path, max_steps=4)
    assert fit(make(num_workers=1, val_rows=1), tmp_path, ckpt_path=path, max_steps=4).seen


def test_state_without_a_trainer(make) -> None:
    module, state = make(), make().state_dict()
    assert state["batches"] == 0
    whole = contents(make().train_dataloader())
    module.load_state_dict({**copy.deepcopy(state), "batches": 3})
    resumed = contents(module.train_dataloader())
    assert resumed[: len(whole) - 3] == whole[3:]
    assert module.batches_done == 3


def test_overfitting_one_batch_repeats_it(make, tmp_path) -> None:
    seen = fit(make(), tmp_path, overfit_batches=1, max_epochs=4).seen
    assert seen == [seen[0]] * 4
    assert seen[0] == contents(make().train_dataloader())[0]


def test_limited_epochs_continue_the_sequence(make, tmp_path) -> None:
    seen = fit(make(), tmp_path, limit_train_batches=3, max_epochs=3).seen
    assert seen == contents(make().train_dataloader())[:9]


def test_properties_come_from_the_shards(make, byte_tokenizer) -> None:
    module = make()
    assert module.domains == ["code", "prose", "verse"]
    assert module.vocab_size == 259
    assert module.tokenizer_hash == byte_tokenizer.hash


def test_unusable_data_is_explained(make, make_shards, tmp_path) -> None:
    with pytest.raises(UserError, match="no token shards in"):
        TokenDataModule(tmp_path / "nowhere", 16, 4)
    with pytest.raises(UserError, match="batch_size=0"):
        make(batch_size=0)
    with pytest.raises(UserError, match=r"fewer than one row of seq_len=4096: lower seq_len"):
        make(seq_len=4096).train_dataloader()
    with pytest.raises(UserError, match="no shard train/code"):
        make(train_split="train").train_dataloader()
    thin = make_shards({"expert_train": {"a": ["some text", "more"], "b": []}}, "thin").directory
    with pytest.raises(UserError, match=r"validation split in .* holds no text"):
        TokenDataModule(thin, 4, 2).val_dataloader()
    with pytest.raises(UserError, match="no text to draw from in domain b"):
        TokenDataModule(thin, 4, 2).train_dataloader()
    assert len(TokenDataModule(thin, 4, 2, mixing={"a": 1, "b": 0}).train_dataloader()) > 0


@pytest.mark.slow
def test_two_processes_of_lightning_see_disjoint_rows(make, tmp_path) -> None:
    class Writer(Recorder):
        def on_train_end(self) -> None:
            torch.save(self.seen, tmp_path / f"rank{self.global_rank}.pt")

    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Writer(), make())
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    single = make()
    batches = single.train_dataloader().dataset
    assert len(first) == 2 * single.steps_per_epoch
    for number, (left, right) in enumerate(zip(first, second, strict=True)):
        interleaved = [row for pair in zip(left, right, strict=True) for row in pair]
        assert interleaved == batches[number]["tokens"].tolist()


def test_training_reads_at_most_so_many_tokens(make) -> None:
    whole, held = make(), make(train_tokens=96)
    assert held.steps_per_epoch == 2 < whole.steps_per_epoch
    drawn = {
        (int(domain), int(row))
        for _ in range(8)
        for batch in held.train_dataloader()
        for domain, row in zip(batch["domain"], batch["row"], strict=True)
    }
    assert 0 < len(drawn) <= 6  # two rows of 16 tokens in each of three domains
    assert contents(held.val_dataloader()) == contents(whole.val_dataloader())
    with pytest.raises(UserError, match="train_tokens=0"):
        make(train_tokens=0)
