"Run a Learner, and restore it bit for bit."
import sys
import traceback
from contextlib import ExitStack, contextmanager

import torch
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from torch import Tensor, nn

from ..core.autocast import restore_autocast
from ..core.compiling import stance
from ..core.devices import fit_device, unwrap_model
from ..core.memory_format import group_by_memory
from ..core.nested_tensors import tensors_of
from ..core.random_state import generators_of, restore_random_states
from ..core.undo import restore_dict, uninterrupted
from .step_callbacks import changes_step, is_part_of_step


def learner_modules(learn, cbs=()) -> list:
    "The modules of the Learner's model, of its loss function and of these callbacks, each once."
    roots = [learn.model, learn.loss_func, getattr(learn.loss_func, 'func', None)]
    for cb in cbs: roots += vars(cb).values()
    return list({id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}.values())


def check_model(learn):
    "Raise `ValueError`, with what to do, for a model that can't run in a Learner."
    params = list(learn.model.parameters())
    if not params: raise ValueError("The model has no parameters: fastai needs one to find the device.")
    if any(nn.parameter.is_lazy(p) for p in params):
        raise ValueError("The model has lazy modules without shapes. Run one batch through it first: "
                         "`learn.model(learn.dls.one_batch()[0])`.")
    if any(p.is_meta for p in params):
        raise ValueError("The model is on the meta device, so it has no values. Call "
                         "`learn.model.to_empty(device='cpu')` and load weights first.")


def objects_in(modules):
    "Objects among the attributes of modules and callbacks, such as a UNet's `Hook`s, which keep activations."
    objects = {id(v): v for m in modules for v in getattr(m, '__dict__', {}).values() if type(v).__module__ != 'builtins'}.values()
    return [o for o in objects if hasattr(o, '__dict__') and not isinstance(o, (nn.Module, Tensor, type, Learner))]


def objects_behind(loader) -> list:
    """Objects with state behind a loader: its dataset, its samplers, and what these hold. Not its iterators and worker
    processes, nor objects that hold a file or an iterator, which would continue elsewhere than their other attributes say."""
    def _is_restorable(o):
        if type(o).__module__.partition('.')[0] in sys.stdlib_module_names: return False
        return not any(hasattr(type(v), k) for v in (o, *vars(o).values()) for k in ('__next__', 'seek', 'fileno'))
    first = [o for o in objects_in([loader]) if _is_restorable(o)]
    return list({id(o): o for o in (*first, *filter(_is_restorable, objects_in(first)))}.values())


def _note_left_out(e, cbs):
    "Add a note to an error of a step: which callbacks it ran without."
    names = ', '.join(f'`{type(o).__name__}`' for o in cbs if type(o).__module__.partition('.')[0] != 'fastai')
    if names and any(f.f_code.co_name == 'one_batch' for f, _ in traceback.walk_tb(e.__traceback__)):
        e.add_note(f"The step ran without {names}, because callbacks may log, save, stop or draw. One is "
                 "included only if it assigns `self.learn.xb`, `yb`, `pred`, `loss`, `loss_grad` or `loss_func`.")


def cpp_attributes(m) -> dict:
    "Attributes of a scripted module that are stored in C++: mode, parameters, buffers, plain values."
    if not isinstance(m, torch.jit.ScriptModule): return {}
    return {k: m._c.getattr(k) for k in torch._C.ConcreteModuleType.from_jit_type(m._c._type()).get_attributes()}


def _run_on_clones(undo, tensors):
    """Swap in clones of the tensors' memory, one clone for tensors that share it; `undo` restores the originals, which
    were never written to. Returns each tensor with its original."""
    originals = []
    for group in group_by_memory(tensors):
        memory = group[0].untyped_storage().clone() if len(group) > 1 else None
        for t in group:
            def _restore(t=t, data=t.data, grad=t.grad if t.is_leaf else None, needs_grad=t.requires_grad):
                t.grad = None
                t.data = data
                t.requires_grad_(needs_grad).grad = grad
            undo.callback(_restore)
            originals.append((t, t.data))
            t.grad = None
            if memory is None: t.data = t.data.clone()
            else: t.data = t.data.new_empty(0).set_(memory, t.storage_offset(), t.shape, t.stride())
    return originals


