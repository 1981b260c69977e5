"""The facts in generated texts are checked by parsing them again, not by asking the generator."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from nano_think.data.builtin import GRAMMARS
from nano_think.data.builtin_words import Rng, number_word, ordinal_word

NUMBER = {number_word(n): n for n in range(1000)}
ORDINAL = {ordinal_word(n): n for n in range(1, 400)}
COUNT = 60
A = "(?:a|an)"


def texts(domain, kind, count=COUNT):
    return [GRAMMARS[domain][kind](Rng("test", kind, i)) for i in range(count)]


KINDS = [(domain, kind) for domain, kinds in GRAMMARS.items() for kind in kinds]


@pytest.mark.parametrize(("domain", "kind"), KINDS)
def test_a_text_is_a_function_of_its_key_and_texts_differ(domain, kind):
    assert texts(domain, kind) == texts(domain, kind)
    assert len(set(texts(domain, kind))) == COUNT


@pytest.mark.parametrize(("domain", "kind"), KINDS)
def test_texts_are_clean_and_of_useful_length(domain, kind):
    for text in texts(domain, kind):
        assert 300 < len(text) < 6000
        assert text == text.strip()
        assert not re.search(r"[{}\[\]]|  |\.\.| [.,;:]|\bNone\b", text), text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text


def test_journey_names_gifts_and_places_in_reverse():
    for text in texts("general", "journey"):
        stops = re.findall(r"^\w+ came to the ([\w ]+), and", text, re.M)
        given = re.findall(rf"gave \w+ {A} ([\w ]+) for the road", text)
        assert len(stops) == len(given) >= 2
        assert re.findall(r'"The ([\w ]+) is from', text) == given[::-1]
        assert re.findall(r"is from \w+ the \w+, at the ([\w ]+),", text) == stops[::-1]
        way = re.search(r"went home by (.*), until", text).group(1)
        assert re.findall(r"the ([\w ]+?)(?:,| and|$)", way) == stops[::-1]
        own, owner = re.search(rf"carried nothing but {A} ([\w ]+), which (\w+)", text).groups()
        assert f"gave the {own} back to {owner}" in text
        assert f"It belongs to {owner}." in text


def test_market_accounts_are_right():
    for text in texts("general", "market"):
        stock = NUMBER[re.search(r"with ([\w -]+?) (?:[a-z]+|[a-z]+ of [a-z]+)\.", text).group(1)]
        coins = NUMBER[re.search(r"had ([\w -]+) coins in", text).group(1)]
        first = stock, coins
        for part in text.split("\n\n")[1:-1]:
            bought = re.search(r"wanted ([\w -]+?) [a-z]+(?: of [a-z]+)? at ([\w -]+) a piece", part)
            paid = re.search(r"asked ([\w -]+) coins for", part)
            if bought:
                count, price = (NUMBER[word] for word in bought.groups())
                assert f"That made {number_word(count * price)} coins" in part
                stock, coins = stock - count, coins + count * price
            elif paid:
                coins -= NUMBER[paid.group(1)]
            assert re.search(rf"had {number_word(stock)} .* left and {number_word(coins)} coins", part), part
        last = text.split("\n\n")[-1]
        assert f"{number_word(first[0] - stock)} were sold and {number_word(stock)} remained" in last
        assert f"held {number_word(coins)} coins, {number_word(abs(coins - first[1]))} " in last
        assert ("fewer" in last) == (coins < first[1])


def test_mystery_clears_everyone_but_the_thief():
    for text in texts("general", "mystery"):
        rows = re.findall(rf"(\w+) the \w+ wore {A} (\w+) coat and had been at the ([\w ]+?)\.", text)
        suspects = {name: (colour, place) for name, colour, place in rows}
        cleared = set()
        for colour, place in re.findall(r"seen the (\w+) coat at the ([\w ]+) all night", text):
            cleared |= {name for name, facts in suspects.items() if facts == (colour, place)}
        for place in re.findall(r"The door of the ([\w ]+) had been locked", text):
            cleared |= {name for name, facts in suspects.items() if facts[1] == place}
        (thief,) = suspects.keys() - cleared
        assert set(re.findall(r"(?:not|cleared) (\w+)[.,]", text)) == cleared
        thing, owner = re.search(r"the ([\w ]+) of (\w+) the \w+ disappeared", text).groups()
        assert re.search(rf"{thief} gave the {thing} back to {owner}", text)
        assert f"looked at the {suspects[thief][0]} coat" in text


def test_nested_tales_close_in_reverse_order():
    for text in texts("general", "nested"):
        opened = re.findall(r"(\w+) the \w+ sat with (\w+) at the ([\w ]+)\.", text)
        things = re.findall(rf"between them lay {A} ([\w ]+)\.", text)
        closed = re.findall(r'"And so," said (\w+) to (\w+), "the ([\w ]+) came from (\w+)', text)
        assert len(opened) == len(things) == len(closed) + 1
        inner = [name for name, _, _ in opened[1:]]
        expected = [(a, b, thing, c) for (a, b, _), thing, c in zip(opened, things, inner, strict=False)]
        assert closed == expected[::-1]
        assert re.findall(r"tale of (\w+) and the", text) == inner[::-1]


def test_letters_answer_the_letter_before():
    for text in texts("general", "letters"):
        letters = [part.split("\n") for part in text.split("\n\n")]
        for before, after in pairwise(letters):
            asked = re.search(rf"lend me {A} ([\w ]+)\?", before[2]).group(1)
            date = before[0].split(", ")[1]
            assert after[2].startswith(
                f"Your letter of {date} reached me at {after[0].split(',')[0].lower()}."
            )
            assert re.search(rf"You ask for {A} {asked}: I send it", after[2])
            assert before[1] == f"Dear {after[3].removeprefix('Yours, ')},"
            assert int(date.split()[1]) < int(after[0].split()[-1])


def test_race_order_follows_from_the_pairs():
    pair = re.compile(r"(\w+) (?:came in just before|was faster than) (\w+)|(\w+) left (\w+) behind")
    ranks = ("first", "second", "third", "fourth", "fifth", "sixth")
    for text in texts("general", "race"):
        before = {(a or c, b or d) for a, b, c, d in pair.findall(text)}
        line = re.search(r"the order was this: (.*)\.", text).group(1)
        order = [re.search(rf"(\w+) {rank}", line).group(1) for rank in ranks if rank in line]
        assert set(pairwise(order)) == before
        assert f"went to {order[0]} the" in text
        assert f"; {order[-1]} carried" in text


def test_dialogue_ends_in_a_contradiction_with_its_definition():
    for text in texts("philosophy", "dialogue"):
        subject, claimed, proper = re.search(
            r"I say that every ([\w ]+?) is (.+), and that nothing which is (.+) is \2\.", text
        ).groups()
        links = re.findall(rf"(?:is not every|do you call {A}) ([\w ]+?) {A} ([\w ]+)\?", text)
        assert links[0][0] == subject
        assert all(a[1] == b[0] for a, b in pairwise(links))
        assert f"every {links[-1][1]}, you will agree, is {proper}." in text
        assert re.search(rf"Then {A} {subject} is not {re.escape(claimed)}, ", text)


def test_treatise_proofs_cite_what_they_use():
    statement = r"Every ([\w ]+?) is {} ([\w ]+)\."
    for text in texts("philosophy", "treatise"):
        axioms = dict(re.findall(r"Axiom (\d+)\. (Every .*\.)", text))
        known = {f"Axiom {n}": re.match(statement.format(A), line) for n, line in axioms.items()}
        known = {name: match.groups() for name, match in known.items() if match}
        trait_axiom, (carrier, trait) = (
            f"Axiom {len(axioms)}",
            re.match(r"Every ([\w ]+?) is (.+)\.", axioms[str(len(axioms))]).groups(),
        )
        proofs = re.findall(r"Proposition (\d+)\. (Every .*\.)\nProof\. (.*) Q\.E\.D\.", text)
        assert len(proofs) == len(axioms) - 1
        for number, claim, proof in proofs[:-1]:
            (a, b), (c, d) = (known[name] for name in re.findall(r"(?:Axiom|Proposition) \d+", proof))
            assert b == c
            known[f"Proposition {number}"] = re.match(statement.format(A), claim).groups()
            assert known[f"Proposition {number}"] == (a, d)
        first, second = re.findall(r"(?:Axiom|Proposition) \d+", proofs[-1][2])
        assert second == trait_axiom
        assert known[first][1] == carrier
        assert proofs[-1][1] == f"Every {known[first][0]} is {trait}."


def test_disputation_replies_to_each_objection():
    for text in texts("philosophy", "disputation"):
        subject, claim = re.match(rf"Whether {A} ([\w ]+?) is (.+)\n", text).groups()
        objections = dict(re.findall(rf"Objection (\d)\. .*?({A} [\w ]+? is [^,]+), and what", text))
        replies = dict(re.findall(r"Reply to Objection (\d)\. That (.*?) is true", text))
        assert objections.keys() == replies.keys()
        assert len(objections) >= 3
        for number, reply in replies.items():
            assert reply.startswith(objections[number][:30])
        assert text.count(f"{subject} is {claim}") >= len(objections) + 1


def test_ranking_is_transitive():
    patterns = (
        r"gives up (.+) for (.+); therefore",
        r"Since (?:.+), (?P<better>.+) is to be preferred to (?P<worse>.+)\.",
        r"part with (?P<better>.+) to gain (?P<worse>.+): so",
    )
    for text in texts("philosophy", "ranking"):
        before = set()
        for line in re.findall(r"^\d+\. .*$", text, re.M):
            match = next(m for m in (re.search(p, line) for p in patterns) if m)
            pair = match.groups() if match.groupdict() else match.groups()[::-1]
            before.add(pair)
        line = re.search(r"from the highest down, is (.*)\.", text).group(1)
        order = re.split(r", | and ", line)
        assert set(pairwise(order)) == before
        for low, high, via in re.findall(r"between ([\w ]+) and ([\w ]+), one chooses \2(.*)\.", text):
            assert order.index(high) < order.index(low)
            assert via.count(" of ") >= (order.index(low) - order.index(high) > 1)
        assert f"highest of these goods is {order[0]} and the lowest is {order[-1]}." in text


def test_city_judges_by_its_laws():
    for text in texts("philosophy", "city"):
        laws = {
            n: (deed, due)
            for n, deed, due in re.findall(
                r"Law (\w+)\. Whoever (.+?) (must .+|receives .+|loses .+|is named .+|owes .+|may .+); and",
                text,
            )
        }
        assert len(laws) >= 3
        for deed, number, due in re.findall(r"^\w+ the \w+ (.+)\. By Law (\w+), \w+ (.+)\.$", text, re.M):
            assert laws[number] == (deed, due)
        for due, deed, number in re.findall(
            r"^\w+ the \w+ (.+)\. Since only one who (.+) \1, .* Law (\w+) that", text, re.M
        ):
            assert laws[number] == (deed, due)
        for deed, number, due in re.findall(
            r"not \w+ who (.+)\. Then by Law (\w+) it is not \w+ who (.+)\.", text
        ):
            assert laws[number] == (deed, due)


def test_verses_are_numbered_from_one():
    for kind in GRAMMARS["theology"]:
        for text in texts("theology", kind, 10):
            numbers = [int(n) for n in re.findall(r"^(\d+) ", text, re.M)]
            assert numbers == list(range(1, len(numbers) + 1))


def test_genealogy_ages_add_up():
    for text in texts("theology", "genealogy"):
        births = re.findall(r"And (\w+) lived ([\w -]+) years, and took \w+ to wife, and begat (\w+)\.", text)
        lives = re.findall(
            r"lived after he begat (\w+) ([\w -]+) years, .* of (\w+) were ([\w -]+) years", text
        )
        assert len(births) == len(lives) >= 5
        for (father, before, son), (son_again, after, same, life) in zip(births, lives, strict=True):
            assert (father, son) == (same, son_again)
            assert NUMBER[before] + NUMBER[after] == NUMBER[life]
        assert all(a[2] == b[0] for a, b in pairwise(births))
        total = re.search(r"From the birth of \w+ unto the birth of \w+ were ([\w -]+) years", text).group(1)
        assert NUMBER[total] == sum(NUMBER[before] for _, before, _ in births)


def test_kings_follow_their_fathers_and_dates_add_up():
    for text in texts("theology", "kings"):
        starts = re.findall(
            r"In the ([\w -]+) year of (\w+) king of (\w+) began (\w+)(?: the son of (\w+))? to", text
        )
        reigns = [NUMBER[n.lower()] for n in re.findall(r"^\d+ ([\w -]+) years reigned", text, re.M)]
        ways = re.findall(r"did that which was (\w+) .* Lord, (.*)\.", text)
        assert len(starts) == len(reigns) == len(ways)
        for i, (before, after) in enumerate(pairwise(starts)):
            assert ORDINAL[after[0]] == ORDINAL[before[0]] + reigns[i]
            assert after[1:3] == before[1:3]
            assert after[4] == before[3]
            same = ways[i][0] == ways[i + 1][0]
            assert (
                ways[i + 1][1]
                == f"{'according to all that' if same else 'and not as'} {before[3]} his father had done"
            )


def test_psalm_refrain_returns_word_for_word():
    for text in texts("theology", "psalm"):
        refrains = re.findall(r": (.*)\.$", text, re.M)
        assert len(refrains) >= 5
        assert len(set(refrains)) == 1
        called = re.findall(r"[Ll]et ([\w ]+?) give thanks", text)
        assert (
            re.search(r"^\d+ (.*), give thanks together", text, re.M)
            .group(1)
            .lower()
            .startswith(", ".join(called[:-1]))
        )


def test_law_curses_mirror_its_blessings():
    for text in texts("theology", "law"):
        statutes = re.findall(r"Thou shalt \w+ (.*)\.", text)
        blessings = re.findall(r"If thou (\w+) (?!not )(.*), then shall (.*) be increased", text)
        curses = re.findall(r"If thou (\w+) not (.*), then shall (.*) be taken", text)
        assert blessings == curses
        assert [rest for _, rest, _ in blessings] == statutes
        count = re.search(r", ([\w-]+) in number", text).group(1)
        assert NUMBER[count] == len(statutes)


def test_parable_explains_each_thing_once():
    for text in texts("theology", "parable"):
        man, animal = re.search(rf"a certain (\w+), and with him was {A} (\w+)\.", text).groups()
        told, explained = text.split("Then came")
        things = re.findall(rf"And the {man} .*?\b{A} (\w+)\b", told)
        meanings = re.findall(r"^\d+ The (\w+) is (.*)\.", explained, re.M)
        assert [thing for thing, _ in meanings] == things
        main = re.search(rf"The {man} is (.*), and the {animal} is (.*)\.", explained).groups()
        assert len({*main, *(meaning for _, meaning in meanings)}) == 2 + len(things)


def test_census_total_is_the_sum():
    for text in texts("theology", "census"):
        counts = re.findall(r"children of (\w+), by their families, were numbered ([\w-]+) men", text)
        total = re.search(r"All that were numbered of .* were ([\w -]+)\.", text).group(1)
        assert NUMBER[total] == sum(NUMBER[count] for _, count in counts)
        sides = dict(re.findall(r"of (\w+), by .* pitched toward (the \w+)\.", text))
        for side, names in re.findall(r"And on (the \w+) side were the standards of (.*)\.", text):
            assert set(re.split(r", | and ", names)) == {
                name for name, where in sides.items() if where == side
            }
        most = re.search(r"children of (\w+), being the most", text).group(1)
        assert NUMBER[dict(counts)[most]] == max(NUMBER[count] for _, count in counts)
