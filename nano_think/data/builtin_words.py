"""Word lists of the built-in grammars, and a random generator that is the same on every Python version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_MASK = (1 << 64) - 1


class Rng:
    """Counter-based generator (splitmix64) keyed by plain values; `random` may change between versions."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        self._state = int.from_bytes(digest, "little")

    def below(self, n: int) -> int:
        """Return an integer in [0, n)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return (z ^ (z >> 31)) % n

    def between(self, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """Return True in `percent` of 100 calls."""
        return self.below(100) < percent

    def choice(self, items: Sequence[T]) -> T:
        """Return one of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different items in random order."""
        pool = list(items)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


@dataclass(frozen=True)
class Person:
    """Someone in a tale, with the words that refer to them."""

    name: str
    female: bool
    trade: str = ""

    @property
    def she(self) -> str:
        """Subject pronoun."""
        return "she" if self.female else "he"

    @property
    def her(self) -> str:
        """Object pronoun."""
        return "her" if self.female else "him"

    @property
    def hers(self) -> str:
        """Possessive determiner."""
        return "her" if self.female else "his"


def people(rng: Rng, count: int) -> list[Person]:
    """Return `count` persons with different names and trades."""
    names = rng.sample(WOMEN + MEN, count)
    trades = rng.sample(TRADES, count)
    return [Person(name, name in WOMEN, trade) for name, trade in zip(names, trades, strict=True)]


def article(noun_phrase: str) -> str:
    """Return the phrase with "a" or "an" before it."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def listing(items: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def sentence(text: str) -> str:
    """Return the text with a capital first letter and a full stop, if it has no end mark yet."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" or text[-2:] in ('."', '!"', '?"') else text + "."


def number_word(n: int) -> str:
    """Return a whole number from 0 to 999 in words."""
    if n < 20:
        return _UNITS[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"-{_UNITS[n % 10]}" if n % 10 else "")
    return f"{_UNITS[n // 100]} hundred" + (f" and {number_word(n % 100)}" if n % 100 else "")


def ordinal_word(n: int) -> str:
    """Return "first", "second", ... for 1 to 999."""
    head, separator, tail = number_word(n).rpartition("-" if "-" in number_word(n) else " ")
    irregular = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth"}
    irregular |= {"nine": "ninth", "twelve": "twelfth"}
    ending = irregular.get(tail) or (f"{tail[:-1]}ieth" if tail.endswith("y") else f"{tail}th")
    return head + separator + ending


def _items(text: str) -> tuple[str, ...]:
    """Split a list whose items are separated by semicolons."""
    return tuple(" ".join(item.split()) for item in text.split(";"))


_UNITS = _items(
    """
    no; one; two; three; four; five; six; seven; eight; nine; ten; eleven; twelve; thirteen; fourteen;
    fifteen; sixteen; seventeen; eighteen; nineteen
    """
)
_TENS = _items("twenty; thirty; forty; fifty; sixty; seventy; eighty; ninety")
WOMEN = _items(
    """
    Ada; Agnes; Alma; Beatrix; Bettina; Carlotta; Cecily; Clara; Delia; Dorothea; Edith; Elsa; Esther;
    Fenella; Flora; Greta; Hanna; Helena; Ida; Ingrid; Iris; Jessamy; Johanna; Judith; Katrin; Lena;
    Lidia; Louisa; Magda; Marian; Marit; Nadia; Nell; Olive; Ottilie; Paula; Petra; Rosalind; Ruta;
    Sabine; Selma; Sofia; Tilda; Ulla; Vera; Wilma; Yvonne; Zelda
    """
)
MEN = _items(
    """
    Adam; Albin; Anselm; Arno; Benedikt; Bruno; Caspar; Cedric; Conrad; Dario; Dominic; Edmund; Emil;
    Ernest; Fabian; Felix; Georg; Gustav; Harald; Hugo; Ivo; Jakob; Jasper; Jonas; Karel; Konstantin;
    Lambert; Leo; Ludwig; Magnus; Marcus; Milo; Nikolas; Norbert; Oskar; Otto; Pavel; Philip; Quentin;
    Ralf; Roland; Rufus; Sander; Silas; Tobias; Tomas; Ulrich; Viktor; Walter; Wendel; Yorick
    """
)
TRADES = _items(
    """
    baker; beekeeper; blacksmith; bookbinder; brewer; candlemaker; carpenter; carter; cartographer;
    clockmaker; cobbler; cooper; doctor; dyer; farmer; ferryman; fiddler; fisher; gardener; glassblower;
    goldsmith; innkeeper; locksmith; mason; miller; painter; piper; potter; printer; ropemaker; saddler;
    sailmaker; schoolteacher; shepherd; smuggler; spinner; tailor; tanner; thatcher; tinker; weaver;
    wheelwright; woodcutter
    """
)
PLACES = _items(
    """
    mill; harbour; lighthouse; quarry; orchard; old bridge; market square; stone chapel; ferry house;
    north gate; salt works; beech wood; boat yard; clock tower; upper meadow; brick kiln; hunting lodge;
    fish market; rope walk; ruined abbey; mountain pass; school house; toll house; vineyard; smithy;
    village green; east pier; granary; bell tower; heron lake; chalk cliffs; winter camp; sheepfold;
    paper mill; deep well; fairground; marsh road; castle ditch; guild hall; lower lock
    """
)
OBJECTS = _items(
    """
    lantern; kettle; compass; fiddle; basket; key; whistle; letter; blanket; map; knife; mirror; bell;
    rope; book; ring; spoon; hammer; coat; candlestick; box; cup; needle case; pocket watch; telescope;
    music box; walking stick; saddle; umbrella; ink bottle; brooch; flute; drum; scarf; purse; jug;
    chess piece; seal; lamp; anchor; spindle; helmet; pair of scissors; pair of boots; pipe; comb;
    clasp; hourglass; loaf tin; fishing net
    """
)
LOOKS = _items(
    """
    copper; silver; wooden; painted; broken; blue; red; green; black; white; yellow; striped; heavy;
    small; dented; polished; rusty; carved; leather; ivory; iron; brass; crooked; faded; borrowed;
    gilded; plain; narrow; patched; scratched; tin; velvet; woollen; amber; grey
    """
)
GOODS = _items(
    """
    apples; pears; eggs; candles; loaves; herrings; lemons; horseshoes; ribbons; baskets; jars of honey;
    balls of wool; sacks of flour; cheeses; nails; buttons; plums; walnuts; brooms; bricks; geese;
    onions; barrels of cider; tiles; bundles of reeds; cabbages
    """
)
ANIMALS = _items(
    """
    fox; heron; badger; hare; crow; otter; wolf; owl; goat; donkey; magpie; toad; stork; hedgehog; swan;
    weasel
    """
)
WEATHER = _items(
    """
    a thin rain was falling; the wind came from the sea; the first snow lay on the roofs;
    fog filled the valley; the sun had not yet risen; the evening was warm and still;
    thunder walked along the hills; frost had drawn ferns on every window; the moon was almost full;
    the roads were deep in mud; swallows were flying low; a dry heat stood between the houses
    """
)
TIMES = _items(
    """
    in the last week of {m}; on the second day of {m}; one morning in {m}; late in {m};
    on the eve of the {m} fair; in the coldest {m} that anyone remembered; at the end of a wet {m};
    when {m} was half over
    """
)
MONTHS = _items(
    """
    January; February; March; April; May; June; July; August; September; October; November; December
    """
)
FEELINGS = _items(
    """
    glad; tired; afraid; proud; curious; ashamed; content; uneasy; patient; angry; hopeful; sad
    """
)
# Philosophy: things a chain of "every X is Y" can be built from, and what can be said of them.
CONCEPTS = _items(
    """
    act of courage; act of justice; act of mercy; artefact; belief; body; cause; choice; city; command;
    craft; custom; desire; doubt; duty; effect; emotion; event; fear; form; friendship; gift; habit;
    hope; idea; image; instrument; intention; judgement; law; living thing; measure; memory; motion;
    name; number; opinion; passion; perception; pleasure; power; principle; promise; proof; punishment;
    quality; question; reason; relation; rule; science; sensation; sign; soul; substance; thought;
    truth; virtue; vow; whole; will; wish; work of art
    """
)
TRAITS = _items(
    """
    divisible; known only through its effects; good in itself; subject to change; older than its name;
    shared by many; never complete; dependent on another; able to be taught; open to correction;
    useful to the city; present in time; without parts; capable of more and less;
    moved by something else; expressed in words; measured by its end; hidden from the senses;
    the same for all; chosen for its own sake; bound to a place; easily mistaken for its likeness;
    strengthened by use; lost by neglect; harder to keep than to gain; intelligible; limited;
    one in kind
    """
)
VALUES = _items(
    """
    honour; health; wealth; wisdom; friendship; freedom; fame; leisure; safety; truth; beauty; power;
    peace; skill; piety; pleasure; knowledge; courage; good order; a quiet mind; a long life;
    the praise of the many; a just law
    """
)
THINKERS = _items(
    """
    Aristeas; Callias; Damaris; Diotimus; Eudora; Glaucis; Hermon; Iphicles; Kleon; Lysander; Melissa;
    Nikias; Oenone; Phaidra; Philon; Polydora; Protas; Simmon; Theano; Theron; Timaia; Xanthe; Zenon
    """
)
DEEDS = _items(
    """
    breaks a promise; hides a stranger; sells a false measure; teaches without fee; leaves a post;
    speaks for the accused; closes a well; returns a debt late; plants an orchard; burns a letter
    """
)
DUES = _items(
    """
    must keep silent for a year; receives a house; loses the vote; must plough the common field;
    is named at the feast; must guard the gate; owes the city a song; may not bear witness
    """
)
# Scripture: invented peoples and lands, and the plain words of chronicles and psalms.
PATRIARCHS = _items(
    """
    Abiram; Adonel; Amaziel; Asaph; Azarel; Baruk; Beriah; Eleph; Eliab; Elnath; Gaddiel; Hadoram;
    Hanokh; Hodesh; Ithmar; Jahdai; Jareth; Jekuel; Jorim; Kemuah; Kenaz; Lemek; Malkiel; Matthan;
    Melea; Naharai; Nathael; Nogah; Obal; Omri; Pedael; Peleth; Rephael; Resheph; Salmah; Semei;
    Shaphan; Tahan; Tolah; Uriel; Uzal; Zabdi; Zaccur; Zereth; Zimran
    """
)
MATRIARCHS = _items(
    """
    Abital; Adinah; Atarah; Azubah; Basmath; Dinorah; Eglah; Hadassel; Helah; Hodiah; Iskah; Jedidah;
    Keturel; Maacah; Milkah; Naarah; Orpah; Peninel; Rizpah; Serah; Tamarel; Timnah; Zibiah
    """
)
LANDS = _items(
    """
    Aramel; Besorah; Cabul; Dedanel; Elath; Gilboth; Hamarah; Ibleam; Jabneth; Kedemah; Lodebar;
    Mizpath; Naioth; Ophrah; Pelonah; Ramathel; Siddim; Tirzath; Uzzah; Zoarim
    """
)
PRAISED = _items(
    """
    the hills; the deep waters; the morning stars; the cedars; the islands; the young lions;
    the north wind; the harvest; the ends of the earth; the gates of the city; the rivers;
    the sparrow on the roof; the elders; the dew; the thunder; the vine and the fig tree
    """
)
MERCIES = _items(
    """
    lifted the poor out of the dust; counted the number of the stars; opened a door in the sea;
    remembered the covenant; broken the bow of the mighty; fed the flock in a dry land;
    set a lamp before our feet; heard the cry of the widow; made the crooked places straight;
    turned our mourning into dancing; brought back the captives; kept the door of our lips;
    set the bounds of the waters; given bread to the hungry; healed the broken in heart
    """
)
REFRAINS = _items(
    """
    for {p} mercy standeth from age to age; and let all the people say, Amen;
    blessed be {p} name in {p} holy hill; who is like unto {o} among the mighty;
    {s} is our rock, we shall not be moved; unto {o} be the song at evening and at dawn;
    therefore will I wait, and {s} will hear me
    """
)
# "base form, second person, rest".
STATUTES = _items(
    """
    leave leavest the corners of thy field to the stranger; keep keepest a true weight in thy bag;
    lend lendest thy garment to the poor before night; honour honourest the grey head in the gate;
    give givest rest to thine ox on the seventh day; pay payest the hireling ere the sun go down;
    bring bringest the firstfruits into the storehouse; spare sparest the tree that beareth fruit;
    open openest thy well to the traveller; feed feedest the bird that nesteth in thy wall;
    bless blessest the bread ere thou eat it; tell tellest thy son what was of old
    """
)
FRUITS = _items(
    "thy corn; thy vineyard; thy flocks; thy children; thy city; thy rain; thy bread; thy house; thy sleep"
)
# "thing: what is done with it", for the parables.
SCENES = _items(
    """
    door: found {} shut, and knocked until evening; lamp: lit {} and set it in the window;
    field: bought {} for all that he had; road: chose {} that no man kept;
    well: digged {} where there had been stones; seal: lost {} and swept the whole house;
    net: cast {} by night and drew it in by day; guest: received {} whom he did not know;
    wall: built {} and left one stone out; seed: hid {} in the ground and slept;
    coat: gave {} to one who had two; measure: broke {} that had been false
    """
)
MEANINGS = _items(
    """
    mercy; the word; patience; the end of days; faith; the neighbour; repentance; the kingdom; prayer;
    the fear of the Lord; wisdom; the law; hope; thanksgiving
    """
)
