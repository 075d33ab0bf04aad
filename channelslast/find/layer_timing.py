"Which layers does half precision slow down? Each measured alone, at the shapes it really gets."
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from ..core.autocast import fp32_forward
from ..core.devices import elapsed_ms
from ..core.onednn_workarounds import hits_onednn_6035, pads_in_kernel, safe_forward
from .selection import fastest

__all__ = ['LayerTiming', 'record_inputs', 'layer_key', 'time_layers', 'fp32_names']

KINDS = nn.modules.conv._ConvNd, nn.Linear  # what autocast runs in half; transposed convolutions are among the first
MARGIN, WARM_UP, ROUNDS, PASSES = 0.9, 1, 4, 10  # fp32 has to take less than this part of the time in half


@dataclass(frozen=True)
class LayerTiming:
    "All layers of one signature in one half precision: forward and backward, the casts around them included."
    names: tuple      # As in `named_modules`
    cls: str          # Class name
    shape: tuple      # Of the input
    precision: str    # `'fp16'` or `'bf16'`: the half precision measured
    half_ms: float    # Milliseconds in it, the fastest of several passes
    fp32_ms: float    # The same in fp32
    kept: str         # Where the layer is faster: `'fp32'` (clearly) or the half precision


def record_inputs(model: nn.Module, run) -> dict:
    "What each convolution and linear layer gets in `run()`: `{module: [(shape, strides, dtype, needs gradient)]}`."
    seen = defaultdict(list)
    def _note(m, args):
        if not args or not isinstance(x := args[0], torch.Tensor): return
        seen[m].append((x.shape, x.stride(), x.dtype, x.requires_grad))
    handles = [m.register_forward_pre_hook(_note) for m in model.modules() if isinstance(m, KINDS)]
    try: run()
    finally:
        for h in handles: h.remove()
    return seen


def layer_key(m, x) -> tuple:
    "Layers that agree in this take the same time."
    conv = (getattr(m, o, None) for o in ('stride', 'padding', 'dilation', 'groups', 'output_padding', 'padding_mode'))
    return type(m), x, m.weight.shape, m.weight.requires_grad, m.bias is not None, *conv


def layer_ms(m, x, device, half, in_fp32) -> float:
    """Milliseconds of one forward and backward pass of a layer inside autocast, or outside it with the casts that this
    needs. On a GPU the mean of several passes: one is computed while the next one is launched."""
    forward = safe_forward(m, m.forward) if device.type == 'cpu' and (hits_onednn_6035(m) or pads_in_kernel(m)) else m.forward
    if in_fp32: forward = fp32_forward(forward, device.type, half)
    def _pass():
        with torch.autocast(device.type, half): out = forward(x)
        if out.requires_grad: out.backward(torch.ones_like(out))
        x.grad = None
        m.zero_grad(set_to_none=True)
    passes = 1 if device.type == 'cpu' else PASSES
    return elapsed_ms(device, lambda: [_pass() for _ in range(passes)])/passes


def time_layers(
    model: nn.Module, # In the format to measure in
    inputs: dict, # Of `record_inputs`
    half: torch.dtype,
    precision: str, # Its name
) -> list: # `LayerTiming`s
    "Time each distinct layer in half and in fp32, turn about; a layer that can't run alone is left out."
    names, groups = {m: n for n, m in model.named_modules()}, defaultdict(list)
    for m, xs in inputs.items():
        # a shared layer of several shapes has no one answer
        if len(set(xs)) == 1: groups[layer_key(m, xs[0])].append(m)
    xs, runs = {}, defaultdict(list)
    for _ in range(WARM_UP + ROUNDS):  # layer after layer: a burst of other work spoils one round of many layers
        for key, (m, *_) in groups.items():
            if runs[key] is None: continue
            try:
                if key not in xs: xs[key] = _input(m, *key[1])
                runs[key].append([layer_ms(m, xs[key], m.weight.device, half, in_fp32) for in_fp32 in (False, True)])
            except Exception: runs[key] = None
    return [_timing(ms, key, runs[key][WARM_UP:], precision, names) for key, ms in groups.items() if runs[key]]


def _input(m, shape, stride, dtype, grad):
    "A random tensor like the one that the layer got."
    x = torch.empty_strided(shape, stride, dtype=dtype, device=m.weight.device)
    return x.normal_().requires_grad_(grad)


def _timing(ms, key, runs, precision, names) -> LayerTiming:
    in_half, in_fp32 = map(fastest, zip(*runs))
    (cls, (shape, *_), *_), kept = key, 'fp32' if in_fp32 < MARGIN*in_half else precision
    return LayerTiming(tuple(names[m] for m in ms), cls.__name__, tuple(shape), precision, in_half, in_fp32, kept)


def fp32_names(rows, precision) -> list:
    "The names of the layers that are to stay in fp32 beside this half precision."
    return [n for r in rows if r.kept == 'fp32' and r.precision == precision for n in r.names]
