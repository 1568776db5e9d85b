"""A small table of facts about the world, and its split between training text and evaluation.

A fact belongs to exactly one side, by the hash of its relation and subject: what training text says is never asked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

CAPITALS = """France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|Greece:Athens|Austria:Vienna|Hungary:Budapest|
Poland:Warsaw|Sweden:Stockholm|Norway:Oslo|Denmark:Copenhagen|Finland:Helsinki|Iceland:Reykjavik|Ireland:Dublin|Belgium:Brussels|
Netherlands:Amsterdam|Switzerland:Bern|Romania:Bucharest|Bulgaria:Sofia|Serbia:Belgrade|Croatia:Zagreb|Slovenia:Ljubljana|
Slovakia:Bratislava|Ukraine:Kyiv|Belarus:Minsk|Russia:Moscow|Estonia:Tallinn|Latvia:Riga|Lithuania:Vilnius|Albania:Tirana|
Turkey:Ankara|Cyprus:Nicosia|Malta:Valletta|Georgia:Tbilisi|Armenia:Yerevan|Azerbaijan:Baku|Egypt:Cairo|Morocco:Rabat|
Algeria:Algiers|Tunisia:Tunis|Libya:Tripoli|Sudan:Khartoum|Ethiopia:Addis Ababa|Kenya:Nairobi|Uganda:Kampala|Rwanda:Kigali|
Somalia:Mogadishu|Ghana:Accra|Nigeria:Abuja|Senegal:Dakar|Mali:Bamako|Angola:Luanda|Zambia:Lusaka|Zimbabwe:Harare|
Mozambique:Maputo|Namibia:Windhoek|Botswana:Gaborone|Madagascar:Antananarivo|Cameroon:Yaoundé|Chad:N'Djamena|Niger:Niamey|
Liberia:Monrovia|Iran:Tehran|Iraq:Baghdad|Syria:Damascus|Lebanon:Beirut|Jordan:Amman|Saudi Arabia:Riyadh|Yemen:Sana'a|
Oman:Muscat|Qatar:Doha|Kuwait:Kuwait City|Afghanistan:Kabul|Pakistan:Islamabad|India:New Delhi|Nepal:Kathmandu|Bhutan:Thimphu|
Bangladesh:Dhaka|Myanmar:Naypyidaw|Thailand:Bangkok|Vietnam:Hanoi|Laos:Vientiane|Cambodia:Phnom Penh|Malaysia:Kuala Lumpur|
Indonesia:Jakarta|Philippines:Manila|China:Beijing|Mongolia:Ulaanbaatar|Japan:Tokyo|South Korea:Seoul|North Korea:Pyongyang|
Taiwan:Taipei|Kazakhstan:Astana|Uzbekistan:Tashkent|Turkmenistan:Ashgabat|Kyrgyzstan:Bishkek|Tajikistan:Dushanbe|
Australia:Canberra|New Zealand:Wellington|Fiji:Suva|Canada:Ottawa|Mexico:Mexico City|Cuba:Havana|Jamaica:Kingston|
Haiti:Port-au-Prince|Guatemala:Guatemala City|Honduras:Tegucigalpa|Nicaragua:Managua|Panama:Panama City|Colombia:Bogotá|
Venezuela:Caracas|Ecuador:Quito|Peru:Lima|Chile:Santiago|Argentina:Buenos Aires|Uruguay:Montevideo|Paraguay:Asunción|
Brazil:Brasília|Suriname:Paramaribo|Guyana:Georgetown|Costa Rica:San José|El Salvador:San Salvador"""

SYMBOLS = """hydrogen:H|helium:He|lithium:Li|beryllium:Be|boron:B|carbon:C|nitrogen:N|oxygen:O|fluorine:F|neon:Ne|sodium:Na|
magnesium:Mg|aluminum:Al|silicon:Si|phosphorus:P|sulfur:S|chlorine:Cl|argon:Ar|potassium:K|calcium:Ca|titanium:Ti|vanadium:V|
chromium:Cr|manganese:Mn|iron:Fe|cobalt:Co|nickel:Ni|copper:Cu|zinc:Zn|gallium:Ga|germanium:Ge|arsenic:As|selenium:Se|bromine:Br|
krypton:Kr|strontium:Sr|zirconium:Zr|molybdenum:Mo|palladium:Pd|silver:Ag|cadmium:Cd|tin:Sn|antimony:Sb|iodine:I|xenon:Xe|
cesium:Cs|barium:Ba|tungsten:W|platinum:Pt|gold:Au|mercury:Hg|thallium:Tl|lead:Pb|bismuth:Bi|radon:Rn|radium:Ra|thorium:Th|
uranium:U|plutonium:Pu"""

LANGUAGES = """Brazil:Portuguese|Mexico:Spanish|Argentina:Spanish|Austria:German|Egypt:Arabic|Iran:Persian|Japan:Japanese|
China:Chinese|Russia:Russian|Poland:Polish|Greece:Greek|Turkey:Turkish|Sweden:Swedish|Norway:Norwegian|Denmark:Danish|
Finland:Finnish|Hungary:Hungarian|Romania:Romanian|Bulgaria:Bulgarian|Ukraine:Ukrainian|Israel:Hebrew|Thailand:Thai|
Vietnam:Vietnamese|Indonesia:Indonesian|Nepal:Nepali|Bangladesh:Bengali|Iceland:Icelandic|Italy:Italian|Albania:Albanian|
Estonia:Estonian|Latvia:Latvian|Lithuania:Lithuanian|Angola:Portuguese|Cuba:Spanish|Iraq:Arabic|Morocco:Arabic|Jamaica:English|
Croatia:Croatian|Serbia:Serbian|Slovenia:Slovene|Mongolia:Mongolian|Cambodia:Khmer|Laos:Lao|Portugal:Portuguese|Spain:Spanish|
Germany:German|France:French|Australia:English"""

CURRENCIES = """Japan:yen|India:rupee|China:yuan|Russia:ruble|Mexico:peso|Brazil:real|Poland:zloty|Sweden:krona|Norway:krone|
Denmark:krone|Switzerland:franc|Turkey:lira|South Korea:won|Thailand:baht|Vietnam:dong|Israel:shekel|Saudi Arabia:riyal|
Iran:rial|Iraq:dinar|Kuwait:dinar|Egypt:pound|South Africa:rand|Nigeria:naira|Kenya:shilling|Germany:euro|France:euro|Italy:euro|
Canada:dollar|Australia:dollar|New Zealand:dollar|Hungary:forint|Romania:leu|Bulgaria:lev|Ukraine:hryvnia|Indonesia:rupiah|
Malaysia:ringgit|Philippines:peso|Pakistan:rupee|Bangladesh:taka|Argentina:peso|Chile:peso|Morocco:dirham|Ghana:cedi"""

CONTINENTS = """Kenya:Africa|Nigeria:Africa|Egypt:Africa|Ghana:Africa|Morocco:Africa|Ethiopia:Africa|Angola:Africa|Mali:Africa|
Zambia:Africa|Uganda:Africa|Japan:Asia|China:Asia|India:Asia|Nepal:Asia|Thailand:Asia|Vietnam:Asia|Iran:Asia|Iraq:Asia|
Mongolia:Asia|Pakistan:Asia|France:Europe|Spain:Europe|Poland:Europe|Norway:Europe|Greece:Europe|Italy:Europe|Austria:Europe|
Ireland:Europe|Finland:Europe|Hungary:Europe|Brazil:South America|Peru:South America|Chile:South America|
Argentina:South America|Bolivia:South America|Ecuador:South America|Colombia:South America|Uruguay:South America|
Canada:North America|Mexico:North America"""

OPPOSITES = """hot:cold|big:small|up:down|left:right|fast:slow|happy:sad|open:closed|light:dark|old:young|rich:poor|hard:soft|
wet:dry|early:late|high:low|strong:weak|full:empty|good:bad|true:false|black:white|long:short|thick:thin|wide:narrow|heavy:light|
loud:quiet|clean:dirty|day:night|love:hate|begin:end|win:lose|buy:sell|push:pull|north:south|east:west|inside:outside|
front:back|above:below|alive:dead|friend:enemy|war:peace|success:failure|ancient:modern|increase:decrease|accept:reject|
arrive:depart|sharp:dull|smooth:rough|sweet:sour|tall:short|safe:dangerous|brave:cowardly|tight:loose|near:far|always:never|
first:last|more:less|summer:winter|same:different|remember:forget|smile:frown|laugh:cry"""

YOUNG = """dog:puppy|cat:kitten|cow:calf|horse:foal|sheep:lamb|goat:kid|pig:piglet|bear:cub|lion:cub|deer:fawn|duck:duckling|
goose:gosling|swan:cygnet|chicken:chick|kangaroo:joey|frog:tadpole|owl:owlet|eagle:eaglet|seal:pup|elephant:calf|whale:calf|
fox:cub|wolf:pup|butterfly:caterpillar|hare:leveret"""

AUTHORS = """Hamlet:William Shakespeare|Macbeth:William Shakespeare|Oliver Twist:Charles Dickens|
Great Expectations:Charles Dickens|War and Peace:Leo Tolstoy|Anna Karenina:Leo Tolstoy|Pride and Prejudice:Jane Austen|Emma:Jane Austen|
Moby-Dick:Herman Melville|Frankenstein:Mary Shelley|Dracula:Bram Stoker|Ulysses:James Joyce|1984:George Orwell|
Animal Farm:George Orwell|Brave New World:Aldous Huxley|The Great Gatsby:F. Scott Fitzgerald|
The Old Man and the Sea:Ernest Hemingway|To Kill a Mockingbird:Harper Lee|The Hobbit:J.R.R. Tolkien|
The Lord of the Rings:J.R.R. Tolkien|Don Quixote:Miguel de Cervantes|Les Misérables:Victor Hugo|Crime and Punishment:Fyodor Dostoevsky|
The Odyssey:Homer|The Iliad:Homer|The Divine Comedy:Dante Alighieri|Faust:Johann Wolfgang von Goethe|The Metamorphosis:Franz Kafka|
Jane Eyre:Charlotte Brontë|Wuthering Heights:Emily Brontë|Treasure Island:Robert Louis Stevenson|
The Jungle Book:Rudyard Kipling|Alice in Wonderland:Lewis Carroll|The Picture of Dorian Gray:Oscar Wilde|Walden:Henry David Thoreau|
On the Origin of Species:Charles Darwin|The Time Machine:H.G. Wells|Robinson Crusoe:Daniel Defoe|Gulliver's Travels:Jonathan Swift"""

