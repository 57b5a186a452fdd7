"""The operators under ``torch.compile`` on the card: no graph break, no recompile by length, the eager result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import gka_ops
from gka_ops.triton import slabs
from tests.helpers.problems import Problem, make_problem, norm_error

pytestmark = pytest.mark.gpu


def gka(p: Problem) -> torch.Tensor:
    return gka_ops.chunk_gka(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta, qk_l2norm=True).output


def solve(p: Problem) -> torch.Tensor:
    return gka_ops.chunk_solve(p.q, p.k, p.log_decay, p.beta, qk_l2norm=True).x


def gradients(function, p: Problem) -> tuple[torch.Tensor, list[torch.Tensor]]:
    p = p.requiring_grad()
    output = function(p.q, p.k, p.v, p.log_decay, p.alpha, p.beta)
    used = [t for n, t in p.leaves().items() if function.reads_all or n not in ("v", "alpha")]
    return output.detach(), list(torch.autograd.grad(output.float().square().sum(), used))


@pytest.fixture(params=[None, 4], ids=["one slab", "one slab or several"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whether backwards of more than 4 chunks are cut into slabs (docs/adr/0007)."""
    from gka_ops.triton import launcher

    if request.param is not None:
        monkeypatch.setattr(slabs, "PROGRAMS", 1)
        monkeypatch.setattr(slabs, "LEAST_CHUNKS", request.param)
    launcher.forget()
    with torch._inductor.config.patch(force_disable_caches=True):  # a cached graph has the sizes of another cut
        yield
    launcher.forget()


@pytest.mark.supports("torch.compile(fullgraph=True)")
@pytest.mark.supports("one graph for every T and B")
@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("which", ["gka", "solve"])
def test_compiled_equals_eager_for_every_length(which: str) -> None:
    def plain(q, k, v, log_decay, alpha, beta):
        p = Problem(q, k, v, log_decay, alpha, beta)
        return 2 * (gka(p) if which == "gka" else solve(p))

    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, dynamic=True)
    plain.reads_all = compiled.reads_all = which == "gka"
    for i, T in enumerate((128, 200, 65, 1000)):
        p = make_problem(B=2, T=T, H=4, Hkv=2, D=64, dtype=torch.bfloat16, device="cuda", qk_l2norm=True, seed=T)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            output, grads = gradients(compiled, p)
        expected, expected_grads = gradients(plain, p)
        assert torch.equal(output, expected)
        # The same kernels run; only the pointwise work around them may round differently under Inductor.
        for actual, reference in zip(grads, expected_grads, strict=True):
            assert norm_error(actual, reference) <= 2 * torch.finfo(torch.bfloat16).eps
