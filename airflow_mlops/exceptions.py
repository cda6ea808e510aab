"""The errors of this package.

Nothing here imports Airflow, so that the core can raise them. ``retryable`` says whether the same call can
succeed later without anyone changing the input; the shell turns what cannot into ``AirflowFailException``
(see :func:`airflow_mlops.shell.permanent_errors_fail`).
"""

from __future__ import annotations


class MlopsError(Exception):
    """Base class of every error this package raises on purpose."""

    retryable = True


class InvalidInputError(MlopsError, ValueError):
    """A parameter, file or connection that no retry will mend; the message says how to."""

    retryable = False


class DataError(InvalidInputError):
    """Data that breaks its contract: a missing month, an unknown category, a column of another type."""


class RegistryError(InvalidInputError):
    """The model registry is not in the state the operation needs: alias missing, version deleted, no model."""


class ConcurrentChangeError(MlopsError):
    """Somebody else changed the same thing first: an alias, a rollout, a run directory."""

    retryable = False


class ApprovalError(MlopsError):
    """A person was needed and did not agree, was silent until the deadline, or could not be asked."""

    retryable = False


class ExternalSystemError(MlopsError):
    """An external system is down or answered with an error; a retry may succeed."""


class TrainingError(MlopsError):
    """The user's training code failed; the message ends with the end of the driver's log."""


class AttemptsExhaustedError(MlopsError):
    """Every attempt of a training run was lost to infrastructure."""

    retryable = False


class LimitExceededError(MlopsError):
    """A training took longer, or cost more, than it may; what it committed is kept."""

    retryable = False
