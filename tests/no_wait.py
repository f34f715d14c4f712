"""What fails on an operation that waits for a GPU, without one."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class NoWait(TorchDispatchMode):
    """Fails on operations that wait for a GPU, with tensors of device "meta" in place of a GPU's.

    They hold no values, so torch itself raises where one is read: .item(), .tolist(), .cpu(), nonzero.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        out = function(*args, **kwargs)
        produced = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        devices = {t.device for t in (*given, *produced) if t.dim()}
        if len(devices) > 1:
            copied = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
            assert copied, f"{function}: a copy between {devices} that waits"
        return out


class NoTensorOfAList(TorchFunctionMode):
    """Fails on a list that torch would convert on the host and copy with a wait."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, list) for i in index), "a list as index"
        if function in (torch.tensor, torch.as_tensor):
            device = torch.device((kwargs or {}).get("device") or "cpu")
            assert device == torch.device("cpu"), f"{function.__name__} from pageable memory"
        return function(*args, **(kwargs or {}))
