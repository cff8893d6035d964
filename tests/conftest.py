"""Fixtures that every test may use: the shared files, a fixed random state, and small cases with their oracle."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import paper
import pytest
import tiny
import torch
from cases import Case, make_case
from hypothesis import HealthCheck, settings
from torch import Tensor

from spherelm.report import sphere_map

ROOT = Path(__file__).resolve().parents[1]

# Both health checks depend on how busy the machine is, or on which modules happen to be imported, and say nothing of
# the code.
UNHEEDED = [HealthCheck.too_slow, HealthCheck.filter_too_much]
settings.register_profile(
    "spherelm", deadline=None, derandomize=True, max_examples=40, database=None, suppress_health_check=UNHEEDED
)
settings.load_profile("spherelm")

# A script that puts the tests into the background has them ignore Ctrl-C, and with them every process that they start
# and stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that tests start fail on warnings as tests do, but for deprecations, of which other libraries have many on
# import.
os.environ["PYTHONWARNINGS"] = ",".join(f"error::{kind}" for kind in ("UserWarning", "FutureWarning", "RuntimeWarning"))

# The tensors here are tiny: a second thread costs more than it brings, fifty times as much beside other tests, since it
# waits spinning. The variable is for processes that tests start, and for commands that share the cores among runs.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that none is left to one process at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def map_iterations() -> Iterator[int]:
    """Every walk on the sphere is rough, which saves seconds a page; how many iterations users get."""
    whole = sphere_map.ITERATIONS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sphere_map, "ITERATIONS", 20)
        yield whole


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference files beside the repository; without it the test is skipped."""
    path = ROOT.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip(f"the reference files are not here: no folder {path / 'golden'}")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data directory; read only, a test that damages it takes a copy."""
    return tiny.make_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> commands.Command:
    """The command line, called in this process."""
    return commands.make_command(monkeypatch, capsys)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`without(library)`: importing it fails, as where it is not installed,
    though parts of it may be imported already.
    """

    def without(library: str) -> None:
        real = builtins.__import__

        def refuse(name: str, *rest: Any, **options: Any) -> Any:
            if name.split(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return real(name, *rest, **options)

        monkeypatch.setattr(builtins, "__import__", refuse)

    return without


@pytest.fixture
def case() -> Callable[..., Case]:
    """`case(arm, **config_fields)`: see `cases.make_case`."""
    return make_case


def wrong_rope(x: Tensor, base: float) -> Tensor:
    """Pairs neighbouring channels instead of i and i + d_k/2."""
    order = torch.arange(x.shape[-1]).reshape(-1, 2).T.reshape(-1)
    return right_rope(x[..., order], base)[..., torch.argsort(order)]


def wrong_gpt_decay(name: str) -> float:
    """Decays the gains too."""
    return 0.1


def wrong_axes() -> dict[str, int]:
    """Rows where columns are unit, and the reverse."""
    return {name: 1 - axis for name, axis in paper.UNIT_AXIS.items()}


def wrong_one_axis() -> dict[str, int]:
    return {**paper.UNIT_AXIS, "mlp.o.weight": 1}


def wrong_gate(p: paper.Params, prefix: str, shape: paper.Shape, h: Tensor) -> Tensor:
    """SiLU on u instead of v."""
    other = {"u.weight": "v.weight", "v.weight": "u.weight", "s_u.value": "s_v.value", "s_v.value": "s_u.value"}
    return right_mlp({**p, **{prefix + to: p[prefix + name] for name, to in other.items()}}, prefix, shape, h)


right_rope, right_mlp = paper.rope, paper.mlp
Mutation = tuple[str, str, Callable[..., Any] | dict[str, int]]

MUTATIONS: dict[str, Mutation] = {
    "rope pairing": ("ngpt", "rope", wrong_rope),
    "rope pairing in gpt": ("gpt", "rope", wrong_rope),
    "no abs on alpha": ("ngpt", "eigen_rate", lambda p, name, s: paper.effective(p[name], s.alpha, s.d_model)),
    "s_qk on q only": ("ngpt", "scale_q_k", lambda q, k, s_qk: (paper.norm(q) * s_qk, paper.norm(k))),
    "no norm on q and k": ("ngpt", "scale_q_k", lambda q, k, s_qk: (q * s_qk, k * s_qk)),
    "softmax scale": ("ngpt", "softmax_scale", lambda d_k: d_k**-0.5),
    "softmax scale of gpt": ("gpt", "gpt_softmax_scale", lambda d_k: d_k**0.5),
    "no sqrt(d_model) on v": ("ngpt", "v_scale", lambda d_model: 1.0),
    "scales stored as used": ("ngpt", "effective", lambda stored, init_scale, d_model: stored),
    "step not normalized": ("ngpt", "step", lambda h, target, alpha: h + alpha * (target - h)),
    "step along the tangent": ("ngpt", "step", lambda h, target, alpha: paper.riemannian_step(h, target, alpha)),
    "unit axes swapped": ("ngpt", "UNIT_AXIS", wrong_axes()),
    "one unit axis swapped": ("ngpt", "UNIT_AXIS", wrong_one_axis()),
    "no retraction": ("ngpt", "retract", lambda p: p),
    "u gates v": ("ngpt", "mlp", wrong_gate),
    "gate without SiLU": ("gpt", "silu", lambda x: x),
    "decay on gains": ("gpt", "gpt_decay", wrong_gpt_decay),
    "no clipping": ("gpt", "clip", lambda gradients, limit, eps=0.0: gradients),
    "attention sees the future": ("gpt", "causal_softmax", lambda scores: torch.softmax(scores, -1)),
}


@pytest.fixture(params=sorted(MUTATIONS))
def mutated_arm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts one mistake into the oracle, and says which arm it concerns."""
    arm, name, replacement = MUTATIONS[request.param]
    monkeypatch.setattr(paper, name, replacement)
    return arm


def assert_agree(ours: Tensor, oracle: Tensor, leaves: list[Tensor]) -> None:
    """Both results, and their gradients with respect to ``leaves`` along a random direction,
    to 1e-12 of the largest.
    """
    assert ours.shape == oracle.shape
    direction = torch.randn_like(oracle)
    pairs = [(ours, oracle)]
    gradients = (torch.autograd.grad(result, leaves, direction, retain_graph=True) for result in (ours, oracle))
    pairs += zip(*gradients, strict=True)
    for one, other in pairs:
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


@pytest.fixture
def agree() -> Callable[[Tensor, Tensor, list[Tensor]], None]:
    """``agree(ours, oracle, leaves)``: see ``assert_agree``."""
    return assert_agree
