"""The tasks by name. Cheap to import: torch and transformers come with the first task."""

from typing import TYPE_CHECKING

from rankfit.configs.settings import RunSettings

if TYPE_CHECKING:
    from rankfit.tasks.task import Task


def load_task(settings: RunSettings, *, data_path: str | None = None) -> "Task":
    """Make the task of a run; data, processor and tokenizer are read when first needed.

    Parameters
    ----------
    settings
        ``task.kind`` selects the task.
    data_path
        A node's own file or folder, in place of ``data.source``.
    """
    if settings.task.kind == "image-classification":
        from rankfit.tasks.image import ImageTask

        return ImageTask(settings, data_path)
    if settings.task.kind == "causal-lm":
        from rankfit.tasks.language import LanguageTask

        return LanguageTask(settings, data_path)
    from rankfit.tasks.text import TextTask

    return TextTask(settings, data_path)
