"""The shipped engine under seeded chaos: nothing acknowledged is lost, and there is one history."""

from __future__ import annotations

import os
import random

import pytest

from simulation import mutants, patches, world

#: Seeds played altogether; more with WALSHIP_SEEDS.
SEEDS = int(os.environ.get("WALSHIP_SEEDS", "2000"))
_PARTS = 40
#: Within so many seeds each deliberate fault has to show.
_MUTANT_SEEDS = 150

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("part", range(_PARTS))
def test_seeds(part: int) -> None:
    """Machines, processes and stores that fail in every way: all that must hold holds."""
    with patches.installed():
        for seed in range(part, SEEDS, _PARTS):
            outcome = world.run(seed)
            assert outcome.problem is None, (
                f"seed {seed}: {outcome.problem}\n"
                f"again with: cd tests && python -m simulation {seed} --trace"
            )


def test_a_seed_is_reproduced_exactly() -> None:
    """Whatever is drawn, is drawn from the seed: a second run is the same in every step."""
    with patches.installed():
        for seed in range(12):
            first, second = world.run(seed), world.run(seed)
            assert first == second


@pytest.mark.parametrize("name", sorted(mutants.MUTANTS))
def test_a_deliberate_fault_is_noticed(name: str) -> None:
    """What the simulation cannot notice it does not test."""
    mutant = mutants.MUTANTS[name]
    with patches.installed() as patch:
        mutant.install(patch)
        for seed in range(_MUTANT_SEEDS):
            profile = world.Profile.draw(random.Random(seed), mutant.theme)
            mutant.tune(profile)
            if world.run(seed, profile).problem is not None:
                return
    pytest.fail(f"{_MUTANT_SEEDS} seeds with this fault, and nothing was noticed")
