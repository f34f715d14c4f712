import pytest
import torch


@pytest.fixture
def one_thread():
    """For tiny models and matrices, where more threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
