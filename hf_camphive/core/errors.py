"""The errors a user can cause. Each message says what came, where, and what to do about it."""


class CampHiVeError(Exception):
    """Base of every error of this package: a message for the user, never a bug report."""


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
    """Curvature that cannot be worked out, such as products that are not numbers."""


class ReconstructionError(CampHiVeError, RuntimeError):
    """A least-squares fit that cannot be solved, such as one on activations that are not numbers."""
