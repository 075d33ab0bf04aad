"fastai's `distrib_ctx` with two processes that communicate over gloo."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

here = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "The weights and facts that each process wrote, and all that they printed."
    folder = tmp_path_factory.mktemp('two')
    path = os.pathsep.join([str(here.parent), os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    out = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(here/'two_processes.py'), str(folder)],
                         capture_output=True, text=True, env=env, timeout=500)
    assert out.returncode == 0, out.stderr[-3000:]
    ranks = [torch.load(folder/f'{r}.pt') for r in (0, 1)], [json.loads((folder/f'{r}.json').read_text()) for r in (0, 1)]
    return *ranks, out.stdout + out.stderr


def test_both_processes_end_with_the_same_weights(two):
    weights, facts, _ = two
    assert [f['world'] for f in facts] == [2, 2] and all(f['last'] for f in facts)
    for name in weights[0]:
        for a, b in zip(weights[0][name], weights[1][name]): assert torch.equal(a, b), name


@pytest.mark.parametrize('how', ['last', 'inside', 'callback'])
def test_weights_are_those_of_the_contiguous_run(two, how):
    for a, b in zip(two[0][0][how], two[0][0]['contiguous']): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_match_the_buckets_of_DistributedDataParallel(two):
    "If the format changes after DDP has wrapped the model, PyTorch warns and copies each gradient."
    assert 'bucket' not in two[2]


def test_to_fastest_chooses_the_same_in_both_processes(two):
    "Although the second process measured the opposite."
    _, (first, second), _ = two
    assert first['best'] == second['best'] == ['contiguous', 1.0] and first['cbs'] == second['cbs']


def test_format_find_of_predictions_measures_and_chooses_the_same_in_both_processes(two):
    "Also which candidates to fold, since steps of each candidate communicate."
    _, (first, second), _ = two
    assert first['predictions'] == second['predictions'] == 'contiguous'
    assert first['settings'] == second['settings'] and 'contiguous, fp32, folded' in first['settings']


def test_to_fastest_before_the_processes_know_each_other_is_refused(two):
    for facts in two[1]: assert 'distrib_ctx' in facts['refused']


def test_fp32_layers_stay_in_fp32_inside_DistributedDataParallel(two):
    for facts in two[1]: assert facts['dtypes'] == {'0.0': 'torch.float32', '1.0': 'torch.bfloat16'}


FINE = ['fp32', '', True]
DIFFER = 'numbers differ from contiguous fp32'


@pytest.mark.parametrize('name, rows', [
    ('memory', [FINE, ['fp32', 'out of memory', False]]), ('comparison', [FINE, ['fp32', 'out of memory', False]]),
    ('predictions', [FINE, ['fp32', 'out of memory', False]]),
    ('infinite', [FINE, ['fp32', 'loss is not finite', False]]), ('numbers', [FINE, ['fp32', DIFFER, False]]),
    ('other_predictions', [FINE, ['fp32', DIFFER, False]]), ('halves', [FINE, FINE])])
def test_what_goes_wrong_in_one_process_is_known_to_both(two, name, rows):
    "When one process ran out of memory, only this one dropped the candidate, and the other one waited."
    first, second = (facts['alone'][name] for facts in two[1])
    assert first == second
    for found, (_, note, valid) in zip(first[0], rows):
        assert found[2] == valid and found[1].startswith(note) and bool(found[1]) == bool(note)
    assert ('Measured on 2 of the 4 items' in first[1][0]) == (name == 'halves')


def test_format_find_keeps_the_same_layers_in_fp32_in_both_processes(two):
    "Each process chose by its own times: TypeError, or a hang."
    first, second = (facts['alone']['layers'][0] for facts in two[1])
    assert first == second and [r[0] for r in first].count('bf16+fp32') == 1


def test_an_error_in_one_process_is_raised_in_both(two):
    first, second = (facts['alone']['error'] for facts in two[1])
    assert first == "RuntimeError: Process 1 of 2: KeyError: 'mine'" and second == "KeyError: 'mine'"


def test_two_different_errors_are_raised_each_in_its_process(two):
    "The process without memory tried half a batch and waited for the other one."
    assert [facts['alone']['two_errors'] for facts in two[1]] == ["KeyError: 'mine'", 'OutOfMemoryError: out of memory']


def test_a_step_skipped_in_one_process_is_taken_again_in_both(two):
    first, second = (facts['alone']['skips'] for facts in two[1])
    assert first == second and [r[::2] for r in first[0]] == [['fp32', True], ['fp16', True]]
