"""What is compared with what: the links of a distiller, from a config_list of kind ``distillation``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dwindle.config import resolve
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.distillation.matching import ShapeMatcher, corresponding_path, observed_features
from dwindle.distillation.methods import METHODS
from dwindle.training.named_schedules import read_schedule
from dwindle.training.schedule import Schedule

__all__ = ["FeatureLink", "resolve_links", "summary_of"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class FeatureLink:
    """One target of the student and what it is compared with.

    Attributes:
        module: The student's module.
        target: ``_output_0``, ``_input_0`` and so on.
        teacher_modules: Modules of the teacher; the nearest of them counts (the smallest loss).
        weight: Weight of this target's loss (``lambda`` in a config_list), a number or a schedule.
        method: A key of :data:`dwindle.distillation.METHODS`.
        options: Options of the method, numbers or schedules.
        matched: How the teacher's modules were found: ``link`` (named), ``path`` or ``shape``.
    """

    module: str
    target: str
    teacher_modules: tuple[str, ...]
    weight: float | Schedule
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    matched: str = field(default="link", compare=False)


def resolve_links(
    model: nn.Module,
    teacher: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    inputs: Inputs | None = None,
) -> tuple[FeatureLink, ...]:
    """Turn a config_list of kind ``distillation`` into links, in the order of the model's modules.

    Args:
        model: The student.
        teacher: The teacher.
        config_list: The user's.
        inputs: Positional and keyword inputs of both; without them modules are matched by their paths alone.

    Raises:
        ConfigError: An entry is not valid, a linked module does not exist, or none corresponds.
    """
    settings = resolve(model, config_list, "distillation")
    unmatched = []
    for target, setting in settings.items():
        if target.is_parameter:
            raise ConfigError(f"{target.path}: only inputs and outputs can be distilled, not parameters")
        if _wants_matching(setting.link) and corresponding_path(target.module, model, teacher) is None:
            unmatched.append(target.module)
    matcher = _shape_matcher(model, teacher, inputs, unmatched)
    teacher_names = dict(teacher.named_modules())
    links = []
    for target, setting in settings.items():
        names, matched = [], "link"
        for name in _named(setting.link):
            if name is None:
                found = corresponding_path(target.module, model, teacher)
                matched = "path" if found is not None else "shape"
                name = found if found is not None else _by_shape(matcher, target, teacher_names)
            elif name not in teacher_names:
                raise ConfigError(
                    f"{target.path}: the teacher has no module {name!r}{did_you_mean(name, teacher_names)}"
                )
            names.append(name)
        method = setting.apply_method or "mse"
        options = {
            key: read_schedule(value, f"{target.path}: option {key!r}")
            if isinstance(value, Mapping)
            else value
            for key, value in (setting.options or {}).items()
        }
        METHODS[method].check(options, f"{target.path}: apply_method {method!r}")
        weight = 1.0 if setting.lambda_ is None else setting.lambda_
        links.append(
            FeatureLink(
                target.module,
                target.name,
                tuple(names),
                read_schedule(weight, f"{target.path}: key 'lambda'"),
                method,
                options,
                matched,
            )
        )
    return tuple(links)


def _named(link: Any) -> tuple[str | None, ...]:
    """The names of a setting's ``link``; None where the module is to be found."""
    entries = (link,) if link is None or isinstance(link, str) else tuple(link) or (None,)
    return tuple(None if entry in (None, "auto") else str(entry) for entry in entries)


def _wants_matching(link: Any) -> bool:
    return None in _named(link)


def _shape_matcher(
    model: nn.Module, teacher: nn.Module, inputs: Inputs | None, wanted: Sequence[str]
) -> ShapeMatcher | None:
    if inputs is None or not wanted:
        return None
    args, kwargs = inputs
    return ShapeMatcher(
        observed_features(model, args, kwargs), observed_features(teacher, args, kwargs), wanted
    )


def _by_shape(matcher: ShapeMatcher | None, target: Any, teacher_names: Mapping[str, Any]) -> str:
    nearest = did_you_mean(target.module, [name for name in teacher_names if name])
    if matcher is None:
        raise ConfigError(
            f"{target.path}: the teacher has no module {target.module!r}; name one with 'link', or give example_inputs "
            f"so that it is matched by its shape{nearest}"
        )
    found = matcher.match(target.module) if target.name == "_output_0" else None
    if found is None:
        raise ConfigError(
            f"{target.path}: no module of the teacher corresponds to {target.module!r} by path or by shape; "
            f"name one with 'link'{nearest}"
        )
    return found


def summary_of(links: Sequence[FeatureLink], shapes: Mapping[tuple[str, str, str], str]) -> str:
    """Return a table of links as text.

    Args:
        links: The links.
        shapes: What is known of the shapes, by student module, target and teacher module.
    """
    rows = [("student", "teacher", "method", "lambda", "matched by", "shapes")]
    for link in links:
        weight = f"{link.weight:g}" if isinstance(link.weight, int | float) else type(link.weight).__name__
        options = ", ".join(f"{name}={value}" for name, value in link.options.items())
        for name in link.teacher_modules:
            rows.append(
                (
                    f"{link.module}.{link.target}",
                    name or "(the whole model)",
                    f"{link.method}({options})" if options else link.method,
                    weight,
                    link.matched,
                    shapes.get((link.module, link.target, name), ""),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
