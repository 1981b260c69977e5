"""What a fit leaves on disk: tags and values of the event files, the dashboard's layout, and the texts."""

from __future__ import annotations

import re
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from nano_think.callbacks.dashboard import Dashboard
from nano_think.callbacks.domain_shares import DomainShares
from nano_think.callbacks.reconstructions import Reconstructions
from nano_think.callbacks.samples import SampleTexts
from nano_think.callbacks.selection import ValidationSelection
from nano_think.callbacks.throughput import Throughput

DOMAINS = ("fruit", "tools")
EXPERTS = ("transformer", "state_space")
ALWAYS = {"train/loss", "val/loss", "val/perplexity", "train/tokens_per_second", "train/tokens"}
ALWAYS |= {f"val/{what}/{name}" for what in ("loss", "perplexity", "bpb") for name in DOMAINS}
ALWAYS |= {f"data/share/{name}" for name in DOMAINS}
ROUTING = {f"routing/{name}/{what}" for name in EXPERTS for what in ("mean", "std", "min", "max")}
ROUTING |= {f"routing/domain/{domain}/{name}" for domain in DOMAINS for name in EXPERTS}
ROUTING |= {"routing/entropy_token", "routing/entropy_mean", "routing/mi_token", "routing/mi_domain"}
ROUTING |= {"routing/effective_experts_token", "routing/effective_experts_mean"}
ROUTING |= {f"routing/position/{first}/{name}" for first in (0, 1, 2, 4, 8, 16) for name in EXPERTS}
MSE = {"train/mse", "train/cross_entropy", "val/mse", "val/mse_relative", "val/mse_relative_pure_noise"}
MSE |= {f"val/mse_bucket/{k}" for k in range(10)} | {f"val/mse_relative_bucket/{k}" for k in range(10)}


class Rows(L.Callback):
    """The domain of every row that was trained on."""

    def __init__(self):
        self.seen = Counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.update(batch["domain"].tolist())


@pytest.fixture(scope="module")
def fits():
    """Fits by objective, so that all tests of this module read the same files."""
    return {}


@pytest.fixture(params=["transformer", "diffuser", "route"])
def logged(request, fits, objective, data, trainer, byte_tokenizer, tmp_path_factory):
    if request.param not in fits:
        folder = tmp_path_factory.mktemp(request.param)
        task, rows, selection = objective(request.param), Rows(), ValidationSelection(patience=9)
        callbacks = [
            rows,
            selection,
            Throughput(),
            DomainShares(),
            SampleTexts(byte_tokenizer, max_new_tokens=5),
        ]
        callbacks.append(Dashboard(EXPERTS if request.param == "route" else ()))
        callbacks += [Reconstructions(byte_tokenizer)] if request.param == "diffuser" else []
        logger = TensorBoardLogger(save_dir=str(folder), name=None, version="")
        runner = trainer(
            max_steps=6,
            val_check_interval=3,
            check_val_every_n_epoch=None,
            log_every_n_steps=2,
            logger=logger,
            callbacks=callbacks,
        )
        module = data(mixing=[0.75, 0.25])
        runner.validate(task, datamodule=module, verbose=False)
        runner.fit(task, datamodule=module)
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        fits[request.param] = (request.param, task, module, events, rows, selection, folder)
    return fits[request.param]


def test_all_promised_tags_are_there(logged):
    kind, _, _, events, _, _, _ = logged
    expected = ALWAYS | {"route": ROUTING, "diffuser": MSE}.get(kind, set())
    assert expected <= set(events.Tags()["scalars"])


def test_validations_are_logged_at_their_steps(logged):
    _, _, _, events, _, selection, _ = logged
    logged_values = {(event.step, event.value) for event in events.Scalars("val/loss")}
    assert [step for step, _ in selection.history] == [0, 3, 6]
    assert len({step for step, _ in logged_values}) == 3
    for _, loss in selection.history:
        assert any(value == pytest.approx(loss, rel=1e-6) for _, value in logged_values)


