"""Grammar of the domain "general": tales in which what is said early decides what may be said later.

Names, owners, places, prices and promises are facts of a small simulated world. Later sentences report the
state of that world, so a model that remembers the beginning predicts the end better than any short n-gram
can.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from nano_think.data.builtin_words import (
    ANIMALS,
    FEELINGS,
    GOODS,
    LOOKS,
    MONTHS,
    OBJECTS,
    PLACES,
    TIMES,
    WEATHER,
    Person,
    Rng,
    article,
    listing,
    number_word,
    people,
    sentence,
)


def _things(rng: Rng, count: int) -> list[str]:
    """Return `count` different things, each with an adjective of its own."""
    looks, objects = rng.sample(LOOKS, count), rng.sample(OBJECTS, count)
    return [f"{look} {thing}" for look, thing in zip(looks, objects, strict=True)]


def _time(rng: Rng) -> str:
    return rng.choice(TIMES).format(m=rng.choice(MONTHS))


class Teller:
    """Collects sentences and says "she" only where it is clear who is meant."""

    def __init__(self, rng: Rng) -> None:
        self._rng = rng
        self._paragraphs: list[list[str]] = [[]]
        self._last: Person | None = None

    def say(self, text: str) -> None:
        """Add a sentence about no one in particular."""
        self._paragraphs[-1].append(sentence(text))
        self._last = None

    def tell(self, person: Person, predicate: str) -> None:
        """Add a sentence whose subject is `person`: the pronoun if they were the last subject."""
        same = self._last is not None and self._last.name == person.name
        subject = person.she if same and self._rng.chance(75) else person.name
        self._paragraphs[-1].append(sentence(f"{subject} {predicate}"))
        self._last = person

    def paragraph(self) -> None:
        """Begin a new paragraph; pronouns do not reach across."""
        self._paragraphs.append([])
        self._last = None

    def text(self) -> str:
        """Return the whole tale."""
        return "\n\n".join(" ".join(part) for part in self._paragraphs if part)


def journey(rng: Rng) -> str:
    """A way out and back: gifts received on the way are named, and places passed again, in reverse order."""
    hero, elder, *helpers = people(rng, rng.between(4, 6))
    home, *stops = rng.sample(PLACES, len(helpers) + 2)
    goal = stops.pop()
    own, *gifts = _things(rng, len(helpers) + 1)
    teller = Teller(rng)
    teller.say(f"{_time(rng)}, {hero.name} the {hero.trade} left the {home}, where {hero.she} lived")
    teller.tell(
        hero, f"carried nothing but {article(own)}, which {elder.name} the {elder.trade} had lent {hero.her}"
    )
    teller.say(
        f'"Bring the {own} back to me," {elder.name} had said, "and tell me what you saw at the {goal}."'
    )
    for stop, helper, gift in zip(stops, helpers, gifts, strict=True):
        teller.paragraph()
        teller.tell(hero, f"came to the {stop}, and {rng.choice(WEATHER)}")
        greeting = rng.choice(
            ("sat mending a wall", "called from a window", "was counting geese", "could not sleep")
        )
        teller.say(f"There {helper.name} the {helper.trade} {greeting}")
        teller.tell(helper, f"was {rng.choice(FEELINGS)}, but gave {hero.name} {article(gift)} for the road")
    teller.paragraph()
    teller.say(
        f"At the {goal} {hero.name} met {article(rng.choice(ANIMALS))} that guarded the way and could speak"
    )
    teller.say(f'"I open only for one who can tell me where {hero.hers} things come from," it said')
    for stop, helper, gift in reversed(list(zip(stops, helpers, gifts, strict=True))):
        teller.say(f'"The {gift} is from {helper.name} the {helper.trade}, at the {stop}," said {hero.name}')
    teller.say(f'"And the {own}?" "That is not mine. It belongs to {elder.name}."')
    teller.paragraph()
    back = [f"the {stop}" for stop in reversed(stops)]
    teller.say(
        f"So {hero.name} was let through, and went home by {listing(back)}, until {hero.she} saw the {home}"
    )
    teller.tell(
        hero,
        f"gave the {own} back to {elder.name} and told {elder.her} what {hero.she} had seen at the {goal}",
    )
    return teller.text()


def market(rng: Rng) -> str:
    """A day of buying and selling in which every sum is right and the last count follows from all of them."""
    trader, *others = people(rng, 4)
    goods, place = rng.choice(GOODS), rng.choice(PLACES)
    stock, coins = rng.between(20, 60), rng.between(5, 40)
    first_stock, first_coins = stock, coins
    teller = Teller(rng)
    teller.say(
        f"{_time(rng)}, {trader.name} the {trader.trade} came to the {place} "
        f"with {number_word(stock)} {goods}"
    )
    teller.tell(trader, f"had {number_word(coins)} coins in {trader.hers} purse when the bell rang")
    for buyer in rng.sample(others * 2, rng.between(3, 6)):
        teller.paragraph()
        count, price = rng.between(1, max(1, min(9, stock))), rng.between(1, 5)
        if rng.chance(70) and stock >= count:
            stock, coins = stock - count, coins + count * price
            teller.tell(
                buyer,
                f"the {buyer.trade} wanted {number_word(count)} {goods} at {number_word(price)} a piece",
            )
            teller.say(f"That made {number_word(count * price)} coins, and {buyer.name} paid them")
        elif coins >= price:
            coins -= price
            teller.tell(
                buyer,
                f"the {buyer.trade} asked {number_word(price)} coins for the stall, and {trader.name} paid",
            )
        teller.say(
            rng.choice(("Now", "After that", "So")) + f" {trader.name} had {number_word(stock)} {goods} left "
            f"and {number_word(coins)} coins"
        )
    teller.paragraph()
    teller.say(f"When the {place} was empty, {trader.name} counted once more")
    sold, gain = first_stock - stock, coins - first_coins
    teller.say(
        f"Of {number_word(first_stock)} {goods}, {number_word(sold)} were sold "
        f"and {number_word(stock)} remained"
    )
    change = "more" if gain >= 0 else "fewer"
    teller.say(
        f"The purse held {number_word(coins)} coins, {number_word(abs(gain))} {change} than in the morning"
    )
    return teller.text()


def mystery(rng: Rng) -> str:
    """A thing is stolen; each clue clears one suspect for a reason given earlier, and one remains."""
    owner, judge, *suspects = people(rng, rng.between(5, 7))
    thing, scene = _things(rng, 1)[0], rng.choice(PLACES)
    places = rng.sample([place for place in PLACES if place != scene], len(suspects))
    colours = rng.sample(("red", "blue", "green", "black", "white", "yellow", "grey"), len(suspects))
    culprit = rng.below(len(suspects))
    teller = Teller(rng)
    teller.say(f"{_time(rng)}, the {thing} of {owner.name} the {owner.trade} disappeared from the {scene}")
    teller.say(
        f"{judge.name}, who was {judge.trade} and judge in one, sent for {number_word(len(suspects))} people"
    )
    teller.paragraph()
    for suspect, place, colour in zip(suspects, places, colours, strict=True):
        teller.tell(suspect, f"the {suspect.trade} wore {article(colour)} coat and had been at the {place}")
    clues = []
    for i in rng.sample(range(len(suspects)), len(suspects)):
        suspect, place, colour = suspects[i], places[i], colours[i]
        if i != culprit and rng.chance(50):
            clues.append((f"A boy had seen the {colour} coat at the {place} all night", suspect))
        elif i != culprit:
            clues.append((f"The door of the {place} had been locked from outside until morning", suspect))
    teller.paragraph()
    cleared = []
    for clue, suspect in clues:
        teller.say(clue)
        cleared.append(suspect.name)
        left = [s.name for s in suspects if s.name not in cleared]
        teller.say(
            rng.choice(
                (f"So it was not {suspect.name}", f"That cleared {suspect.name}, and left {listing(left)}")
            )
        )
    teller.paragraph()
    thief = suspects[culprit]
    teller.say(f"{judge.name} looked at the {colours[culprit]} coat and said nothing for a while")
    teller.say(f'"I was not at the {places[culprit]}," said {thief.name} at last. "I was at the {scene}."')
    teller.tell(thief, f"gave the {thing} back to {owner.name}, and was {rng.choice(FEELINGS)} ever after")
    return teller.text()


def nested(rng: Rng) -> str:
    """A tale inside a tale inside a tale: each is closed by the one who opened it, in reverse order."""
    depth = rng.between(2, 4)
    tellers = people(rng, 2 * depth)
    places, things = rng.sample(PLACES, depth), _things(rng, depth)
    out = Teller(rng)
    for level in range(depth):
        speaker, listener = tellers[2 * level], tellers[2 * level + 1]
        opening = _time(rng) if level == 0 else rng.choice(("years before", "once", "long ago", "as a child"))
        out.say(
            f"{opening}, {speaker.name} the {speaker.trade} sat with {listener.name} at the {places[level]}"
        )
        out.say(f"{rng.choice(WEATHER)}, and between them lay {article(things[level])}")
        out.say(f'"Where did you get the {things[level]}?" asked {listener.name}')
        if level + 1 < depth:
            inner = tellers[2 * level + 2]
            out.say(f'"That is the tale of {inner.name} the {inner.trade}," said {speaker.name}, and told it')
        else:
            out.say(
                f'"I found it at the {rng.choice(PLACES)}," said {speaker.name}, "and there my tale ends."'
            )
        out.paragraph()
    for level in reversed(range(depth - 1)):
        speaker, listener, inner = tellers[2 * level], tellers[2 * level + 1], tellers[2 * level + 2]
        out.say(f"That was the tale of {inner.name} and the {things[level + 1]}")
        out.say(
            f'"And so," said {speaker.name} to {listener.name}, "the {things[level]} came from {inner.name}."'
        )
        out.tell(listener, f"was {rng.choice(FEELINGS)}, and looked out over the {places[level]}")
        out.paragraph()
    return out.text()


def letters(rng: Rng) -> str:
    """An exchange of letters: every answer takes up what the letter before asked for and its date."""
    ada, bruno = people(rng, 2)
    here, there, meeting = rng.sample(PLACES, 3)
    count = 2 * rng.between(2, 3)
    things, goods = _things(rng, count), rng.sample(GOODS, count)
    month, days = rng.choice(MONTHS), [rng.between(1, 9)]
    parts = []
    for i in range(count):
        sender, receiver, place, other = (
            (ada, bruno, here, there) if i % 2 == 0 else (bruno, ada, there, here)
        )
        lines = [f"The {place}, {month} {days[-1]}", f"Dear {receiver.name},"]
        body = []
        if i:
            body.append(f"your letter of {month} {days[-2]} reached me at the {place}.")
            body.append(f"You ask for {article(things[i - 1])}: I send it with the {goods[i]}.")
        body.append(f"As I sat down to write, {rng.choice(WEATHER)}. I am {rng.choice(FEELINGS)}.")
        if i + 1 < count:
            body.append(f"Could you lend me {article(things[i])}?")
            endings = (
                f"Is there work for {article(sender.trade)} at the {other}?",
                "Write soon.",
                "Do not forget me.",
            )
            body.append(rng.choice(endings))
        else:
            body.append(
                f"Let us meet at the {meeting}; I shall bring the {things[1]} and you the {things[0]}."
            )
        lines.append(" ".join(map(sentence, body)))
        lines.append(f"Yours, {sender.name}")
        parts.append("\n".join(lines))
        days.append(days[-1] + rng.between(1, 4))
    return "\n\n".join(parts)


def race(rng: Rng) -> str:
    """An order told in pairs that are out of order; the full ranking at the end follows from them."""
    runners = people(rng, rng.between(4, 6))
    start, finish = rng.sample(PLACES, 2)
    prize = _things(rng, 1)[0]
    teller = Teller(rng)
    names = [runner.name for runner in rng.sample(runners, len(runners))]
    teller.say(f"{_time(rng)}, {listing(names)} ran from the {start} to the {finish} for {article(prize)}")
    for runner in rng.sample(runners, len(runners)):
        teller.tell(
            runner, f"the {runner.trade} was {rng.choice(FEELINGS)} and wore {rng.choice(LOOKS)} shoes"
        )
    teller.paragraph()
    pairs = list(pairwise(runners))
    for fast, slow in rng.sample(pairs, len(pairs)):
        verb = rng.choice(
            ("came in just before {}", "left {} behind at the last corner", "was faster than {}")
        )
        teller.say(f"{fast.name} {verb.format(slow.name)}")
    teller.paragraph()
    places = ("first", "second", "third", "fourth", "fifth", "sixth")
    teller.say(
        "So the order was this: " + listing([f"{r.name} {p}" for r, p in zip(runners, places, strict=False)])
    )
    teller.say(
        f"The {prize} went to {runners[0].name} the {runners[0].trade}; {runners[-1].name} carried the shoes"
    )
    return teller.text()


STORIES: dict[str, Callable[[Rng], str]] = {
    "journey": journey,
    "market": market,
    "mystery": mystery,
    "nested": nested,
    "letters": letters,
    "race": race,
}
