"""The closed world: the facts and word lists that the dialogues are made of."""

from __future__ import annotations

_CAPITALS = """
Argentina:Buenos Aires, Australia:Canberra, Austria:Vienna, Belgium:Brussels, Bolivia:La Paz,
Brazil:Brasilia, Bulgaria:Sofia, Canada:Ottawa, Chile:Santiago, China:Beijing, Colombia:Bogota,
Croatia:Zagreb, Cuba:Havana, Cyprus:Nicosia, Denmark:Copenhagen, Ecuador:Quito, Egypt:Cairo,
England:London, Estonia:Tallinn, Ethiopia:Addis Ababa, Finland:Helsinki, France:Paris,
Germany:Berlin, Ghana:Accra, Greece:Athens, Hungary:Budapest, Iceland:Reykjavik, India:New Delhi,
Indonesia:Jakarta, Iran:Tehran, Iraq:Baghdad, Ireland:Dublin, Italy:Rome, Jamaica:Kingston,
Japan:Tokyo, Jordan:Amman, Kenya:Nairobi, Latvia:Riga, Lebanon:Beirut, Libya:Tripoli,
Lithuania:Vilnius, Malta:Valletta, Morocco:Rabat, Nepal:Kathmandu, Nigeria:Abuja, Norway:Oslo,
Pakistan:Islamabad, Peru:Lima, Poland:Warsaw, Portugal:Lisbon, Romania:Bucharest, Russia:Moscow,
Scotland:Edinburgh, Senegal:Dakar, Serbia:Belgrade, Slovakia:Bratislava, Spain:Madrid,
Sweden:Stockholm, Thailand:Bangkok, Tunisia:Tunis, Turkey:Ankara, Ukraine:Kyiv, Uruguay:Montevideo,
Vietnam:Hanoi
"""
CAPITALS: dict[str, str] = dict(
    pair.strip().split(":") for pair in _CAPITALS.replace("\n", " ").split(",")
)

_COLOURS = """
blue: the sky, the sea, a sapphire, a blueberry
green: grass, a leaf, an emerald, a frog, a lime, broccoli, spinach, a cucumber, a pea
yellow: the sun, a lemon, a banana, butter, a canary, mustard, a sunflower
red: blood, a ruby, a tomato, a strawberry, a cherry, a fire engine, a poppy, ketchup
white: snow, milk, salt, a swan, rice, flour, a polar bear, chalk
black: coal, a raven, the night, tar, a crow, liquorice, a panther
orange: a carrot, an orange, a pumpkin, an apricot, a tangerine
brown: chocolate, coffee, wood, a chestnut, soil, a brown bear, cinnamon
purple: a plum, a violet, an aubergine, lavender, an amethyst
grey: an elephant, ash, lead, a rain cloud, a mouse
pink: a flamingo, a pig, a salmon
gold: a crown, a wedding ring
"""
COLOURS: dict[str, str] = {
    thing.strip(): colour
    for line in _COLOURS.strip().splitlines()
    for colour, things in [line.split(":")]
    for thing in things.split(",")
}

_NAMES = """
Ada Adam Alice Amir Amy Ana Anders Andre Anna Anton Aria Arjun Astrid Ben Bianca Boris Carla Carlos
Cathy Chen Clara Colin Dan Dana Daniel David Deepa Diana Diego Edith Elena Eli Ella Elsa Emil Emily
Emma Erik Esther Eva Fatima Felix Fiona Frank Freya George Grace Greta Hana Hannah Harry Hassan
Heidi Helen Henry Hugo Ian Ida Igor Ines Ingrid Irene Isaac Ivan Jack James Jan Jane Jasmine Jean
Joan Joe John Jonas Jose Julia Karen Karim Kate Keiko Ken Kim Lars Laura Lea Leo Lena Lily Linda
Lisa Louis Lucas Lucy Luis Maja Marco Maria Mark Martha Martin Mary Mateo Max Maya Mei Mia Mike
Mila Mina Mohamed Mona Nadia Nick Nina Noah Nora Olaf Olga Oliver Olivia Omar Oscar Otto Pablo Paul
Pedro Petra Pia Priya Rachel Raj Ravi Rita Robert Rosa Ruth Sam Sara Sasha Sean Selma Simon Sofia
Sonia Stella Sven Tara Theo Thomas Tim Tina Tom Uma Vera Victor Vivian Walter Wei Wendy Yara Yuki
Yusuf Zara Zoe
"""
NAMES = _NAMES.split()

