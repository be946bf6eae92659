"""Make up text with numbers for calibration: sums, problems and their solutions, and tables, without end."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import date, timedelta

ARITHMETIC_TITLE = "sums and tables"
_LINES = 16
_GOODS = ("apples", "bolts", "litres of paint", "books", "metres of cable", "tickets", "bags of flour", "lamps")
_NAMES = ("Amina", "Bruno", "Chen", "Dana", "Elif", "Farid", "Grace", "Hiro")


def arithmetic_documents(seed: int) -> Iterator[str]:
    """Yield documents of some hundred tokens each: always the same ones for a seed."""
    generator = random.Random(seed)
    while True:
        for make in (_sums, _problems, _table, _records):
            yield make(generator)


def _sums(draw: random.Random) -> str:
    lines = []
    for _ in range(_LINES):
        one, other = draw.randrange(2, 10 ** draw.randint(1, 4)), draw.randrange(2, 10 ** draw.randint(1, 3))
        lines.append(
            draw.choice(
                (
                    f"{one} + {other} = {one + other}",
                    f"{one} - {other} = {one - other}",
                    f"{one} * {other} = {one * other}",
                    f"{one * other} / {other} = {one}",
                    f"{other} % of {one} is {one * other / 100:.2f}",
                    f"{one} divided by {other} is {one // other} with a remainder of {one % other}",
                )
            )
        )
    return "\n".join(lines)


def _problems(draw: random.Random) -> str:
    return "\n\n".join(_problem(draw) for _ in range(_LINES // 4))


def _problem(draw: random.Random) -> str:
    name, goods = draw.choice(_NAMES), draw.choice(_GOODS)
    amount, cents = draw.randint(2, 60), draw.randrange(25, 4000, 5)
    cost = amount * cents
    paid = -(-cost // 2000) * 2000
    return (
        f"{name} buys {amount} {goods} at {cents / 100:.2f} each and pays with {paid / 100:.2f}. How much is left?\n"
        f"{amount} x {cents / 100:.2f} = {cost / 100:.2f}, and {paid / 100:.2f} - {cost / 100:.2f} = "
        f"{(paid - cost) / 100:.2f}. So {(paid - cost) / 100:.2f} is left."
    )


def _table(draw: random.Random) -> str:
    columns, first = draw.sample(_GOODS, 3), draw.randint(1950, 2010)
    rows = [[draw.randrange(10 ** draw.randint(2, 5)) for _ in columns] for _ in range(_LINES // 2)]
    lines = [
        ["year", *columns, "total"],
        ["---"] * (len(columns) + 2),
        *([str(first + index), *map(str, row), str(sum(row))] for index, row in enumerate(rows)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _records(draw: random.Random) -> str:
    day = date(2000, 1, 1) + timedelta(draw.randrange(9000))
    records = [
        {
            "id": draw.randrange(10**6),
            "date": (day + timedelta(index)).isoformat(),
            "name": draw.choice(_NAMES),
            "value": round(draw.gauss(20, 8), 2),
        }
        for index in range(_LINES)
    ]
    if draw.random() < 0.5:
        return "\n".join(map(json.dumps, records))
    return "\n".join([",".join(records[0]), *(",".join(map(str, record.values())) for record in records)])
