"""Make the bundled training rows: messages that book a table, and the record that each amounts to.

    python data/make_bookings.py --out_dir data

Writes bookings_train.jsonl and bookings_test.jsonl, the same bytes for the same seed. The test rows have names,
sentences and messages that no training row has.
"""

import json
import random
import re
from pathlib import Path

from lit_gpt.cli import NonNegativeInt, PositiveInt, run

out_dir: Path = Path("data")  # Write to this folder.
train_rows: PositiveInt = 300  # Make so many messages to train on.
test_rows: PositiveInt = 40  # Hold out so many messages.
seed: NonNegativeInt = 1  # Seed the choice of words.

INSTRUCTION = 'Write this booking as JSON: {"name": "...", "people": ..., "day": "...", "time": "H:MM"}'
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
HOURS = (5, 6, 7, 8, 9, 10)  # in the evening
MINUTES = (0, 15, 30, 45)

TRAIN_NAMES = """
    Ada Adrian Ahmed Alan Alba Alice Alma Amara Amir Andrea Anton Asha Astrid Aylin Bashir Bea Ben Bianca Boris Bruno
    Carla Carlos Carmen Cecil Cem Charlotte Chen Chloe Clara Colin Cora Dana Daniel Daria David Delia Dora Edith Eileen
    Elena Eli Elias Emma Enzo Erik Esra Eva Ewa Farid Faye Felix Fergus Fiona Flora Frank Freya Gabriel Gemma Gita
    Gloria Greta Gustav Hana Harry Hassan Heidi Hilda Hugo Ian Ida Igor Imani Ines Irene Ivan Jack Jana Javier Jonas
    Joy Judith Julia June Kai Karim Kate Kenji Kira Klaus Lars Laura Lena Leo Lin Linda Lisa Livia Lucas Lucy Luis
    Malik Marco Maria Mark Martha Maya Mei Mia Milan Mona Nadia Nicola Nils Nina Nora Oleg Olga Olivia Oscar Pablo
    Paula Pedro Penny Peter Petra Priya Quinn Rafael Rania Ravi Rita Robert Rosa Rufus Ruth Sam Samira Sara Sergio
    Simon Sofia Stefan Stella Suki Sunil Tara Theo Tina Tom Ulla Valerie Vera Victor Vikram Walter Wendy Wilma Xavier
    Yara Yusuf Zoe
""".split()
TEST_NAMES = """
    Abel Agnes Aisha Anita Arthur Bella Cedric Celia Diego Dmitri Elsa Emil Fatima George Gina Hector Helen Holly Isaac
    Ivy James Jasmine Joel Kofi Leila Lorenz Louise Magda Mateo Miriam Naomi Noah Omar Otto Pia Ralph Ramona Salma
    Selma Tariq Teresa Thomas Ursula Vincent Wanda Yuki
""".split()
TRAIN_SENTENCES = """
    Hi, could I book a table for {people} on {day} at {time}? My name is {name}.
    Hello, this is {name}. I would like a table for {people}, {day} at {time}.
    {name} here. Do you have room for {people} on {day} around {time}?
    Can we come on {day} at {time}? We are {people}. Thanks, {name}
    Good morning! Please keep a table for {people} at {time} on {day}. The name is {name}.
    Table for {people} please, {day}, {time}. {name}
    Hey, it's {name}! Is there anything free at {time} on {day}? There will be {people} of us.
    We need a table on {day}. {people} people, {time}, under {name}. Cheers!
    I'm {name} and I'd love to eat at your place on {day}, at {time}, with a party of {people}.
    Evening. {day} at {time}, {people} guests, name of {name}.
    Would {time} on {day} work for {people} people? Please put it under {name}.
    Dear team, please reserve for {people} on {day} at {time}. Kind regards, {name}
    Is {day} at {time} still possible? It's for {people}, booked by {name}.
    My friends and I want to come by on {day} at {time}, {people} of us in all. Ask for {name}.
    Please write down {name} for {day}: {people} people at {time}.
    So, {people} of us are hungry on {day}! Could you fit us in at {time}? Greetings from {name}
    {day}, {time}, {people} persons, {name}. Thank you!
    Hi there, {name} speaking, we would be {people} on {day} and could arrive at {time}.
    For {day} I need {people} seats at {time}, please. {name}
    It is my birthday on {day}! {people} of us will come at {time}. Yours, {name}
""".strip().split("\n")
TEST_SENTENCES = """
    Hello! {name} again. On {day} we'd be {people}, and {time} would suit us best.
    Do you still have a table at {time} on {day}? {people} of us would come. Best wishes, {name}
    Could you save {people} seats for {name}, please? {day} at {time} would be great.
    I want to surprise my mother on {day}: a table at {time} for {people}, under the name {name}.
    Good afternoon, may I reserve {day}, {time}, for {people} people? I am called {name}.
    Any chance of a table for {people} this {day}? We could be there at {time}. Love, {name}
    Hiya, need somewhere to eat {day} at {time} with {people} people, {name} is the name
    A table by the window at {time} on {day} would be lovely. We are {people}. Signed, {name}
""".strip().split("\n")


def say_people(rng: random.Random, people: int) -> str:
    return rng.choice([str(people), NUMBERS[people - 1]])


def say_time(rng: random.Random, hour: int, minute: int) -> str:
    """One of the ways in which people say a time."""
    this, following = NUMBERS[hour - 1], NUMBERS[hour]
    ways = {
        0: (f"{hour}:00", f"{hour} pm", f"{this} o'clock", f"{hour} o'clock"),
        15: (f"{hour}:15", f"{this} fifteen", f"quarter past {this}", f"a quarter past {this}"),
        30: (f"{hour}:30 pm", f"{this} thirty", f"half past {this}", f"half past {hour}"),
        45: (f"{hour}:45", f"quarter to {hour + 1}", f"quarter to {following}", f"a quarter to {following}"),
    }
    return rng.choice(ways[minute])


def make_row(rng: random.Random, name: str, sentence: str) -> dict[str, str]:
    people, day, hour, minute = rng.randint(2, 12), rng.choice(DAYS), rng.choice(HOURS), rng.choice(MINUTES)
    said = {"people": say_people(rng, people), "time": say_time(rng, hour, minute)}
    message = sentence.strip().format(name=name, day=day, **said)
    message = re.sub(r"(^|[.!?] )[a-z]", lambda start: start[0].upper(), message)
    record = {"name": name, "people": people, "day": day, "time": f"{hour}:{minute:02}"}
    return {"instruction": INSTRUCTION, "input": message, "output": json.dumps(record)}


def make_rows(rng: random.Random, names: list[str], sentences: list[str], n: int) -> list[dict[str, str]]:
    """n rows of which no two have the same message; names and sentences take turns."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        row = make_row(rng, names[len(rows) % len(names)], sentences[len(rows) % len(sentences)])
        rows[row["input"]] = row
    return list(rows.values())


def main() -> None:
    rng = random.Random(seed)
    for split, names, sentences, n in (
        ("train", TRAIN_NAMES, TRAIN_SENTENCES, train_rows),
        ("test", TEST_NAMES, TEST_SENTENCES, test_rows),
    ):
        rows = make_rows(rng, rng.sample(names, len(names)), sentences, n)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = out_dir / f"bookings_{split}.jsonl"
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {n} rows to {path}")


if __name__ == "__main__":
    run(main)
