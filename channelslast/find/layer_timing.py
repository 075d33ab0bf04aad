"Find the layers that are slower in half precision: each is timed alone, with inputs as in a training step."
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ..core.autocast import fp32_forward
from ..core.devices import elapsed_ms
from ..core.onednn_workarounds import SafeConvolutions, needs_safe_convolutions
from .race import fastest

__all__ = ['LayerTiming', 'record_inputs', 'layer_key', 'time_layers', 'fp32_names']

KINDS = nn.modules.conv._ConvNd, nn.Linear  # autocast runs these in half precision; includes transposed convolutions
MARGIN, WARM_UP, ROUNDS, PASSES = 0.9, 1, 4, 10  # fp32 must take less than this fraction of the time in half precision


@dataclass(frozen=True)
class LayerTiming:
    "Times of identical layers in half precision and in fp32: forward and backward pass, with the casts around them."
    names: tuple      # As in `named_modules`
    cls: str          # Class name
    shape: tuple      # Of the input
    precision: str    # The half precision: `'fp16'` or `'bf16'`
    half_ms: float    # Milliseconds in half precision, the fastest of several passes
    fp32_ms: float    # The same in fp32
    kept: str         # The faster precision: `'fp32'` if clearly faster, otherwise the half precision


def record_inputs(model: nn.Module, run) -> dict: # `{module: [(shape, strides, dtype, requires_grad)]}`
    "Record the inputs that each convolution and linear layer gets in `run()`."
    inputs = defaultdict(list)
    def _record(m, args):
        x = args[0] if args else None
        if isinstance(x, torch.Tensor): inputs[m].append((x.shape, x.stride(), x.dtype, x.requires_grad))
    handles = [m.register_forward_pre_hook(_record) for m in model.modules() if isinstance(m, KINDS)]
    try: run()
    finally:
        for h in handles: h.remove()
    return inputs


def layer_key(m, x) -> tuple:
    "Layers with equal keys take the same time."
    conv = (getattr(m, o, None) for o in ('stride', 'padding', 'dilation', 'groups', 'output_padding', 'padding_mode'))
    return type(m), x, m.weight.shape, m.weight.requires_grad, m.bias is not None, *conv


def layer_ms(m, x, device, half, in_fp32) -> float:
    """Milliseconds of one forward and backward pass of a layer in autocast, or in fp32 with the casts that it needs
    there. On a GPU the mean of several passes, since one is computed while the next one is launched."""
    forward, n = m.forward, 1 if device.type == 'cpu' else PASSES
    safe = SafeConvolutions() if device.type == 'cpu' and needs_safe_convolutions([m]) else nullcontext()
    if in_fp32: forward = fp32_forward(forward, device.type, half)
    def _passes():
        for _ in range(n):
            with safe, torch.autocast(device.type, half): out = forward(x)
            if out.requires_grad: out.backward(torch.ones_like(out))
            x.grad = None
            m.zero_grad(set_to_none=True)
            del out  # before the next pass allocates its own
    return elapsed_ms(device, _passes)/n


def time_layers(
    model: nn.Module, # In the memory format to measure
    inputs: dict, # Output of `record_inputs`
    half: torch.dtype, precision: str, # The half precision and its name
) -> list: # `LayerTiming`s
    "Time each distinct layer alternately in half precision and in fp32. Layers that can't run alone are left out."
    names, groups = {m: n for n, m in model.named_modules()}, defaultdict(list)
    for m, specs in inputs.items(): # skip layers that are called with different shapes
        if len(set(specs)) == 1: groups[layer_key(m, specs[0])].append(m)
    xs, runs = {}, defaultdict(list)
    for _ in range(WARM_UP + ROUNDS):  # all layers in each round, so that a burst of other work affects only one round
        for key, (m, *_) in groups.items():
            if runs[key] is None: continue
            try:
                if key not in xs:
                    shape, stride, dtype, requires_grad = key[1]
                    x = torch.empty_strided(shape, stride, dtype=dtype, device=m.weight.device)
                    xs[key] = x.normal_().requires_grad_(requires_grad)
                runs[key].append([layer_ms(m, xs[key], m.weight.device, half, in_fp32) for in_fp32 in (False, True)])
            except Exception: runs[key] = None
    def _timing(key, modules):
        half_ms, fp32_ms = map(fastest, zip(*runs[key][WARM_UP:]))
        kept, layers = 'fp32' if fp32_ms < MARGIN*half_ms else precision, tuple(names[m] for m in modules)
        return LayerTiming(layers, key[0].__name__, tuple(key[1][0]), precision, half_ms, fp32_ms=fp32_ms, kept=kept)
    return [_timing(key, modules) for key, modules in groups.items() if runs[key]]


def fp32_names(rows, precision) -> list:
    "Names of the layers to keep in fp32 with this half precision."
    return [n for r in rows if r.kept == 'fp32' and r.precision == precision for n in r.names]
