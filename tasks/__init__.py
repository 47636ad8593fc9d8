"""What is learned: model, data, partition and metrics behind one interface; the tasks by name.

Cheap to import: torch and transformers come with the first task.
"""

from typing import TYPE_CHECKING

from rankfit.configs.settings import RunSettings
from rankfit.tasks.records import EVERYTHING, Access

if TYPE_CHECKING:
    from rankfit.tasks.task import Task


def load_task(
    settings: RunSettings, *, data_path: str | None = None, access: Access = EVERYTHING
) -> "Task":
    """Make the task of a run; data, processor and tokenizer are read when first needed.

    Parameters
    ----------
    settings
        ``task.kind`` selects the task.
    data_path
        A node's own file or folder, in place of ``data.source``.
    access
        What of the machine's data may be read and named.
    """
    if settings.task.kind == "image-classification":
        from rankfit.tasks.classification import ImageTask

        return ImageTask(settings, data_path, access)
    if settings.task.kind == "causal-lm":
        from rankfit.tasks.language_model import LanguageTask

        return LanguageTask(settings, data_path, access)
    from rankfit.tasks.classification import TextTask

    return TextTask(settings, data_path, access)
