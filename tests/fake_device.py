"""A GPU made of real numbers: tensors that say they are on cuda:0, compute on the CPU, refuse other devices, and count kernels and synchronisations.

    with fake_gpu(monkeypatch) as gpu:
        Trainer(Config(device='cuda', …)).step()
        print(gpu.kernels, gpu.syncs, gpu.by_place())

What CUDA refuses is refused: a tensor of each device in one operation (a single number or an index from the CPU excepted), `.numpy()` of a tensor on the GPU.
What makes CUDA wait for the device is counted as a synchronisation: reading a value, results whose size depends on values, and blocking copies either way.
Kernels are operations that compute; on a GPU some take several launches, so that the count is a lower bound.
"""

import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device('cuda', 0)
aten = torch.ops.aten

# results whose size depends on values, or values that the host reads; CUDA waits for the device in each of
# them
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten._unique.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.segment_reduce.default,
}
# what moves no data
FREE = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._local_scalar_dense.default,
    aten.is_pinned.default,
    aten.set_.source_Tensor,
}
INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index', '_unsafe_index_put'}


class FakeTensor(torch.Tensor):
    "Metadata of a tensor on cuda:0 over numbers in main memory."

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            requires_grad=requires_grad,
        )

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f'{self.inner!r} on {DEVICE}'

    def __reduce_ex__(self, protocol):
        # as torch.save of a tensor on a GPU, read with map_location='cpu'
        return self.inner.__reduce_ex__(protocol)

    def __tensor_flatten__(self):
        return ['inner'], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return FakeTensor(inner['inner'])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class Gpu:
    "What happened on the device."

    def __init__(self):
        self.start()

    def start(self):
        "Counts from 0 again."
        self.operations, self.waits, self.places = Counter(), Counter(), Counter()

    kernels = property(lambda self: sum(self.operations.values()))
    syncs = property(lambda self: sum(self.waits.values()))

    def wait(self, why):
        self.waits[why] += 1
        self.places[f'{_place()}  {why}'] += 1

    def by_place(self) -> str:
        return '\n'.join(f'{n:6} {place}' for place, n in self.places.most_common())


GPU = Gpu()


def _place():
    "File and line of this package that asked."
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent.name in ('ccc', 'memory') or path.name.startswith('<ipython'):
            return f'{path.name}:{frame.lineno}'
    return '?'


def _plain(v):
    return v.inner if isinstance(v, FakeTensor) else v


def _wrapped(v):
    return FakeTensor(v) if isinstance(v, torch.Tensor) and not isinstance(v, FakeTensor) else v


def _on_gpu(device):
    return device is not None and torch.device(device).type == 'cuda'


def to_device(tensor, non_blocking=False, copies=True):
    "A plain tensor on the fake device."
    GPU.operations['copy to the device'] += 1
    if not non_blocking:
        GPU.wait('copy to the device')
    return FakeTensor(tensor.detach().clone() if copies else tensor.detach())


def to_host(tensor, non_blocking=False):
    "The numbers of a tensor on the fake device."
    GPU.operations['copy to the host'] += 1
    if not non_blocking:
        GPU.wait('copy to the host')
    return tensor.detach().inner.clone()


def _moved(tensor, args, kwargs):
    "Tensor.to, where it crosses between devices; None where it does not."
    if args and isinstance(args[0], torch.Tensor):
        kwargs, args = kwargs | dict(device=args[0].device, dtype=args[0].dtype), args[1:]
    copy, memory_format = kwargs.pop('copy', False), kwargs.get('memory_format')
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    here = isinstance(tensor, FakeTensor)
    # no crossing: layout and type alone
    if device is None or device.type == ('cuda' if here else tensor.device.type):
        how = {
            k: v
            for k, v in dict(dtype=dtype, memory_format=memory_format, copy=copy or None).items()
            if v is not None
        }
        return torch.Tensor.to(tensor, **how) if how else tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError('a gradient through a copy between devices')
    if device.type == 'meta':  # shapes alone: nothing is copied
        return torch.empty_like(_plain(tensor), device='meta', dtype=dtype or tensor.dtype)
    out = to_host(tensor, non_blocking) if here else to_device(tensor, non_blocking)
    if device.type not in ('cpu', 'cuda'):
        return out.to(device, dtype)
    how = {k: v for k, v in dict(dtype=dtype, memory_format=memory_format).items() if v is not None}
    return torch.Tensor.to(out, **how) if how else out


def _call(func, args, kwargs):
    """Functions that create tensors from values or cross between devices are answered here; the rest goes
    on to the dispatcher."""
    T, first = torch.Tensor, args[0] if args else None
    with torch._C.DisableTorchFunctionSubclass():
        if func is T.to:
            return _moved(first, args[1:], kwargs)
        if func is T.cpu:
            return to_host(first) if isinstance(first, FakeTensor) else first
        if func is T.cuda:
            return (
                first
                if isinstance(first, FakeTensor)
                else to_device(first, kwargs.get('non_blocking', False))
            )
        if func is T.tolist and isinstance(first, FakeTensor):
            GPU.wait('tolist')
            return first.detach().inner.tolist()
        if func is T.numpy and isinstance(first, FakeTensor):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to"
                " host memory first."
            )
        if func in (T.__array__,) and isinstance(first, FakeTensor):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to"
                " host memory first."
            )
        if func is T.new_tensor and isinstance(first, FakeTensor):
            return to_device(
                torch.tensor(
                    *args[1:], **{'dtype': first.dtype} | {k: v for k, v in kwargs.items() if k != 'device'}
                )
            )
        if (
            func in (torch.tensor, torch.as_tensor)
            and not isinstance(first, FakeTensor)
            and _on_gpu(kwargs.get('device'))
        ):
            return to_device(func(*args, **{k: v for k, v in kwargs.items() if k != 'device'}))
        if func is T.pin_memory:
            return _pinned(first)
        if func is T.is_pinned:
            return getattr(first, '_fake_pinned', False)
        return func(*args, **kwargs)


