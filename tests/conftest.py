import pytest
import torch

try:
    from xdist.scheduler import LoadFileScheduling
except ImportError:
    LoadFileScheduling = object

# Folders that take minutes: where several processes share the files, these begin first.
LONGEST = ("aot", "interpret", "build", "examples")
# Of these any process may take any test; elsewhere a file is one process's, for what its tests share.
SPLIT = ("tests/aot/", "tests/interpret/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)
    if torch.cuda.is_available():
        return
    built = "with CUDA" if torch.version.cuda else "without CUDA"
    skip = pytest.mark.skip(
        reason=f"needs an NVIDIA GPU: torch {torch.__version__}, built {built}, sees none"
    )
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


class LongFilesSplit(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith(SPLIT) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return LongFilesSplit(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def m3_folder(tmp_path_factory) -> str:
    """BGE-M3's architecture and file layout at small size, random weights."""
    from benchmarks.models.checkpoints import SMALL, make_bge_m3

    return str(make_bge_m3(tmp_path_factory.mktemp("bge-m3"), SMALL))


@pytest.fixture(scope="session")
def reranker_folder(tmp_path_factory) -> str:
    """bge-reranker-v2-m3's architecture at small size, random weights."""
    from benchmarks.models.checkpoints import SMALL, make_reranker

    return str(make_reranker(tmp_path_factory.mktemp("bge-reranker"), SMALL))


@pytest.fixture(scope="session")
def e5_mistral_folder(tmp_path_factory) -> str:
    """E5-mistral's architecture and file layout at small size, random weights."""
    from benchmarks.models.checkpoints import E5_MISTRAL_SMALL, make_e5_mistral

    return str(make_e5_mistral(tmp_path_factory.mktemp("e5-mistral"), 3, E5_MISTRAL_SMALL))


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Tokens of every run through a decoder's layers."""
    from embedfuse.nn import decoder
    from embedfuse.nn.program import Program

    counts, run, run_program = [], decoder.decode_step, Program.run

    def counting(layers, norm, x, *args, **kwargs):
        counts.append(len(x))
        return run(layers, norm, x, *args, **kwargs)

    def counting_program(program, inputs, packed, *args):
        counts.append(packed.tokens)
        return run_program(program, inputs, packed, *args)

    monkeypatch.setattr(decoder, "decode_step", counting)
    monkeypatch.setattr(Program, "run", counting_program)
    return counts
