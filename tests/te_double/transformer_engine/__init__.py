"""A test double of Transformer Engine: its layers' names, arguments and parameters, on torch.

Transformer Engine needs CUDA to be imported. Put on the path in its place, this package lets
Megatron-Core's own Transformer Engine classes be built, filled and run on a CPU: their names,
shapes, sharding and the wiring around them are real, their kernels are not. It says nothing about
FP8, CUDA kernels or speed. What Megatron-Core only imports is a name without a body, which fails
when it is called.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

__version__ = "2.20.2"


class _Names(ModuleType):
    """A module where every public name is a class that cannot be made."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {"__module__": self.__name__})


class _Name(type):
    """A class by name only; so are its attributes."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {"__module__": f"{cls.__module__}.{cls.__name__}"})

    def __call__(cls, *args, **kwargs):
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__} is not in the double")


class _Rest(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the package's other modules, after those that are files here."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformer_engine", "transformer_engine_torch"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Names(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Rest())

import transformer_engine.common.recipe  # noqa: E402
import transformer_engine.pytorch  # noqa: E402, F401
