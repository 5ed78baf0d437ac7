"""The axis algebra against brute force: arrays of explicit labels that go through the same operations."""

from __future__ import annotations

import math
from itertools import product as every

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.graph import axes as algebra
from dwindle.graph import expressions
from dwindle.graph.axes import CONCATENATION, LEAF, PARALLEL, PRODUCT, Axis
from dwindle.graph.counts import CountSolver, count_of
from dwindle.graph.expressions import Attribute, Dimension, TaggedInt, evaluate
from dwindle.graph.nodes import Value
from dwindle.graph.positions import kept_positions, positions
from dwindle.graph.rules.registry import Scope
from dwindle.graph.shuffles import observe_shuffles

FAST = settings(max_examples=150, deadline=None, derandomize=True)


# positions of random trees


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> tuple[Axis, dict[Axis, np.ndarray], list[Axis]]:
    """A random axis over few leaves, with the brute-force index of each leaf at each position (-1: none)."""
    pool = [Axis(draw(st.integers(2, 4))) for _ in range(3)]

    def build(level: int) -> tuple[Axis, dict[Axis, np.ndarray]]:
        kind = draw(st.sampled_from([LEAF, PRODUCT, CONCATENATION])) if level else LEAF
        if kind == LEAF:
            own = draw(st.sampled_from(pool))
            return own, {own: np.arange(own.size)}
        parts = [build(level - 1) for _ in range(draw(st.integers(2, 3)))]
        arrays: dict[Axis, np.ndarray] = {}
        sizes = [part.size for part, _ in parts]
        if kind == CONCATENATION:
            starts = np.cumsum([0, *sizes])
            for start, (_, inner) in zip(starts, parts, strict=False):
                for own, index in inner.items():
                    whole = arrays.setdefault(own, np.full(sum(sizes), -1))
                    whole[start : start + len(index)] = index
            return algebra.concatenation([part for part, _ in parts]), arrays
        grid = np.indices(sizes).reshape(len(sizes), -1)
        for place, (_, inner) in enumerate(parts):
            for own, index in inner.items():
                arrays.setdefault(own, []).append(index[grid[place]])  # type: ignore[union-attr, attr-defined]
        merged = {}
        for own, found in arrays.items():
            merged[own] = found[0] if len(found) == 1 else np.max(found, axis=0)  # repeated leaves are frozen
        return algebra.product([part for part, _ in parts]), merged

    axis, arrays = build(depth - 1)
    return axis, arrays, pool


@given(trees())
@FAST
def test_positions_of_trees_equal_brute_force(case: tuple[Axis, dict[Axis, np.ndarray], list[Axis]]) -> None:
    axis, expected, _ = case
    found = positions(axis, {})
    assert set(found) == set(expected)
    for own, index in expected.items():
        if own.frozen is None:
            assert found[own].tolist() == index.tolist()
        assert len(found[own]) == axis.find().size


@given(trees(), st.randoms(use_true_random=False))
@FAST
def test_kept_positions_of_trees_equal_brute_force(case: tuple, random: object) -> None:
    axis, expected, pool = case
    keep = {own: np.array([random.random() < 0.6 for _ in range(own.size)]) for own in pool}  # type: ignore[attr-defined]
    keep = {own: chosen for own, chosen in keep.items() if own.frozen is None}
    stay = np.ones(axis.find().size, dtype=bool)
    for own, index in expected.items():
        if own in keep:
            stay &= np.where(index < 0, True, keep[own][index.clip(0)])
    found = kept_positions(axis, {own: torch.from_numpy(chosen) for own, chosen in keep.items()}, {})
    kept = np.arange(len(stay)) if found is None else found.numpy()
    assert kept.tolist() == stay.nonzero()[0].tolist()


# random programs: removing then computing == computing then removing


def _factorizations(number: int) -> list[int]:
    primes, factor = [], 2
    while number > 1:
        while number % factor == 0:
            primes.append(factor)
            number //= factor
        factor += 1
    return primes