def test_last_values_equal_a_recomputation_from_the_weights(logged, trainer):
    """The fit leaves the weights of the best validation; their figures are in the event file."""
    _, task, module, events, _, selection, _ = logged
    place = [step for step, _ in selection.history].index(selection.best_step)
    again = trainer().validate(task, datamodule=module, verbose=False)[0]
    for tag in events.Tags()["scalars"]:
        if tag.startswith(("val/", "routing/")):
            value = events.Scalars(tag)[place].value
            assert again[tag] == pytest.approx(value, rel=1e-5, abs=1e-5), tag


def test_domain_shares_equal_a_recount_of_the_rows(logged):
    _, task, _, events, rows, _, _ = logged
    total = sum(rows.seen.values())
    assert total == 6 * 8
    for index, name in enumerate(task.domains):
        last = events.Scalars(f"data/share/{name}")[-1].value
        assert last == pytest.approx(rows.seen[index] / total, rel=1e-6)
    assert rows.seen[0] > 2 * rows.seen[1]


def test_tokens_are_those_trained_on(logged):
    _, _, _, events, _, _, _ = logged
    assert events.Scalars("train/tokens")[-1].value == 6 * 8 * 32
    assert all(event.value > 0 for event in events.Scalars("train/tokens_per_second"))


def _charts(events):
    """(category, chart) -> patterns of the custom-scalar layout."""
    [event] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    return {
        (category.title, chart.title): list(chart.multiline.tag)
        for category in layout.category
        for chart in category.chart
    }


def test_every_pattern_of_the_dashboard_draws_something(logged):
    kind, _, _, events, _, _, _ = logged
    tags = events.Tags()["scalars"]
    charts = _charts(events)
    for (category, chart), patterns in charts.items():
        if chart == "learning rate":
            continue  # logged by Lightning's own monitor, which is not part of this fit
        for pattern in patterns:
            assert any(re.match(pattern, tag) for tag in tags), (category, chart, pattern)
    assert ("denoising" in {category for category, _ in charts}) == (kind == "diffuser")
    assert ("routing" in {category for category, _ in charts}) == (kind == "route")


def test_a_chart_draws_only_its_own_tags(logged):
    """TensorBoard matches patterns at the start of a tag: val/loss would draw val/loss/<domain> as well."""
    kind, _, _, events, _, _, _ = logged
    tags, charts = events.Tags()["scalars"], _charts(events)

    def drawn(category, chart):
        return {tag for tag in tags if any(re.match(p, tag) for p in charts[category, chart])}

    assert drawn("loss", "train and validation") == {"train/loss", "val/loss"}
    assert drawn("domains", "bits per byte") == {f"val/bpb/{name}" for name in DOMAINS}
    if kind == "diffuser":
        expected = {"val/mse_relative", "val/mse_relative_pure_noise"}
        assert drawn("denoising", "relative to predicting the mean") == expected
        buckets = {f"val/mse_relative_bucket/{k}" for k in range(10)}
        assert drawn("denoising", "by noise bucket") == buckets
    if kind == "route":
        first = {tag for tag in tags if re.fullmatch(r"routing/position/\d+/transformer", tag)}
        assert drawn("routing", "by position: transformer") == first


def test_samples_continue_a_prompt_of_each_domain(logged):
    _, _, module, events, _, _, folder = logged
    text = (folder / "texts.md").read_text()
    for name in DOMAINS:
        assert f"samples/{name}/text_summary" in events.Tags()["tensors"]
        assert text.count(f"### samples/{name}, step") == 3
    first = next(iter(module.val_dataloader()))
    row = int((first["domain"] == 0).nonzero()[0])
    start = bytes(first["tokens"][row, 1:6].tolist()).decode()
    assert start in text


def test_reconstructions_show_the_target_better_restored_than_noised(logged):
    kind, task, _, events, _, _, folder = logged
    if kind != "diffuser":
        assert not (folder / "texts.md").read_text().count("### reconstructions")
        return
    assert "reconstructions/text_summary" in events.Tags()["tensors"]
    text = (folder / "texts.md").read_text()
    assert text.count("### reconstructions, step") == 3
    for level in (5, 10, 15, 20):
        assert f"noised {level}:" in text
        assert f"restored {level}:" in text
    assert not torch.is_inference(task.network.embedding.weight)
