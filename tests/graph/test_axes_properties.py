"""The algebra against brute force: union-find over single indices, with nothing of axes in it.

Every index of every dimension of every tensor is an item. Operations of random programs join items that must go
together: an index of a merged dimension needs all the indices it is made of, so removing is an *upward closed* thing,
worked out here by following single positions. The algebra must keep exactly the positions that brute force keeps, must
never take away an index without all that brute force couples to it, and must never free what touches a frozen one.
"""

from __future__ import annotations

import math
import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from dwindle.graph import axes as algebra
from dwindle.graph.axes import Axis
from dwindle.graph.positions import kept_positions
from support.thoroughness import thoroughness

#: (tensor, dimension, index)
Item = tuple[int, int, int]


class Program:
    """Random operations, run on axes and on single elements at once.

    ``cells[t]`` maps each position of tensor t (a tuple) to an element; elements are shared between tensors where an
    operation moves them, and equal positions of added tensors are written to ``ties``.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self.pick = random.Random(seed)
        self.axes: list[list[Axis]] = []
        self.shapes: list[tuple[int, ...]] = []
        #: For each tensor: where each of its positions came from, as (tensor, position); None for a fresh tensor.
        self.moves: list[dict[tuple[int, ...], tuple[int, tuple[int, ...]]] | None] = []
        #: Tensors whose dimensions are the same thing, position by position.
        self.equal: list[tuple[int, int]] = []
        #: Tensors that repeat another one along a new first dimension.
        self.repeats: set[int] = set()
        for _ in range(self.pick.randint(1, 3)):
            self.fresh()
        for _ in range(steps):
            self.step()
        for axes in self.axes:
            for axis in axes:
                algebra.freeze_diagonals(axis)

    def plain(self) -> list[int]:
        """Tensors without shuffled axes: those stand for other indices in every row, and have tests of their own."""
        return [number for number, axes in enumerate(self.axes) if not any(map(_is_shuffled, axes))]

    def fresh(self) -> None:
        shape = tuple(self.pick.choice([2, 3, 4, 6, 8]) for _ in range(self.pick.randint(1, 2)))
        self.add(shape, [algebra.leaf(size) for size in shape], None)

    def add(self, shape: tuple[int, ...], axes: list[Axis], moves: dict | None) -> None:
        self.shapes.append(shape)
        self.axes.append(axes)
        self.moves.append(moves)
        assert tuple(axis.find().size for axis in axes) == shape

    def step(self) -> None:
        source = self.pick.choice(self.plain())
        shape, axes = self.shapes[source], self.axes[source]
        kind = self.pick.choice(["reshape", "reshape", "permute", "split", "cat", "add", "expand", "freeze"])
        if math.prod(shape) > 200:
            return
        if kind == "reshape":
            sizes = self._sizes(math.prod(shape))
            flat = {place: old for place, old in zip(_grid(tuple(sizes)), _grid(shape), strict=True)}
            moves = {place: (source, old) for place, old in flat.items()}
            self.add(tuple(sizes), algebra.reshape(axes, sizes), moves)
        elif kind == "permute":
            order = list(range(len(shape)))
            self.pick.shuffle(order)
            turned = tuple(shape[dim] for dim in order)
            moves = {}
            for place in _grid(turned):
                old = [0] * len(shape)
                for new_dim, dim in enumerate(order):
                    old[dim] = place[new_dim]
                moves[place] = (source, tuple(old))
            self.add(turned, [axes[dim] for dim in order], moves)
        elif kind == "split":
            dim = self.pick.randrange(len(shape))
            if shape[dim] < 2:
                return
            cut = self.pick.randint(1, shape[dim] - 1)
            pieces = algebra.split(axes[dim], [cut, shape[dim] - cut])
            for start, piece in zip((0, cut), pieces, strict=True):
                size = piece.find().size
                part = (*shape[:dim], size, *shape[dim + 1 :])
                moves = {
                    place: (source, (*place[:dim], place[dim] + start, *place[dim + 1 :]))
                    for place in _grid(part)
                }
                self.add(part, [piece if d == dim else axis for d, axis in enumerate(axes)], moves)
        elif kind == "cat":
            dim = self.pick.randrange(len(shape))
            others = [n for n in self.plain() if _alike(self.shapes[n], shape, dim)]
            other = self.pick.choice(others)
            for place, (one, two) in enumerate(zip(axes, self.axes[other], strict=True)):
                if place != dim:
                    algebra.unify(one, two)
            whole = algebra.concatenation([axes[dim], self.axes[other][dim]])
            size = shape[dim] + self.shapes[other][dim]
            moves = {}
            for place in _grid((*shape[:dim], size, *shape[dim + 1 :])):
                first = place[dim] < shape[dim]
                back = place[dim] if first else place[dim] - shape[dim]
                moves[place] = (source if first else other, (*place[:dim], back, *place[dim + 1 :]))
            joined = [whole if d == dim else axis for d, axis in enumerate(axes)]
            self.add((*shape[:dim], size, *shape[dim + 1 :]), joined, moves)
        elif kind == "add":
            other = self.pick.choice([n for n in self.plain() if self.shapes[n] == shape])
            for one, two in zip(axes, self.axes[other], strict=True):
                algebra.unify(one, two)
            self.equal.append((source, other))
        elif kind == "expand":
            size = self.pick.choice([2, 3])
            wide = (size, *shape)
            moves = {place: (source, place[1:]) for place in _grid(wide)}
            self.repeats.add(len(self.shapes))
            self.add(wide, [algebra.leaf(size), *axes], moves)
        elif self.pick.random() < 0.3:
            algebra.freeze(self.pick.choice(axes), "frozen on purpose")

    def _sizes(self, number: int) -> list[int]:
        sizes: list[int] = []
        while number > 1:
            size = self.pick.choice([d for d in range(2, number + 1) if number % d == 0])
            sizes.append(size)
            number //= size
        return sizes or [1]


def _grid(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for size in shape:
        places = [(*place, index) for place in places for index in range(size)]
    return places


def _is_shuffled(axis: Axis) -> bool:
    axis = axis.find()
    return axis.kind in (algebra.PARALLEL, algebra.INTERLEAVED) or any(map(_is_shuffled, axis.parts))


def _alike(one: tuple[int, ...], two: tuple[int, ...], dim: int) -> bool:
    return len(one) == len(two) and all(
        a == b for d, (a, b) in enumerate(zip(one, two, strict=True)) if d != dim
    )


def _kept(program: Program, keep: dict[Axis, torch.Tensor]) -> list[list[set[int]]]:
    """What the algebra keeps of each dimension of each tensor."""
    found = []
    for axes, shape in zip(program.axes, program.shapes, strict=True):
        own = []
        for axis, size in zip(axes, shape, strict=True):
            index = kept_positions(axis, keep)
            own.append(set(range(size)) if index is None else set(index.tolist()))
        found.append(own)
    return found


def _assert_consistent(program: Program, kept: list[list[set[int]]]) -> None:
    """Position by position: a moved element stays exactly where its source stays; equal tensors stay equal."""
    plain = program.plain()
    for number, moves in enumerate(program.moves):
        if moves is None or number not in plain:
            continue
        for place, (source, old) in moves.items():
            here = all(index in kept[number][dim] for dim, index in enumerate(place))
            there = all(index in kept[source][dim] for dim, index in enumerate(old))
            if number in program.repeats:
                there = there and place[0] in kept[number][0]  # the repeated dimension is its own
            assert here == there, (number, place, source, old)
    for one, two in program.equal:
        assert kept[one] == kept[two]


def _free_leaves(program: Program) -> list[Axis]:
    leaves = dict.fromkeys(leaf for axes in program.axes for axis in axes for leaf in axis.leaves())
    return [leaf for leaf in leaves if leaf.frozen is None]


@given(st.integers(0, 10**9), st.integers(1, 9), st.integers(0, 10**9))
@thoroughness(300)
def test_positions_move_as_single_elements_do(seed: int, steps: int, chosen: int) -> None:
    """Whatever leaves are cut, every operation finds its elements where brute force says they are."""
    program, pick = Program(seed, steps), random.Random(chosen)
    keep = {}
    for leaf in _free_leaves(program):
        stays = torch.tensor([pick.random() < 0.6 for _ in range(leaf.size)])
        stays[pick.randrange(leaf.size)] = True
        keep[leaf] = stays
    _assert_consistent(program, _kept(program, keep))


@given(st.integers(0, 10**9), st.integers(1, 9))
@thoroughness(300)
def test_what_brute_force_couples_goes_together(seed: int, steps: int) -> None:
    """Remove one index of one free leaf: the closure that brute force works out from it is what the algebra removes."""
    program = Program(seed, steps)
    leaves = _free_leaves(program)
    if not leaves:
        return
    leaf = random.Random(seed).choice(leaves)
    keep = {leaf: torch.arange(leaf.size) != random.Random(seed + 1).randrange(leaf.size)}
    kept = _kept(program, keep)
    removed = {
        (tensor, dim, index)
        for tensor, dims in enumerate(kept)
        for dim, stay in enumerate(dims)
        for index in set(range(program.shapes[tensor][dim])) - stay
    }
    assert removed
    assert _closure(program, removed) == removed


def _closure(program: Program, removed: set[Item]) -> set[Item]:
    """All indices that must go when ``removed`` go: an index goes when no element on it is left, and the reverse."""
    gone = set(removed)
    shuffled = set(range(len(program.shapes))) - set(program.plain())
    while True:
        dead: set[tuple[int, tuple[int, ...]]] = set()
        for tensor, shape in enumerate(program.shapes):
            for place in _grid(shape):
                if any((tensor, dim, index) in gone for dim, index in enumerate(place)):
                    dead.add((tensor, place))
        links: list[tuple[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]]] = []
        for tensor, moves in enumerate(program.moves):
            if tensor in shuffled:
                continue
            links += [((tensor, place), origin) for place, origin in (moves or {}).items()]
        links += [
            ((one, place), (two, place)) for one, two in program.equal for place in _grid(program.shapes[one])
        ]
        changed = True
        while changed:
            changed = False
            for here, there in links:
                if (here in dead) != (there in dead) and not (here[0] in program.repeats and here in dead):
                    dead |= {here, there}
                    changed = True
        new = {
            (tensor, dim, index)
            for tensor, shape in enumerate(program.shapes)
            for dim, size in enumerate(shape)
            for index in range(size)
            if all((tensor, place) in dead for place in _grid(shape) if place[dim] == index)
        }
        if new <= gone:
            return gone
        gone |= new


@given(st.integers(0, 10**9), st.integers(1, 9))
@thoroughness(300)
def test_nothing_coupled_to_a_frozen_index_is_free(seed: int, steps: int) -> None:
    """Remove all but one index of every free leaf: no index of a dimension frozen on purpose goes."""
    program = Program(seed, steps)
    frozen = [
        (tensor, dim)
        for tensor, axes in enumerate(program.axes)
        for dim, axis in enumerate(axes)
        if all(leaf.frozen is not None for leaf in axis.leaves())
    ]
    keep = {leaf: torch.arange(leaf.size) == 0 for leaf in _free_leaves(program)}
    kept = _kept(program, keep)
    for tensor, dim in frozen:
        assert kept[tensor][dim] == set(range(program.shapes[tensor][dim]))
    removed = {
        (tensor, dim, index)
        for tensor, dims in enumerate(kept)
        for dim, stay in enumerate(dims)
        for index in set(range(program.shapes[tensor][dim])) - stay
    }
    closure = _closure(program, removed)
    assert not {(tensor, dim) for tensor, dim, _ in closure} & set(frozen)
