"""Model types that transformers' Auto classes find without an import of the code behind them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# transformers' table: model type -> name of its config class, which is looked up in transformers.models.<model type>
_TABLE = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models."


class _Home(Loader):
    """Loads the module of a model type: the public names of the package that has its classes."""

    def __init__(self, home: str) -> None:
        self.home = home

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        home = importlib.import_module(self.home)
        vars(module).update({name: getattr(home, name) for name in home.__all__})


class _AndThen(Loader):
    """Loads transformers' table as its own loader does, then enters the model types."""

    def __init__(self, loader: Any, types: Mapping[str, str]) -> None:
        self.loader, self.types = loader, types

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # the import system sets it
        module.__spec__.loader = module.__loader__ = self.loader  # as without us: pickle and inspect look at it
        self.loader.exec_module(module)
        module.CONFIG_MAPPING_NAMES.update(self.types)


class _Finder(MetaPathFinder):
    def __init__(self, home: str, types: Mapping[str, str]) -> None:
        self.home, self.types = home, dict(types)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(_MODELS) and fullname.removeprefix(_MODELS) in self.types:
            return ModuleSpec(fullname, _Home(self.home), origin=self.home)
        if fullname != _TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndThen(spec.loader, self.types)
        return spec


def register_model_types(home: str, types: Mapping[str, str]) -> None:
    """Let transformers' Auto classes find model types of another package.

    The package `home` is imported when a config of one of the `types` is first asked for, and no earlier; it then
    registers its models itself. transformers is not imported by this call; its table of model types is completed
    at once if transformers has been imported, else right after that.

    home: dotted name of the package that has the classes. types: model type -> name of its config class.
    """
    sys.meta_path.insert(0, _Finder(home, types))
    if (table := sys.modules.get(_TABLE)) is not None:
        table.CONFIG_MAPPING_NAMES.update(types)
