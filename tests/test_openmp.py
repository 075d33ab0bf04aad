"`end_waiting_threads`: PyTorch's OpenMP threads end, and operations give the same afterwards."
import os
import sys
import threading

import pytest
import torch

from channelslast.core.openmp import end_waiting_threads

pytest.importorskip('openvino', reason='threads end only before a runtime computes')


@pytest.fixture
def two_threads():
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)


@pytest.mark.skipif(not sys.platform.startswith('linux') or 'libgomp' not in open('/proc/self/maps').read(), reason='needs libgomp')
def test_end_waiting_threads_ends_openmp_threads_which_start_again_with_the_next_operation(two_threads):
    def _threads(): return len(os.listdir('/proc/self/task'))
    x = torch.randn(1_000_000)
    expected, started = x.sin(), _threads()
    for _ in range(3):
        end_waiting_threads()
        assert _threads() == started - 1 and torch.get_num_threads() == 2
        assert torch.equal(x.sin(), expected) and _threads() == started


def test_end_waiting_threads_in_several_threads_changes_no_result(two_threads):
    x, right = torch.randn(300_000), []
    expected = x.exp()
    def _work():
        for _ in range(50):
            right.append(torch.equal(x.exp(), expected))
            end_waiting_threads()
    threads = [threading.Thread(target=_work) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(right) == 150 and all(right)
