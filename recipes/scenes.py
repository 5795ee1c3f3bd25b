"""Pictures of one to three colored shapes, drawn from numbers, and questions on them whose words tell nothing.

Of every kind of question, whatever its words, each answer is as frequent: who sees no picture is right by chance alone.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
SHAPES = ("square", "triangle", "circle", "ring", "line")
ANSWERS = {"color": tuple(COLORS), "shape": SHAPES, "count": ("one", "two", "three"), "left": ("yes", "no")}
CHANCE = {"color": 1 / 4, "shape": 1 / 4, "count": 1 / 3, "left": 1 / 2}  # one of the five pairs is held out
PATCH = 4  # pixels of a patch's side
TESTS = 500  # questions of a kind


def scene(draw: np.random.Generator, count: int) -> list[tuple]:
    """Objects (color, shape, x, y) by number and place, no color and no shape twice, in cells of three by three.

    Color n never goes with shape n: those five combinations are held out.
    """
    while True:
        colors, shapes = draw.permutation(5)[:count], draw.permutation(5)[:count]
        if (colors != shapes).all():
            break
    cells, jitter = draw.permutation(9)[:count], draw.uniform(-0.02, 0.02, (count, 2))
    return [(int(c), int(s), (cell % 3 + 0.5) / 3 + dx, (cell // 3 + 0.5) / 3 + dy)
            for c, s, cell, (dx, dy) in zip(colors, shapes, cells, jitter)]  # fmt: skip


def paint(objects: list[tuple], size: int, radius: float = 0.14) -> np.ndarray:
    """A picture (size, size, 3) of a scene: a pixel is what its middle lies in, black where nothing is."""
    middles, picture = (np.arange(size) + 0.5) / size, np.zeros((size, size, 3), np.float32)
    for color, shape, x, y in objects:
        dx, dy = (middles - x)[None] / radius, (middles - y)[:, None] / radius
        far, box = dx**2 + dy**2, np.maximum(abs(dx), abs(dy))
        inside = (box < 0.9, (2 * abs(dx) < 1 + dy) & (dy < 1), far < 1, (0.4 < far) & (far < 1),
                  (abs(dy) < 0.35) & (abs(dx) < 1))[shape]  # fmt: skip
        picture[inside] = list(COLORS.values())[color]
    return picture


def question(draw: np.random.Generator, kind: str) -> tuple[list[tuple], str, str]:
    """A scene, what is asked of its first object, and the answer; every answer of a kind is as frequent."""
    objects = scene(draw, draw.integers(1 + (kind == "left"), 4))
    color, shape, x, _ = objects[0]
    if kind == "color":
        return objects, f"Which color is the {SHAPES[shape]}?", ANSWERS[kind][color]
    if kind == "shape":
        return objects, f"Which shape is {ANSWERS['color'][color]}?", SHAPES[shape]
    if kind == "count":
        return objects, "How many shapes?", ANSWERS[kind][len(objects) - 1]
    if abs(x - objects[1][2]) < 0.2:  # one above the other
        return question(draw, kind)
    return objects, f"Is the {SHAPES[shape]} left of the {SHAPES[objects[1][1]]}?", "yes" if x < objects[1][2] else "no"


def held_out(objects: list[tuple], kind: str) -> tuple[list[tuple], str]:
    """The same picture, but that the object asked for has the color or shape never seen with the other; the answer."""
    (color, shape, x, y), *others = objects
    number = shape if kind == "color" else color
    return [(number, number, x, y), *others], ANSWERS[kind][number]


class Test(NamedTuple):
    kind: str
    objects: list[tuple]
    asked: str
    answer: str


@lru_cache
def tests() -> list[Test]:
    """Questions of every kind, then those of colors and shapes once more with held-out pairs."""
    draw = np.random.default_rng(20_230_918)
    seen = [Test(kind, *question(draw, kind)) for kind in ANSWERS for _ in range(TESTS)]
    unseen = []
    for test in seen[: 2 * TESTS]:
        objects, answer = held_out(test.objects, test.kind)
        unseen.append(test._replace(objects=objects, answer=answer))
    return seen + unseen


@lru_cache
def taken(size: int) -> frozenset[bytes]:
    """The pixels of the tests' pictures."""
    return frozenset(paint(test.objects, size).tobytes() for test in tests())


class Lesson(NamedTuple):
    objects: list[tuple]
    picture: np.ndarray
    asked: str
    answer: str


def lesson(draw: np.random.Generator, size: int) -> Lesson:
    """A scene of training, its picture, which no test has, a question of any kind, and the answer."""
    while True:
        objects, asked, answer = question(draw, list(ANSWERS)[draw.integers(4)])
        picture = paint(objects, size)
        if picture.tobytes() not in taken(size):
            return Lesson(objects, picture, asked, answer)


def caption(objects: list[tuple]) -> str:
    """From left to right.

    >>> caption([(0, 1, 0.8, 0.5), (2, 3, 0.2, 0.5)])
    'a blue ring, a red triangle'
    """
    ordered = sorted(objects, key=lambda thing: thing[2])
    return ", ".join(f"a {ANSWERS['color'][color]} {SHAPES[shape]}" for color, shape, _, _ in ordered)


def patches_of(pictures: list[np.ndarray]) -> Tensor:
    """Pictures (size, size, 3) in patches (B, P, 48), row by row."""
    pixels = torch.tensor(np.stack(pictures))
    cut = pixels.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))  # (B, rows, 4, columns, 4, 3)
    return cut.transpose(2, 3).flatten(3).flatten(1, 2)


Batches = Iterator[tuple[list[Lesson], Tensor]]  # with their patches


def lessons(seed: int, stage: int, size: int, count: int) -> Batches:
    """Batches of so many new pictures, the same scenes for whoever asks."""
    draw = np.random.default_rng((seed, stage))
    while True:
        batch = [lesson(draw, size) for _ in range(count)]
        yield batch, patches_of([one.picture for one in batch])
