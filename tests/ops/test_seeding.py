from __future__ import annotations

import itertools

import torch

from nano_think.ops.seeding import mixed_seed


def test_streams_differ_in_every_number_as_torch_sees_them():
    numbers = (0, 1, 2, 11, 2**31, 2**40)
    seeds = [mixed_seed(*pair) for pair in itertools.product(numbers, repeat=2)]
    draws = {torch.rand(4, generator=torch.Generator().manual_seed(seed)).sum().item() for seed in seeds}
    assert len(draws) == len(numbers) ** 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_same_numbers_give_the_same_seed_on_every_machine():
    assert mixed_seed(1, 2) == mixed_seed(1, 2)
    assert mixed_seed(1, 2) != mixed_seed(2, 1)
    assert mixed_seed(12) != mixed_seed(1, 2)
    assert mixed_seed(1, 2, 3) == 1517167407554927345


def test_torch_drops_the_high_half_of_a_seed():
    """The reason for mixing; once this fails, shifting numbers together is enough."""
    draws = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in (5, (1 << 32) + 5)]
    assert torch.equal(*draws)
