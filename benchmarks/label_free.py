"""EfficientNet-Lite0 at half of the latency of its own int8 file, unlabelled: three ways to share out what must go.

    python benchmarks/label_free.py [--ways uniform joint]    rows in benchmarks/results/label_free.jsonl
    python benchmarks/label_free.py --page                    docs/label_free_results.md from the rows

Everything is done with photographs, and with scenes of things cut out of other ones (``label_free_pictures.py``), a
quarter of which only score the trials of the search; the result is judged on those of the agreement part, which nothing
else sees: how often the int8 file's first guess, in ONNX Runtime, is that of the float original. On Debian they come
with ``sudo apt-get install opencv-doc mate-backgrounds tuxpaint-stamps-default``.

- *joint*: an Optuna study over residual blocks, the way in which axes share what must go (by importance, by measured
  sensitivity, with equal drop, uniformly) and what each axis is held to be worth beside that. A trial is repaired and
  scored by the divergence of its outputs from the original's.
- *dw.auto*: one call, ``effort="seconds"`` with as many trials, told the milliseconds, and scored in the same way.
- *sensitivity-guided*: ``dw.sensitivity`` without a metric, and the counts at which all axes cost the same drop alone.
- *uniform*: every axis loses the same share.

All get the same measured latency, the same repair, the same batches for ranges, and then, as rows of their own, the
same training by the original's answers with int8 in the loop.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dwindle as dw
from dwindle import zoo
from dwindle.search import run_study
from dwindle.search.auto import Candidate, Training
from dwindle.search.auto.beginning import Beginning
from dwindle.search.auto.fitting import Fitted, Fitter, Share, uniform_share
from dwindle.search.auto.joint import Choices, JointSubject, Wish
from dwindle.search.auto.latencies import Latencies
from dwindle.search.auto.limits import Limit
from dwindle.search.auto.making import built, integer_model, trained
from dwindle.search.auto.measured_harm import HarmCurves, equal_drop_share
from dwindle.search.auto.variant import Workpiece
from dwindle.search.auto.workbench import Workbench
from dwindle.search.studies import Report
from dwindle.training.normalization_statistics import adapt_normalization
from label_free_pictures import Answers, Sources, in_order

HERE = Path(__file__).resolve().parent
CACHE = HERE / "results" / "cache" / "label_free"
ROWS = HERE / "results" / "label_free.jsonl"
PAGE = HERE.parent / "docs" / "label_free_results.md"
COST = "latency:onnxruntime"
SHARE = 0.5
WAYS = ("uniform", "sensitivity-guided", "joint", "dw.auto")
#: Measured latencies of the ways may differ by so much.
CLOSE = 0.02
#: Counts are multiples of this, for all ways: the depthwise kernels of ONNX Runtime go through channels by sixteen and
#: do those left over one by one, so that a third of the channels may take as long as all of them.
ROUND_TO = 16
#: Crops of each photograph and scenes of each thing: to repair, to train, to score trials, to judge. For ranges and
#: importances there is one crop of each photograph, and as many scenes.
PICTURES = {"repair": (2, 1), "training": (8, 8), "scoring": (4, 2), "judging": (4, 2)}
#: Training rounds from this share of its steps on: before that a step takes half as long.
QUANTIZE_AT = 0.7


def log(*words: Any) -> None:
    """Say something with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


