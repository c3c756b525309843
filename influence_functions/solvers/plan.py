"""Which solver, how many test samples at once and how many training samples at a time: what fits into the memory."""

from __future__ import annotations

import dataclasses
import math

from ..problem import Problem
from .base import SOLVERS, Cost, Plan, Prepared

AUTO = ("kernel", "ekfac_kernel", "ekfac")  # by preference
NOTHING = Cost()
SMALL = 16  # training samples at a time, below which more passes are better than smaller chunks


def check_solver(name: str) -> None:
    """ValueError for a solver that nobody registered."""
    if name != "auto" and name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: use one of auto, {', '.join(SOLVERS)}")


def plan(problem: Problem, tests: int, results: Cost = NOTHING) -> Plan:
    """The first solver that fits, with what its results take, for `tests` samples in as few passes as may be.

    ValueError with the numbers where none fits.
    """
    asked, room = problem.settings.solver, problem.footprint.room
    check_solver(asked)
    tried: list[tuple[str, float]] = []
    for name in AUTO if asked == "auto" else (asked,):
        cost = SOLVERS[name].cost(problem, tests).plus(results)
        if (fitting := _fitting(name, cost, tests, problem)) is not None:
            choice = "; ".join(f"{other} needs {_gb(least)} of {_gb(room)}" for other, least in tried)
            return dataclasses.replace(fitting, choice=choice)
        tried.append((name, cost.total(1, 1)))
    needed = ", ".join(f"{_gb(least)} with solver {name!r}" for name, least in tried)
    scores = f", {_gb(results.fixed)} of it for the scores" if results.fixed else ""
    raise ValueError(
        f"influence needs at least {needed}{scores}, and {_gb(room)} may be taken; raise memory=, if there is more, or "
        f"pass fewer test samples, samples below {len(problem.sample)} or a model with frozen layers"
    )


def _fitting(name: str, cost: Cost, tests: int, problem: Problem) -> Plan | None:
    """As many tests at once as fit with a small chunk, evenly, and the largest chunk that fits with them."""
    room, most = problem.footprint.room, min(problem.settings.chunk, problem.train.size)
    if math.isinf(room):
        return Plan(name, tests, most, cost.total(tests, most))
    for least in (min(SMALL, most), 1):
        at_once = int((room - cost.total(0, least)) // (cost.test + least * cost.pair))
        if at_once < 1:
            continue
        passes = math.ceil(tests / at_once)
        at_once = math.ceil(tests / passes)
        chunk = min(most, int((room - cost.total(at_once, 0)) // (cost.sample + at_once * cost.pair)))
        return Plan(name, at_once, chunk, cost.total(at_once, chunk))
    return None


def prepare(problem: Problem, tests: int = 1, results: Cost = NOTHING) -> Prepared:
    """The solver that the settings name, or that fits, ready for any test samples, `plan.tests` of them at once."""
    chosen = plan(problem, tests, results)
    if chosen.chunk < min(problem.settings.chunk, problem.train.size):
        problem = dataclasses.replace(problem, settings=problem.settings.changed({"chunk": chosen.chunk}))
    prepared = SOLVERS[chosen.solver](problem)
    prepared.plan = chosen
    return prepared


def _gb(size: float) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"