CITIES = (
    sorted(set(CAPITALS.values()))
    + """
Amsterdam|Atlanta|Auckland|Bangalore|Barcelona|Basel|Bergen|Bilbao|Bologna|Bordeaux|Boston|Bremen
Brighton|Bristol|Brno|Calgary|Cape Town|Cardiff|Chicago|Cologne|Dallas|Delft|Denver|Detroit|Dubai
Florence|Geneva|Genoa|Ghent|Glasgow|Gothenburg|Granada|Graz|Hamburg|Hong Kong|Houston|Istanbul
Karachi|Kobe|Krakow|Kyoto|Lagos|Leeds|Leipzig|Liverpool|Los Angeles|Luxembourg|Lyon|Malaga|Manila
Manchester|Marseille|Melbourne|Miami|Milan|Montreal|Mumbai|Munich|Nagoya|Nantes|Naples|New York
Nice|Osaka|Oxford|Palermo|Perth|Philadelphia|Phoenix|Pisa|Porto|Prague|Rotterdam|Salzburg
San Francisco|Sao Paulo|Seattle|Seoul|Seville|Shanghai|Singapore|Split|Sydney|Taipei|Toronto
Toulouse|Trieste|Turin|Utrecht|Valencia|Vancouver|Venice|Verona|York|Zurich
""".strip()
    .replace("\n", "|")
    .split("|")
)

# Short everyday words: what one may ask to have spelled, and the stuff of phrases to repeat.
_WORDS = """
able about above acorn actor after again air alarm album alone along amber anchor angel animal ant
apple april arm arrow art aunt autumn baby back bag baker ball bamboo band bank barn basket bat
bath beach bean bear bed bee bell belt bench berry bike bird black blanket blue board boat body
bone book boot bottle bowl box boy brain branch brave bread brick bridge bright broom brother brown
brush bucket bus butter button cabin cable cake calm camel camera camp candle candy cap car card
carpet carrot castle cat cave chair chalk cheese cherry chess chest chicken child church circle
city clean clever clock cloud clown coach coast coat coffee coin cold colour comb cook copper corn
cotton cousin cow crab cream crown cup curtain dance dark daughter day deer desk dinner doctor dog
doll door dragon dream dress drum duck dust eagle ear early earth east easy egg eight elbow empty
engine evening eye face family farm fast father feather fence field fig finger fire fish five flag
flame floor flower flute fog food foot forest fork four fox friend frog fruit game garden gate
ghost gift giraffe girl glass glove goat gold goose grain grape grass green guitar hair half hammer
hand happy harbour hat hawk head heart heavy hen hill honey hook horse hospital hotel house hundred
ice ink iron island ivory jacket jam jar jewel juice july jump june jungle kettle key king kitchen
kite kitten knee knife ladder lady lake lamb lamp large leaf leather lemon letter light lily lime
lion little lizard lock long lunch magic mango maple map market mask meadow meal melon metal milk
mill mirror money monkey month moon morning mother mountain mouse mouth mud museum music nail neck
needle nest net new night nine noise north nose nurse oak ocean olive onion orange otter oven owl
page paint pan panda paper parcel park parrot path peach pear pen pencil people pepper piano
picture pie pig pillow pilot pine pink pipe pirate plane planet plant plate plum pocket poem pond
pony potato prince puppy purple queen quick quiet rabbit radio rain rainbow red rice ring river
road robin rock roof room root rope rose round ruby sail salt sand school sea seed seven sheep
shelf shell ship shirt shoe shop silk silver sister six sky sleep slow small smile snail snake snow
soap sock soft song soup south spider spoon spring square stable stairs star station stone storm
story straw street sugar summer sun swan table tail tall tea teacher ten tent thread three thumb
tiger timber toast tower town toy train tree truck trumpet turtle twelve two umbrella uncle valley
vase village violin voice wagon wall warm water whale wheat wheel white wide wind window wing
winter wolf wood wool word world worm yacht yard yellow young zebra zero
"""
WORDS = _WORDS.split()

_DAYS = """
Monday Tuesday Wednesday Thursday Friday Saturday Sunday
"""
DAYS = _DAYS.split()
_LANGUAGES = """
French German Spanish Italian Japanese Chinese Russian Arabic Dutch Greek Hindi
"""
LANGUAGES = _LANGUAGES.split()
_CURRENCIES = """
USD EUR GBP JPY CHF SEK NOK CAD AUD INR CNY BRL
"""
CURRENCIES = _CURRENCIES.split()