class Setting:
    """The model, its pictures and what measures.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = zoo.efficientnet_lite0_timm()
        learning, held = Sources.of("calibration", options.python_only).split()
        self.judges = Sources.of("agreement", options.python_only)
        scenes = learning.scenes(1, 0)[: len(learning.photographs)]
        # small batches: files whose time alone counts are made with the first
        self.ranges = list(in_order(torch.cat([learning.crops(1, 0), scenes])).split(3))
        # the crops of a photograph lie together, so that what a repair holds out is new to it
        self.repairing = list(learning.pictures(*PICTURES["repair"], 1).split(2 * PICTURES["repair"][0]))
        self.training = learning.pictures(*PICTURES["training"], 2)
        self.scoring = Answers(self.model, held.pictures(*PICTURES["scoring"], 3))
        parts = {"used": learning, "held out": held, "judged": self.judges}
        self.sources = {name: [len(own.photographs), len(own.things)] for name, own in parts.items()}
        self.workpiece = Workpiece(
            self.model, (self.ranges[0][:1],), {}, self.ranges, None, round_to=ROUND_TO
        )
        log("photographs and things", self.sources)
        self.whole = self.rounded(Candidate(), self.model)
        self.bench = Workbench(self.whole, self.workpiece.inputs, {}, [COST], threads=1, repeats=100)
        self.latencies = Latencies(self.workpiece, self.bench, "onnxruntime", 1)
        self.fitter = self.fitter_for(SHARE)
        log("original in int8:", self.bench.whole, self.scoring(self.bench.sessions()["onnxruntime"]))

    @functools.cached_property
    def judging(self) -> Answers:
        """Return what judges: made only when everything else is done."""
        return Answers(self.model, self.judges.pictures(*PICTURES["judging"], 0))

    def fitter_for(self, share: float) -> Fitter:
        """Return what fits candidates to a share of the latency of the original's int8 file."""
        return Fitter(self.workpiece, self.bench, [Limit(COST, share, False)], "onnxruntime", self.latencies)

    def rounded(self, candidate: Candidate, small: nn.Module) -> nn.Module:
        """Return the int8 model."""
        return integer_model(self.workpiece, candidate, small, "onnxruntime", self.ranges)

    def repaired(self, candidate: Candidate, passes: int) -> nn.Module:
        """Return the small float model, repaired, its normalizations adapted."""
        small = built(self.workpiece, candidate)
        if candidate.counts or candidate.blocks:
            dw.repair(small, self.model, self.repairing, passes=passes)
        adapt_normalization(small, self.repairing)
        return small

    def trained(self, candidate: Candidate, small: nn.Module) -> nn.Module:
        """Return the model trained by the original's answers, with quantizers on it."""
        options = self.options
        generator = torch.Generator().manual_seed(options.seed)
        pictures = torch.cat(
            [
                self.training[torch.randperm(len(self.training), generator=generator)]
                for _ in range(options.epochs)
            ]
        )
        training = Training(
            1,
            lambda own: torch.optim.AdamW(own, options.rate, weight_decay=0.0),
            temperature=2.0,
            cache=True,
        )
        return trained(
            self.workpiece,
            candidate.but(quantize_at=QUANTIZE_AT),
            small,
            list(pictures.split(16)),
            training,
            epochs=1,
            loss=None,
            backend="onnxruntime",
            seed=options.seed,
            progress=False,
        )

    def measured(self, model: nn.Module, small: nn.Module) -> float:
        """Return the latency of an int8 model over that of the original's int8 file; its file is open behind this."""
        costs = self.bench.measure(model, small, integers=True)
        return self.bench.shares(costs)[COST]


def curves(setting: Setting) -> HarmCurves:
    """Measure what cutting each axis alone does; kept on the disk."""
    result = dw.sensitivity(
        setting.model,
        setting.ranges[::2],
        kinds=["pruning"],
        ratios=(0.25, 0.5, 0.75),
        importance="outputs",
        storage=CACHE / "sensitivity",
        progress=False,
    )
    return HarmCurves.of(setting.workpiece.variant().space, result)


def by_share(setting: Setting, share: Share, goal: float) -> Fitted:
    """Return a candidate by one rule whose latency is close to a goal, as a share of the original's.

    Where the rule does not reach it, that is the smallest model of the space.
    """
    best: Fitted | None = None
    aim = goal
    for _ in range(4):
        found = setting.fitter_for(aim).fit(Candidate(importance="outputs"), share)
        if found is None:  # the smallest one that there is
            log(f"nothing by this rule at {aim:.3f}: the smallest model instead")
            space = setting.workpiece.variant().space
            smallest = Candidate(importance="outputs", counts=space.named(space.smallest()))
            return setting.fitter.measure(smallest)
        now = setting.bench.shares(found.costs)[COST]
        log(f"aimed at {aim:.3f}, measured {now:.3f}")
        if best is None or abs(now - goal) < abs(setting.bench.shares(best.costs)[COST] - goal):
            best = found
        if abs(now / goal - 1) < CLOSE:
            break
        aim *= goal / now
    assert best is not None
    return best


