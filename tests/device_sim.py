"""A GPU for a machine that has none: the numbers are the CPU's, the rules about where a tensor is are the GPU's.

    with simulated('cuda') as gpu: Experiment(complete(profile='smoke'), device='cuda')...    # gpu.ops, gpu.syncs, gpu.moves

A tensor is on the GPU if its storage was put there: by `.to`, by a factory's `device=`, or as the result of an operation on
such tensors. Backward passes, `torch.func` and optimisers are seen too, as the check sits below them. MPS refuses float64,
and both kinds refuse operations for which PyTorch's own list has no kernel of theirs. Where deterministic algorithms are
asked for, CUDA refuses what has none.
Not seen: rounding, the order of sums, how much memory there is, what `torch.compile` makes, other processes."""
import contextlib, functools, sys, weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import torch, torchgen, yaml
import torch._dynamo # loaded later, under the simulation, it would look into functions that are replaced there
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

SYNCS = {'_local_scalar_dense', 'nonzero', '_unique2', 'unique_dim', 'unique_consecutive', 'masked_select', 'is_nonzero', 'equal',
         'bincount', 'repeat_interleave'}                     # the host waits for their answer
MOVERS = {'copy_', '_to_copy', 'set_', 'resize_', '_has_compatible_shallow_copy_type'} # may see two places
FILLERS = {'masked_fill', 'masked_fill_', 'fill', 'fill_', 'index_fill', 'index_fill_'} # take a number from the CPU
PUTTERS = {'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index_put'}
INDEXERS = {'index', '_unsafe_index'} | PUTTERS
NO_DETERMINISTIC = {'grid_sampler_2d_backward', '_adaptive_avg_pool2d_backward', 'adaptive_max_pool2d_backward',
                    'upsample_bilinear2d_backward', 'upsample_bicubic2d_backward', 'reflection_pad2d_backward',
                    'nll_loss2d_forward', 'put_', 'histc'} # on CUDA, as `torch.use_deterministic_algorithms` lists them

def tensors(o):
    "All tensors in nested arguments."
    return [t for t in tree_leaves(o) if isinstance(t, Tensor)]

def storage(t):
    "Where the numbers lie, inside the wrappers of `grad` and `vmap`."
    while torch._C._functorch.is_functorch_wrapped_tensor(t): t = torch._C._functorch.get_unwrapped(t)
    return t.untyped_storage()

def property_of(name): return getattr(Tensor, name).__get__

@functools.cache
def kernels()->dict: # name of an operation -> the kinds of device that it is written for
    "PyTorch's own list of operations, as far as it names kinds of device."
    listed = yaml.load((Path(torchgen.__file__).parent/'packaged/ATen/native/native_functions.yaml').read_text(),
                       Loader=getattr(yaml, 'CSafeLoader', yaml.SafeLoader))
    by_name = {o['func'].split('(')[0]: o for o in listed}
    def kinds(o):
        own = by_name.get(o.get('structured_delegate'), o).get('dispatch') or {}
        return {k.strip() for keys in own for k in keys.split(',')}
    return {name: kinds(o) for name,o in by_name.items()}

def varies(name, args):
    "Has an operation on CUDA no form that gives the same bits twice?"
    floats = args and isinstance(args[0], Tensor) and args[0].is_floating_point()
    weighted = name == 'bincount' and len(args) > 1 and args[1] is not None
    return name in NO_DETERMINISTIC or weighted or name == 'cumsum' and floats # which PyTorch 2.6 does not order

class Device:
    "What the simulated GPU holds, and what it was seen to do."
    def __init__(self, name, memory):
        self.name, self.memory = torch.device(name) if ':' in name else torch.device(name, 0), memory
        self.kind, self.on, self.neutral, self.owner = self.name.type, WeakIdKeyDictionary(), WeakIdKeyDictionary(), False
        self.ops, self.syncs, self.moves = Counter(), Counter(), Counter() # operations; waits and copies by place
        self.named, self.asked, self.now, self.peak = set(), [], 0, 0      # devices by name; questions to the driver; bytes

    def has(self, t): return storage(t) in self.on
    def is_neutral(self, t): return not self.has(t) and storage(t) in self.neutral # of the device that it meets

    def put(self, o):
        "Say that tensors are on the GPU."
        for s in map(storage, tensors(o)):
            if s in self.on: continue
            self.on[s] = n = s.nbytes()
            self.now += n
            self.peak = max(self.peak, self.now)
            weakref.finalize(s, self.free, n)
        return o

    def free(self, n): self.now -= n
    def wait(self, name): self.syncs[name, self.caller()] += 1
    def moved(self, way): self.moves[way, self.caller()] += 1
    def wanted(self, device):
        "Is a device that Python names this one? An error for one that is not there."
        d = torch.device(device)
        if d.type not in ('cpu', self.kind): raise RuntimeError(f'no {d} on this simulated machine')
        if d.type == self.kind: self.named.add(str(d))
        return d.type == self.kind

    def caller(self):
        "The line of the package that asked for this."
        f = sys._getframe(2)
        while f and 'bias_distill' not in f.f_code.co_filename: f = f.f_back
        return f'{Path(f.f_code.co_filename).name}:{f.f_lineno}' if f else '?'

    def reset(self):
        "Count from here on."
        for c in (self.ops, self.syncs, self.moves): c.clear()
        self.peak = self.now

