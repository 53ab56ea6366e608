"""Tasks whose answers can be checked to the letter: each makes rows of an instruction, an input and the wanted output.

A task draws what it says from lists of words; no two rows of `make_rows` have the same input, so what is held out was
never trained on.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

Row = dict[str, str]

CATEGORIES = {
    "billing": (
        "I was charged twice for my {product}",
        "the invoice for the {product} shows the wrong amount",
        "my refund for the {product} has not arrived",
        "you billed me for a {product} that I never ordered",
        "the discount was not taken off the price of the {product}",
        "the invoice for my {product} has another company's address",
    ),
    "shipping": (
        "the {product} that I ordered has not arrived",
        "my parcel with the {product} went to the wrong address",
        "the tracking number of my {product} does not work",
        "the box with the {product} was delivered to a neighbor",
        "the courier left without handing over the {product}",
        "the delivery of the {product} is a week late",
    ),
    "defect": (
        "the {product} does not turn on anymore",
        "my {product} makes a strange noise",
        "the {product} broke after two days",
        "there is a crack in my {product}",
        "the {product} stops working when it gets warm",
        "a button of my {product} has come off",
    ),
    "question": (
        "does the {product} come with a manual",
        "which colors does the {product} come in",
        "how long is the warranty of the {product}",
        "can I use the {product} outdoors",
        "is the {product} back in stock soon",
        "what is the {product} made of",
    ),
}
PRIORITIES = {
    "high": ("This is urgent!", "I need this solved today.", "Please act at once.", "It cannot wait any longer."),
    "medium": ("Please answer this week.", "A reply in a few days would be good.", "Soon, please."),
    "low": ("There is no hurry.", "Whenever you find the time.", "It can wait.", "Take your time."),
}
PRODUCTS = """
    kettle lamp toaster printer keyboard monitor headset camera tripod backpack tent stove heater fan blender mixer
    drill saw router scanner tablet phone watch speaker microphone charger mouse desk chair shelf sofa mattress pillow
    bicycle helmet scooter treadmill rower dishwasher freezer
""".split()
GREETINGS = ("Hello,", "Hi there,", "Good morning,", "Dear team,", "Hey,", "To whom it may concern:")
GOODS = """
    apples pears lemons onions carrots tomatoes eggs rolls bagels candles pencils batteries napkins bottles jars plates
    cups spoons towels stamps
""".split()
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 12: "a dozen"}
ORDERS = (
    "Please send {goods}.",
    "We need {goods} by Friday.",
    "Could you bring {goods}?",
    "I would like {goods}, thanks.",
    "For the party: {goods}.",
    "Put {goods} on my list.",
)
ROOMS = "kitchen bedroom bathroom hall office attic cellar garage nursery studio".split()
DEVICES = {
    "light": (("Dim the light in the {room} to {n} percent", "Set the {room} light to {n} %"), "level"),
    "heating": (("Make it {n} degrees in the {room}", "Heat the {room} to {n} degrees"), "degrees"),
    "blinds": (("Close the blinds in the {room} to {n} percent", "Bring the {room} blinds to {n} %"), "level"),
    "music": (("Play music in the {room} at volume {n}", "Music in the {room}, volume {n}"), "volume"),
}
POLITE = ("{}.", "Please: {}.", "{}, please.", "Could you do this: {}?", "{}, now.", "Hey, {}!")


def capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def ticket(rng: random.Random) -> Row:
    """A customer's message, and the record of it."""
    category, priority, product = rng.choice(list(CATEGORIES)), rng.choice(list(PRIORITIES)), rng.choice(PRODUCTS)
    problem = rng.choice(CATEGORIES[category]).format(product=product) + ("?" if category == "question" else ".")
    parts = [rng.choice(GREETINGS), problem, rng.choice(PRIORITIES[priority])]
    return {
        "instruction": 'Turn this ticket into JSON: {"category": "...", "product": "...", "priority": "..."}',
        "input": " ".join(parts),
        "output": json.dumps({"category": category, "product": product, "priority": priority}),
    }


def order(rng: random.Random) -> Row:
    """A wish for some goods, and the list of them."""
    wanted = [(rng.choice(list(NUMBERS)), goods) for goods in rng.sample(GOODS, rng.randint(1, 3))]
    said = [f"{rng.choice([str(n), NUMBERS[n]])} {goods}" for n, goods in wanted]
    goods = " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))
    return {
        "instruction": "List what is ordered, as in: 2 apples; 12 eggs",
        "input": rng.choice(ORDERS).format(goods=goods),
        "output": "; ".join(f"{n} {goods}" for n, goods in wanted),
    }


def command(rng: random.Random) -> Row:
    """What is asked of a smart home, and the call that does it."""
    device, room = rng.choice(list(DEVICES)), rng.choice(ROOMS)
    said, unit = DEVICES[device]
    n = rng.randint(15, 26) if device == "heating" else rng.choice(range(5, 100, 5))
    text = rng.choice(said).format(room=room, n=n)
    return {
        "instruction": "Write the call that does what is asked.",
        "input": capitalized(rng.choice(POLITE).format(text)),
        "output": f'set_{device}(room="{room}", {unit}={n})',
    }


TASKS: dict[str, Callable[[random.Random], Row]] = {"tickets": ticket, "orders": order, "commands": command}


def make_rows(task: str, n: int, seed: int) -> list[Row]:
    """Return n rows of a task with different inputs; the same for the same seed."""
    rng, rows = random.Random(seed), dict[str, Row]()
    while len(rows) < n:
        row = TASKS[task](rng)
        rows[row["input"]] = row
    return list(rows.values())


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows to a file, one a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
