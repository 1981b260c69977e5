from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from nano_think.data.module import TokenDataModule
from nano_think.tasks.expert_cache import ExpertCache
from nano_think.tasks.route import RouteTask, set_trainable

FUSIONS = ("hidden", "prob")


@pytest.fixture
def network(fused, randomise):
    """`network(**options)`: every part does something, weights differ from token to token."""

    def make(**options):
        model = randomise(fused(**options), seed=3)
        with torch.no_grad():
            model.expert_gain.copy_(torch.tensor([0.9, 1.2]))
        return model

    return make


@pytest.fixture
def task(network, common):
    """`task(fusion, cached, folder=None)` of stage 7b."""

    def make(fusion="hidden", cached=True, folder=None, rows=200, **options):
        model = network(fusion=fusion, **options)
        cache = ExpertCache(model, rows, 32, folder) if cached else None
        return RouteTask(model, stage="7b", cache=cache, **common(1e-2), entropy_token=0.1)

    return make


def _batches(data, count=4, **options):
    loader = data(train_split="fusion_train", batch_size=4, **options).train_dataloader()
    return [batch for _, batch in zip(range(count), loader, strict=False)]


def _step(task, batch):
    """Sums of a batch and the gradients of what learns."""
    task.train()
    task.network.zero_grad()
    sums = task.batch_loss(batch)
    sums["loss"].backward()
    gradients = {n: p.grad.clone() for n, p in task.network.named_parameters() if p.requires_grad}
    return {name: value.detach() for name, value in sums.items()}, gradients


