import math

import pytest
import torch

from nano_think.metrics.domain_loss import DomainLoss

DOMAINS = ["code", "general", "theology"]


def make_batches(count: int, domains: tuple[int, ...] = (0, 1, 2), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (40,), generator=generator)
    lengths[:3] = 0
    batches = []
    for _ in range(count):
        labels = torch.randint(0, 40, (4, 9), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        nll = torch.rand(labels.shape, generator=generator) * 8
        nll[labels < 0] = 0
        domain = torch.tensor(domains)[torch.randint(0, len(domains), (4,), generator=generator)]
        batches.append((nll, labels, domain))
    return lengths, batches


def brute_force(lengths, batches, wanted=None):
    """Python floats, token by token."""
    nll = tokens = num_bytes = 0.0
    for losses, labels, domain in batches:
        for row in range(len(labels)):
            for position in range(labels.shape[1]):
                label = int(labels[row, position])
                if label >= 0 and wanted in (None, int(domain[row])):
                    nll += float(losses[row, position])
                    tokens += 1
                    num_bytes += int(lengths[label])
    return nll / tokens, math.exp(nll / tokens), nll / math.log(2) / num_bytes


def test_equals_brute_force_over_tokens():
    lengths, batches = make_batches(5)
    metric = DomainLoss(DOMAINS, lengths)
    for batch in batches:
        metric.update(*batch)
    values = {name: float(value) for name, value in metric.compute().items()}
    for suffix, wanted in [("", None), *((f"/{name}", index) for index, name in enumerate(DOMAINS))]:
        expected = brute_force(lengths, batches, wanted)
        got = tuple(values[f"{key}{suffix}"] for key in ("loss", "perplexity", "bpb"))
        assert got == pytest.approx(expected, rel=1e-12)
    per_domain = [brute_force(lengths, batches, index) for index in range(3)]
    assert values["loss_macro"] == pytest.approx(sum(value[0] for value in per_domain) / 3)
    assert values["perplexity_macro"] == pytest.approx(math.exp(values["loss_macro"]))
    assert values["bpb_macro"] == pytest.approx(sum(value[2] for value in per_domain) / 3)
    assert len(values) == 6 + 9


def test_hand_values():
    metric = DomainLoss(["a", "b"], torch.tensor([0, 1, 3]))
    nll = torch.tensor([[1.0, 3.0, 0.0], [2.0, 0.0, 0.0]])
    labels = torch.tensor([[1, 2, -100], [0, -100, -100]])
    metric.update(nll, labels, torch.tensor([0, 1]))
    values = metric.compute()
    assert values["loss"] == 2.0
    assert values["loss/a"] == 2.0
    assert float(values["bpb/a"]) == pytest.approx(4 / (4 * math.log(2)))
    assert values["bpb/b"].isinf(), "a domain whose labels have no bytes has no finite bits per byte"


def test_perplexity_is_exp_of_the_mean_not_the_mean_of_exps():
    metric = DomainLoss(["a"], torch.ones(4))
    metric.update(torch.tensor([[0.0, 4.0]]), torch.tensor([[1, 2]]), torch.tensor([0]))
    assert float(metric.compute()["perplexity"]) == pytest.approx(math.exp(2))


def test_merged_states_of_two_processes_equal_one():
    lengths, batches = make_batches(6)
    whole, left, right = (DomainLoss(DOMAINS, lengths) for _ in range(3))
    for index, batch in enumerate(batches):
        whole.update(*batch)
        (left if index % 2 else right).update(*batch)
    left.merge_state(right)
    expected, merged = whole.compute(), left.compute()
    assert merged.keys() == expected.keys()
    for name in expected:
        assert float(merged[name]) == pytest.approx(float(expected[name]), rel=1e-13)


def test_forward_gives_the_batch_value_and_keeps_the_epoch():
    lengths, batches = make_batches(2)
    metric, alone = DomainLoss(DOMAINS, lengths), DomainLoss(DOMAINS, lengths)
    metric(*batches[0])
    alone.update(*batches[1])
    assert torch.equal(metric(*batches[1])["loss"], alone.compute()["loss"])
    assert float(metric.compute()["loss"]) == pytest.approx(brute_force(lengths, batches)[0])


def test_domains_without_tokens_are_absent_and_out_of_the_macro_mean():
    lengths, batches = make_batches(3, domains=(0, 2))
    metric = DomainLoss(DOMAINS, lengths)
    for batch in batches:
        metric.update(*batch)
    values = metric.compute()
    assert "loss/general" not in values
    assert torch.equal(values["loss_macro"], (values["loss/code"] + values["loss/theology"]) / 2)
    metric.reset()
    metric.update(torch.zeros(1, 2), torch.full((1, 2), -100), torch.tensor([0]))
    assert metric.compute()["loss"].isnan()


def test_sums_are_float64():
    """Float32 sums stop growing at 2^24 tokens of 1 nat."""
    metric = DomainLoss(["a"], torch.ones(2))
    metric.nll += 2.0**24
    metric.tokens += 2.0**24
    metric.update(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.long), torch.tensor([0]))
    assert metric.tokens.item() == metric.nll.item() == 2**24 + 1
    assert metric.nll.dtype == torch.float64


def test_wrong_shapes_are_refused():
    metric = DomainLoss(["a"], torch.ones(2))
    with pytest.raises(ValueError, match="must have shapes"):
        metric.update(
            torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        )
    with pytest.raises(ValueError, match="at least one domain"):
        DomainLoss([], torch.ones(2))