def _restore_optimizer(undo, opt):
    "Have `undo` restore an optimizer and those it wraps; returns each state tensor with its original."
    originals = []
    while opt is not None:
        attrs = vars(opt)
        restore_dict(undo, attrs)
        for group in (*attrs.get('param_groups', ()), *attrs.get('hypers', ())): restore_dict(undo, group)
        for state in getattr(opt, 'state', {}).values():
            if isinstance(state, dict): restore_dict(undo, state)
        originals += _run_on_clones(undo, tensors_of([attrs.get('state'), *map(list, attrs.get('slow_weights') or ())]))
        inner = attrs.get('opt', attrs.get('optimizer'))
        opt = inner if hasattr(inner, 'state') else None
    return originals


@contextmanager
def preserve_learner(learn,
    classes=(), # Classes of callbacks to keep, in addition to those that a step needs
    eager=True, # Run compiled models as the modules they were made from
    loader=None, # Loader used inside; None: the training loader
):
    """Context manager: do anything with the Learner inside. Afterwards it is restored bit for bit, even after an error:
    weights, buffers, gradients, their formats and memory, optimizer, modes, callbacks, recorder, hooks, random states,
    autocast, the order and state of the loader, its samplers and its dataset. Costs one copy of the tensors of model and
    optimizer. Callbacks that a step does not need are left out; an error of a step names them. Yields the tensors with
    their originals. Objects in a module's attributes are restored, and those in a loader's and in theirs, but nothing
    nested deeper in them."""
    kept = [o for o in learn.cbs if is_part_of_step(o, classes)]
    changing = [o for o in kept if changes_step(o)]
    try: loader = learn.dls.train if loader is None else loader
    except IndexError:
        raise ValueError("The Learner's DataLoaders hold no loader: there is nothing to run on.") from None
    modules, device, loss_func = learner_modules(learn, changing), fit_device(learn), learn.loss_func
    with ExitStack() as end, restore_random_states(), restore_autocast(device.type), torch.enable_grad(), ExitStack() as undo:
        if eager: undo.enter_context(stance('force_eager'))
        owners = modules if isinstance(loss_func, nn.Module) else [*modules, loss_func]
        owners = [o for o in owners if hasattr(o, '__dict__')]
        for o in (learn, *learn.cbs, loader, *owners):
            if hasattr(o, '__dict__'): restore_dict(undo, vars(o))
        inner, behind = objects_in([*modules, *changing]), objects_behind(loader)
        for o in (*inner, *behind): restore_dict(undo, vars(o))
        for m in modules:
            for k, v in cpp_attributes(m).items(): undo.callback(m._c.setattr, k, v)
        holders = [o for o in (*owners, *changing, *inner, loader, *behind) if hasattr(o, '__dict__')]
        for restore, state in generators_of(v for o in holders for v in vars(o).values()): undo.callback(restore, state)
        values = [[*vars(o).values(), *cpp_attributes(o).values()] for o in (*owners, *changing)]
        originals = _run_on_clones(undo, tensors_of(values))  # parameters, buffers, plain attributes
        opt = learn.opt_func if learn.opt is None and isinstance(learn.opt_func, OptimWrapper) else learn.opt
        originals += _restore_optimizer(undo, opt)
        if getattr(learn.dls, 'device', None) not in (None, device):
            undo.callback(setattr, learn.dls, 'device', learn.dls.device)
            learn.dls.device = device
        left_out, learn.cbs = [o for o in learn.cbs if o not in kept], L(kept)
        if eager: learn.model = unwrap_model(learn.model)
        undo.callback(end.enter_context, uninterrupted())  # is called first
        try: yield originals
        except Exception as e:
            _note_left_out(e, left_out)
            raise