def _close(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_losses_and_gradients_are_those_of_the_uncached_stage(task, data, fusion, mode, half, tolerance):
    plain, kept = task(fusion, cached=False), task(fusion)
    # mixing repeats rows, and the second pass finds all of them
    batches = _batches(data, mode=mode, mixing={"fruit": 0.8, "tools": 0.2})
    for batch in batches * 2:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            got, want = _step(kept, batch), _step(plain, batch)
        _close(got[0], want[0], tolerance)
        _close(got[1], want[1], tolerance)
    assert got[1]["router.weight"].abs().max() > 0
    assert ("expert_gain" in got[1]) == (fusion == "hidden")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_validation_says_the_same(task, data, trainer, fusion):
    metrics = []
    for cached in (False, True):
        found = trainer().validate(task(fusion, cached), datamodule=data(), verbose=False)
        metrics.append(found[0])
    assert metrics[0].keys() == metrics[1].keys()
    assert any(name.startswith("routing/position/") for name in metrics[0])
    for name, value in metrics[0].items():
        assert metrics[1][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_a_row_is_computed_once_and_its_bits_do_not_depend_on_the_batch(task, data):
    first, second = task(), task()
    batches = _batches(data, 6)
    distinct = {place for b in batches for place in zip(b["domain"].tolist(), b["row"].tolist(), strict=True)}
    calls = []
    first.network.experts["transformer"].register_forward_hook(lambda *_: calls.append(1))
    kept = [first.cache("train", batch) for batch in batches + batches]
    assert len(calls) == first.cache.computed == len(distinct)
    shuffled = [{name: values.flip(0) for name, values in batch.items()} for batch in reversed(batches)]
    again = [second.cache("train", batch) for batch in shuffled][::-1]
    for one, two in zip(kept, again, strict=False):
        assert torch.equal(one.context, two.context.flip(0))
        for name, hidden in one.expert_hidden.items():
            assert torch.equal(hidden, two.expert_hidden[name].flip(0))


def test_rows_of_other_splits_are_other_rows(task, data):
    cached = task().cache
    train = next(iter(data().dataloader("test")))
    validation = next(iter(data().dataloader("validation")))
    assert set(train["row"].tolist()) & set(validation["row"].tolist())
    cached("train", train)
    kept = cached("validation", validation)
    context, _ = cached.network.expert_outputs(
        validation["tokens"][:1], RouteTask.layout({k: validation[k][:1] for k in ("positions", "segments")})
    )
    assert torch.allclose(kept.context[:1], context, atol=1e-6)


def test_a_file_keeps_the_same_bits_and_leaves_nothing_behind(task, data, tmp_path):
    memory, disk = task(), task(folder=tmp_path / "work")
    for batch in _batches(data) * 2:
        one, two = memory.cache("train", batch), disk.cache("train", batch)
        assert torch.equal(one.context, two.context)
        assert all(torch.equal(h, two.expert_hidden[n]) for n, h in one.expert_hidden.items())
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_resumed_fit_ends_with_the_bits_of_an_uninterrupted_one(task, data, trainer, tmp_path, fusion):
    def fit(steps, folder, start=None):
        checkpoints = ModelCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "enable_checkpointing": True}
        runner = trainer(max_steps=steps, callbacks=[checkpoints], **options)
        routed = task(fusion)
        module: TokenDataModule = data(train_split="fusion_train", batch_size=4)
        runner.validate(routed, datamodule=module, verbose=False)
        runner.fit(routed, datamodule=module, ckpt_path=start, weights_only=True)
        return routed.network.state_dict()

    whole = fit(7, "whole")
    assert not torch.equal(whole["router.weight"], task(fusion).network.router.weight)
    resumed = fit(7, "resumed", start=tmp_path / "whole" / "step=3.ckpt")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_other_arithmetic_is_computed_anew(task, data):
    routed, plain = task(), task(cached=False)
    [batch] = _batches(data, 1)
    for half in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            _step(routed, batch)
    assert routed.cache.computed == 8
    _close(_step(routed, batch)[1], _step(plain, batch)[1], 1e-5)


def test_a_pass_on_the_side_neither_fills_nor_reads(task, data):
    routed = task()
    [batch] = _batches(data, 1)
    with routed.aside():
        _step(routed, batch)
    assert routed.cache.computed == 0
    _step(routed, batch)
    calls = []
    routed.network.experts["transformer"].register_forward_hook(lambda *_: calls.append(1))
    with routed.aside():
        _step(routed, batch)
    assert (len(calls), routed.cache.computed) == (1, 4)


def test_what_inference_mode_computed_can_be_trained_on(task, data):
    routed, plain = task(), task(cached=False)
    [batch] = _batches(data, 1)
    with torch.inference_mode():
        routed.cache("train", batch)
    _close(_step(routed, batch)[1], _step(plain, batch)[1], 1e-5)


def test_private_tables_are_kept_too(task, data):
    tables = {name: nn.Embedding(259, 32) for name in ("transformer", "state_space")}
    options = {"tables": tables, "expert_input": "raw"}
    plain, kept = task("prob", cached=False, **options), task("prob", **options)
    [batch] = _batches(data, 1)
    _close(_step(kept, batch)[1], _step(plain, batch)[1], 1e-5)


def test_probabilities_leave_the_gains_alone_in_7b(network):
    model = network(fusion="prob")
    assert set(set_trainable(model, "7b")) == {"router.weight", "router.bias"}
    assert "expert_gain" in set_trainable(model, "7c")


def test_what_cannot_be_kept_is_refused(task, network, common, data):
    with pytest.raises(IndexError, match="made for 3 rows"):
        task(rows=3).cache("train", _batches(data, 1)[0])
    model = network()
    with pytest.raises(ValueError, match="7c trains what the experts read"):
        RouteTask(model, stage="7c", cache=ExpertCache(model, 10, 32), **common())


@pytest.mark.parametrize(("fusion", "numbers"), [("hidden", 32 * 3), ("prob", 32 + 2)])
def test_the_announced_size_is_what_is_held(task, data, fusion, numbers, tmp_path):
    routed = task(fusion, rows=8)
    routed.cache("train", _batches(data, 1)[0])
    held = sum(array.numel() * array.element_size() for array in routed.cache._arrays.values())
    assert held == routed.cache.bytes == routed.kept_bytes == 8 * 32 * numbers * 4
    assert task(fusion, folder=tmp_path).kept_bytes == task(fusion, cached=False).kept_bytes == 0
