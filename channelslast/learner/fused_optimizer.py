"fastai's `Adam` and `SGD`, stepping with PyTorch's fused kernels: the same weights in less time."
from functools import partial
from importlib import import_module

import torch
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.optimizer import (SGD, Adam, Optimizer, adam_step, average_grad, average_sqr_grad, l2_reg, momentum_step,
                              sgd_step, step_stat, weight_decay)
from torch import nn

from ..core.memory_format import match_strides
from ..core.pickle_as import pickle_as
from .added import added_by_to_fastest, record_added


def _state_tensors(ps, states, name):
    "The state tensors of this name in the strides of their parameters; missing ones start at zero."
    for p, s in zip(ps, states): s[name] = match_strides(s[name], p) if name in s else torch.zeros_like(p)
    return [s[name] for s in states]


def _functional(name):
    "PyTorch's functional optimizer of this name, such as `torch.optim.adam.adam`. None in a version that lacks it."
    try: return getattr(import_module(f'torch.optim.{name}'), name, None)
    except ImportError: return None


def _adam(name, ps, grads, states, lr, wd, mom, sqr_mom, eps):
    # fastai counts steps in plain numbers; the kernel takes tensors and adds 1. On a GPU, copying a list would wait.
    counts = [float(s.get('step', 0)) for s in states]
    kind, all_equal = dict(dtype=torch.float32, device=ps[0].device), len({*counts}) == 1
    steps = torch.full((len(ps),), counts[0], **kind) if all_equal else torch.tensor(counts, **kind)
    avgs, sqr_avgs = _state_tensors(ps, states, 'grad_avg'), _state_tensors(ps, states, 'sqr_avg')
    _functional(name)(ps, grads, avgs, sqr_avgs, [], [*steps.unbind()], fused=True, lr=lr, weight_decay=wd, beta1=mom,
                      beta2=sqr_mom, eps=eps, amsgrad=False, maximize=False)
    for s in states: s['step'] = s.get('step', 0) + 1


def _sgd(name, decoupled, averaged, ps, grads, states, lr, wd, mom):
    if decoupled and averaged and wd:  # without an average, both kinds of decay are the same
        torch._foreach_mul_(ps, 1 - lr*wd)  # has no public name; on a GPU one launch instead of one per parameter
        wd = 0.
    avgs = _state_tensors(ps, states, 'grad_avg') if averaged else [None]*len(ps)
    # At momentum 0 the kernel drops its buffer, which a schedule may need later: pass a tiny value.
    _functional(name)(ps, grads, avgs, fused=True, lr=lr, weight_decay=wd, momentum=(mom or 1e-30) if averaged else 0.,
                      dampening=0., nesterov=False, maximize=False)


_ADAM = (average_grad, "{'dampening': True}"), average_sqr_grad, step_stat, adam_step
KERNELS = {  # by the callbacks of a fastai optimizer; its other optimizers have no faster equivalent
    (weight_decay, *_ADAM): partial(_adam, 'adamw'), (l2_reg, *_ADAM): partial(_adam, 'adam'),
    (weight_decay, sgd_step): partial(_sgd, 'sgd', True, False), (l2_reg, sgd_step): partial(_sgd, 'sgd', False, False),
    (weight_decay, average_grad, momentum_step): partial(_sgd, 'sgd', True, True),
    (l2_reg, average_grad, momentum_step): partial(_sgd, 'sgd', False, True)}


def _is_fusable(p) -> bool:
    "True if the kernels update `p` as fastai does: they round half precision differently, and need dense memory."
    return (type(p) is nn.Parameter and p.device.type in ('cpu', 'cuda') and p.dtype in (torch.float32, torch.float64)
            and p.layout is torch.strided and p.stride() == torch.empty_like(p).stride())


def _kernel(opt):
    "The kernel that computes the same step as this optimizer, or None."
    if type(opt) is not Optimizer or any({*h} - {'lr', 'wd', 'mom', 'sqr_mom', 'eps'} for h in opt.hypers): return None
    ps = [p for pg in opt.param_lists for p in pg]
    if len({*ps}) < len(ps) or len({p.device for p in ps}) != 1 or not all(map(_is_fusable, ps)): return None
    step = KERNELS.get(tuple((cb.func, str(cb.keywords)) if isinstance(cb, partial) else cb for cb in opt.cbs))
    return step if step and _functional(step.args[0]) else None


