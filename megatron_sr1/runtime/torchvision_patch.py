"""Make torchvision's Python transforms importable with a CPU build of torch.

PyPI's torchvision is compiled for CUDA builds of torch. With a CPU build its compiled operators are
not registered, and `import torchvision` fails in the two modules that describe them (`operator
torchvision::nms does not exist`). transformers and vLLM only need its transforms, so those two
modules are left out, and only if the plain import has failed. In the environment of `make env` they
are empty files (tools/make_env.py), which also serves processes that import nothing of ours; this
module serves environments made with pip.
"""

import sys
from types import ModuleType

_DESCRIPTIONS = ("torchvision._meta_registrations", "torchvision._autograd_registrations")


def patch_torchvision() -> bool:
    """Import torchvision, without its operator descriptions if they cannot be loaded.

    Call it before importing transformers' models or vLLM. Calling it again has no effect.

    Returns:
        True if the patch was needed.
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
    """An empty module that replaces one that cannot be loaded."""
