"`less_random`: runs repeat, and random states and cuDNN's flags are restored."
import random

import numpy as np
import pytest
import torch

from channelslast import less_random
from .helpers import learner, loaders


def draw(): return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_run_with_less_random_repeats_its_losses():
    def _losses():
        with less_random(3):
            learn = learner(dls=loaders(shuffle=True)).to_channelslast(to_fp16=False)
            learn.fit(2)
            return [float(o) for o in learn.recorder.losses]
    assert _losses() == _losses()


def test_less_random_seeds_python_numpy_and_PyTorch():
    with less_random(1): a = draw()
    with less_random(2): b = draw()
    with less_random(1): c = draw()
    assert a == c and all(x != y for x, y in zip(a, b))


@pytest.mark.parametrize('fails', [False, True])
def test_less_random_restores_states_and_flags_even_after_an_error(fails):
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    with less_random(0): expected = (draw(), draw())
    with less_random(0):
        first = draw()
        try:
            with less_random(7, deterministic=not flags[0], benchmark=not flags[1]):
                draw()
                assert (cudnn.deterministic, cudnn.benchmark) == (not flags[0], not flags[1])
                if fails: raise KeyboardInterrupt
        except KeyboardInterrupt: pass
        assert (first, draw()) == expected
    assert (cudnn.deterministic, cudnn.benchmark) == flags


def test_less_random_leaves_flags_that_are_not_given(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    with less_random(): assert torch.backends.cudnn.benchmark and torch.backends.cudnn.deterministic


@pytest.mark.cuda
def test_less_random_seeds_and_restores_every_CUDA_GPU():
    state = torch.cuda.get_rng_state_all()
    with less_random(5): a = torch.rand(1, device='cuda')
    with less_random(5): assert torch.equal(a, torch.rand(1, device='cuda'))
    assert all(torch.equal(a, b) for a, b in zip(state, torch.cuda.get_rng_state_all()))


def test_less_random_restores_the_state_of_an_apple_gpu(monkeypatch):
    state = [torch.tensor([1])]
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda: state[-1])
    monkeypatch.setattr(torch.mps, 'set_rng_state', state.append)
    with less_random(): state.append(torch.tensor([2]))  # a draw
    assert state[-1] is state[0]
