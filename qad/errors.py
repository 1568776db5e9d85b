"""The exceptions of the core.

QadError
    RecipeError       what to quantize does not fit the model
        SplitError    layers that engines serve as one, in more than one format
    NonFiniteError    a NaN or an infinity, with the name of the tensor that holds it
    CalibrationError  activations were never seen, or saturate too often
    CheckpointError   a folder that is not a checkpoint we can read
    TrainingError     a loss that is not finite, a batch without a token to learn from
    Interrupted       a run that was asked to stop, and did
"""


def memory_asked_for(error: Exception) -> str | None:
    """What an allocator said when there was too little memory, on a CPU or a GPU; None for any other error."""
    reason = (str(error).splitlines() or [""])[0]
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    is_it = named or (isinstance(error, RuntimeError) and "allocate memory" in reason)
    return (reason or type(error).__name__) if is_it else None


class QadError(ValueError):
    """Something the caller can mend: a message without a traceback is enough."""


class RecipeError(QadError):
    """The recipe does not fit the model."""


class SplitError(RecipeError):
    """Layers that serving engines merge do not have one format. where: the group; found: its kind, and what its members have."""

    def __init__(self, where: str, found: str, advice: str) -> None:
        super().__init__(f"{where}: the recipe splits {found}; {advice}")
        self.where, self.found = where, found


class NonFiniteError(QadError):
    """A tensor holds NaN or infinity; the message names it."""


class CalibrationError(QadError):
    """The calibration did not see what it needs, or its scales saturate."""


class CheckpointError(QadError):
    """A checkpoint folder is missing, incomplete or of an unknown layout."""


class TrainingError(QadError):
    """The training loop cannot go on."""


class Interrupted(QadError):
    """Someone asked the run to stop; the message says what is kept."""
