"""Names of classes in other languages, for the question whether a circuit found from English words stops them too."""

from __future__ import annotations

_NAMES = """
african_elephant: elefante africano, afrikanischer elefant
alp: montaña alpina, alpengipfel
american_alligator: caimán americano, mississippi alligator
banana: plátano, banane
beach_wagon: coche familiar, kombi
bee: abeja, biene
bell_pepper: pimiento, paprika
brown_bear: oso pardo, braunbär
bullfrog: rana toro, ochsenfrosch
chihuahua: perro chihuahueño, chihuahuahund
computer_keyboard: teclado, tastatur
convertible: descapotable, cabrio
egyptian_cat: gato egipcio, ägyptische katze
espresso: café solo, kaffee
european_fire_salamander: salamandra común, feuersalamander
freight_car: vagón de carga, güterwagen
german_shepherd: pastor alemán, schäferhund
golden_retriever: perro cobrador dorado, goldener apportierhund
goldfish: pez dorado, goldfisch
gondola: góndola, gondel
goose: ganso, gans
guinea_pig: cobaya, meerschweinchen
ice_cream: helado, eiscreme
ipod: reproductor, musikspieler
jellyfish: medusa, qualle
king_penguin: pingüino rey, königspinguin
koala: coala, beutelbär
ladybug: mariquita, marienkäfer
lemon: limón, zitrone
lion: león, löwe
monarch: mariposa monarca, monarchfalter
mushroom: seta, pilz
orange: naranja, apfelsine
orangutan: orangután, orang utan
persian_cat: gato persa, perserkatze
pizza: torta italiana, teigfladen
police_van: furgón policial, polizeiwagen
rocking_chair: mecedora, schaukelstuhl
school_bus: autobús escolar, schulbus
scorpion: escorpión, skorpion
seashore: orilla del mar, meeresküste
snail: caracol, schnecke
sports_car: coche deportivo, sportwagen
suspension_bridge: puente colgante, hängebrücke
tabby: gato atigrado, getigerte katze
tarantula: tarántula, vogelspinne
teapot: tetera, teekanne
tractor: máquina agrícola, traktor
umbrella: paraguas, regenschirm
water_tower: torre de agua, wasserturm
red: rojo, rot
green: verde, grün
blue: azul, blau
circle: círculo, kreis
ring: anillo, reif
curve: curva, kurve
stripes: rayas, streifen
"""


def _language(place: int) -> dict[str, str]:
    rows = (line.split(": ") for line in _NAMES.strip().splitlines())
    return {name: words.split(", ")[place] for name, words in rows}


TRANSLATIONS = {"in Spanish": _language(0), "in German": _language(1)}
