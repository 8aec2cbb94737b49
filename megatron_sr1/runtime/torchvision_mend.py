"""Make torchvision's Python transforms importable beside a CPU build of torch.

PyPI's torchvision is compiled for CUDA builds of torch. Beside the CPU build its compiled
operators are not registered, and `import torchvision` fails while it describes them
(`operator torchvision::nms does not exist`). transformers and vLLM need its transforms only, so
the two modules that describe the operators are left out, and only when the plain import failed.
In the environment of `make env` they are empty files (tools/make_env.py), for processes that import
nothing of ours; this serves environments that were made with pip.
"""

import sys
from types import ModuleType

_DESCRIPTIONS = ("torchvision._meta_registrations", "torchvision._autograd_registrations")


def mend_torchvision() -> bool:
    """Import torchvision; leave out its operator descriptions where they cannot load.

    Call it before transformers' models or vLLM are imported. Calling it again does nothing.

    Returns:
        whether the mend was needed.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return False
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    else:
        return all(isinstance(sys.modules.get(n), _Omitted) for n in _DESCRIPTIONS)
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in _DESCRIPTIONS:
        sys.modules[name] = _Omitted(name)
    import torchvision  # noqa: F401, F811

    return True


class _Omitted(ModuleType):
    """An empty module in the place of one that cannot load."""
