"fastai's own optimizers with their step in PyTorch's fused kernels: the same weights, sooner."
from functools import partial

import torch
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.optimizer import (SGD, Adam, Optimizer, adam_step, average_grad, average_sqr_grad, l2_reg, momentum_step,
                              sgd_step, step_stat, weight_decay)
from torch import nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ..core.memory_format import match_strides

__all__ = ['fused', 'fused_argument']


def _kept(ps, states, name):
    "The states' tensors of this name, new ones where there are none, in the strides of their parameters."
    for p, s in zip(ps, states): s[name] = match_strides(s[name], p) if name in s else torch.zeros_like(p)
    return [s[name] for s in states]


def _adam(kernel, ps, grads, states, lr, wd, mom, sqr_mom, eps):
    # fastai counts in plain numbers, the kernel, which adds 1, in tensors. A GPU waits for the copy of a list.
    counts = [float(s.get('step', 0)) for s in states]
    same = len({*counts}) == 1
    steps = (torch.full((len(ps),), counts[0], device=ps[0].device) if same else
             torch.tensor(counts, device=ps[0].device)).unbind()
    kernel(ps, grads, _kept(ps, states, 'grad_avg'), _kept(ps, states, 'sqr_avg'), [], [*steps], fused=True, lr=lr,
           weight_decay=wd, beta1=mom, beta2=sqr_mom, eps=eps, amsgrad=False, maximize=False)
    for s in states: s['step'] = s.get('step', 0) + 1


def _sgd(decoupled, averaged, ps, grads, states, lr, wd, mom):
    if decoupled and averaged and wd:  # without an average both decays are one
        torch._foreach_mul_(ps, 1 - lr*wd)
        wd = 0.
    # at momentum 0 the kernel forgets the average, which a schedule may need again: a number that is as good as 0
    sgd(ps, grads, _kept(ps, states, 'grad_avg') if averaged else [None]*len(ps), fused=True, weight_decay=wd, lr=lr,
        momentum=(mom or 1e-30) if averaged else 0., dampening=0., nesterov=False, maximize=False)


_ADAM = (average_grad, "{'dampening': True}"), average_sqr_grad, step_stat, adam_step
KERNELS = {  # by the callbacks that a fastai optimizer consists of; its other optimizers have no equal that is faster
    (weight_decay, *_ADAM): partial(_adam, adamw), (l2_reg, *_ADAM): partial(_adam, adam),
    (weight_decay, sgd_step): partial(_sgd, True, False), (l2_reg, sgd_step): partial(_sgd, False, False),
    (weight_decay, average_grad, momentum_step): partial(_sgd, True, True),
    (l2_reg, average_grad, momentum_step): partial(_sgd, False, True)}


def _fusable(p) -> bool:
    "Do the kernels treat this parameter as fastai does? They round half precision elsewhere, and walk through memory."
    return (type(p) is nn.Parameter and p.device.type in ('cpu', 'cuda') and p.dtype in (torch.float32, torch.float64)
            and p.layout is torch.strided and p.stride() == torch.empty_like(p).stride())


def _kernel(opt):
    "The kernel that does what this optimizer does, or None."
    if type(opt) is not Optimizer or any({*h} - {'lr', 'wd', 'mom', 'sqr_mom', 'eps'} for h in opt.hypers): return None
    ps = [p for pg in opt.param_lists for p in pg]
    if len({*ps}) < len(ps) or len({p.device for p in ps}) != 1 or not all(map(_fusable, ps)): return None
    return KERNELS.get(tuple((cb.func, str(cb.keywords)) if isinstance(cb, partial) else cb for cb in opt.cbs))


class FusedOptimizer(Optimizer):
    "A fastai optimizer, its groups, hyper-parameters and state, that steps with a fused kernel."
    def __init__(self, opt, kernel): vars(self).update(vars(opt), kernel=kernel, had_grad=set())

    def zero_grad(self):
        for pg in self.param_lists:
            for p in pg:
                if p.grad is not None:
                    self.had_grad.add(p)
                    p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None: raise NotImplementedError("fastai optimizers currently do not support closure")
        for p in self.had_grad:  # fastai's become zero, not None: average and decay go on, in frozen layers too
            if p.grad is None: p.grad = torch.zeros_like(p)
        for pg, hyper in zip(self.param_lists, self.hypers):
            for do_wd in True, False:
                ps = [p for p in pg if p.grad is not None and self.state[p].get('do_wd', True) == do_wd]
                if not ps: continue
                grads, states = [match_strides(p.grad, p) for p in ps], [self.state[p] for p in ps]
                self.kernel(ps, grads, states, **{**hyper, 'wd': hyper['wd']*do_wd})


class fused(partial):
    """Optimizer function for a Learner, `opt_func=fused(SGD, mom=0.9)`: fastai's `Adam` or `SGD` that steps in a
    fused kernel of PyTorch's. Weights, schedules, groups, checkpoints are fastai's; pickles as what it was made of."""
    def __init__(self,
        opt_func, # fastai's `Adam` or `SGD`, or a `partial` of one
        **kwargs # Its arguments
    ): pass  # `partial` has taken them

    def __call__(self, *args, **kwargs):
        opt = super().__call__(*args, **kwargs)
        if kernel := _kernel(opt): return FusedOptimizer(opt, kernel)
        raise ValueError("fused: no kernel is known to give this optimizer's weights. It takes fastai's `Adam` and "
                         "`SGD`, each parameter once, dense, in fp32 or fp64, all on the CPU or on one CUDA GPU.")

    def __reduce__(self): return (partial, *super().__reduce__()[1:])  # an exported Learner loads without this library
    def __copy__(self): return self
    def __deepcopy__(self, memo): return self


def fused_argument(
    learn, # A `Learner`; it is only looked at
) -> str|None: # An argument of `Learner`
    "Code for the same optimizer with a fused step, `opt_func=fused(Adam)`; None where none is proven equal."
    f = learn.opt_func
    func, kwargs = (f.func, f.keywords) if type(f) is partial else (f, {})
    if func not in (Adam, SGD) or any(isinstance(cb, NonNativeMixedPrecision) for cb in learn.cbs): return None
    if any(getattr(m, 'sparse', False) for m in learn.model.modules()): return None  # embeddings: sparse gradients
    opts = [f(learn.splitter(learn.model), lr=learn.lr), *([learn.opt] if learn.opt is not None else [])]
    if None in (kernels := {_kernel(o) for o in opts}) or len(kernels) > 1: return None
    return f"opt_func=fused({', '.join([func.__name__, *(f'{k}={v!r}' for k, v in kwargs.items())])})"
