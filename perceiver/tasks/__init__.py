"""The tasks. Importing this package imports every module of its folder, so a new file registers its task itself."""

import importlib
import pkgutil

from perceiver.tasks.base import TASKS, Task

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"perceiver.tasks.{module.name}")