class _Program:
    """A random straight-line program on label arrays, run with the algebra beside it."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.axes: list[list[Axis]] = []
        self.steps: list[tuple] = []
        self.shapes: list[tuple[int, ...]] = []

    def leaf_tensor(self) -> None:
        shape = tuple(self.draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=3)))
        self._add(("base",), [algebra.leaf(size) for size in shape])

    def _add(self, step: tuple, axes: list[Axis]) -> None:
        self.steps.append(step)
        self.axes.append(axes)
        self.shapes.append(tuple(axis.find().size for axis in axes))

    def step(self) -> None:
        source = self.draw(st.integers(0, len(self.steps) - 1))
        axes, shape = self.axes[source], self.shapes[source]
        kind = self.draw(
            st.sampled_from(
                ["reshape", "reshape", "permute", "split", "shuffle", "repeat_cat", "add", "square"]
            )
        )
        if kind not in ("reshape", "permute"):
            for axis in axes:
                algebra.collapse(axis)  # as is done before every operator that does not merely pass axes on
        if kind == "square":
            edge = math.isqrt(math.prod(shape))
            if edge**2 != math.prod(shape) or edge == 1:
                return
            self._add(("reshape", source), algebra.reshape(axes, [edge, edge]))
            self._add(("permute", len(self.steps) - 1, (1, 0)), self.axes[-1][::-1])
            for first, second in zip(self.axes[-1], self.axes[-2], strict=True):
                algebra.unify(first, second)
            self._add(("add", len(self.steps) - 1, len(self.steps) - 2), list(self.axes[-1]))
        elif kind == "reshape":
            primes = [prime for size in shape for prime in _factorizations(size)]
            sizes: list[int] = []
            for prime in primes:
                if sizes and self.draw(st.booleans()):
                    sizes[-1] *= prime
                else:
                    sizes.append(prime)
            self._add(("reshape", source), algebra.reshape(axes, sizes))
        elif kind == "permute":
            order = self.draw(st.permutations(range(len(shape))))
            self._add(("permute", source, order), [axes[dim] for dim in order])
        elif kind in ("split", "shuffle", "repeat_cat"):
            if not shape:
                return
            dim = self.draw(st.integers(0, len(shape) - 1))
            if shape[dim] < 2:
                return
            cut = sorted(self.draw(st.sets(st.integers(1, shape[dim] - 1), min_size=1, max_size=3)))
            sizes = np.diff([0, *cut, shape[dim]]).tolist()
            pieces = algebra.split(axes[dim], sizes)
            if kind == "split":
                chosen = [self.draw(st.integers(0, len(sizes) - 1))]
            elif kind == "shuffle":
                chosen = list(self.draw(st.permutations(range(len(sizes)))))
            else:
                chosen = self.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=2, max_size=3))
            whole = algebra.concatenation([pieces[number] for number in chosen])
            joined = [whole if place == dim else axis for place, axis in enumerate(axes)]
            self._add(("pieces", source, dim, pieces, chosen), joined)
        else:
            twins = [other for other, own in enumerate(self.shapes) if own == shape]
            other = self.draw(st.sampled_from(twins))
            for axis in self.axes[other]:
                algebra.collapse(axis)
            for first, second in zip(axes, self.axes[other], strict=True):
                algebra.unify(first, second)
            self._add(("add", source, other), list(axes))

    def run(self, counts: dict[Axis, int], bases: dict[int, np.ndarray]) -> list[np.ndarray]:
        """Run on arrays; sizes are what the axes say under ``counts``."""
        results: list[np.ndarray] = []
        for number, step in enumerate(self.steps):
            if step[0] == "base":
                results.append(bases[number])
            elif step[0] == "reshape":
                sizes = [count_of(axis, counts) for axis in self.axes[number]]
                results.append(results[step[1]].reshape(sizes))
            elif step[0] == "permute":
                results.append(results[step[1]].transpose(step[2]))
            elif step[0] == "pieces":
                _, source, dim, pieces, chosen = step
                borders = np.cumsum([count_of(piece, counts) for piece in pieces])
                assert borders[-1] == results[source].shape[dim]
                parts = np.split(results[source], borders[:-1], axis=dim)
                results.append(np.concatenate([parts[piece] for piece in chosen], axis=dim))
            else:
                with np.errstate(over="ignore"):
                    results.append(results[step[1]] * np.uint64(6364136223846793005) + results[step[2]])
        return results


@st.composite
def programs(draw: st.DrawFn) -> _Program:
    program = _Program(draw)
    for _ in range(draw(st.integers(1, 3))):
        program.leaf_tensor()
    for _ in range(draw(st.integers(1, 7))):
        program.step()
    return program


def _leaves(program: _Program) -> list[Axis]:
    return list(dict.fromkeys(own for axes in program.axes for axis in axes for own in axis.leaves()))


@given(programs(), st.randoms(use_true_random=False))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_removing_then_computing_is_computing_then_removing(program: _Program, random: object) -> None:
    assert_removal_commutes(program, random)


@st.composite
def shuffles(draw: st.DrawFn) -> _Program:
    """Channel shuffles in a row, with cuts anywhere between them: parts of two widths, even and odd."""
    program = _Program(draw)
    parts, width = draw(st.integers(2, 3)), draw(st.integers(2, 9))
    program.steps, program.shapes = [("base",)], [(parts * width,)]
    program.axes = [[algebra.leaf(parts * width)]]
    for _ in range(draw(st.integers(1, 3))):
        source, (axis,) = len(program.steps) - 1, program.axes[-1]
        borders = set(range(width, parts * width, width))
        borders |= draw(st.sets(st.integers(1, parts * width - 1), max_size=2))
        pieces = algebra.split(axis, np.diff([0, *sorted(borders), parts * width]).tolist())
        chosen = list(range(len(pieces)))
        program._add(("pieces", source, 0, pieces, chosen), [algebra.concatenation(pieces)])
        program._add(("reshape", source + 1), algebra.reshape(program.axes[-1], [parts, width]))
        program._add(("permute", source + 2, (1, 0)), program.axes[-1][::-1])
        program._add(("reshape", source + 3), algebra.reshape(program.axes[-1], [parts * width]))
    return program


@given(shuffles(), st.randoms(use_true_random=False))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_shuffles_with_cuts_anywhere_commute_with_removal(program: _Program, random: object) -> None:
    assert_removal_commutes(program, random)


def test_an_odd_shuffle_stays_free_and_its_parts_keep_other_indices() -> None:
    first, second = Axis(5), Axis(5)
    groups, inner = algebra.reshape([algebra.concatenation([first, second])], [2, 5])
    assert inner.kind == PARALLEL
    (shuffled,) = algebra.reshape([inner, groups], [10])
    low, high = algebra.split(shuffled, [5, 5])
    assert _free(low)
    assert _free(high)
    assert [own.size for own in [*first.leaves(), *second.leaves()]] == [3, 2, 2, 3]
    scope = Scope()
    observe_shuffles([inner, shuffled, low, high], scope)
    free = [*first.leaves(), *second.leaves()]
    counts = CountSolver(scope, [], free).solve({free[0]: 2, free[1]: 1, free[2]: 1, free[3]: 1})
    assert [counts[own] for own in free] == [2, 1, 1, 2]
    keep = {free[0]: [1, 2], free[1]: [1], free[2]: [0], free[3]: [0, 2]}
    masks = {
        own: torch.zeros(own.size, dtype=torch.bool).index_fill(0, torch.tensor(index), True)
        for own, index in keep.items()
    }
    # first keeps 1, 2, 4 and second keeps 0, 2, 4: in turn they stand at 2, 1, 4, 5, 8, 9 of the full axis
    assert kept_positions(shuffled, masks).tolist() == [2, 1, 4, 5, 8, 9]  # type: ignore[union-attr]
    assert kept_positions(low, masks).tolist() == [2, 1, 4]  # type: ignore[union-attr]
    assert kept_positions(high, masks).tolist() == [0, 3, 4]  # type: ignore[union-attr]


def test_any_other_use_of_parallel_parts_makes_them_one_axis() -> None:
    first, second = Axis(6), Axis(6)
    _, inner = algebra.reshape([algebra.concatenation([first, second])], [2, 6])
    row = Axis(6)
    algebra.unify(inner, row)
    assert first.find() is second.find() is row.find()
    _, other = algebra.reshape([algebra.concatenation([Axis(6), Axis(6)])], [2, 6])
    assert algebra.collapse(other).kind == LEAF


def assert_removal_commutes(program: _Program, random: object) -> None:
    """Run a program on full arrays and on cut ones: the results are the same but for what was cut."""
    every = [axis for axes in program.axes for axis in axes]
    for axis in every:
        algebra.freeze_diagonals(axis)
    scope = Scope()
    observe_shuffles(every, scope)
    free = [own for own in _leaves(program) if own.frozen is None]
    wanted = {own: random.randint(1, own.size) for own in free}  # type: ignore[attr-defined]
    counts = CountSolver(scope, [], free).solve(wanted)
    keep: dict[Axis, torch.Tensor] = {}
    for own in free:
        keep[own] = torch.zeros(own.size, dtype=torch.bool)
        keep[own][random.sample(range(own.size), counts[own])] = True  # type: ignore[attr-defined]

    def kept(number: int) -> list[np.ndarray]:
        found = []
        for axis, size in zip(program.axes[number], program.shapes[number], strict=True):
            assert axis.find().size == size
            index = kept_positions(axis, keep, {})
            found.append(np.arange(size) if index is None else index.numpy())
            assert len(found[-1]) == count_of(axis, counts)
        return found

    start, whole, small = 0, {}, {}
    for number, step in enumerate(program.steps):
        if step[0] == "base":
            size = math.prod(program.shapes[number])
            whole[number] = np.arange(start, start + size, dtype=np.uint64).reshape(program.shapes[number])
            small[number] = whole[number][np.ix_(*kept(number))]
            start += size
    computed, reduced = program.run({}, whole), program.run(counts, small)
    for number, array in enumerate(computed):
        if any(axis.find().kind == PARALLEL for axis in program.axes[number]):
            continue  # one position stands for other indices in each part
        removed = array[np.ix_(*kept(number))]
        assert removed.shape == reduced[number].shape
        assert (removed == reduced[number]).all(), program.steps


@given(programs())
@FAST
def test_leaves_of_every_tensor_multiply_and_add_up_to_its_sizes(program: _Program) -> None:
    for axes, shape in zip(program.axes, program.shapes, strict=True):
        assert tuple(count_of(axis, {}) for axis in axes) == shape
        for axis in axes:
            for own in axis.leaves():
                assert own.parent is None
                assert own.kind == LEAF


# what must stay free, and what must freeze


def _free(axis: Axis) -> bool:
    return all(own.frozen is None for own in axis.leaves())


def test_heads_and_width_are_discovered_by_a_reshape() -> None:
    hidden, row = Axis(32), Axis(32)
    algebra.unify(hidden, row)
    heads, width = algebra.reshape([hidden], [4, 8])
    assert row.find().kind == PRODUCT
    assert list(row.leaves()) == [heads, width]
    assert _free(row)


def test_fused_query_key_value_is_three_segments_of_the_same_structure() -> None:
    fused = Axis(96)
    query, key, value = algebra.split(fused, [32, 32, 32])
    heads = [algebra.reshape([piece], [4, 8]) for piece in (query, key, value)]
    for own in heads[1:]:
        algebra.unify(heads[0][0], own[0])
        algebra.unify(heads[0][1], own[1])
    assert _free(fused)
    assert len(set(fused.leaves())) == 2
    keep = {heads[0][0].find(): torch.tensor([True, False, True, False])}
    expected = [p for p in range(96) if (p % 32) // 8 in (0, 2)]
    assert kept_positions(fused, keep).tolist() == expected  # type: ignore[union-attr]


def test_channel_shuffle_stays_free_and_moves_indices() -> None:
    channels = Axis(12)
    groups, inner = algebra.reshape([channels], [2, 6])
    shuffled = algebra.product([inner, groups])
    assert _free(shuffled)
    labels = np.arange(12).reshape(2, 6).T.reshape(-1)
    keep = {inner.find(): torch.tensor([True, True, False, True, False, False])}
    source = kept_positions(channels, keep)
    target = kept_positions(shuffled, keep)
    assert set(labels[target.numpy()]) == set(source.tolist())  # type: ignore[union-attr]


def test_a_cut_inside_an_inner_factor_freezes() -> None:
    whole = algebra.product([Axis(3), Axis(8)])
    pieces = algebra.split(whole, [4, 20], "model.py:3")
    assert not any(own.frozen is None for own in whole.leaves())
    assert all(own.frozen for piece in pieces for own in piece.leaves())
    assert next(iter(whole.leaves())).where == "model.py:3"


def test_a_cut_at_multiples_of_the_inner_factor_stays_free() -> None:
    outer, inner = Axis(6), Axis(8)
    whole = algebra.product([outer, inner])
    first, second = algebra.split(whole, [16, 32])
    assert _free(whole)
    assert outer.find().kind == CONCATENATION
    assert [first.find().size, second.find().size] == [16, 32]


def test_an_axis_that_would_contain_itself_freezes() -> None:
    own = Axis(4)
    whole = algebra.product([own, Axis(1)])
    assert whole.find() is own
    larger = algebra.concatenation([own, Axis(2)])
    target = Axis(6)
    algebra.unify(target, larger)
    algebra.unify(algebra.split(target, [4, 2])[0], own)  # same axis again: no circle
    assert own.find().frozen is None
    inside = Axis(4)
    around = algebra.product([inside, inside])
    assert inside.frozen is not None  # multiplied with itself: a diagonal cannot be cut
    assert around.find().size == 16


def test_occurs_check() -> None:
    own = Axis(8)
    structure = Axis(8, PRODUCT, (Axis(1, frozen="size 1"), own))
    algebra.unify(own, structure)
    assert own.find() is own
    assert own.frozen == "an axis that would contain itself"


def test_sizes_that_differ_freeze_both() -> None:
    first, second = Axis(4), Axis(6)
    algebra.unify(first, second, "here.py:1")
    assert first.frozen is not None
    assert second.frozen is not None
    assert first.where == "here.py:1"


def test_incompatible_reshapes_freeze() -> None:
    own = Axis(36)
    algebra.reshape([own], [4, 9])
    algebra.reshape([own], [6, 6])
    assert not _free(own)


def test_a_tensor_without_elements_is_regrouped_around_its_empty_dimension() -> None:
    samples, channels, height = algebra.leaf(0), algebra.leaf(6), algebra.leaf(4)
    rows, flat = algebra.reshape([samples, channels, height], [0, 24])
    assert rows is samples
    assert set(flat.leaves()) == {channels, height}
    assert channels.frozen is None
    merged = [algebra.leaf(2), algebra.leaf(0), algebra.leaf(5)]
    assert all(axis.frozen for axis in algebra.reshape(merged, [0, 10]))
    assert all(axis.frozen for axis in merged)  # which part of them went where cannot be known


def test_freezing_one_spelling_of_an_axis_freezes_all() -> None:
    hidden = Axis(24)
    heads, width = algebra.reshape([hidden], [4, 6])
    algebra.freeze(hidden, "why", "a.py:9")
    assert heads.find().frozen == width.find().frozen == "why"
    late = Axis(24)
    algebra.unify(late, hidden)
    assert not _free(late)


def test_a_frozen_leaf_stays_frozen_when_it_is_refined() -> None:
    own = Axis(24, frozen="model input")
    assert all(part.find().frozen == "model input" for part in algebra.reshape([own], [4, 6]))
    other = Axis(24, frozen="model input")
    assert all(part.find().frozen == "model input" for part in algebra.split(other, [10, 14]))


def test_refinement_by_powers_of_two_is_safe() -> None:
    own = Axis(16)
    first, second = algebra.reshape([own], [4, 4])
    algebra.unify(first, second)  # x.view(4, 4) + x.view(4, 4).T
    assert first.find() is second.find()
    algebra.freeze_diagonals(own)
    keep = {
        leaf: torch.tensor([True, False, True, True]) for leaf in set(own.leaves()) if leaf.frozen is None
    }
    kept = kept_positions(own, keep)
    matrix = np.arange(16).reshape(4, 4)
    allowed = matrix if kept is None else matrix[np.ix_([0, 2, 3], [0, 2, 3])]
    assert (np.arange(16) if kept is None else kept.numpy()).tolist() == allowed.reshape(-1).tolist()


# expressions


_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "/": lambda a, b: a / b,
    "%": lambda a, b: a % b,
}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(_OPERATIONS)), st.booleans(), st.integers(1, 9)), max_size=6),
    st.integers(2, 50),
    st.integers(2, 50),
)
@FAST
def test_tagged_arithmetic_equals_plain_and_re_evaluates(steps: list, number: int, other: int) -> None:
    variable = Attribute(1, "width", None, "m.width", number)
    heads = Attribute(2, "heads", None, "m.heads", 7)

    def compute(start: int, second: int) -> float:
        value: float = start
        for name, swapped, plain in steps:
            operand = second if plain > 6 else plain
            # a value may be zero: it is never a divisor
            value = (
                _OPERATIONS[name](operand, value)
                if swapped and name in "+-*"
                else _OPERATIONS[name](value, operand)
            )
        return value

    tagged = compute(TaggedInt(number, variable), TaggedInt(7, heads))
    plain = compute(number, 7)
    assert tagged == plain
    assert isinstance(tagged, type(plain))
    expression = expressions.expression_of(tagged)
    assert evaluate(expression, lambda v: v.number) == plain
    assert evaluate(expression, {variable: other, heads: 3}.__getitem__) == compute(other, 3)


def test_tagged_integers_behave_as_integers() -> None:
    number = TaggedInt(6, Attribute(0, "k", None, "m.k", 6))
    assert number == 6
    assert {6: "six"}[number] == "six"
    assert list(range(number)) == list(range(6))
    assert f"{number}" == "6"
    assert isinstance(number, int)
    assert [0] * number == [0] * 6
    import copy
    import pickle

    assert type(copy.deepcopy(number)) is int
    assert type(pickle.loads(pickle.dumps(number))) is int
    assert expressions.describe((number * 2 + 1).expression) == "((m.k * 2) + 1)"
    assert type(-number).__name__ == "TaggedInt"
    assert evaluate((2 - number).expression, lambda v: 10) == -8
    assert evaluate((number**-0.5).expression, lambda v: 16) == 0.25


# counts


def _attribute(name: str, number: int) -> Attribute:
    return Attribute(hash(name), name, None, name, number)


def _brute_force(solver: CountSolver, desired: dict[Axis, int]) -> float:
    """Smallest total of relative increases that satisfies every constraint."""
    own = list(desired)
    best = math.inf
    for numbers in every(*(range(desired[axis], axis.size + 1) for axis in own)):
        counts = dict(zip(own, numbers, strict=True))
        if all(solver.holds(constraint, counts) for constraint in solver.constraints):
            best = min(best, sum((counts[axis] - desired[axis]) / axis.size for axis in own))
    return best


def _cost(counts: dict[Axis, int], desired: dict[Axis, int]) -> float:
    return sum((counts[axis] - desired[axis]) / axis.size for axis in desired)


class _Call:
    """What the solver asks of a node."""

    where = "model.py:1"


def _solver(leaves: list[Axis], observations: list[tuple]) -> CountSolver:
    from dwindle.graph.rules.registry import Observation

    scope = Scope()
    for expression, axes in observations:
        scope.observations.append(Observation(expression, axes, 1, _Call()))  # type: ignore[arg-type]
    return CountSolver(scope, [], leaves)


@given(st.integers(1, 8), st.integers(1, 8))
@FAST
def test_one_attribute_that_sizes_two_axes_keeps_them_equal(first: int, second: int) -> None:
    a, b = Axis(8), Axis(8)
    width = _attribute("width", 8)
    solver = _solver([a, b], [(width, [a]), (width, [b])])
    desired = {a: first, b: second}
    counts = solver.solve(desired)
    assert counts[a] == counts[b] == max(first, second)
    assert solver.attributes(counts).get(width, 8) == max(first, second)
    assert _cost(counts, desired) == pytest.approx(_brute_force(solver, desired))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 12))
@FAST
def test_products_and_sums_of_counts_against_brute_force(heads: int, width: int, hidden: int) -> None:
    """``hidden = heads * width`` where hidden is another axis: same count, other indices."""
    a, b, c = Axis(6), Axis(4), Axis(24)
    number = _attribute("heads", 6), _attribute("width", 4)
    product = expressions.Operation("mul", number)
    solver = _solver([a, b, c], [(number[0], [a]), (number[1], [b]), (product, [c])])
    desired = {a: heads, b: width, c: hidden}
    counts = solver.solve(desired)
    assert counts[a] * counts[b] == counts[c]
    assert all(counts[axis] >= desired[axis] for axis in desired)
    best = _brute_force(solver, desired)
    assert _cost(counts, desired) >= best - 1e-9
    if best == 0:
        assert counts == desired
    alone = [c for c in range(hidden, 25) if heads * width == c]
    if alone:  # raising one axis is enough: then only the cheapest single one is raised
        assert _cost(counts, desired) <= (alone[0] - hidden) / 24 + 1e-9


@given(st.lists(st.integers(1, 6), min_size=3, max_size=3), st.sampled_from([1, 2, 4]))
@FAST
def test_chains_of_constraints_are_satisfied(wishes: list[int], multiple: int) -> None:
    """Halves that stay equally long, one of which is an attribute's size plus another axis."""
    a, b, c = Axis(6), Axis(6), Axis(12)
    own = _attribute("n", 12)
    solver = _solver([a, b, c], [(own, [a, b]), (own, [c])])
    solver_scope = Scope()
    solver_scope.same_counts.append([a, b])
    pairs = CountSolver(solver_scope, [], [a, b, c])
    desired = dict(zip((a, b, c), (wishes[0], wishes[1], wishes[2] * 2), strict=True))
    counts = solver.solve(desired, multiple)
    assert counts[a] + counts[b] == counts[c]
    assert all(counts[axis] >= min(axis.size, desired[axis]) for axis in desired)
    both = pairs.solve(desired, multiple)
    assert both[a] == both[b] >= max(wishes[0], wishes[1])
    assert all(both[axis] % multiple == 0 or both[axis] == axis.size for axis in (a, b))


