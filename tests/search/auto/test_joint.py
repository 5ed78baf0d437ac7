"""What trials of the joint search draw: candidates that can be built, whatever was drawn together."""

from __future__ import annotations

import optuna
import pytest

import dwindle as dw
from dwindle.search.auto import Candidate
from dwindle.search.auto.fitting import Fitter
from dwindle.search.auto.joint import Choices, JointSubject, Wish
from dwindle.search.auto.latencies import Latencies
from dwindle.search.auto.limits import Limit
from dwindle.search.auto.making import built, integer_model
from dwindle.search.auto.variant import Workpiece
from dwindle.search.auto.workbench import Workbench

CHOICES = Choices(
    blocks=((), ("stages.0.1",)),
    importances=("l1",),
    float_layers=((), ("stem",), ("stem", "stages.0.1.conv1"), ("stages.1.0.conv2",)),
    numbers=("int8", "float32"),
    ranks={"stages.0.1.conv2": 8, "stages.1.0.conv1": 16, "stages.1.0.conv2": 16},
)


@pytest.fixture
def subject(workpiece: Workpiece) -> JointSubject:
    bench = Workbench(workpiece.model, workpiece.inputs, {}, ["macs"], threads=1)
    latencies = Latencies(workpiece, bench, "onnxruntime", 1)
    fitter = Fitter(workpiece, bench, [Limit("macs", 0.5, False)], "onnxruntime", latencies)
    return JointSubject(fitter, CHOICES, lambda candidate, report: 0.0, {})


def drawn(subject: JointSubject, count: int) -> list[Wish]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [Wish.from_json(subject.suggest(study.ask())) for _ in range(count)]


def test_everything_that_is_drawn_can_be_built_and_rounded(
    subject: JointSubject, workpiece: Workpiece
) -> None:
    wishes = drawn(subject, 40)
    bases = {wish.base.key: wish.base for wish in wishes}
    assert any(base.blocks and base.ranks for base in bases.values())
    assert any(base.blocks and base.float_layers for base in bases.values())
    for base in bases.values():
        named = [*base.ranks, *base.float_layers]
        assert not any(path.startswith(block) for path in named for block in base.blocks)
        assert not set(base.ranks) & set(base.float_layers)
        small = built(workpiece, base)
        if base.numbers == "int8":
            integer_model(workpiece, base, small, "onnxruntime")


def test_what_was_drawn_fits_the_budget(subject: JointSubject) -> None:
    reasons, fits = [], []
    for wish in drawn(subject, 20):
        try:
            fits.append(subject.fitted(wish).fits)
        except dw.DwindleError as error:
            reasons.append(str(error))
    assert all("out of reach" in reason for reason in reasons)
    assert sum(fits) >= 15


def test_half_of_all_trials_leave_every_rank(subject: JointSubject) -> None:
    wishes = drawn(subject, 100)
    whole = sum(not wish.base.ranks for wish in wishes)
    assert 35 <= whole <= 70


def test_a_wish_is_drawn_again_from_its_parameters(subject: JointSubject) -> None:
    for layers in CHOICES.float_layers[:2]:
        for blocks in CHOICES.blocks:
            wish = Wish(
                Candidate(blocks, importance="l1", float_layers=layers), "uniform", {"stem.weight[0]": 0.3}
            )
            again = Wish.from_json(subject.suggest(optuna.trial.FixedTrial(subject.parameters_of(wish))))
            assert again.base == wish.base
            assert {name: own for name, own in again.tilts.items() if own} == wish.tilts
