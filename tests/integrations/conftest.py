import pytest
import torch


@pytest.fixture
def one_thread():
    """Of tiny models and matrices: more threads wait for one another longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