_TABLES = {
    "capital": (CAPITALS, "The capital of {} is", "What is the capital of {}?"),
    "symbol": (SYMBOLS, "The chemical symbol for {} is", "What is the chemical symbol for {}?"),
    "language": (LANGUAGES, "The main language spoken in {} is", "What is the main language spoken in {}?"),
    "currency": (CURRENCIES, "The currency used in {} is the", "What is the currency used in {}?"),
    "continent": (CONTINENTS, "The continent on which {} lies is", "On which continent does {} lie?"),
    "opposite": (OPPOSITES, 'The opposite of "{}" is', 'What is the opposite of "{}"?'),
    "young": (YOUNG, "The young of the {} is called a", "What is the young of the {} called?"),
    "author": (AUTHORS, "The author of {} is", "Who is the author of {}?"),
}
_BACKWARDS = {"capital": "{} is the capital of", "symbol": "{} is the chemical symbol for"}
_EVALUATED_OF_16 = 9
"""Share of facts that is asked in evaluation; the rest may appear in training text."""


@dataclass(frozen=True)
class Fact:
    """`prompt` is a sentence that `answer` ends; `question` asks the same in words."""

    relation: str
    subject: str
    answer: str

    @property
    def prompt(self) -> str:
        return _TABLES[self.relation][1].format(self.subject)

    @property
    def question(self) -> str:
        return _TABLES[self.relation][2].format(self.subject)

    @property
    def backwards(self) -> tuple[str, str] | None:
        """A sentence about the answer that the subject ends, and the subject; None where it would not be unique."""
        template = _BACKWARDS.get(self.relation)
        return (template.format(self.answer), self.subject) if template else None

    @property
    def is_evaluated(self) -> bool:
        return hashlib.sha256(f"{self.relation}:{self.subject}".encode()).digest()[0] % 16 < _EVALUATED_OF_16


def facts() -> list[Fact]:
    """Every fact, in the order of the tables."""
    return [
        Fact(relation, *entry.strip().split(":"))
        for relation, (table, _, _) in _TABLES.items()
        for entry in table.replace("\n", "").split("|")
    ]
