"""Grammar of the domain "theology": chapters in numbered verses, with genealogies, reigns, laws, psalms and
parables.

Ages add up, sons follow fathers, refrains return word for word, and every curse mirrors its blessing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from nano_think.data.builtin_words import (
    ANIMALS,
    FRUITS,
    LANDS,
    MATRIARCHS,
    MEANINGS,
    MERCIES,
    PATRIARCHS,
    PRAISED,
    REFRAINS,
    SCENES,
    STATUTES,
    TRADES,
    Rng,
    article,
    listing,
    number_word,
    ordinal_word,
)


def _chapter(rng: Rng, title: str, verses: Sequence[str]) -> str:
    lines = [f"{i} {verse[0].upper()}{verse[1:]}" for i, verse in enumerate(verses, start=1)]
    return f"{title} {rng.between(1, 40)}\n\n" + "\n".join(lines)


def genealogy(rng: Rng) -> str:
    """Generations: years before and after the son are given and their sum is the length of the life."""
    names = rng.sample(PATRIARCHS, rng.between(6, 9))
    land, wives = rng.choice(LANDS), rng.sample(MATRIARCHS, len(names))
    verses = [f"now these are the generations of {names[0]}, who dwelt in the land of {land}."]
    total = 0
    for i, (father, son) in enumerate(pairwise(names)):
        before, after = rng.between(20, 90), rng.between(30, 400)
        life = number_word(before + after)
        total += before
        verses.append(
            f"And {father} lived {number_word(before)} years, and took {wives[i]} to wife, and begat {son}."
        )
        verses.append(
            f"And {father} lived after he begat {son} {number_word(after)} years, and begat sons and "
            f"daughters: and all the days of {father} were {life} years: and he died."
        )
    verses.append(
        f"From the birth of {names[0]} unto the birth of {names[-1]} were {number_word(total)} years, "
        f"and these are their names: {listing(names)}."
    )
    return _chapter(rng, "Generations", verses)


def kings(rng: Rng) -> str:
    """Reigns: each king follows his father, is judged by him, and is dated by the king of another land."""
    left, right = rng.sample(LANDS, 2)
    names = rng.sample(PATRIARCHS, rng.between(5, 7))
    other, year = rng.choice([name for name in PATRIARCHS if name not in names]), rng.between(1, 9)
    mothers = rng.sample(MATRIARCHS, len(names))
    righteous = rng.chance(50)
    verses = []
    for i, name in enumerate(names):
        reign = rng.between(2, 30)
        start = f"in the {ordinal_word(year)} year of {other} king of {right} began {name}"
        verses.append(f"{start}{f' the son of {names[i - 1]}' if i else ''} to reign over {left}.")
        verses.append(
            f"{number_word(reign).capitalize()} years reigned he in {left}: "
            f"and his mother's name was {mothers[i]} of {rng.choice(LANDS)}."
        )
        follows = i > 0 and rng.chance(65)
        righteous = righteous if follows else (not righteous if i else righteous)
        way = "right" if righteous else "evil"
        if i:
            tail = (
                f"{'according to all that' if follows else 'and not as'} {names[i - 1]} his father had done"
            )
        else:
            tail = "all his days"
        verses.append(f"And he did that which was {way} in the sight of the Lord, {tail}.")
        if not righteous and rng.chance(50):
            verses.append(
                f"For he set up {rng.choice(('a pillar', 'an image of a calf', 'a high place'))} in {left}."
            )
        heir = (
            f"and {names[i + 1]} his son reigned in his stead"
            if i + 1 < len(names)
            else "and there was no king after him"
        )
        verses.append(f"And {name} slept with his fathers, and was buried in {left}: {heir}.")
        year += reign
    return _chapter(rng, "Chronicles of " + left, verses)


def psalm(rng: Rng) -> str:
    """Parallel half-verses with a refrain that returns unchanged; the last verse gathers all the called."""
    spoken = rng.chance(50)
    forms = {"p": "thy", "o": "thee", "s": "thou"} if spoken else {"p": "his", "o": "him", "s": "he"}
    refrain = rng.choice([r for r in REFRAINS if not (spoken and "{s}" in r)]).format(**forms)
    count = rng.between(4, 7)
    called, mercies = rng.sample(PRAISED, count), rng.sample(MERCIES, count)
    verses = []
    for voice, mercy in zip(called, mercies, strict=True):
        opening = f"let {voice} give thanks"
        deed = f"{'for thou hast' if spoken else 'for the Lord hath'} {mercy}"
        verses.append(
            f"{opening}, {deed}: {refrain}." if rng.chance(50) else f"{deed}; {opening}: {refrain}."
        )
        if rng.chance(40):
            verses.append(f"Yea, {voice} and {rng.choice(PRAISED)} shall not be silent.")
    verses.append(f"{listing(called)}, give thanks together: {refrain}.")
    chief = f"To the chief musician, a song of {rng.choice(PATRIARCHS)}"
    return _chapter(rng, f"{chief}\n\nPsalm", verses)


def law(rng: Rng) -> str:
    """Statutes, then blessings for keeping and curses for breaking them, in the same order and words."""
    lawgiver, land, count = rng.choice(PATRIARCHS), rng.choice(LANDS), rng.between(4, 6)
    statutes = [statute.split(" ", 2) for statute in rng.sample(STATUTES, count)]
    fruits = rng.sample(FRUITS, count)
    verses = [f"and these are the statutes which {lawgiver} gave in {land}, {number_word(count)} in number."]
    verses += [f"Thou shalt {base} {rest}." for base, _, rest in statutes]
    verses.append(f"And {lawgiver} set before them a blessing and a curse.")
    for (_, verb, rest), fruit in zip(statutes, fruits, strict=True):
        verses.append(f"If thou {verb} {rest}, then shall {fruit} be increased.")
    verses.append("But if thou wilt not hearken, then shall all these turn upon thee.")
    for (_, verb, rest), fruit in zip(statutes, fruits, strict=True):
        verses.append(f"If thou {verb} not {rest}, then shall {fruit} be taken from thee.")
    verses.append(
        f"And all the people of {land} answered {lawgiver}, We will keep {listing(fruits)} by keeping these."
    )
    return _chapter(rng, "The Law", verses)


def parable(rng: Rng) -> str:
    """A likeness and its meaning: each thing is explained once, in the order of the telling."""
    teacher, asker = rng.sample(PATRIARCHS, 2)
    man, animal = rng.choice(TRADES), rng.choice(ANIMALS)
    scenes = [scene.split(": ") for scene in rng.sample(SCENES, rng.between(3, 5))]
    meanings = rng.sample(MEANINGS, len(scenes) + 2)
    verses = [
        f"and {teacher} opened his mouth in {rng.choice(LANDS)}, saying, There was a certain {man}, "
        f"and with him was {article(animal)}."
    ]
    for thing, deed in scenes:
        verses.append(f"And the {man} {deed.format(article(thing))}.")
        if rng.chance(40):
            verses.append(f"And the {animal} saw the {thing}, and {rng.choice(('was still', 'cried out'))}.")
    verses.append(
        f"Then came {asker} unto {teacher} and said, What meaneth the {man}, and what the {animal}?"
    )
    verses.append(
        f"And {teacher} answered {asker}, The {man} is {meanings[0]}, and the {animal} is {meanings[1]}."
    )
    verses += [f"The {thing} is {meaning}." for (thing, _), meaning in zip(scenes, meanings[2:], strict=True)]
    verses.append(f"Whoso hath understood the {scenes[0][0]} of the {man}, let him hear.")
    return _chapter(rng, "Parables", verses)


def census(rng: Rng) -> str:
    """Tribes numbered one by one, camped around a tent, and a total that is their sum."""
    leader, land = rng.choice(PATRIARCHS), rng.choice(LANDS)
    heads = rng.sample([name for name in PATRIARCHS if name != leader], rng.between(5, 8))
    counts = [rng.between(11, 99) for _ in heads]
    sides = ("the east", "the south", "the west", "the north")
    verses = [f"and {leader} numbered the people in the wilderness of {land}, tribe by tribe."]
    for i, (head, count) in enumerate(zip(heads, counts, strict=True)):
        verses.append(
            f"Of the children of {head}, by their families, were numbered {number_word(count)} men "
            f"able to go forth; and they pitched toward {sides[i % 4]}."
        )
        offered = rng.choice(
            ("bowls of silver", "rams", "measures of fine flour", "spoons of gold", "cords", "oxen")
        )
        verses.append(
            f"And {head} the captain brought for his offering {number_word(rng.between(2, 12))} {offered}."
        )
    verses.append(f"All that were numbered of {listing(heads)} were {number_word(sum(counts))}.")
    for side in sides[: min(4, len(heads))]:
        camp = [head for i, head in enumerate(heads) if sides[i % 4] == side]
        verses.append(f"And on {side} side were the standards of {listing(camp)}.")
    most = heads[counts.index(max(counts))]
    verses.append(f"And the children of {most}, being the most, went before {leader} when they set forward.")
    return _chapter(rng, "Numberings", verses)


SCRIPTURES: dict[str, Callable[[Rng], str]] = {
    "genealogy": genealogy,
    "kings": kings,
    "psalm": psalm,
    "law": law,
    "parable": parable,
    "census": census,
}
