from __future__ import annotations

from collections import Counter

import pytest

from nano_think.data import builtin_words as words
from nano_think.data.builtin_words import Rng, article, listing, number_word, ordinal_word, people, sentence


def test_the_generator_is_frozen():
    """Prepared corpora and committed figures depend on these numbers: they may never change."""
    rng = Rng("story", 0, 1)
    assert [rng.below(1000) for _ in range(6)] == [865, 583, 13, 706, 133, 637]
    assert Rng("a", 1).below(2**32) != Rng("a1").below(2**32)


def test_draws_are_uniform():
    rng = Rng("uniform")
    counts = Counter(rng.below(7) for _ in range(14_000))
    chi_square = sum((counts[i] - 2000) ** 2 / 2000 for i in range(7))
    assert chi_square < 22.5  # 99.9% of a chi-square with 6 degrees of freedom
    assert {rng.between(3, 5) for _ in range(100)} == {3, 4, 5}
    assert abs(sum(rng.chance(30) for _ in range(10_000)) - 3000) < 5 * 46


def test_samples_are_distinct_and_reach_every_order():
    rng = Rng("sample")
    assert {tuple(rng.sample("abc", 3)) for _ in range(300)} == {
        tuple(order) for order in ("abc", "acb", "bac", "bca", "cab", "cba")
    }
    assert all(len(set(rng.sample(range(10), 4))) == 4 for _ in range(100))


@pytest.mark.parametrize(
    ("n", "cardinal", "ordinal"),
    [
        (1, "one", "first"),
        (12, "twelve", "twelfth"),
        (20, "twenty", "twentieth"),
        (45, "forty-five", "forty-fifth"),
        (100, "one hundred", "one hundredth"),
        (203, "two hundred and three", "two hundred and third"),
        (999, "nine hundred and ninety-nine", "nine hundred and ninety-ninth"),
    ],
)
def test_numbers_in_words(n, cardinal, ordinal):
    assert number_word(n) == cardinal
    assert ordinal_word(n) == ordinal


def test_all_number_words_differ():
    assert len({number_word(n) for n in range(1000)}) == 1000


def test_small_pieces_of_language():
    assert article("old mill") == "an old mill"
    assert article("mill") == "a mill"
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert sentence("so it was") == "So it was."
    assert sentence('"why?"') == '"why?"'
    group = people(Rng(1), 5)
    assert len({person.name for person in group}) == len({person.trade for person in group}) == 5
    assert all((person.name in words.WOMEN) == (person.she == "she") for person in group)


def test_lists_have_no_item_twice_and_names_tell_the_gender():
    lists = {
        name: value for name, value in vars(words).items() if name.isupper() and isinstance(value, tuple)
    }
    assert len(lists) > 20
    for name, items in lists.items():
        assert len(set(items)) == len(items), name
        assert all(item and item == item.strip() for item in items), name
    assert not set(words.WOMEN) & set(words.MEN)
