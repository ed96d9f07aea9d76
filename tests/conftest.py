"""What all tests share: the device they run on, and how hard hypothesis searches.

ATTN_OPS_TEST_DEVICE=cuda runs the suite on a GPU, and fails where there is none.
"""

import os
from collections.abc import Iterator

# Threads that wait spin by default: where other processes share the cores, small tensors then take
# thirty times as long. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
import torch._functorch.config as functorch_config

DEVICE = os.environ.get("ATTN_OPS_TEST_DEVICE", "cpu")

hypothesis.settings.register_profile(
    "attn_ops",
    deadline=None,  # the first call of a kernel compiles
    max_examples=int(os.environ.get("ATTN_OPS_TEST_EXAMPLES", "25")),
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("attn_ops")


def pytest_sessionstart(session: pytest.Session) -> None:
    if torch.device(DEVICE).type == "cuda" and not torch.cuda.is_available():
        pytest.exit(f"ATTN_OPS_TEST_DEVICE={DEVICE}, but torch sees no GPU here", returncode=1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Processes of a parallel run share a GPU: what one's allocator keeps, the others lack."""
    yield
    if DEVICE.startswith("cuda"):
        torch.cuda.empty_cache()


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    """Takes back what the commands of the benchmarks set for their process."""
    threads, donated = torch.get_num_threads(), functorch_config.donated_buffer
    yield
    torch.set_num_threads(threads)
    functorch_config.donated_buffer = donated


@pytest.fixture
def uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic mode fills what `torch.empty` returns with NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