def by_joint(setting: Setting, harm: HarmCurves) -> tuple[Candidate, dict[str, Any]]:
    """Search jointly, and return what scored best on the held-out pictures."""
    options, latencies = setting.options, setting.latencies

    def assess(candidate: Candidate, report: Report) -> float:
        begin = time.process_time()
        score = -setting.scoring(setting.repaired(candidate, options.trial_passes))["divergence"]
        log(f"trial: {score:.3f}, {candidate.summary()}, {time.process_time() - begin:.0f} s")
        return score

    beginning = Beginning(
        setting.fitter, ("blocks", "widths", "int8"), False, options.trials, latencies.widths
    )
    found = beginning.choices()
    choices = Choices(found.blocks, found.importances, found.float_layers, found.numbers)
    log("blocks in the order in which they may go:", choices.blocks[-1])
    identity = {"model": "efficientnet_lite0", "share": SHARE, "passes": options.trial_passes}
    subject = JointSubject(setting.fitter, choices, assess, identity, latencies.widths, harm)
    base = Candidate(importance="outputs", float_layers=choices.float_layers[0])
    first = [
        Wish(base.but(blocks=blocks), share, {})
        for blocks in choices.blocks[: options.depths]
        for share in (
            ("measured", "greedy", "equal drop", "uniform") if not blocks else ("measured", "greedy")
        )
    ]
    study = run_study(
        subject,
        trials=options.trials,
        name="joint",
        storage=CACHE / f"joint_{options.trial_passes}.db",
        seed=options.seed,
        enqueue=[subject.parameters_of(wish) for wish in first[: options.trials]],
        progress=False,
    )
    ranked = sorted((own for own in study.trials if own.feasible), key=lambda own: -own.values["score"])
    facts = {"trials": len(study.trials), "scores": [own.values["score"] for own in ranked]}
    return Candidate.from_json(ranked[0].attributes["candidate"]), facts


def by_auto(setting: Setting) -> tuple[Candidate, dict[str, Any]]:
    """Ask ``dw.auto``."""
    options, milliseconds = setting.options, SHARE * setting.bench.whole[COST]
    found = dw.auto(
        setting.model,
        torch.cat(setting.repairing).split(16),
        budget={COST: f"{milliseconds:.4f} ms"},
        loss=None,
        metric=lambda model: setting.scoring(model)["divergence"],
        greater_is_better=False,
        effort="seconds",
        trials=options.trials,
        example_inputs=setting.workpiece.inputs,
        threads=1,
        storage=CACHE / "auto.db",
        seed=options.seed,
        progress=False,
    )
    log(found.summary())
    return found.candidate, {"trials": options.trials, "costs": found.costs}


def row_of(
    setting: Setting, way: str, candidate: Candidate, small: nn.Module, model: nn.Module, trained_or_not: str
) -> dict[str, Any]:
    """Judge an int8 model."""
    latency = setting.measured(model, small)
    session = setting.bench.sessions()["onnxruntime"]
    row = {
        "way": way,
        "trained": trained_or_not,
        "latency": latency,
        "judged": setting.judging(session),
        "held out": setting.scoring(session),
        "candidate": candidate.to_json(),
        "sources": setting.sources,
        "pictures": {"repair": sum(map(len, setting.repairing)), "training": len(setting.training)},
        "passes": setting.options.passes,
        "epochs": setting.options.epochs,
        "rate": setting.options.rate,
    }
    log(way, "trained:", trained_or_not, f"latency {latency:.3f}", row["judged"], row["held out"])
    return row


