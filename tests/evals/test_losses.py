import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from nano_think.evals import losses as module
from nano_think.evals.losses import DocumentLosses, document_losses, evaluate_models

LENGTHS = torch.randint(0, 6, (30,), generator=torch.Generator().manual_seed(9))


def make_batches(count=6, seed=0):
    """Documents 0..19 in fragments over rows and batches; uid % 3 is the domain, 3 of 4 domains seen."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        domain = torch.randint(0, 3, (4,), generator=generator)
        step = torch.randint(0, 6, (4, 2), generator=generator)
        uid = (domain[:, None] + 3 * step).repeat_interleave(5, dim=1)
        labels = torch.randint(0, 30, uid.shape, generator=generator)
        labels[torch.rand(uid.shape, generator=generator) < 0.2] = -100
        uid[:, -1], labels[:, -1] = -1, -100
        tokens = torch.randint(0, 30, uid.shape, generator=generator)
        batches.append({"tokens": tokens, "labels": labels, "doc_uid": uid, "domain": domain})
    return batches


def nll_fn(batch):
    return (batch["tokens"] * 7 % 11 + batch["labels"].clamp(min=0) * 0.25).float()


def by_hand(batches):
    table = defaultdict(lambda: [0.0, 0, 0])
    for batch in batches:
        nll = nll_fn(batch)
        for row in range(4):
            for t in range(batch["labels"].shape[1]):
                label = int(batch["labels"][row, t])
                if label >= 0:
                    entry = table[int(batch["doc_uid"][row, t])]
                    entry[0] += float(nll[row, t])
                    entry[1] += 1
                    entry[2] += int(LENGTHS[label])
    return table


def test_documents_are_summed_over_fragments():
    batches = make_batches()
    result = document_losses(nll_fn, batches, LENGTHS, 4)
    table = by_hand(batches)
    assert result.uid.tolist() == sorted(table)
    assert result.sum_nll.tolist() == pytest.approx([table[u][0] for u in sorted(table)])
    assert result.num_tokens.tolist() == [table[u][1] for u in sorted(table)]
    assert result.num_bytes.tolist() == [table[u][2] for u in sorted(table)]
    assert result.domain.tolist() == [u % 3 for u in sorted(table)]
    assert len(result) == result.documents() == len(table)


def test_loss_perplexity_and_bpb_weigh_tokens():
    batches = make_batches()
    result = document_losses(nll_fn, batches, LENGTHS, 4)
    for domain in (None, 0, 1, 2):
        rows = [v for u, v in by_hand(batches).items() if domain is None or u % 3 == domain]
        nll, tokens, num_bytes = (sum(column) for column in zip(*rows, strict=True))
        assert result.loss(domain) == pytest.approx(nll / tokens)
        assert result.perplexity(domain) == pytest.approx(math.exp(nll / tokens))
        assert result.bpb(domain) == pytest.approx(nll / math.log(2) / num_bytes)
    assert math.isnan(result.loss(3))
    assert math.isnan(result.bpb(3))
    assert result.per_domain("bpb")[:3] == [result.bpb(d) for d in range(3)]
    assert len(result.per_domain()) == 4


def test_many_models_see_each_batch_once_and_the_same_tokens():
    batches, calls = make_batches(), []

    def stream():
        for batch in batches:
            calls.append("batch")
            yield batch

    models = {"a": nll_fn, "b": lambda batch: nll_fn(batch) + 1}
    results = evaluate_models(models, stream(), LENGTHS, 4)
    assert len(calls) == len(batches)
    assert np.array_equal(results["a"].num_tokens, results["b"].num_tokens)
    assert results["b"].loss() - results["a"].loss() == pytest.approx(1)


def test_many_batches_are_merged_on_the_way(monkeypatch):
    batches = make_batches(9)
    whole = document_losses(nll_fn, batches, LENGTHS, 4)
    monkeypatch.setattr(module, "_MERGE_EVERY", 2)
    merged = document_losses(nll_fn, batches, LENGTHS, 4)
    for name, value in vars(whole).items():
        assert np.allclose(value, getattr(merged, name))


def test_concatenate_adds_halves_to_the_whole(tmp_path):
    batches = make_batches()
    whole = document_losses(nll_fn, batches, LENGTHS, 4)
    halves = [document_losses(nll_fn, part, LENGTHS, 4) for part in (batches[:2], batches[2:])]
    joined = DocumentLosses.concatenate(halves)
    joined.save(tmp_path / "losses.npz")
    loaded = DocumentLosses.load(tmp_path / "losses.npz")
    for name, value in vars(whole).items():
        assert np.allclose(value, getattr(joined, name))
        assert np.array_equal(getattr(joined, name), getattr(loaded, name))
        assert np.asarray(getattr(loaded, name)).dtype == np.asarray(value).dtype
    assert loaded.num_domains == 4
    assert isinstance(loaded.num_domains, int)


def test_large_uids_survive():
    batch = make_batches(1)[0]
    batch["doc_uid"] = torch.where(batch["doc_uid"] < 0, -1, batch["doc_uid"] + 2**62)
    uid = document_losses(nll_fn, [batch], LENGTHS, 4).uid
    assert (uid >= 2**62).all()
    assert len(set(uid.tolist())) == len(uid)


def test_no_gradient_and_bad_results():
    batches = make_batches(2)
    scale = torch.ones((), requires_grad=True)
    result = document_losses(lambda batch: nll_fn(batch) * scale, batches, LENGTHS, 4)
    assert result.loss() > 0
    with pytest.raises(ValueError, match="shape"):
        document_losses(lambda batch: nll_fn(batch)[:, 1:], batches, LENGTHS, 4)
    empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(ValueError, match="no scored token"):
        document_losses(nll_fn, [empty], LENGTHS, 4)
    with pytest.raises(ValueError, match="at least one"):
        DocumentLosses.concatenate([])


def test_micro_weighs_tokens_and_macro_domains():
    losses = DocumentLosses(
        uid=np.arange(3),
        domain=np.array([0, 2, 2]),
        sum_nll=np.array([20.0, 30.0, 60.0]),
        num_tokens=np.array([10, 10, 20]),
        num_bytes=np.array([40, 20, 40]),
        num_domains=4,
    )
    assert losses.loss() == pytest.approx(110 / 40)
    assert losses.macro() == pytest.approx((2 + 3) / 2)
    assert losses.macro("bpb") == pytest.approx((20 / 40 + 90 / 60) / 2 / math.log(2))


def test_tokens_are_summed_by_document():
    uid, domain = np.array([7, 3, 7]), np.array([1, 0, 1])
    got = DocumentLosses.from_tokens(uid, domain, np.array([1.0, 2.0, 4.0]), np.array([3, 1, 2]), 2)
    assert got.uid.tolist() == [3, 7]
    assert got.domain.tolist() == [0, 1]
    assert got.sum_nll.tolist() == [2, 5]
    assert got.num_tokens.tolist() == [1, 2]
    assert got.num_bytes.tolist() == [1, 5]
    assert got.pairs_with(got)
    assert not got.pairs_with(DocumentLosses.from_tokens(uid[:2], domain[:2], np.ones(2), np.ones(2), 2))
