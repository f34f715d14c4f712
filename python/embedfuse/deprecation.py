"""What 0.1 had under other names: it works until 0.3, with a DeprecationWarning that names the new one."""

import importlib
import warnings


def warn_moved(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn the caller of the caller that `old` is `new` now."""
    message = f"{old} has moved to {new}; the old path is removed in 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def moved(package: str, name: str, modules: dict[str, str]):
    """`__getattr__` of a package whose names have moved into its modules. modules: name -> module."""
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    new = f"{package}.{modules[name]}"
    warn_moved(f"{package}.{name}", f"{new}.{name}", stacklevel=4)
    found = getattr(importlib.import_module(new), name)
    # `from package import name` asks twice; the second time it finds this.
    vars(importlib.import_module(package))[name] = found
    return found
