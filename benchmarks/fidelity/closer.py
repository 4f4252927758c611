"""A closer look where few networks and photographs leave open who is ahead: `--closer`.

1. *Trained networks*, by `anchored` and by removal one at a time, on fifty seeds each. There are two sets of weights
   of each network: seeds draw images and the order of units.
2. *Groups* in EfficientNet-Lite0, by the methods that removal is about. A circuit is found on all but about a tenth of
   a group's photographs, in small groups on all but one or two; 300 others are tested in place of 80.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity import planted, removal, roster, summary
from fidelity.roster import AGAINST, ORACLE, RECOMMENDED, REMOVAL_OPTIONS, REMOVER, Contender
from fidelity.store import digest_of

PART = "closer"
TRAINED = ("trained-and", "trained-xor")
SEEDS = range(60, 110)  # one variant of `anchored` was left out after a look at these: docs/rivals.md
NETWORK = "lite0"
FOLDS = {"dog": 10, "bird": 10, "cat": 11, "insect": 11, "fish": 13, "fruit": 8, "car": 10}
N_OTHERS = 300
SIZES = (0.05, 0.10)


def jobs(cache: Path) -> list[Any]:
    """Groups with most photographs first, then planted networks."""
    explainers = tuple(roster.of_planted([ORACLE, RECOMMENDED]))
    return [
        *(
            removal.Job(
                NETWORK, "groups", concept, _removers(), n_folds, bounded=False, cache=cache, part=PART,
                n_others=N_OTHERS, sizes=SIZES,
            )
            for concept, n_folds in FOLDS.items()
        ),
        *(planted.Job(network, "small", seed, explainers) for network in TRAINED for seed in SEEDS),
    ]  # fmt: skip


def _removers() -> tuple[Contender, ...]:
    first, *others = (
        Contender(name, name, REMOVAL_OPTIONS.get(name, {}))
        for name in (REMOVER, "relp-difference", RECOMMENDED, AGAINST)
    )
    return first, Contender(f"{REMOVER} over all", REMOVER, share="over all"), *others


def digest(of_jobs: Sequence[Any]) -> str:
    """Of all that decides the numbers, and how they are added up."""
    wanted = {key: value for job in of_jobs for key, value in job.wanted().items()}
    return digest_of(wanted, inspect.getsource(summary))