def candidate_of(setting: Setting, way: str) -> tuple[Candidate, dict[str, Any]]:
    """Return the candidate of a way; kept on the disk."""
    path = CACHE / f"{way}.json"
    if path.exists():
        data = json.loads(path.read_text())
        return Candidate.from_json(data["candidate"]), data["facts"]
    begin = time.process_time()
    facts: dict[str, Any] = {}
    if way == "uniform":
        candidate = by_share(setting, uniform_share(), SHARE).candidate
    elif way == "sensitivity-guided":
        candidate = by_share(setting, equal_drop_share(curves(setting)), SHARE).candidate
    elif way == "joint":
        candidate, facts = by_joint(setting, curves(setting))
    else:
        candidate, facts = by_auto(setting)
    facts["search seconds"] = time.process_time() - begin
    log(way, candidate.summary(), facts)
    path.write_text(json.dumps({"candidate": candidate.to_json(), "facts": facts}))
    return candidate, facts


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of results."""
    sources = {name: f"{own[0]} photographs and {own[1]} things" for name, own in rows[0]["sources"].items()}
    pictures = rows[0]["pictures"]
    lines = [
        "# Half the latency without a label",
        "",
        "Made by `benchmarks/label_free.py`, which says how; do not edit by hand. EfficientNet-Lite0 with its",
        "ImageNet weights; latency in ONNX Runtime, one thread, one picture, over that of its own int8 file.",
        f"Pictures without labels: {sources['used']}, {pictures['repair']} pictures of which repair and",
        f"{pictures['training']} train; {sources['held out']} score the trials of the search. The figures are of the",
        f"int8 files on {sources['judged']} that nothing else saw: how often their first guess is that of the float",
        "original, how often that is among their five, and the divergence of their",
        "outputs.",
        "",
        "| way | trained by the original's answers | latency | same first guess | among five | divergence, nats |",
        "|---|---|---|---|---|---|",
    ]
    latest = {(row["way"], row["trained"]): row for row in rows}
    for trained_or_not in ("no", "yes"):
        for way in ("original", *WAYS):
            row = latest.get((way, trained_or_not))
            if row is not None:
                own = row["judged"]
                lines.append(
                    f"| {way} | {trained_or_not} | {row['latency']:.3f} | {100 * own['agreement']:.1f} % "
                    f"| {100 * own['in five']:.1f} % | {own['divergence']:.2f} |"
                )
    lines += ["", "What goes:", ""]
    for way in WAYS:
        row = latest.get((way, "no"))
        if row is not None:
            lines.append(f"- {way}: {Candidate.from_json(row['candidate']).summary()}")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the ways that have no rows, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--depths", type=int, default=4, help="sets of blocks that the search begins with")
    parser.add_argument("--trial-passes", type=int, default=1, help="of the repair of a trial")
    parser.add_argument("--passes", type=int, default=1, help="of the repair of the result")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--python-only", action="store_true", help="only the photographs of Python packages")
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    rows = (
        [json.loads(line) for line in options.output.read_text().splitlines()]
        if options.output.exists()
        else []
    )
    if options.page:
        PAGE.write_text(page(rows))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    setting = Setting(options)
    done = {(row["way"], row["trained"]) for row in rows}
    small: dict[str, nn.Module] = {}

    def write(row: dict[str, Any]) -> None:
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if ("original", "no") not in done:
        write(row_of(setting, "original", Candidate(), setting.model, setting.whole, "no"))
    for train in ("no",) if options.no_training else ("no", "yes"):
        for way in options.ways:
            if (way, train) in done:
                continue
            candidate, facts = candidate_of(setting, way)
            begin = time.process_time()
            if way not in small:
                small[way] = setting.repaired(candidate, options.passes)
            made = (
                setting.rounded(candidate, small[way])
                if train == "no"
                else setting.trained(candidate, small[way])
            )
            seconds = time.process_time() - begin
            write(
                {
                    **row_of(setting, way, candidate, small[way], made, train),
                    "seconds": seconds,
                    "facts": facts,
                }
            )


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent / "tests"))
    importlib.import_module("support.torchvision_shim").install()
    main()
