"""What Python calls of torch, with devices as they are said to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.fake_device import CPU, GPU, FakeGpu, is_gpu, key_of


def is_on() -> bool:
    return any(isinstance(mode, Functions) for mode in torch.overrides._get_current_function_mode_stack())


class Functions(TorchFunctionMode):
    """What Python calls: devices as they are said to be."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self.gpu.called(self.gpu.depth + 1):
            handle = _HANDLERS.get(func)
            if handle is not None:
                return handle(self.gpu, func, args, kwargs)
            if kwargs.get("device") is not None:
                return _made(self.gpu, func, args, kwargs)
            return func(*args, **kwargs)


def _made(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """By a function that is given a device."""
    there = is_gpu(kwargs["device"])
    if there:
        kwargs["device"] = CPU
        generator = kwargs.get("generator")
        if generator is not None and generator.device != GPU:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if not there and torch.device(kwargs["device"]).type != "cpu":
        return func(*args, **kwargs)
    found = func(*args, **kwargs)
    if func in (torch.tensor, torch.as_tensor, torch.asarray):
        if there and not (args and isinstance(args[0], Tensor) and gpu.place(args[0])):
            gpu.wait(func.__name__)
        if any(found is one or key_of(found) == key_of(one) for one in args if isinstance(one, Tensor)):
            if gpu.place(found) is not None:
                return found
            found = found.clone()
        elif there:
            found = found.clone()  # as_tensor shares numpy's memory
    return gpu.outputs(found, True if there else None)


def _moved(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Tensor.to, with what says how."""
    own, *rest = args
    if rest and isinstance(rest[0], Tensor):
        device, dtype = (GPU if gpu.place(rest[0]) else rest[0].device), rest[0].dtype
        blocking, rest = not kwargs.pop("non_blocking", False), []
    else:
        names = {name: kwargs[name] for name in ("device", "dtype", "non_blocking") if name in kwargs}
        device, dtype, asynchronous, _ = torch._C._nn._parse_to(*rest[:3], **names)
        blocking = not asynchronous
    copies = kwargs.get("copy", False)
    if device is None or device.type not in ("cuda", "cpu") or own.device.type == "meta":
        return func(*args, **kwargs)
    there, goes = gpu.place(own), is_gpu(device)
    found = func(own, dtype=dtype or own.dtype, copy=copies)  # not that of a class of one's own
    if bool(there) == goes:
        return found
    if blocking or there:
        gpu.wait("to")
    with gpu.called(0), torch._C.DisableTorchFunction():
        found = found.clone()
    gpu.put(found, True if goes else None)
    return found


def _to_host(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _moved(gpu, torch.Tensor.to, (args[0], CPU), {})


def _to_gpu(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _moved(gpu, torch.Tensor.to, (args[0], GPU), kwargs)


def _device_of(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return GPU if gpu.place(args[0]) else func(*args)


def _answer(on_gpu: Any) -> Callable[..., Any]:
    return lambda gpu, func, args, kwargs: on_gpu if gpu.place(args[0]) else func(*args, **kwargs)


def _list_of(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if gpu.place(args[0]):
        gpu.wait("tolist")
    with torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


def _array_of(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if gpu.place(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return func(*args, **kwargs)


def _new_tensor(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    there = is_gpu(kwargs.pop("device")) if kwargs.get("device") is not None else gpu.place(args[0])
    if there:
        gpu.wait("new_tensor")
    return gpu.outputs(func(*args, **kwargs), True if there else None)


def _copied(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return gpu.outputs(func(*args, **kwargs), gpu.place(args[0]))


def _empty(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs.pop("pin_memory", None)
    return func(*args, **kwargs) if kwargs.get("device") is None else _made(gpu, func, args, kwargs)


def _set_item(gpu: FakeGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    own, index, value = args
    if not isinstance(value, Tensor) and gpu.place(own):  # a number is made where it is written
        value = gpu.outputs(torch.tensor(value, dtype=own.dtype), True)
    return func(own, index, value)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _device_of,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: _answer(True),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: _answer(False),  # type: ignore[attr-defined]
    Tensor.get_device: _answer(0),
    Tensor.to: _moved,
    Tensor.cpu: _to_host,
    Tensor.cuda: _to_gpu,
    Tensor.tolist: _list_of,
    Tensor.numpy: _array_of,
    Tensor.__array__: _array_of,
    Tensor.__setitem__: _set_item,
    Tensor.new_tensor: _new_tensor,
    Tensor.__deepcopy__: _copied,
    Tensor.pin_memory: lambda gpu, func, args, kwargs: args[0],
    torch.empty: _empty,
}
