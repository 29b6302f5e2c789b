"""What facts may say: values drawn at random, of lists written for this file or made of syllables and digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_NAMES = (
    "Ada Alma Anton Arthur Astrid Beatrix Benno Birgit Bram Carla Cedric Clara Cosima Dario Delia Dorian Edith "
    "Edgar Ella Emil Erika Esther Fabian Fergus Flora Frieda Gideon Gina Gustav Hanna Hector Helga Henrik Ida "
    "Ilse Ingrid Ivo Jasper Joan Judith Kasimir Keira Konrad Lars Lena Linus Lotte Luisa Magnus Marta Matilda "
    "Milo Mira Nadia Nestor Noor Otto Paula Percy Petra Quentin Ralph Ramona Rufus Ruth Selma Silas Simone Sven "
    "Tara Theo Thelma Ulrich Una Vera Viktor Walter Wanda Xaver Yara Yusuf Zelda"
)
_SURNAMES = (
    "Abbott Barlow Calloway Dunmore Easton Farrow Gentry Holloway Iverson Jarvis Kessler Langley Merton Norwood "
    "Osborne Pemberton Quigley Rosser Sheridan Thackeray Underhill Vance Whitlock Yardley Zimmer"
)
_TOWNS = (
    "Aarhus Antwerp Bilbao Bologna Bremen Brighton Cadiz Cardiff Coimbra Delft Dijon Dundee Durham Exeter Galway "
    "Genoa Haarlem Innsbruck Kiel Lausanne Linz Lucerne Lund Maastricht Mainz Modena Nantes Norwich Odense Ostend "
    "Padua Perth Pisa Rennes Riga Rouen Salzburg Siena Tallinn Tampere Toledo Trieste Trondheim Ulm Utrecht "
    "Verona Vilnius Visby Zagreb"
)
_JOBS = (
    "architect beekeeper blacksmith bookbinder butcher cartographer cellist clockmaker conductor dancer diver "
    "editor engineer firefighter gardener geologist glazier goldsmith illustrator joiner judge locksmith mason "
    "midwife miller optician painter pharmacist potter printer roofer saddler sculptor shepherd surgeon surveyor "
    "translator upholsterer vet weaver"
)
_COLOURS = (
    "amber apricot aquamarine black blue bronze burgundy charcoal copper coral cream emerald grey ivory khaki "
    "lavender lilac magenta mint mustard navy ochre peach plum red rust salmon sand teal white"
)
_FOODS = (
    "apple pie, baked beans, borscht, bread pudding, cabbage rolls, carrot cake, cheese toast, chestnut soup, "
    "chili, couscous, crab cakes, fish stew, fried rice, gnocchi, grilled aubergine, hummus, lentil soup, mashed "
    "potatoes, meatballs, moussaka, mushroom pie, onion tart, pea soup, pickled herring, polenta, pumpkin bread, "
    "ratatouille, rice pudding, roast duck, rye bread, sauerkraut, shakshuka, spinach pie, stuffed peppers, "
    "tomato salad, tortillas, trout, waffles, wild rice"
)
_HOBBIES = (
    "astronomy, baking, basketry, birdwatching, bookbinding, calligraphy, canoeing, caving, chess, crochet, "
    "dancing, darts, embroidery, falconry, fishing, folk singing, gardening, gliding, hiking, juggling, kite "
    "flying, knitting, lacework, model trains, mosaics, origami, orienteering, photography, pottery, puppetry, "
    "quilting, sailing, skating, sketching, surfing, table tennis, wood carving, yoga"
)
_ANIMALS = (
    "badger beaver bison crane crow donkey eel ferret finch fox goat goose hare hedgehog heron ibex jackal "
    "kestrel lamb llama lynx magpie marten mole moose newt otter owl panther parrot pelican pony puffin quail "
    "raven seal snail squirrel stork swan toad tortoise trout turtle viper walrus weasel wolf wren yak zebra"
)
_THINGS = (
    "anvil basin bell blanket bucket cabinet carpet chain chisel clasp compass crate cushion drum easel fiddle "
    "flag flask fork funnel globe hinge hook jar jug kettle knife ladle lamp lens loom mallet map medal mug nail "
    "net oar paddle pan pin plate plough pulley quill rake razor rope ruler sack saw scarf shelf sieve sled spade "
    "spoon stool tent thimble tray vase wheel whip wrench"
)
_QUALITIES = (
    "ancient bitter blunt brave bright broken calm clever cold crooked curious dark deep distant dusty eager "
    "early empty faithful famous fierce foreign frozen gentle giant golden hidden hollow honest humble idle jolly "
    "late lazy little lonely loud lucky mild modest narrow noble nimble odd patient plain polite proud quick "
    "quiet rapid rare restless rough round royal rusty secret sharp shy silent simple sleepy slow smooth solid "
    "spare steep stern strange sturdy sudden sweet tall tame tidy tiny upright vast warm weary wild wise wooden "
    "young"
)
_FLOURISHES = "Club Works House Yard Hall Street Brothers Point Row Lane Mill Court"
_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_ONSETS = "b br c d dr f fl g gr h j k kr l m n p pl qu r s sh st t th tr v w y z"
_VOWELS = "a e i o u ai ea io ou"
_ENDS = "l m n nd r rk s st th x"

Draw = Callable[[np.random.Generator], str]


def pick(rng: np.random.Generator, some: Sequence[str]) -> str:
    """One of some, each as likely."""
    return some[int(rng.integers(len(some)))]


def invented(rng: np.random.Generator) -> str:
    """A name of two or three syllables that nobody has."""
    syllables = int(rng.integers(2, 4))
    parts = (pick(rng, _ONSETS.split()) + pick(rng, _VOWELS.split()) for _ in range(syllables))
    end = pick(rng, _ENDS.split()) if rng.random() < 0.5 else ""
    return ("".join(parts) + end).capitalize()


def digits(count: int) -> Draw:
    """Numbers of so many digits, the first not 0."""
    return lambda rng: str(int(rng.integers(10 ** (count - 1), 10**count)))


def hexadecimal(count: int) -> Draw:
    """So many hexadecimal digits."""
    return lambda rng: "".join(pick(rng, "0123456789abcdef") for _ in range(count))


def of(words: str, separator: str | None = None) -> Draw:
    """A word of a list."""
    some = words.split(separator)
    return lambda rng: pick(rng, some)


def either(*draws: Draw) -> Draw:
    """What one of several draws says."""
    return lambda rng: draws[int(rng.integers(len(draws)))](rng)


def joined(separator: str, *draws: Draw) -> Draw:
    """What several draws say, side by side."""
    return lambda rng: separator.join(draw(rng) for draw in draws)


def number(least: int, most: int) -> Draw:
    """A whole number from `least` to `most`."""
    return lambda rng: str(int(rng.integers(least, most + 1)))


_PETS = (
    "Acorn Bramble Button Caramel Cricket Dusty Flint Ginger Hazel Inky Jasper Jinx Muffin Nutmeg Patch Peanut Pippin "
    "Pumpkin Raffles Rascal Rocket Scout Smokey Snowy Socks Sooty Tansy Thistle Toffee Truffle Whiskers Willow"
)
_TIPPLES = (
    "apple juice, barley water, camomile tea, cherry juice, cold brew, elderflower cordial, ginger beer, green tea, "
    "hot chocolate, iced tea, malt beer, mango lassi, mineral water, peppermint tea, port, red wine, sherry, "
    "tonic water"
)
_LANGUAGES = (
    "Albanian Arabic Armenian Breton Bulgarian Catalan Croatian Danish Estonian French Galician German Hungarian "
    "Icelandic Irish Japanese Latvian Maltese Norwegian Persian Portuguese Romanian Russian Serbian Slovak Spanish "
    "Swedish Tamil Thai Ukrainian Urdu Vietnamese Yiddish Zulu"
)
_MATERIALS = (
    "alder ash bamboo beech birch brass cane cedar cherry chestnut concrete cork elm glass larch linen marble "
    "oak pine plywood poplar rattan slate spruce steel teak walnut wool"
)
_FLOORS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_PLANTS = (
    "agave aloe azalea basil begonia cactus clivia coleus cyclamen fern fuchsia geranium hibiscus hyacinth ivy jade "
    "jasmine mint monstera myrtle oleander palm primrose rosemary sage thyme yucca"
)
_SPOTS = "behind beneath beside inside under"
_FURNITURE = "cupboard bench barrel chest clock desk dresser mirror oven piano sofa staircase wardrobe stove bookcase"

_thing, _quality, _animal = of(_THINGS), of(_QUALITIES), of(_ANIMALS)
_first, _surname = of(_NAMES), of(_SURNAMES)
_letters = joined("", *[of("A B C D E F G H J K L M N P R S T V W X Z")] * 2)

VALUES: dict[str, Draw] = {
    "name": either(_first, _first, invented, joined(" ", _first, _surname)),
    "surname": either(_surname, invented),
    "town": either(of(_TOWNS), of(_TOWNS), invented),
    "job": of(_JOBS),
    "colour": either(of(_COLOURS), of(_COLOURS), joined(" ", of("dark light pale"), of(_COLOURS))),
    "food": of(_FOODS, ", "),
    "hobby": of(_HOBBIES, ", "),
    "animal": _animal,
    "thing": _thing,
    "brand": either(invented, invented, joined(" ", _surname, of(_FLOURISHES))),
    "title": either(
        joined(" ", of("The"), lambda rng: _quality(rng).capitalize(), lambda rng: _animal(rng).capitalize()),
        joined(" ", lambda rng: _quality(rng).capitalize(), lambda rng: _thing(rng).capitalize()),
        invented,
    ),
    "street": joined(" ", number(2, 199), either(_surname, invented), of("Road Lane Street Avenue Hill")),
    "day": of(_DAYS),
    "month": of(_MONTHS),
    "date": joined(" ", number(1, 28), of(_MONTHS)),
    "year": number(1931, 2024),
    "time": joined(":", number(6, 22), of("05 10 15 20 25 30 35 40 45 50 55")),
    "count": number(2, 99),
    "room": number(100, 989),
    "extension": either(digits(3), digits(4)),
    "code": either(digits(4), digits(5), digits(5), digits(6)),
    "digits5": digits(5),
    "plate": joined("-", _letters, digits(4)),
    "flight": joined(" ", _letters, digits(3)),
    "word": either(_thing, _animal, _quality),
    "words": joined(" ", either(_quality, _animal, _thing), either(_thing, _animal)),
    "price": joined(" ", number(12, 990), of("euros pounds dollars francs")),
    "hex8": hexadecimal(8),
    "uuid": joined("-", hexadecimal(4), hexadecimal(4), hexadecimal(4)),
    "pin": either(digits(4), digits(4), digits(5), digits(6)),
    "digits4": digits(4),
    "digits6": digits(6),
    "digits7": digits(7),
    "digits8": digits(8),
    "digits9": digits(9),
    "anydigits": either(*(digits(count) for count in (4, 5, 5, 5, 6, 7, 8, 9))),
    "lettered": either(
        joined("", _letters, digits(3)),
        joined("-", digits(3), _letters, digits(2)),
        joined("", digits(2), _letters, digits(2)),
    ),
    "longcode": either(
        digits(7), digits(8), digits(9), joined("", _letters, digits(6)), joined("-", digits(4), digits(4))
    ),
    "reference": either(joined("", _letters, digits(2), _letters), joined("-", _letters, digits(5)), digits(6)),
    "postcode": either(digits(5), joined(" ", joined("", _letters, number(1, 9)), joined("", number(1, 9), _letters))),
    "paintcode": joined(" ", of("RAL NCS HX TK"), digits(4)),
    "phone": either(joined(" ", digits(3), digits(3), digits(4)), joined("-", digits(4), digits(5)), digits(7)),
    "username": either(
        lambda rng: invented(rng).lower() + str(int(rng.integers(10, 99))),
        joined("_", _quality, _animal),
        joined(".", _thing, digits(3)),
    ),
    "schoolname": joined(" ", either(_surname, invented), of("School College Academy")),
    "floor": of(_FLOORS),
    "age": number(19, 96),
    "number": number(2, 40),
    "minutes": joined(" ", number(12, 95), of("minutes")),
    "kilometres": joined(" ", number(2, 40), of("kilometres")),
    "centimetres": joined(" ", number(41, 240), of("centimetres")),
    "area": joined(" ", number(6, 140), of("square metres", ",")),
    "degrees": joined(" ", number(150, 250), of("degrees")),
    "milligrams": joined(" ", number(5, 800), of("milligrams")),
    "score": joined(":", number(3, 30), number(0, 30)),
    "pressure": joined(" over ", number(105, 160), number(60, 99)),
    "monthyear": joined(" ", of(_MONTHS), number(2026, 2039)),
    "spot": joined(
        " ", of(_SPOTS), of("the"), either(_quality, of(_COLOURS)), either(of(_FURNITURE), of(_FURNITURE), _thing)
    ),
    "pet": either(of(_PETS), of(_PETS), invented),
    "tipple": of(_TIPPLES, ", "),
    "language": of(_LANGUAGES),
    "material": of(_MATERIALS),
    "plantname": of(_PLANTS),
    "invented": invented,
    "phrase": joined(" ", _quality, either(_thing, _animal)),
    "size": number(34, 48),
    "weight": joined(" ", number(3, 90), of("kilos")),
}
