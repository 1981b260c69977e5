"""Grammar of the domain "philosophy": arguments whose conclusions follow from what was granted before.

Terms and premises are drawn at random; the inferences are not. Citations point to the line that is used,
objections are answered one by one, and a speaker never forgets what was conceded.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from nano_think.data.builtin_words import (
    CONCEPTS,
    DEEDS,
    DUES,
    PLACES,
    THINKERS,
    TRADES,
    TRAITS,
    VALUES,
    Rng,
    article,
    listing,
    number_word,
    sentence,
)

_ASSENT = (
    "Certainly.",
    "So it seems.",
    "I grant it.",
    "How could it be otherwise?",
    "Yes, {n}.",
    "It must be so.",
)
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")


def dialogue(rng: Rng) -> str:
    """Two speakers: a definition, a chain of admissions, and a conclusion against the definition."""
    asker, answerer = rng.sample(THINKERS, 2)
    chain = rng.sample(CONCEPTS, rng.between(3, 5))
    claimed, proper = rng.sample(TRAITS, 2)
    lines = []

    def speak(name: str, text: str) -> None:
        lines.append(f"{name.upper()}: {sentence(text)}")

    speak(asker, f"tell me, {answerer}, what you hold {article(chain[0])} to be")
    speak(
        answerer, f"I say that every {chain[0]} is {claimed}, and that nothing which is {proper} is {claimed}"
    )
    speak(
        asker,
        rng.choice(
            ("A bold saying.", "Let us test it.", f"You speak as they speak at the {rng.choice(PLACES)}.")
        ),
    )
    for lower, upper in pairwise(chain):
        question = rng.choice(
            (f"is not every {lower} {article(upper)}?", f"do you call {article(lower)} {article(upper)}?")
        )
        speak(asker, f"{rng.choice(('and', 'then', 'now'))} {question}")
        speak(answerer, rng.choice(_ASSENT).format(n=asker))
        if rng.chance(30):
            example = rng.choice(TRADES)
            speak(asker, f"as the {example} says of {rng.choice(('his tools', 'his art', 'his trade'))}")
    speak(asker, f"and every {chain[-1]}, you will agree, is {proper}")
    speak(answerer, rng.choice(_ASSENT).format(n=asker))
    steps = listing([f"every {a} is {article(b)}" for a, b in pairwise(chain)])
    speak(asker, f"but if {steps}, then every {chain[0]} is {article(chain[-1])}, and therefore is {proper}")
    speak(answerer, "That follows.")
    speak(asker, f"and what is {proper}, you said, is not {claimed}")
    speak(answerer, "I did say so.")
    speak(
        asker,
        f"then {article(chain[0])} is not {claimed}, {answerer}, though you first said that every one is",
    )
    endings = (
        f"I no longer know what {article(chain[0])} is",
        f"Then I must give up either that, or that every {chain[-1]} is {proper}",
        f"Let us begin again tomorrow, {asker}, with {article(chain[1])}",
    )
    speak(answerer, rng.choice(endings))
    return "\n\n".join(lines)


def treatise(rng: Rng) -> str:
    """Axioms and numbered propositions; each proof cites exactly the two statements it combines."""
    chain = rng.sample(CONCEPTS, rng.between(5, 7))
    trait = rng.choice(TRAITS)
    place = {i: number for number, i in enumerate(rng.sample(range(len(chain) - 1), len(chain) - 1), start=1)}
    lines = [f"Of {listing([f'the {name}' for name in chain[:2]])}", ""]
    for i in sorted(place, key=lambda i: place[i]):
        lines.append(f"Axiom {place[i]}. Every {chain[i]} is {article(chain[i + 1])}.")
    last = len(place) + 1
    lines += [f"Axiom {last}. Every {chain[-1]} is {trait}.", ""]
    # upper: how far along the chain the first concept has been carried; the next axiom is always the one
    # needed.
    for number in range(1, len(chain) - 1):
        source = f"Axiom {place[0]}" if number == 1 else f"Proposition {number - 1}"
        middle, upper = chain[number], chain[number + 1]
        proof = rng.choice(
            (
                f"Every {chain[0]} is {article(middle)} (by {source}), "
                f"and every {middle} is {article(upper)} (by Axiom {place[number]})",
                f"Let there be {article(chain[0])}. By {source} it is {article(middle)}; "
                f"by Axiom {place[number]} it is {article(upper)}",
            )
        )
        lines += [
            f"Proposition {number}. Every {chain[0]} is {article(upper)}.",
            f"Proof. {proof}. Q.E.D.",
            "",
        ]
    final, other = len(chain) - 1, chain[rng.between(1, len(chain) - 2)]
    lines += [
        f"Proposition {final}. Every {chain[0]} is {trait}.",
        f"Proof. By Proposition {final - 1} every {chain[0]} is {article(chain[-1])}, "
        f"which by Axiom {last} is {trait}. Q.E.D.",
        "",
        f"Corollary. What is not {trait} is no {chain[0]}, and no {other} either.",
    ]
    return "\n".join(lines)


def disputation(rng: Rng) -> str:
    """A question with objections; the answer draws a distinction, the replies take each in turn."""
    subject, *middles = rng.sample(CONCEPTS, rng.between(4, 5))
    claim, *reasons = rng.sample(TRAITS, len(middles) + 1)
    authority, place = rng.choice(THINKERS), rng.choice(PLACES)
    first, second = rng.sample(
        ("in itself", "for us", "in its beginning", "in its end", "as a whole", "in its parts"), 2
    )
    parts = [f"Whether {article(subject)} is {claim}"]
    for number, (middle, reason) in enumerate(zip(middles, reasons, strict=True), start=1):
        lead = "It seems that it is not; for" if number == 1 else "Further,"
        likeness = rng.choice((f"a kind of {middle}", f"nothing but {article(middle)}"))
        parts.append(
            f"Objection {number}. {lead} {article(middle)} is {reason}, and what is {reason} is not {claim}. "
            f"But {article(subject)} is {likeness}."
        )
    parts.append(f"On the contrary, {authority} wrote at the {place}: every {subject} is {claim}.")
    parts.append(
        f"I answer that {article(subject)} may be considered {first} or {second}. "
        f"{first.capitalize()} it is {claim}, as {authority} says; {second} it need not be."
    )
    for number, (middle, reason) in enumerate(zip(middles, reasons, strict=True), start=1):
        parts.append(
            f"Reply to Objection {number}. That {article(middle)} is {reason} is true {second}, "
            f"but the question was whether {article(subject)} is {claim} {first}."
        )
    return "\n\n".join(parts)


def ranking(rng: Rng) -> str:
    """Preferences given in pairs; the highest, the lowest and every comparison asked for follow from them."""
    author = rng.choice(THINKERS)
    order = rng.sample(VALUES, rng.between(4, 6))
    witnesses = rng.sample(TRADES, len(order) - 1)
    lines = [f"Of the order of goods, after {author}", ""]
    pairs = list(zip(pairwise(order), witnesses, strict=True))
    for number, ((better, worse), witness) in enumerate(rng.sample(pairs, len(pairs)), start=1):
        trait = rng.choice(TRAITS)
        reasons = (
            f"The {witness} gives up {worse} for {better}; therefore {better} is better than {worse}.",
            f"Since {better} is {trait} and {worse} is not, {better} is to be preferred to {worse}.",
            f"No {witness} would part with {better} to gain {worse}: so {better} ranks above {worse}.",
        )
        lines.append(f"{number}. {rng.choice(reasons)}")
    lines += ["", f"From these {number_word(len(pairs))} comparisons {author} reasons as follows."]
    for _ in range(rng.between(2, 4)):
        low = rng.between(1, len(order) - 1)
        high = rng.below(low)
        link = "" if low - high == 1 else f", by way of {listing(order[high + 1 : low])}"
        lines.append(
            f"If one must choose between {order[low]} and {order[high]}, one chooses {order[high]}{link}."
        )
    lines += [
        f"The highest of these goods is {order[0]} and the lowest is {order[-1]}.",
        f"The whole order, from the highest down, is {listing(order)}.",
    ]
    return "\n".join(lines)


def city(rng: Rng) -> str:
    """Laws of an imagined city applied to cases: the deed gives what is owed, and the other way round."""
    founder, count = rng.choice(THINKERS), rng.between(3, 5)
    deeds, dues = rng.sample(DEEDS, count), rng.sample(DUES, count)
    lines = [
        f"Suppose with {founder} a city at the {rng.choice(PLACES)} that has only {number_word(count)} laws.",
        "",
    ]
    for i in range(count):
        lines.append(f"Law {_ROMAN[i]}. Whoever {deeds[i]} {dues[i]}; and no one else {dues[i]}.")
    lines.append("")
    for name in rng.sample(THINKERS, rng.between(3, 5)):
        i = rng.below(count)
        trade = rng.choice(TRADES)
        cases = (
            f"{name} the {trade} {deeds[i]}. By Law {_ROMAN[i]}, {name} {dues[i]}.",
            f"{name} the {trade} {dues[i]}. Since only one who {deeds[i]} {dues[i]}, "
            f"it follows by Law {_ROMAN[i]} that {name} {deeds[i]}.",
            f"Of {name} the {trade} we know only that it is not {name} who {deeds[i]}. "
            f"Then by Law {_ROMAN[i]} it is not {name} who {dues[i]}.",
        )
        lines.append(rng.choice(cases))
    value, other = rng.sample(VALUES, 2)
    lines += [
        "",
        f"If {founder} is right, such a city has {value}, but whether it has {other} the laws do not say.",
    ]
    return "\n".join(lines)


ARGUMENTS: dict[str, Callable[[Rng], str]] = {
    "dialogue": dialogue,
    "treatise": treatise,
    "disputation": disputation,
    "ranking": ranking,
    "city": city,
}
