"""A pure-Python runtime for compiled NEML2 models, in place of neml2's C++ binding.

Importing this package puts the plugin in place and loads neither torch nor neml2; the public names come when they
are first used.
"""

from __future__ import annotations

from neml2_aoti_plugin import _autoload

__version__ = "1.0.0"

__all__ = [
    "AOTIError",
    "AOTIModel",
    "ArtifactError",
    "ArtifactNotFoundError",
    "ConvergenceError",
    "DerivativeNotCompiledError",
    "InputError",
    "InputTypeError",
    "Model",
    "Points",
    "UnknownNameError",
    "__version__",
    "map_rows",
    "read_result",
    "seal",
    "status",
]

# Type checkers take a name of this spelling for typing's, whose import would cost more than arming does.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from neml2_aoti_plugin._artifact.locate import seal as seal
    from neml2_aoti_plugin._cli.result_files import read_result as read_result
    from neml2_aoti_plugin._host.hit import AOTIModel as AOTIModel
    from neml2_aoti_plugin._status import status as status
    from neml2_aoti_plugin.errors import AOTIError as AOTIError
    from neml2_aoti_plugin.errors import ArtifactError as ArtifactError
    from neml2_aoti_plugin.errors import ArtifactNotFoundError as ArtifactNotFoundError
    from neml2_aoti_plugin.errors import ConvergenceError as ConvergenceError
    from neml2_aoti_plugin.errors import DerivativeNotCompiledError as DerivativeNotCompiledError
    from neml2_aoti_plugin.errors import InputError as InputError
    from neml2_aoti_plugin.errors import InputTypeError as InputTypeError
    from neml2_aoti_plugin.errors import UnknownNameError as UnknownNameError
    from neml2_aoti_plugin.model import Model as Model
    from neml2_aoti_plugin.parallel import map_rows as map_rows
    from neml2_aoti_plugin.points import Points as Points

_HOME = {
    "AOTIModel": "_host.hit",
    "Model": "model",
    "Points": "points",
    "map_rows": "parallel",
    "read_result": "_cli.result_files",
    "seal": "_artifact.locate",
    "status": "_status",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(__all__)}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autoload.arm("import")
