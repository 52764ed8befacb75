"""The errors a user can cause: each names the rule, the value and the fix. The CLI prints them and exits with 2."""


class LlmpruneError(ValueError):
    """Base of everything that the user's input can cause; never raised for a fault of ours."""


class RecipeError(LlmpruneError):
    """A recipe, or an override of it, that breaks a rule."""


class ModelError(LlmpruneError):
    """A parent model or checkpoint that cannot be read."""


class UnsupportedModelError(ModelError):
    """A parent that can be read, but not pruned: family, quantisation or layout."""


class DataError(LlmpruneError):
    """Text that cannot be read, or is too short for the splits asked for."""


class ArchitectureError(LlmpruneError):
    """Choices that do not fit the parent."""


class BudgetError(LlmpruneError):
    """A budget or pick that cannot be parsed, or that no child meets."""


class RunDirectoryError(LlmpruneError):
    """A run directory that is corrupt, in use, or lacks what a stage needs."""


class StorageError(LlmpruneError):
    """A study's storage that cannot be named, reached or joined. Never holds a password."""


class ExportError(LlmpruneError):
    """A checkpoint that cannot be written, or that failed its proof."""


class PushError(LlmpruneError):
    """A checkpoint that must not, or cannot, be pushed to the Hub. Never holds a token."""


class TaskError(LlmpruneError):
    """An evaluation task that is unknown, or whose data is not at hand."""
