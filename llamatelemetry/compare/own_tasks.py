"""This package's own tasks: made by rules and from its public-domain text with a fixed seed, in the
formats of HellaSwag (four endings) and Winogrande (one of two words in a gap). No measure of a
model's worth, and no data set's: they are there to count answers that change."""

import random
import re
from itertools import product

from ..arguments import whole
from ..errors import CompareError
from .tasks import HELLASWAG, WINOGRANDE, Task, TaskSet, chosen
from .texts import load_text

N = 200  # tasks of each set
SERIES = {
    "days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "numbers": "one two three four five six seven eight nine ten eleven twelve",
    "tens": "ten twenty thirty forty fifty sixty seventy eighty ninety",
    "places": "first second third fourth fifth sixth seventh eighth ninth tenth",
}
OPPOSITES = (
    "hot cold, big small, up down, left right, day night, open closed, early late, rich poor, old young, "
    "hard soft, wet dry, full empty, light dark, fast slow, high low, near far, strong weak, happy sad, "
    "clean dirty, loud quiet, thick thin, sweet sour, true false, long short, east west"
)
# What does what, by kind: a subject of another kind does not.
DOES = {
    "dog": "barked at the stranger by the gate. wagged its tail and ran after the ball. buried a bone in the garden.",
    "cat": "purred and licked its paws by the fire. caught a mouse in the kitchen last night.",
    "bird": "sang from the top of the tree. built a nest and laid three eggs in it. spread its wings and flew away.",
    "ship": "sailed into the harbour with its crew. sank in the storm with all hands. dropped its anchor in the bay.",
    "teacher": "gave the children their homework. wrote the answer on the blackboard for the class.",
    "doctor": "examined the patient and wrote a prescription. told the nurse to call the next patient.",
    "farmer": "milked the cows before sunrise. ploughed the field and sowed the wheat.",
    "baker": "took the fresh bread out of the oven. mixed the flour with water and yeast.",
    "river": "flooded its banks after the heavy rain. flowed down from the mountains to the sea.",
    "clock": "struck twelve in the empty hall. was ten minutes slow, so we missed the train.",
    "tree": "lost its leaves in the autumn. had roots that reached deep into the soil.",
    "knife": "was so sharp that it cut his finger. lay beside the fork and the spoon.",
    "king": "ruled the country from his throne. wore a crown of gold and sent his army to war.",
    "horse": "galloped across the field with its rider. ate the hay in the stable.",
    "candle": "burned down slowly and went out. lit the dark room with its small flame.",
    "judge": "sentenced the thief to ten years in prison. asked the jury for its verdict.",
}
MANY = "boy girl dog horse chair book ship window sailor farmer lamp letter".split()
NUMBER = (
    "{} standing near the door when we came in.",
    "{} known to everybody in the village.",
    "{} gone by the time they arrived.",
    "{} not at home that day.",
)
HIS, HER = "John Peter George Henry Thomas".split(), "Mary Anna Alice Emma Susan".split()
OWN = (
    "Yesterday _ took off {} hat and sat down.",
    "In the evening _ wrote a letter to {} wife.",
    "Nobody knew that _ had sold {} house by the sea.",
    "At noon _ called {} dog and went for a walk.",
)
# What is too large for what, as in Winograd's schemas.
FITS = "trophy suitcase, piano van, book pocket, table room, statue box, chair car, coat bag, boat garage"


def own_tasks(limit: int | None = None, seed: int = 0) -> dict[str, TaskSet]:
    """{"endings", "gaps"}: N tasks each, the same for the same seed.

    endings (HellaSwag's format): how sentences of the text end, series, sums and opposites. gaps
    (Winogrande's): what does what, singular and plural, his and her, what is too large for what.
    limit: as many as llama-perplexity would choose of each."""
    whole("limit", limit, 1, error=CompareError, none=True)
    endings, gaps = _endings(random.Random(seed)), _gaps(random.Random(seed))
    sets = {"endings": TaskSet(HELLASWAG, endings), "gaps": TaskSet(WINOGRANDE, gaps)}
    if limit is None:
        return sets
    return {name: TaskSet(one.kind, chosen(one, limit)) for name, one in sets.items()}


