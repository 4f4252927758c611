"""Which seeds an experiment takes: others are made of them, and rendered images take twelve digits at most."""

from __future__ import annotations

from viscircuits.errors import ViscircuitsError

LARGEST = 10**9


def check_seed(seed: int, option: str = "--seed") -> None:
    """Refuse a seed that is out of range.

    Raises
    ------
    ViscircuitsError
        If it is below 0 or above `LARGEST`.
    """
    if not 0 <= seed <= LARGEST:
        raise ViscircuitsError(f"a seed is a whole number from 0 to {LARGEST}, got {seed} ({option})")