@pickle_as(Optimizer)
class FusedOptimizer(Optimizer):
    "A fastai optimizer with its groups, hyperparameters and state, but a fused step."
    _kernel = _made_by = None
    def __init__(self, opt,
        made_by=None, # The `fused` that makes it
    ):
        vars(self).update(vars(opt), _kernel=_kernel(opt), _made_by=made_by)
        if self._kernel is None:
            raise ValueError("`fused` supports only fastai's `Adam` and `SGD`, with dense, unshared fp32 or fp64 "
                             "parameters on one device (CPU or CUDA), and needs PyTorch's functional `adam`, "
                             "`adamw` and `sgd`.")

    def plain(self) -> Optimizer:
        "fastai's optimizer with these groups, hyperparameters and state."
        opt = Optimizer.__new__(Optimizer)
        vars(opt).update({k: v for k, v in vars(self).items() if k not in vars(FusedOptimizer)})
        return opt

    def zero_grad(self):
        # not None, as in fastai: averages and decay continue without a new gradient, in frozen layers too
        grads = [p.grad.detach_() for pg in self.param_lists for p in pg if p.grad is not None]
        if grads: torch._foreach_zero_(grads)  # no public name, see above

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None: raise NotImplementedError("fastai optimizers currently do not support closure")
        for pg, hyper in zip(self.param_lists, self.hypers):
            for do_wd in True, False:
                ps = [p for p in pg if p.grad is not None and self.state[p].get('do_wd', True) == do_wd]
                if not ps: continue
                grads, states = [match_strides(p.grad, p) for p in ps], [self.state[p] for p in ps]
                self._kernel(ps, grads, states, **{**hyper, 'wd': hyper['wd'] if do_wd else 0.})


class fused(partial):
    """Optimizer function for a Learner: fastai's `Adam` or `SGD`, or a `partial` of one, with PyTorch's fused step.
    Weights, schedules, groups and checkpoints are as without it. An exported Learner holds a plain `partial` of
    `opt_func`.

    >>> from fastai.vision.all import *; from channelslast import *
    >>> learn = Learner(DataLoaders(), nn.Linear(2, 2), MSELossFlat(), opt_func=fused(SGD, mom=0.9))
    >>> learn.create_opt()
    >>> type(learn.opt).__name__
    'FusedOptimizer'"""
    own = None  # the Learner's own `opt_func`, if `to_fastest` put this one in its place
    def __init__(self,
        opt_func, # fastai's `Adam` or `SGD`, or a `partial` of one
        **kwargs # Its arguments
    ): pass  # `partial.__new__` has stored them

    def __call__(self, *args, **kwargs):
        opt = super().__call__(*args, **kwargs)
        if self.own is not None and _kernel(opt) is None: return opt  # the model has changed since
        return FusedOptimizer(opt, self)

    def __reduce__(self): # an exported Learner loads where this library is not installed
        return partial, (self.func,), (self.func, self.args, self.keywords, None)
    def __copy__(self): return self
    def __deepcopy__(self, memo): return self


def _opt_func_is_newer(learn) -> bool:
    "True if the optimizer lacks the fused step of `learn.opt_func`, which was set after it was made."
    f = learn.opt_func
    if not isinstance(f, fused) or f.own is not None or type(learn.opt) is not Optimizer: return False
    kernel = _kernel(learn.opt)
    plain = partial.__call__(f, learn.splitter(learn.model), lr=learn.lr)
    return kernel is not None and kernel is _kernel(plain)  # otherwise it would compute other weights


def is_fused(learn) -> bool:
    "True if the next fit takes fused steps."
    if learn.opt is None: return isinstance(learn.opt_func, fused)
    return isinstance(learn.opt, FusedOptimizer) or _opt_func_is_newer(learn)


def follow_opt_func(learn):
    "Give an existing optimizer the fused step if `learn.opt_func` is a `fused` of it. `unfreeze`, `fit` and `lr_find` make one."
    if _opt_func_is_newer(learn): learn.opt = FusedOptimizer(learn.opt, learn.opt_func)


def fused_argument(learn) -> str|None:
    "The `Learner` argument for an equal, fused optimizer, such as `opt_func=fused(Adam)`; None if none is known."
    f = learn.opt_func
    func, kwargs = (f.func, f.keywords) if type(f) is partial else (f, {})
    if func not in (Adam, SGD) or any(isinstance(cb, NonNativeMixedPrecision) for cb in learn.cbs): return None
    if any(getattr(m, 'sparse', False) for m in learn.model.modules()): return None  # embeddings: sparse gradients
    opts = f(learn.splitter(learn.model), lr=learn.lr), learn.opt
    kernels = {_kernel(o) for o in opts if o is not None}
    if None in kernels or len(kernels) > 1: return None
    return f"opt_func=fused({', '.join([func.__name__, *[f'{k}={v!r}' for k, v in kwargs.items()]])})"


def use_fused(learn):
    """Replace the Learner's optimizer, for which `fused_argument` must know an equal one, by that one. An existing
    optimizer's state, groups and hyperparameters are kept. `restore_optimizer` undoes it."""
    restore_optimizer(learn)
    own, learn.opt_func = learn.opt_func, fused(learn.opt_func)
    learn.opt_func.own = own
    record_added(learn, optimizer=learn.opt_func)
    if learn.opt is not None: learn.opt = FusedOptimizer(learn.opt, learn.opt_func)


def restore_optimizer(learn):
    "Undo `use_fused`. The optimizer keeps its current state; one that the user has put in since then stays."
    new = added_by_to_fastest(learn)['optimizer']
    if new is None: return
    record_added(learn, optimizer=None)
    if learn.opt_func is new and isinstance(new, fused): learn.opt_func = new.own  # that of an exported Learner is plain
    if getattr(learn.opt, '_made_by', None) is new: learn.opt = learn.opt.plain()
