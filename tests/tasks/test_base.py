from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import nano_think
from nano_think.data.module import TokenDataModule
from nano_think.model import ExpertLM
from nano_think.ops.layout import Layout
from nano_think.tasks.next_token import NextTokenTask

OBJECTIVES = ("transformer", "state_space", "diffuser", "route")


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_passes_fast_dev_run(kind, objective, data, trainer):
    task = objective(kind)
    before = {name: p.detach().clone() for name, p in task.network.named_parameters() if p.requires_grad}
    runner = trainer(fast_dev_run=True)
    runner.fit(task, datamodule=data())
    metrics = runner.callback_metrics
    for name in ("train/loss", "val/loss", "val/perplexity/fruit", "val/bpb/tools"):
        assert math.isfinite(float(metrics[name])), name
    after = dict(task.network.named_parameters())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_validation_figures_are_those_of_all_tokens_of_the_split(objective, data, trainer):
    task, module = objective("transformer"), data()
    metrics = trainer().validate(task, datamodule=module, verbose=False)[0]
    sums = {name: [0.0, 0, 0] for name in module.domains}
    for batch in module.dataloader("validation"):
        nll = task.network.token_nll(batch["tokens"], batch["labels"], task.layout(batch)).detach()
        lengths = task.val_loss.byte_lengths[batch["labels"].clamp_min(0)] * (batch["labels"] >= 0)
        for row, domain in enumerate(batch["domain"].tolist()):
            mine = sums[module.domains[domain]]
            mine[0] += float(nll[row].double().sum())
            mine[1] += int((batch["labels"][row] >= 0).sum())
            mine[2] += float(lengths[row].sum())
    total = [sum(column) for column in zip(*sums.values(), strict=True)]
    assert metrics["val/loss"] == pytest.approx(total[0] / total[1], rel=1e-5)
    for name, (nats, tokens, num_bytes) in sums.items():
        assert metrics[f"val/loss/{name}"] == pytest.approx(nats / tokens, rel=1e-5)
        assert metrics[f"val/perplexity/{name}"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert metrics[f"val/bpb/{name}"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)


def test_the_loss_of_a_text_by_hand(make_shards, byte_tokenizer, common):
    """The label of a token is the one after it: BOS a, a b, b EOS of "ab", and nothing after EOS."""
    shards = make_shards({"expert_train": {"fruit": ["ab"] * 4}})
    batch = next(iter(TokenDataModule(shards.directory, 4, 4).dataloader("expert_train")))
    torch.manual_seed(0)
    table = nn.Embedding(259, 8)
    task = NextTokenTask(ExpertLM(table, nn.Identity()), **common())
    task.network.expert.forward = lambda x, layout: x
    bos, a, b, eos = byte_tokenizer.bos_id, *byte_tokenizer.encode("ab"), byte_tokenizer.eos_id
    with torch.no_grad():
        log_probs = (table.weight @ table.weight.T).log_softmax(-1)
        by_hand = -sum(float(log_probs[now, then]) for now, then in ((bos, a), (a, b), (b, eos)))
        total = float(task.batch_loss(batch)["loss"])
    assert int((batch["labels"] != -100).sum()) == 4 * 3
    assert total == pytest.approx(4 * by_hand, rel=1e-5)


def _batches(sizes, rows, seed=0):
    """Random micro-batches; micro-batch i keeps about 1 / (i + 1) of its labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(sizes):
        tokens = torch.randint(0, 256, (rows, 12), generator=generator)
        labels = torch.randint(0, 256, (rows, 12), generator=generator)
        masked = torch.rand(rows, 12, generator=generator) > 1 / (i + 1)
        positions = torch.arange(12).expand(rows, 12)
        made.append({
            "tokens": tokens,
            "labels": labels.masked_fill(masked, -100),
            "positions": positions,
            "segments": torch.zeros_like(tokens),
            "domain": torch.zeros(rows, dtype=torch.int64),
        })  # fmt: skip
    return made


def _one_step(task, batches, trainer, **settings):
    """Gradient of one optimizer step, read off a step of plain gradient descent with rate 1."""
    before = {name: p.detach().clone() for name, p in task.network.named_parameters()}
    runner = trainer(max_steps=1, accumulate_grad_batches=len(batches), limit_val_batches=0, **settings)
    runner.fit(task, train_dataloaders=DataLoader(batches, batch_size=None))
    return {name: before[name] - p.detach() for name, p in task.network.named_parameters()}


def test_four_micro_batches_give_the_gradient_of_one_big_batch_and_of_the_plain_mean(
    common, expert_lm, trainer
):
    def task():
        sgd = common(optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1.0))
        return NextTokenTask(expert_lm("transformer"), **sgd)

    parts = _batches(4, 4)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    assert max(counts) > 2 * min(counts)
    reference = expert_lm("transformer")
    logits = reference(whole["tokens"], Layout(whole["positions"], whole["segments"])).logits
    F.cross_entropy(logits.flatten(0, 1), whole["labels"].flatten(), ignore_index=-100).backward()
    by_hand = {name: p.grad for name, p in reference.named_parameters()}
    for step in (_one_step(task(), parts, trainer), _one_step(task(), [whole], trainer)):
        for name, gradient in by_hand.items():
            torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-6)


def test_clipping_sees_the_gradient_of_the_mean(common, expert_lm, trainer):
    sgd = common(optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1.0))
    step = _one_step(
        NextTokenTask(expert_lm("transformer"), **sgd), _batches(4, 4), trainer, gradient_clip_val=0.01
    )
    norm = torch.stack([change.norm() for change in step.values()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["transformer", "state_space"])
def test_language_models_overfit_one_batch(kind, objective, losses):
    batch = _batches(1, 4)[0]
    # rows that begin differently, so that every label follows from what stands before it
    batch["tokens"][:, 0] = torch.arange(4)
    batch["labels"] = torch.cat((batch["tokens"][:, 1:], batch["tokens"][:, :1]), dim=1)
    seen = losses(objective(kind), batch, 150)
    assert seen[0] > 3.0
    assert seen[-1] < 0.05


DDP = """
import sys, torch, lightning as L
from functools import partial
from torch import nn
from torch.utils.data import DataLoader
sys.path.insert(0, sys.argv[1])
from nano_think.model import ExpertLM
from nano_think.experts.transformer import TransformerExpert
from nano_think.optim.schedule import constant
from nano_think.tasks.next_token import NextTokenTask

def batches(rank):
    g = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 32, (4, 8), generator=g)
    labels = tokens.roll(-1, 1).clone()
    labels[:, 2 * rank + 1 :] = -100 if rank else labels[:, 2 * rank + 1 :]
    zeros = torch.zeros_like(tokens)
    return [{"tokens": tokens, "labels": labels, "positions": torch.arange(8).expand(4, 8),
             "segments": zeros, "domain": zeros[:, 0]}]