def _endings(draw):
    made = [*_sentences(draw, N // 2), *_series(draw, N // 5), *_sums(draw, N // 5)]
    made += _opposites(draw, N - len(made))
    draw.shuffle(made)
    return made


def _sentences(draw, n):
    """How a sentence of the text goes on, beside the ends of three others as long."""
    sentences = re.findall(r"[A-Z][^.!?\"“”()—\n]{50,100}[.]", load_text())
    parts = [sentence.split() for sentence in dict.fromkeys(sentences)]
    halves = [(" ".join(words[:-4]), " ".join(words[-4:])) for words in parts if len(words) > 9]
    for context, end in draw.sample(halves, n):
        others = draw.sample([other for _, other in halves if other != end], 3)
        yield _task(draw, context, end, others)


def _series(draw, n):
    for _ in range(n):
        words = SERIES[draw.choice(list(SERIES))].split()
        start, length = draw.randrange(len(words) - 4), draw.choice([3, 4])
        shown, right = words[start : start + length], words[start + length]
        others = [word for word in words if word != right and word != shown[-1]]
        yield _task(draw, f"{', '.join(shown)},", right, draw.sample(others, 3))


def _sums(draw, n):
    pairs = draw.sample(list(product(range(2, 13), range(2, 13))), n)
    for a, b in pairs:
        wrong = draw.sample([d for d in (-3, -2, -1, 1, 2, 3, 10) if a + b + d > 0], 3)
        yield _task(draw, f"{a} + {b} =", str(a + b), [str(a + b + d) for d in wrong])


def _opposites(draw, n):
    pairs = [tuple(pair.split()) for pair in OPPOSITES.split(", ")]
    pairs += [pair[::-1] for pair in pairs]
    for word, right in draw.sample(pairs, n):
        others = [other for _, other in pairs if other not in (word, right)]
        yield _task(draw, f"The opposite of {word} is", right, draw.sample(others, 3))


def _task(draw, context, right, wrong):
    answer = draw.randrange(4)
    choices = [*wrong[:answer], right, *wrong[answer:]]
    return Task(context, tuple(choices), answer)


def _gaps(draw):
    made = [*_doing(draw, N // 4), *_number(draw, N // 4), *_own(draw, N // 4)]
    made += _fitting(draw, N - len(made))
    draw.shuffle(made)
    return made


def _doing(draw, n):
    told = [(who, f"{end}.") for who, ends in DOES.items() for end in ends[:-1].split(". ")]
    pairs = [(who, end, other) for who, end in told for other in DOES if other != who]
    for who, end, other in draw.sample(pairs, n):
        yield _gap(draw, f"The _ {end}", who, other)


def _number(draw, n):
    cases = list(product(MANY, NUMBER, (True, False)))
    for word, rest, many in draw.sample(cases, n):
        right, wrong = (f"{word}s", word) if many else (word, f"{word}s")
        yield _gap(draw, f"The _ {rest.format('were' if many else 'was')}", right, wrong)


def _own(draw, n):
    cases = [case for case in product(HIS, HER, OWN, (True, False))]
    for he, she, sentence, his in draw.sample(cases, n):
        right, wrong = (he, she) if his else (she, he)
        yield _gap(draw, sentence.format("his" if his else "her"), right, wrong)


def _fitting(draw, n):
    pairs = [tuple(pair.split()) for pair in FITS.split(", ")]
    cases = list(product(pairs, ("large", "small", "big", "narrow"), ("did", "would")))
    for (thing, place), size, did in draw.sample(cases, n):
        right, wrong = (thing, place) if size in ("large", "big") else (place, thing)
        sentence = (
            f"The {thing} {did} not go into the {place} because the _ was far too {size} for that."
        )
        yield _gap(draw, sentence, right, wrong)


def _gap(draw, sentence, right, wrong):
    before, _, after = sentence.partition("_")
    answer = draw.randrange(2)
    choices = (right, wrong) if answer == 0 else (wrong, right)
    return Task(before, choices, answer, after)