def _pinned(tensor):
    out = tensor.clone()
    out._fake_pinned = True
    return out


def _mixed(func, flat):
    "RuntimeError where CUDA would say that tensors are on two devices."
    plain = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor)]
    if not any(isinstance(t, FakeTensor) for t in flat) or not plain:
        return
    name = func._schema.name.split('::')[1]
    if name in ('copy_', '_to_copy'):
        return
    if name in INDEXING and isinstance(flat[0], FakeTensor):
        return
    if any(t.ndim for t in plain):
        raise RuntimeError(
            'Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!'
            f' (in {func._schema.name}, shapes'
            f' {[tuple(t.shape) for t in flat if isinstance(t, torch.Tensor)]})'
        )


def _count(func, args, flat, kwargs):
    "Kernels and synchronisations of one operation on the device."
    name = func._schema.name.split('::')[1]
    if name == 'copy_':
        target, source = args[:2]
        if isinstance(target, FakeTensor) != isinstance(source, FakeTensor):
            to = 'device' if isinstance(target, FakeTensor) else 'host'
            GPU.operations[f'copy to the {to}'] += 1
            blocking = not (len(args) > 2 and args[2] or kwargs.get('non_blocking'))
            if blocking and source.ndim + target.ndim:
                GPU.wait(f'copy to the {to}')
            return
    if (
        func in WAITING
        or name == 'repeat_interleave'
        and kwargs.get('output_size') is None
        and func is aten.repeat_interleave.Tensor
    ):
        GPU.wait(name)
    if name in INDEXING:
        where = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in where):
            GPU.wait(f'{name} by a mask')
        if any(not isinstance(i, FakeTensor) for i in where) and isinstance(args[0], FakeTensor):
            GPU.wait(f'{name} by an index on the host')
    if not func.is_view and func not in FREE:
        GPU.operations[name] += 1


def _compute(func, args, kwargs):
    "One operation; its result is on the device if an operand is, or if it is asked to be."
    flat = [v for v in tree_flatten((args, kwargs))[0]]
    _mixed(func, flat)
    here = any(isinstance(v, FakeTensor) for v in flat)
    if 'device' in kwargs and kwargs['device'] is not None:
        here = _on_gpu(kwargs['device']) or func is aten._to_copy.default and here
        kwargs = kwargs | (dict(device=torch.device('cpu')) if _on_gpu(kwargs['device']) else {})
    if kwargs.get('pin_memory'):
        kwargs = kwargs | dict(pin_memory=False)
    if here:
        _count(func, args, flat, kwargs)
    inner_args, inner_kwargs = tree_map(_plain, args), tree_map(_plain, kwargs)
    out = func(*inner_args, **inner_kwargs)
    if (
        not here
        or isinstance(args[0] if args else None, torch.Tensor)
        and func._schema.name == 'aten::copy_'
        and not isinstance(args[0], FakeTensor)
    ):
        return args[0] if func._schema.name == 'aten::copy_' else out
    if func is aten._local_scalar_dense.default or func is aten.equal.default:
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrapped, out))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


@contextmanager
def fake_gpu(monkeypatch, free=8 * 2**30, bf16=False):
    "A machine with one GPU, for as long as the context lasts; gives the counters."
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def forget():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    with monkeypatch.context() as m:
        cuda = dict(
            is_available=lambda: True,
            device_count=lambda: 1,
            set_device=lambda d: None,
            current_device=lambda: 0,
            get_device_name=lambda d=None: 'a GPU made of real numbers',
            mem_get_info=lambda d=None: (free, free),
            is_bf16_supported=lambda including_emulation=True: bf16,
            synchronize=lambda d=None: GPU.wait('synchronize'),
            get_device_capability=lambda d=None: (9, 0),
            _lazy_init=lambda: None,
            is_initialized=lambda: True,
            manual_seed_all=lambda s: None,
            empty_cache=lambda: None,
        )
        for name, answer in cuda.items():
            m.setattr(torch.cuda, name, answer)
        m.setattr(
            torch.optim.Optimizer, '_accelerator_graph_capture_health_check', lambda self: None, raising=False
        )
        m.setattr('ccc.epoch.measured_peak', lambda *_: 1e12)
        real = torch.autocast.__init__
        m.setattr(
            torch.autocast,
            '__init__',
            lambda self, device_type, *a, **k: real(
                self, 'cpu' if device_type == 'cuda' else device_type, *a, **k
            ),
        )
        forget()
        GPU.start()
        try:
            with _Functions(), _Operations():
                yield GPU
        finally:
            forget()
