"""A device that is not there: it catches mixed devices and waits of the host where there is no GPU.

"far" is a Python PrivateUse1 backend of torch (a private API). Its tensors are computed on the CPU. An operation that
mixes far and near tensors raises, as on a GPU, and whatever makes the host wait for a GPU is counted in WAITS, by what
it is and by the line of lab6 that asked for it. Not caught: what autocast casts, fused kernels, several GPUs.

Importing this module changes torch, so it runs in a process of its own (see far_program.py).
"""

import collections
import traceback
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "far:0"
ROOMS = Path(__file__).resolve().parents[1] / "lab6"
#: {(operation, "room.py:line"): how often the host waited}
WAITS = collections.Counter()
#: Operations whose result the host must know.
ASKED_BY_THE_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}


class BackendModule(backend_registration._DummyBackendModule):
    """What torch asks a backend for."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("far", backend_module=BackendModule())


class Generator(torch.Generator):
    """A CPU generator that says it is far."""

    device = torch.device("far")


class FarTensor(torch.Tensor):
    """Numbers on the CPU (`near`) under a tensor that says it is far."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, near):
        far = torch.Tensor._make_wrapper_subclass(cls, near.size(), near.stride(), near.storage_offset(),
                                                  dtype=near.dtype, device=DEVICE)  # fmt: skip
        far.near = near.detach()
        return far

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def tolist(self):
        wait("tolist")
        return self.near.tolist()

    def numpy(self):
        raise TypeError("a far tensor has no numpy")

    def __deepcopy__(self, memo):
        far = FarTensor(self.near.clone()).requires_grad_(self.requires_grad)
        far._is_param = getattr(self, "_is_param", False)
        return far


class FarMode(TorchDispatchMode):
    """Within it, new tensors may be made far."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def wait(operation):
    """Count a wait of the host, by the innermost line of lab6."""
    lines = [frame for frame in traceback.extract_stack() if ROOMS in Path(frame.filename).parents]
    place = f"{Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else "elsewhere"
    WAITS[operation, place] += 1


def is_far(device):
    return device is not None and torch.device(device).type == "far"


def compute(operation, args, kwargs):
    """Do an operation on the near tensors, refuse mixed devices and count waits."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far, target, name = [t for t in tensors if isinstance(t, FarTensor)], kwargs.get("device"), operation._schema.name
    if not far and not is_far(target):
        return operation(*args, **kwargs)
    copies, indexes = name in ("aten::_to_copy", "aten::copy_"), name.startswith(("aten::index", "aten::_unsafe_index"))
    near_ones = [t for t in tensors if not isinstance(t, FarTensor) and t.dim() and far]  # a number may be anywhere
    if near_ones and not copies and not indexes:
        raise RuntimeError(f"{name}: tensors on far and on cpu")
    crosses = copies and (near_ones or not far or (target is not None and not is_far(target)))
    if (crosses and not kwargs.get("non_blocking")) or near_ones or name in ASKED_BY_THE_HOST:
        wait(name)
    result = operation(*tree_map(to_near, args), **tree_map(to_near, kwargs))
    if copies and target is not None and not is_far(target):
        return result
    known = {id(t.near): t for t in far}  # a tensor that was changed in place stays itself
    to_far = lambda x: known[id(x)] if id(x) in known else FarTensor(x)
    return tree_map(lambda x: to_far(x) if isinstance(x, torch.Tensor) else x, result)


def to_near(value):
    """The CPU tensor of a far one, the CPU for the far device; anything else as it is."""
    if isinstance(value, FarTensor):
        return value.near
    return torch.device("cpu") if isinstance(value, torch.device) and is_far(value) else value
