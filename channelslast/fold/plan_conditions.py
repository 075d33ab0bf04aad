"Conditions under which a fold plan holds: the model's structure, the kind of input, and no hooks or wrappers."
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ..core.memory_format import unique_modules
from ..core.nested_tensors import leaves_of
from .fold_trace import HOOKS, foreign_forward

__all__ = ['is_eager', 'has_global_hooks', 'structure_key', 'input_key']

SWITCHES, PLAIN = {bool, str, type(None)}, (bool, int, float, str)
WRAPPED = nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule


def structure_key(model) -> tuple: # Modules; their modes; hooks; forwards; switches
    "What a plan depends on besides the input. Computed for each batch."
    modules = unique_modules(model)
    own = [vars(m) for m in modules]
    modes, attached = [d.get('training') for d in own], [(*d[k],) for d in own for k in HOOKS if d.get(k)]
    replaced = [(m, d.get('_compiled_call_impl'), foreign_forward(m)) for m, d in zip(modules, own)
                if 'forward' in d or '_compiled_call_impl' in d]
    forwards = [o for o in replaced if any(o[1:])]
    # attributes of classes outside PyTorch, since their forward may read them: `self.return_features = True`
    custom = [d for m, d in zip(modules, own) if type(m).__module__[:8] != 'torch.nn']
    return modules, modes, attached, forwards, [v for d in custom for v in d.values() if type(v) in SWITCHES]


def is_eager(modules) -> bool:
    "True if no module is compiled, scripted or wrapped to run on several devices."
    return not any(isinstance(m, WRAPPED) or '_orig_mod' in m._modules or m._compiled_call_impl for m in modules)


def has_global_hooks() -> bool:
    "True if hooks are registered for all modules: they see each layer's output."
    return any(getattr(hooks, f'_global{k}') for k in HOOKS)


def input_key(args, kwargs) -> tuple: # Kind of the input; its shapes without the batch dimension
    "What a plan depends on in the input."
    leaves = leaves_of((args, kwargs))
    devices = {t.device.type for t in leaves if isinstance(t, Tensor)}
    def _kind(x): return (x.dtype, x.device) if isinstance(x, Tensor) else x if isinstance(x, PLAIN) else type(x)
    def _casts(d): return torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)
    kind, autocast = map(_kind, leaves), [(d, torch.get_autocast_dtype(d)) for d in sorted(devices) if _casts(d)]
    return (*kind, *autocast), tuple(t.shape[1:] for t in leaves if isinstance(t, Tensor))