def test_an_expression_of_a_size_follows_the_axis() -> None:
    """``x.shape[1] // 2`` given to a split: the piece is half of what stays."""
    a, b = Axis(8), Axis(4)
    value = Value("result", "", (2, 8), torch.float32, [Axis(2), a])
    half = expressions.Operation("floordiv", (Dimension(value, 1), 2))
    solver = _solver([a, b], [(half, [b])])
    counts = solver.solve({a: 5, b: 1})
    assert counts[b] == counts[a] // 2
    assert counts == {a: 5, b: 2}


def test_temperatures_keep_their_value() -> None:
    """A scale computed from a width keeps the width (its indices would change the temperature)."""
    width = Axis(8)
    value = Value("result", "", (2, 8), torch.float32, [Axis(2), width])
    scope = Scope()
    scope.scales.append((_Call(), expressions.Operation("pow", (Dimension(value, 1), -0.5))))  # type: ignore[arg-type]
    solver = CountSolver(scope, [], [width])
    assert solver.solve({width: 4}) == {width: 8}


def test_constraints_that_cannot_hold_give_everything_back() -> None:
    a = Axis(8)
    width = _attribute("width", 7)
    solver = _solver(
        [a],
        [
            (width, [Axis(7, frozen="fixed")]),
            (width, [Axis(7)]),
            (expressions.Operation("add", (width, 1)), [a]),
        ],
    )
    assert solver.solve({a: 3}) == {a: 8}