class Below(TorchDispatchMode):
    "Under autograd and `torch.func`: who may be where, and what a GPU can do."
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        g, kwargs, name = self.gpu, kwargs or {}, f.overloadpacket.__name__
        given = tensors((args, kwargs))
        if any(t.is_meta for t in given) or str(kwargs.get('device')) == 'meta': return f(*args, **kwargs)
        here, free = [t for t in given if g.has(t)], [t for t in given if g.is_neutral(t)]
        there = [t for t in given if not g.has(t) and not g.is_neutral(t)]
        if here:
            g.put(free)
            self.check(f, name, args, kwargs, there)
        if name == 'copy_' and len(here) == 1 and len(given) == 2: g.moved('to' if g.has(args[0]) else 'from')
        out = f(*args, **kwargs)
        if here: self.note(f, name, args, out)
        elif not there and (free or g.owner):                 # a constant that C++ made, as in a backward pass
            for t in tensors(out): g.neutral[storage(t)] = True
        return out

    def check(self, f, name, args, kwargs, there):
        "Refuse what a GPU refuses."
        g = self.gpu
        if there and name not in MOVERS: self.places(f, name, args, there)
        for o in tree_leaves((args, kwargs)):
            if isinstance(o, torch.Generator) and o.device.type != g.kind: raise RuntimeError(
                f"Expected a '{g.kind}' device type for generator but found '{o.device.type}' ({name})")
        written = kernels().get(f.name().removeprefix('aten::'), set())
        general = {'CompositeExplicitAutograd', 'CompositeExplicitAutogradNonFunctional', 'CompositeImplicitAutograd'}
        if 'CPU' in written and not written & {g.kind.upper(), *general}: raise NotImplementedError(
            f"The operator {f.name()!r} is not currently implemented for the {g.kind.upper()} device")
        if g.kind == 'cuda' and torch.are_deterministic_algorithms_enabled() and varies(name, args): raise RuntimeError(
            f'{name} does not have a deterministic implementation, but you set use_deterministic_algorithms(True)')

    def places(self, f, name, args, there):
        "Refuse tensors from two places, but for those that PyTorch fetches itself."
        fail = f'Expected all tensors to be on the same device, but found at least two devices, {self.gpu.name} and cpu! ({name})'
        if name in INDEXERS:
            if not self.gpu.has(args[0]): raise RuntimeError(fail if name in PUTTERS else
                'indices should be either on cpu or on the same device as the indexed tensor (cpu)')
            if len(args) > 2 and any(t is args[2] and t.dim() for t in there): raise RuntimeError(fail)
            for _ in there: self.gpu.moved('to')
        elif name in FILLERS or torch.Tag.pointwise in f.tags or name.startswith('_foreach'):
            if any(t.dim() for t in there): raise RuntimeError(fail)
        else: raise RuntimeError(fail)

    def note(self, f, name, args, out):
        "Count, and say where the result is."
        g = self.gpu
        masks = [t for t in tensors(args[1:]) if t.dtype in (torch.bool, torch.uint8)] if name == 'index' else []
        if name in SYNCS or masks: g.wait(name)
        if not f.is_view: g.ops[name] += 1
        if name in ('copy_', '_local_scalar_dense', 'equal', 'is_nonzero'): return
        g.put(out)
        wide = [t for t in tensors(out) if t.dtype in (torch.float64, torch.complex128)]
        if wide and g.kind == 'mps': raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                                                     f"doesn't support float64 ({name})")

