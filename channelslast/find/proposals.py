"""Settings that join the race after its first rounds: layers in fp32, the fused optimizer, folded batch norms, compiled.

Each function gets the milliseconds of the running candidates' steps by setting, and returns settings whose candidates
have taken their first steps and compute the right numbers."""
from dataclasses import replace
from functools import partial

from torch.nn.modules.conv import _ConvNd  # no public name: the base class of all convolutions

from ..core.devices import elapsed_ms, unwrap_model
from ..core.distributed import broadcast_from_rank0, together
from ..core.nested_tensors import copied
from ..learner.fused_optimizer import FusedOptimizer
from .numbers import StopBatch
from .race import TIE, near
from .steps import SYNCHRONOUS

OPTIMIZER_STEPS = 3  # to time the optimizer with


def _joined(steps, numbers, settings, note='') -> list:
    "The settings whose new candidates run and compute the right numbers."
    added = [steps.add(s, note) for s in settings]
    for c in added: steps.warm_up(c)
    numbers.run_checks(added)
    return [c.setting for c in added if c.running]


def with_fp32_layers(steps, numbers, times) -> list:
    """For half precisions in channels last: the depthwise convolutions in fp32, which some devices compute faster. On a CPU
    with AVX512-BF16, timing each layer alone chose other layers in one of 13 networks, which then was 1% slower."""
    convolutions = {n: m for n, m in unwrap_model(steps.learn.model).named_modules() if isinstance(m, _ConvNd)}
    depthwise = tuple(n for n, m in convolutions.items() if 1 < m.groups == m.in_channels)
    halves = [s for s in broadcast_from_rank0([*times]) if s.is_channels_last and s.precision != 'fp32' and depthwise]
    return _joined(steps, numbers, [replace(s, fp32_layers=depthwise) for s in halves],
                   f'{len(depthwise)} of {len(convolutions)} convolutions in fp32')


def with_fused_optimizer(steps, numbers, times) -> list:
    "For all candidates that may still win: the optimizer's fused step, which computes the same weights."
    steps.opts[True], new = FusedOptimizer(steps.opts[False]), []
    for s in broadcast_from_rank0([*times]):
        if steps.warm_up(_fused(steps, s)): new.append(replace(s, fused=True))
    return new


def _fused(steps, setting):
    own, c = steps.candidates[setting], steps.add(replace(setting, fused=True), steps.candidates[setting].note)
    c.loss_diff, c.grad_diff = own.loss_diff, own.grad_diff  # of the same pass
    return c


def time_optimizer(steps, try_fused) -> list: # Settings to race
    """On a CPU: the milliseconds of the optimizer and, with `try_fused`, of its fused step, alone. They are the same in each
    setting, but up to half of a step, and cause much of its noise. So steps leave the optimizer out, and this time is
    added. If the fused one makes a step of contiguous fp32 clearly faster, all settings get it."""
    settings, base = [c.setting for c in steps.running], steps.baseline.setting
    if steps.device.type not in SYNCHRONOUS: return settings
    if try_fused: steps.opts[True] = FusedOptimizer(steps.opts[False])
    def _measure():
        steps.activate(steps.baseline, [StopBatch(steps.learn), *steps.callbacks])
        rest_ms = elapsed_ms(steps.device, partial(steps.learn.one_batch, 0, copied(steps.batches[0])))
        ms = {k: [] for k in steps.opts}
        for k in [*ms]*OPTIMIZER_STEPS: ms[k].append(elapsed_ms(steps.device, steps.opts[k].step))
        return {k: min(v) for k, v in ms.items()}, rest_ms
    try: steps.optimizer_ms, rest_ms = together(_measure)
    except Exception: return settings  # it is part of each step
    own, fast = steps.optimizer_ms[base.fused], min(steps.optimizer_ms.values())
    steps.optimizer_step.skip = True
    if not broadcast_from_rank0((own - fast)/(rest_ms + own) > TIE): return settings
    return [_shared(steps, s) for s in settings]


def _shared(steps, setting):
    "The setting with the fused optimizer: its steps without the optimizer are those of the candidate without it."
    c, own = _fused(steps, setting), steps.candidates[setting]
    c.cbs, c.scaler, c.state, c.ready = own.cbs, own.scaler, own.state, own.ready
    if own is not steps.baseline: del steps.candidates[setting]
    return c.setting


def with_folded_batch_norms(steps, numbers, times) -> list:
    "For candidates that are not far behind: `FoldBatchNorm`, if that prepares any weights."
    new = []
    for s in broadcast_from_rank0(near(times)):
        c = steps.add(replace(s, folded=True), steps.candidates[s].note)
        steps.warm_up(c)
        if broadcast_from_rank0(c.running and c.prepared.works): new.append(c)
        else: del steps.candidates[c.setting]
    numbers.run_checks(new)
    return [c.setting for c in new if c.running]


def compiled_predictions(steps, numbers, times, backends) -> list:
    "The fastest candidate of each precision with its model compiled by each backend, which picks its own formats."
    fastest = {}
    for s in sorted(times, key=lambda s: min(times[s])):
        if not s.fp32_layers: fastest.setdefault(s.precision, s)
    new = []
    for s in broadcast_from_rank0([*fastest.values()]):
        # a runtime takes contiguous inputs of any size, so that uncompiled batches need not be fast
        plain = replace(s, memory_format='contiguous', folded=False)
        new += [replace(s if o == 'inductor' else plain, compiled=o) for o in backends if s.precision == 'fp32' or o != 'onnxruntime']
    return _joined(steps, numbers, new)


def compiled_training(steps, numbers, times) -> list:
    "The fastest candidate with its model compiled: once to compare its numbers, once to train."
    s = broadcast_from_rank0(min((s for s in times if not s.fp32_layers), key=lambda s: min(times[s])))
    c = steps.add(replace(s, compiled='inductor'))
    numbers.check_compiled(c, steps.candidates[s])
    steps.state.restore_tensors()
    for _ in range(3):  # compiles the training mode's code
        if c.running: steps.timed_step(c)
    c.memory = None
    return [s for s in [c.setting] if c.running]
