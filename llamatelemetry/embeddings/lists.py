"""English words by category, sentences and analogies for the embedding analyses. Data, no code: put
your own beside it.

In SENSES the word stands at the end: a causal model knows only what came before it.
"""

CATEGORIES = {
    name: words.split()
    for name, words in {
        "animals": "cat dog horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse elephant monkey snake frog "
        "bird eagle duck chicken fish shark whale bee ant spider butterfly deer",
        "colours": "red blue green yellow orange purple pink brown black white grey gray gold silver violet crimson "
        "scarlet turquoise magenta beige maroon teal indigo",
        "numbers": "one two three four five six seven eight nine ten eleven twelve thirteen fifteen sixteen twenty "
        "thirty forty fifty sixty ninety hundred thousand million billion",
        "countries": "France Germany Spain Italy England Scotland Ireland Poland Russia China Japan India Brazil "
        "Mexico Canada Australia Egypt Turkey Greece Sweden Norway Denmark Finland Portugal Austria Hungary Kenya "
        "Nigeria Vietnam Thailand",
        "food": "bread cheese butter milk rice pasta pizza soup salad meat beef pork sugar salt pepper honey apple "
        "banana lemon tomato potato onion garlic carrot cake chocolate coffee tea wine beer",
        "body": "head hair face eye ear nose mouth lip tongue neck shoulder arm elbow wrist hand finger thumb chest "
        "stomach hip leg knee ankle foot toe skin bone heart lung brain",
        "professions": "doctor nurse teacher lawyer engineer farmer soldier pilot chef baker artist writer singer "
        "actor dancer carpenter mechanic scientist professor journalist architect dentist surgeon priest judge "
        "accountant secretary librarian photographer electrician",
        "motion": "walk run jump swim fly crawl climb dance march slide roll fall rise drive ride sail chase follow "
        "enter leave arrive return travel wander rush hurry escape",
    }.items()
}

# {word: {sense: [sentence that ends in the word, ...]}}
SENSES = {
    "bank": {
        "money": [
            "She opened a savings account at the bank",
            "The loan for the house was approved by the bank",
            "He deposited his monthly salary in the bank",
            "The robbers stole the cash from the bank",
            "Interest rates were raised again by the central bank",
        ],
        "river": [
            "The fisherman sat with his rod on the grassy bank",
            "After the flood, thick mud covered the bank",
            "Reeds and willows grew along the muddy bank",
            "The otter slid into the stream from the bank",
            "They tied the canoe to a tree on the bank",
        ],
    },
    "light": {
        "lamp": [
            "At dawn the room slowly filled with light",
            "She switched on the lamp to get more light",
            "The telescope collects very faint light",
            "Through the window came a bright beam of light",
            "The plants in the cellar died without light",
        ],
        "weight": [
            "The empty suitcase was surprisingly light",
            "Feathers are soft and very light",
            "Carbon fibre makes the bicycle strong and light",
            "The box held only paper and was quite light",
            "After losing ten kilograms he felt thin and light",
        ],
    },
    "match": {
        "game": [
            "The striker scored twice in the football match",
            "Thousands of fans watched the tennis match",
            "Heavy rain delayed the final cricket match",
            "The young champion lost the chess match",
            "Both teams trained hard for the match",
        ],
        "fire": [
            "To start the campfire he struck a match",
            "In the dark cellar she lit a match",
            "The candle was lit with a wooden match",
            "He set the dry paper on fire with a match",
            "The gas stove was lit with a match",
        ],
    },
    "spring": {
        "season": [
            "The snow melts and flowers bloom in spring",
            "Farmers plant their seeds in early spring",
            "After a long winter comes spring",
            "The birds return from the south every spring",
            "The apple trees blossom in late spring",
        ],
        "coil": [
            "The mattress creaked because of a broken spring",
            "The old watch is driven by a tightly wound spring",
            "Pull the lever to compress the steel spring",
            "The mechanic replaced the rusty suspension spring",
            "The weight stretched the metal spring",
        ],
    },
}

SENTENCES = {
    "cooking": [
        "Chop the onions and fry them in butter.",
        "Bake the bread for forty minutes.",
        "Season the soup with salt and pepper.",
        "Whisk the eggs with sugar and flour.",
        "Boil the pasta until it is soft.",
        "Serve the roast chicken with potatoes.",
    ],
    "space": [
        "The telescope discovered a distant galaxy.",
        "Astronauts repaired the orbiting station.",
        "The probe landed on the surface of Mars.",
        "A comet passed close to the Sun.",
        "Jupiter is the largest planet we know.",
        "The rocket left the launch pad at dawn.",
    ],
    "law": [
        "The judge dismissed the case.",
        "The lawyer questioned the witness.",
        "The jury reached a verdict after two days.",
        "The contract was signed by both parties.",
        "The court fined the company for fraud.",
        "The prosecutor presented new evidence.",
    ],
    "sport": [
        "The striker scored in the last minute.",
        "She won the marathon in record time.",
        "The team trained hard for the final.",
        "The referee showed him a red card.",
        "He served an ace to win the set.",
        "The swimmers dived into the pool.",
    ],
}

# (a, b, c, d): a is to b as c is to d
ANALOGIES = [
    ("man", "king", "woman", "queen"),
    ("man", "brother", "woman", "sister"),
    ("man", "actor", "woman", "actress"),
    ("father", "son", "mother", "daughter"),
    ("France", "Paris", "Germany", "Berlin"),
    ("France", "Paris", "Italy", "Rome"),
    ("France", "Paris", "Japan", "Tokyo"),
    ("France", "French", "Spain", "Spanish"),
    ("Germany", "German", "Italy", "Italian"),
    ("cat", "cats", "dog", "dogs"),
    ("house", "houses", "car", "cars"),
    ("walk", "walked", "jump", "jumped"),
    ("go", "went", "take", "took"),
    ("big", "bigger", "small", "smaller"),
    ("good", "best", "bad", "worst"),
    ("he", "his", "she", "her"),
    ("slow", "slowly", "quick", "quickly"),
    ("one", "first", "two", "second"),
    ("possible", "impossible", "known", "unknown"),
    ("play", "playing", "work", "working"),
]
