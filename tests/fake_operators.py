"""What torch's functions come to: operators, which take tensors of one device, and of kinds that CUDA has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.fake_device import FakeGpu, site
from tests.fake_kernels import KERNELS

WAITING = {"nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_dim", "unique_consecutive"} | {
    *("allclose", "_linalg_check_errors", "_linalg_svd", "linalg_cholesky_ex", "linalg_inv_ex", "linalg_ldl_factor_ex"),
    *("linalg_lu_factor_ex", "_linalg_eigh", "linalg_eig", "linalg_lstsq"),
}
"""Operators whose output has a size that the host has to be told, or is a number of the host; those whose success it
asks for."""
NOT_DETERMINISTIC = {
    *("put_", "put", "kthvalue", "median.dim", "nanmedian.dim", "_ctc_loss_backward", "avg_pool3d_backward"),
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "grid_sampler_2d_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward"),
}
"""That raise on CUDA where deterministic algorithms are asked for (torch.use_deterministic_algorithms)."""
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "addbmm"}
"""Of which CUDA has none of whole numbers."""
NUMBERS = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""That take indices from the host."""


class OtherDevice(RuntimeError):
    """An operator was given tensors of the GPU and of the host."""


class Operators(TorchDispatchMode):
    """What the functions come to: all tensors of one device, and of a kind that CUDA takes."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        gpu = self.gpu
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor) and one.device.type == "cpu"]
        places = [gpu.place(one) for one in tensors]
        if True not in places:
            made_by_autograd = not tensors and gpu.depth == 0
            place = False if made_by_autograd or (places and None not in places) else None
        else:
            place = True
            _check(gpu, func, args, kwargs, tensors, places)
        found = KERNELS.get(f"aten::{func.__name__}", func)(*args, **kwargs)
        if place is None or (func._schema.name == "aten::copy_"):
            return found
        return gpu.outputs(found, place)


def _check(gpu: FakeGpu, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], places: list[bool | None]) -> None:
    """An operator with something of the GPU."""
    space, name = func._schema.name.split("::")
    overload = f"{name}.{func._overloadname}"
    strangers = [one for one, place in zip(tensors, places, strict=True) if place is None]
    if strangers:
        _check_strangers(gpu, func, name, tensors, strangers)
    if "mkldnn" in space or "mkldnn" in name:
        raise NotImplementedError(f"{func} is of the CPU; it was given a tensor of the GPU")
    of_floats = name in ("cumsum", "histc") and tensors[0].is_floating_point()
    if torch.are_deterministic_algorithms_enabled() and ({name, overload} & NOT_DETERMINISTIC or of_floats):
        raise RuntimeError(f"{func} does not have a deterministic implementation on CUDA")
    if name in PRODUCTS and not tensors[0].is_floating_point():
        raise NotImplementedError(f"{func} of {tensors[0].dtype} is not implemented on CUDA")
    indices = [one for one in tree_iter(args[1]) if isinstance(one, Tensor)] if name in NUMBERS else []
    masks = any(one.dtype in (torch.bool, torch.uint8) for one in indices)
    unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in WAITING or name == "_local_scalar_dense" or masks or unknown_size:
        gpu.wait(name)


def _check_strangers(gpu: FakeGpu, func: Any, name: str, tensors: list[Tensor], strangers: list[Tensor]) -> None:
    if name in ("copy_", "_copy_from"):
        gpu.wait("copy_")
        return
    first = tensors[0]
    scalars = all(one.ndim == 0 for one in strangers)
    if name in NUMBERS and first is not strangers[0]:
        gpu.wait(f"{name} of the host's numbers")
        return
    writes = func._schema.is_mutable and any(one is first for one in strangers)
    takes_scalars = torch.Tag.pointwise in func.tags or name in ("fill_", "masked_fill", "masked_fill_")
    if scalars and takes_scalars and not writes:
        return
    said = [f"{'host' if any(one is other for other in strangers) else 'GPU'} {list(one.shape)}" for one in tensors]
    raise OtherDevice(f"Expected all tensors to be on the same device: {func} of {', '.join(said)}, at {site()}")
