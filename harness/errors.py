"""The exceptions of the harness. The command line prints them without a traceback and exits with 2.

HarnessError
    SuiteError    the suite file: every mistake of it at once
    ModelError    a model, checkpoint or mirror that cannot be used
    DataError     a source that is missing, empty or too short
    TaskError     a task that is not known, cannot be asked here, or whose data are missing
    StoreError    the cache, a results folder, a full disk
    EngineError   the engine cannot do what was asked
    TrackerError  an experiment tracker that is not installed or does not start
"""


class HarnessError(Exception):
    """Something the user can mend."""


class SuiteError(HarnessError):
    """A suite that is missing, not TOML, or has mistakes; one line a mistake."""


class ModelError(HarnessError):
    """A model, checkpoint folder or mirror entry that cannot be used as asked."""


class DataError(HarnessError):
    """A data source that is missing, empty or too short for its budget."""


class TaskError(HarnessError):
    """A task that is not known, that cannot be asked here, or whose data are missing."""


class StoreError(HarnessError):
    """The stage cache or a results folder cannot be read or written."""


class EngineError(HarnessError):
    """The engine cannot answer a request as asked."""


class TrackerError(HarnessError):
    """An experiment tracker that is not installed or does not start."""