class Rows(L.LightningDataModule):
    def train_dataloader(self):
        both = [batches(0)[0], batches(1)[0]]
        if WORLD == 2:
            return DataLoader([both[self.trainer.global_rank]], batch_size=None)
        return DataLoader([{name: torch.cat([b[name] for b in both]) for name in both[0]}], batch_size=None)

WORLD = int(sys.argv[2])
torch.manual_seed(0)
expert = TransformerExpert(d_model=16, num_layers=1, num_heads=2, ffn_dim=32, dropout=0.0)
task = NextTokenTask(ExpertLM((32, 16), expert), optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1.0),
                     schedule=partial(constant, warmup_steps=0), domains=["a"], byte_lengths=torch.ones(32))
trainer = L.Trainer(max_steps=3, accelerator="cpu", devices=WORLD, strategy="ddp" if WORLD == 2 else "auto",
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    limit_val_batches=0, use_distributed_sampler=False)
trainer.fit(task, datamodule=Rows())
total = torch.cat([p.detach().flatten() for p in task.network.parameters()])
torch.save(total, f"{sys.argv[3]}.{trainer.global_rank}")
"""


@pytest.mark.slow
def test_two_processes_with_different_label_counts_train_like_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DDP)
    root = str(Path(nano_think.__file__).parents[1])
    for world, name in ((1, "one"), (2, "two")):
        command = [sys.executable, str(script), root, str(world), str(tmp_path / name)]
        subprocess.run(command, check=True, timeout=200, capture_output=True)
    one, first, second = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-5)