class Above(TorchFunctionMode):
    "Where Python asks for a device, or is told one."
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, f, types, args=(), kwargs=None):
        g, was, name = self.gpu, self.gpu.owner, getattr(f, '__name__', '')
        g.owner = name in ('backward', 'grad', '_engine_run_backward') or any(g.has(t) for t in tensors(args))
        try: return self.call(f, name, args, dict(kwargs or {}))
        finally: g.owner = was

    def call(self, f, name, args, kwargs):
        "What Python is told."
        g, x = self.gpu, args[0] if args else None
        asked = {property_of('device'): lambda: g.name if g.has(x) else f(*args), property_of('is_cpu'): lambda: not g.has(x),
                 property_of('is_cuda'): lambda: g.kind == 'cuda' and g.has(x),
                 property_of('is_mps'): lambda: g.kind == 'mps' and g.has(x)}.get(f)
        if asked: return asked()
        if name == 'get_device': return (g.name.index or 0) if g.has(x) else -1
        if name in ('numpy', '__array__', '__dlpack__') and g.has(x): raise TypeError(
            f"can't convert {g.name} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if name == 'tolist' and g.has(x): g.wait(name)
        if name == '__deepcopy__': return g.put(f(*args, **kwargs)) if g.has(x) else f(*args, **kwargs)
        if f in (Tensor.cpu, Tensor.cuda): return self.move(x, name != 'cpu')
        if any(isinstance(o, (str, torch.device)) and torch.device(o).type == 'meta' for o in (*args[1:2], kwargs.get('device'))):
            return f(*args, **kwargs)                          # has no numbers, and no place
        if f is Tensor.to: return self.to(x, *args[1:], **kwargs)
        return f(*args, **kwargs) if kwargs.get('device') is None else self.made(f, name, args, kwargs)

    def made(self, f, name, args, kwargs):
        "A factory, or one of `new_` and `_like`."
        g, want, gen = self.gpu, self.gpu.wanted(kwargs.pop('device')), kwargs.get('generator')
        if gen is not None and (gen.device.type == g.kind) != want: raise RuntimeError(
            f"Expected a '{g.kind if want else 'cpu'}' device type for generator but found '{gen.device.type}' ({name})")
        if want and g.kind == 'mps' and kwargs.get('dtype') is torch.float64: raise TypeError('MPS has no float64')
        out = f(*args, **kwargs)
        if g.has(out) and not want: return self.move(out, False)
        return g.put(out) if want else out

    def move(self, x, want):
        g = self.gpu
        if g.has(x) == want: return x
        g.moved('to' if want else 'from')
        if want and g.kind == 'mps' and x.dtype is torch.float64: raise TypeError('MPS has no float64')
        out = x.clone() if x.requires_grad else x.detach().clone()
        if want: return g.put(out)
        g.on.pop(storage(out), None)
        return out

    def to(self, x, *args, **kwargs):
        place, dtype = kwargs.pop('device', None), kwargs.pop('dtype', None)
        for a in args:
            if isinstance(a, (str, torch.device)): place = a
            elif isinstance(a, Tensor): place, dtype = (self.gpu.name if self.gpu.has(a) else 'cpu'), a.dtype
            elif isinstance(a, torch.dtype): dtype = a
        if place is not None: x = self.move(x, self.gpu.wanted(place))
        flags = {k: v for k,v in kwargs.items() if k in ('copy', 'memory_format') and v is not None}
        return x if dtype is None and not flags else Tensor.to(x, dtype or x.dtype, **flags)

def driver(g, bfloat16)->list: # of (object, its functions) to replace
    "What PyTorch's driver of that kind answers."
    def asks(answer):
        def f(*args, **kwargs):
            g.asked.append(str(args[0]) if args else None)
            return answer()
        return f
    def start_anew(): g.peak = g.now
    if g.kind == 'mps': return [(torch.backends.mps, dict(is_available=lambda: True)),
                                (torch.mps, dict(synchronize=asks(lambda: None), driver_allocated_memory=asks(lambda: g.now),
                                                 recommended_max_memory=lambda: g.memory))]
    return [(Tensor, dict(pin_memory=lambda x, *args: x)), (torch.cuda, dict(
        is_available=lambda: True, device_count=lambda: 1+g.name.index, current_device=lambda: 0, empty_cache=lambda: None,
        synchronize=asks(lambda: None), reset_peak_memory_stats=asks(start_anew), max_memory_allocated=asks(lambda: g.peak),
        get_device_properties=asks(lambda: SimpleNamespace(total_memory=g.memory)), is_bf16_supported=lambda *a, **k: bfloat16, get_device_name=asks(lambda: 'Simulated GPU'),
        get_device_capability=lambda *a: (9, 0)))]

@contextlib.contextmanager
def simulated(
    name='cuda',   # 'cuda', 'cuda:1' (then there are two), 'mps'
    bfloat16=True, # has the GPU it?
    memory=80*2**30, # bytes that it says to have; it holds more
):                 # yields a `Device`
    "A machine with a GPU."
    g, optimizer = Device(name, memory), torch.optim.Optimizer
    with contextlib.ExitStack() as s:
        for o,functions in driver(g, bfloat16):
            for k,f in functions.items(): s.enter_context(patch.object(o, k, f))
        for k in ('_accelerator_graph_capture_health_check', '_cuda_graph_capture_health_check'): # ask for the stream
            if hasattr(optimizer, k): s.enter_context(patch.object(optimizer, k, lambda self: None))
        s.enter_context(Below(g))
        s.enter_context(Above(g))
        yield g
