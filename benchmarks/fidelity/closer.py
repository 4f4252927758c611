"""A closer look where few networks and photographs leave open who is ahead: `--closer`.

1. *Trained networks* by `anchored` and by removal one at a time, on fifty seeds on which nothing was chosen: their
   scores are so near 1 that a handful of networks tells luck from nothing.
2. *Groups* in EfficientNet-Lite0 by the methods that removal is about. Circuits are found on all but a tenth of a
   group's photographs, or all but one or two, and every one of them and 300 others are tested in place of 80.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity import planted, removal, roster
from fidelity.roster import AGAINST, ORACLE, RECOMMENDED, REMOVAL_OPTIONS, REMOVER, Contender
from fidelity.store import digest_of

PART = "closer"
TRAINED, SEEDS = ("trained-and", "trained-xor"), range(60, 110)
NETWORK = "lite0"
FOLDS = {"dog": 10, "bird": 10, "cat": 11, "insect": 11, "fish": 13, "fruit": 8, "car": 10}
N_OTHERS = 300
SIZES = (0.05, 0.10)


def jobs(cache: Path) -> list[Any]:
    """Groups with most photographs first, then planted networks."""
    return [
        *(
            removal.Job(
                NETWORK, "groups", concept, _removers(), n, bounded=False, cache=cache, part=PART, n_others=N_OTHERS,
                sizes=SIZES,
            )
            for concept, n in FOLDS.items()
        ),
        *(planted.Job(network, "small", seed, _explainers()) for network in TRAINED for seed in SEEDS),
    ]  # fmt: skip


def _removers() -> tuple[Contender, ...]:
    titles = (REMOVER, "relp-difference", RECOMMENDED, AGAINST)
    found = [Contender(name, name, REMOVAL_OPTIONS.get(name, {})) for name in titles]
    return (found[0], Contender(f"{REMOVER} over all", REMOVER, share="over all"), *found[1:])


def _explainers() -> tuple[Contender, ...]:
    return tuple(roster.of_planted([ORACLE, RECOMMENDED]))


def digest(of_jobs: Sequence[Any]) -> str:
    """Of all that decides the numbers."""
    return digest_of({key: value for job in of_jobs for key, value in job.wanted().items()})
