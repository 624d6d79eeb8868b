"""Errors that a user can cause, and the hint that ends many of their messages.

Every message names the value that was given, where it was given, and what to do about it.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class CampHiVeError(Exception):
    """Base of every error of this package; its message is meant for the user, not for a bug report."""


class ConfigError(CampHiVeError, ValueError):
    """A setting that cannot work."""


class PlanError(CampHiVeError, ValueError):
    """A plan that does not fit the network, or a budget that cannot be met."""


class ModelError(CampHiVeError, ValueError):
    """A model that cannot be found, read or pruned."""


class DataError(CampHiVeError, ValueError):
    """A dataset that cannot be found or used."""


class OutputError(CampHiVeError, OSError):
    """A folder that must not be written to."""


class TrainingError(CampHiVeError, RuntimeError):
    """Training that cannot go on, such as a loss that is not a number."""


class CurvatureError(CampHiVeError, RuntimeError):
    """Curvature that cannot be computed, such as products that are not numbers."""


class ReconstructionError(CampHiVeError, RuntimeError):
    """A least-squares fit that cannot be solved, such as one on activations that are not numbers."""


def did_you_mean(name: str, names: Iterable[str], otherwise: str | None = None, most: int = 1) -> str:
    """Return a hint for a misspelled name: "did you mean 'fisher'?", with at most `most` of `names`.

    Where none of `names` is similar, return `otherwise`; by default "choose from ..." with all names.
    """
    names = list(names)
    close = [] if name in names else get_close_matches(name, names, n=most)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"choose from {', '.join(names)}" if otherwise is None else otherwise
