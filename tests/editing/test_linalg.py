"""The solves are what their formulas say, in float64 to rounding, and refuse what has no answer."""

from __future__ import annotations

import pytest
import torch
from cases import delta

from pmet_lens.editing import solvers
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge, SolveError, preserved

torch.set_num_threads(1)
D_IN, D_MODEL = 24, 7
TIGHT = 1e-12


def problem(n: int = 5, seed: int = 0):
    """A well-conditioned second moment, `n` random keys and their residuals."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(4 * D_IN, D_IN, generator=generator, dtype=torch.float64)
    keys = torch.randn(n, D_IN, generator=generator, dtype=torch.float64)
    residuals = torch.randn(n, D_MODEL, generator=generator, dtype=torch.float64)
    return text.T @ text / len(text), keys, residuals


def solve(solver, C, K, R, weight: float = 3.0):
    return delta(solver.factorise(C, weight), K, R)


def off(got, want) -> float:
    """The largest difference, relative to the largest entry."""
    return float((got - want).abs().max() / want.abs().max())


def thin(C, directions: int):
    """C with all but its `directions` largest eigenvalues made tiny, and the two sets of
    eigenvectors (used, free)."""
    values, vectors = torch.linalg.eigh(C)
    values[:-directions] = 1e-5
    return vectors * values @ vectors.T, vectors[:, -directions:], vectors[:, :-directions]


SOLVERS = [Ridge(), Exact(), NullSpace(threshold=0.5, l2=2.0)]


# -- Ridge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 5, D_IN, 2 * D_IN])
def test_primal_and_dual_are_one_solution(n):
    C, K, R = problem(n)
    factor = Ridge().factorise(C, 3.0)
    primal, dual = (left @ right for left, right in (factor.primal(K, R), factor.dual(K, R)))
    assert off(primal, dual) < TIGHT
    assert off(delta(factor, K, R), primal) < TIGHT
    assert off(solve(Ridge(), C, K, R, 3.1), primal) > 1e-4


@pytest.mark.parametrize("n", [1, 5, 2 * D_IN])
def test_ridge_is_where_the_objective_is_flat(n):
    """λ·tr(ΔᵀCΔ) + ‖KΔ − R‖² has no gradient there, and one everywhere else."""
    C, K, R = problem(n)

    def gradient(value):
        value = value.clone().requires_grad_()
        loss = 3.0 * (value * (C @ value)).sum() + (K @ value - R).square().sum()
        return torch.autograd.grad(loss, value)[0].abs().max()

    best = solve(Ridge(), C, K, R)
    at_rest = gradient(torch.zeros_like(best))
    assert gradient(best) < TIGHT * at_rest
    assert gradient(1.001 * best) > 1e-5 * at_rest


def test_a_weight_of_its_own_wins():
    C, K, R = problem()
    own = Ridge(weight=11.0)
    assert torch.equal(solve(own, C, K, R, 3.0), solve(Ridge(), C, K, R, 11.0))
    assert not torch.allclose(solve(own, C, K, R, 3.0), solve(Ridge(), C, K, R, 3.0))


def test_only_the_product_of_weight_and_moment_counts():
    C, K, R = problem()
    assert off(solve(Ridge(), 4 * C, K, R, 3.0), solve(Ridge(), C, K, R, 12.0)) < TIGHT


def test_the_heavier_the_past_the_smaller_the_change():
    C, K, R = problem()
    sizes = [solve(Ridge(), C, K, R, weight).norm() for weight in (0.1, 1.0, 10.0, 1e3, 1e6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-3 * sizes[0]


# -- Exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, D_IN])
def test_exact_gives_every_key_its_residual(n):
    C, K, R = problem(n)
    assert off(K @ solve(Exact(), C, K, R), R) < TIGHT
    assert off(K @ solve(Ridge(), C, K, R), R) > 1e-2


def test_exact_is_the_smallest_change_that_does():
    """A step that no key of the facts sees only raises the C-norm (and is C-orthogonal to Δ)."""
    C, K, R = problem()
    best = solve(Exact(), C, K, R)

    def size(value):
        return float((value * (C @ value)).sum())

    generator = torch.Generator().manual_seed(1)
    _, _, basis = torch.linalg.svd(K, full_matrices=True)
    for _ in range(20):
        inside = torch.randn(D_IN - len(K), D_MODEL, generator=generator, dtype=torch.float64)
        step = basis[len(K) :].T @ inside
        assert off(K @ (best + step), R) < TIGHT
        assert size(best + step) == pytest.approx(size(best) + size(step), rel=1e-11)
    assert size(0.9 * best) < size(best)  # smaller, but the keys no longer get their residuals


def test_one_fact_is_rome():
    """Δ = C⁻¹k (v − kW)ᵀ / (kᵀC⁻¹k), arXiv 2202.05262, eq. 2."""
    C, K, _ = problem(1)
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(D_IN, D_MODEL, generator=generator, dtype=torch.float64)
    wanted = torch.randn(D_MODEL, generator=generator, dtype=torch.float64)
    k = K[0]
    u = torch.linalg.solve(C, k)
    rome = torch.outer(u, wanted - k @ W) / (u @ k)
    ours = solve(Exact(), C, K, (wanted - k @ W)[None])
    assert off(ours, rome) < TIGHT
    assert off(k @ (W + ours), wanted) < TIGHT
    assert off(k @ W, wanted) > 1e-2


def test_ridge_goes_to_exact_as_its_weight_goes_to_zero():
    """At the rate of λ itself."""
    C, K, R = problem()
    exact = solve(Exact(), C, K, R)
    for form in ("dual", "primal"):
        errors = []
        for weight in (1e-1, 1e-2, 1e-3, 1e-4):
            left, right = getattr(Ridge(weight).factorise(C), form)(K, R)
            errors.append(off(left @ right, exact))
        assert errors == pytest.approx([errors[0] / 10**i for i in range(4)], rel=0.1), form
    left, right = Ridge(1e-14).factorise(C).dual(K, R)
    assert off(left @ right, exact) < TIGHT


# -- NullSpace ------------------------------------------------------------------------------------


def test_null_space_leaves_the_used_directions_alone():
    C, used, free = thin(problem()[0], 10)
    _, K, R = problem()
    found = solve(NullSpace(threshold=1e-3, l2=2.0), C, K, R)
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(50, 10, generator=generator, dtype=torch.float64) @ used.T
    assert (old @ found).abs().max() < TIGHT * found.abs().max()
    assert off(free @ (free.T @ found), found) < TIGHT
    ridge = solve(Ridge(), C, K, R)
    assert (old @ ridge).abs().max() > 1e-6 * ridge.abs().max()  # which only weighs them
    assert (K @ found).abs().max() > 1e-2


def test_null_space_is_the_published_formula():
    """Δ = (P KᵀK + l2·I)⁻¹ P KᵀR with P the projection (arXiv 2410.02355, eq. 12, transposed)."""
    C, _, free = thin(problem()[0], 10)
    _, K, R = problem()
    P = free @ free.T
    eye = torch.eye(D_IN, dtype=torch.float64)
    published = torch.linalg.solve(P @ K.T @ K + 2.0 * eye, P @ K.T @ R)
    assert off(solve(NullSpace(1e-3, 2.0), C, K, R), published) < TIGHT
    assert off(solve(NullSpace(1e-3, 3.0), C, K, R), published) > 1e-3


def test_the_null_space_is_what_lies_below_the_threshold():
    sizes = torch.arange(1, D_IN + 1, dtype=torch.float64) / 10
    _, K, R = problem()
    for threshold, free in ((0.25, 2), (0.5, 4), (0.51, 5)):
        found = solve(NullSpace(threshold, 2.0), sizes.diag(), K, R)
        assert int((found.abs().amax(dim=1) > 1e-9).sum()) == free


def test_null_space_of_everything_is_plain_ridge():
    C, K, R = problem()
    eye = torch.eye(D_IN, dtype=torch.float64)
    every = solve(NullSpace(threshold=1e9, l2=2.0), C, K, R)
    assert off(every, solve(Ridge(2.0), eye, K, R)) < TIGHT


# -- what all of them share -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_rank_is_at_most_the_number_of_facts(solver):
    C, K, R = problem(4)
    left, right = solver.factorise(C, 3.0).factors(K, R)
    assert (left.shape, right.shape) == ((D_IN, 4), (4, D_MODEL))
    assert torch.linalg.matrix_rank(left @ right) == 4
    R[3] = R[0] - 2 * R[1]  # one wish follows from two others
    assert torch.linalg.matrix_rank(solve(solver, C, K, R)) == 3


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_change_is_linear_in_the_residuals(solver):
    C, K, R = problem()
    _, _, other = problem(seed=5)
    parts = 2 * solve(solver, C, K, R) - 3 * solve(solver, C, K, other)
    assert off(solve(solver, C, K, 2 * R - 3 * other), parts) < 1e-11
    assert torch.equal(solve(solver, C, K, 0 * R), torch.zeros(D_IN, D_MODEL, dtype=torch.float64))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_neither_order_of_facts_nor_basis_of_keys_matters(solver):
    C, K, R = problem()
    found = solve(solver, C, K, R)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert off(solve(solver, C, K[order], R[order]), found) < 1e-11
    assert off(solve(solver, C, K[order], R), found) > 1e-2
    Q, _ = torch.linalg.qr(problem(D_IN, seed=4)[1])
    assert off(Q @ solve(solver, Q.T @ C @ Q, K @ Q, R), found) < 1e-11


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_kept_factor_serves_other_facts(solver):
    C, K, R = problem()
    _, other, wishes = problem(3, seed=7)
    kept = solver.factorise(C, 3.0)
    first = delta(kept, K, R)
    assert torch.equal(delta(kept, other, wishes), solve(solver, C, other, wishes))
    assert torch.equal(delta(kept, K, R), first)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_single_precision_in_double_precision_out(solver):
    """Rounded inputs are taken as exact: nothing is lost on the way."""
    C, K, R = (t.float() for t in problem())
    found = solve(solver, C, K, R)
    assert found.dtype == torch.float64
    assert torch.equal(found, solve(solver, C.double(), K.double(), R.double()))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_inputs_are_left_alone(solver):
    C, K, R = problem()
    before = [t.clone() for t in (C, K, R)]
    solve(solver, C, K, R)
    solve(solver, preserved(C, K, 3.0), K, R)
    assert all(torch.equal(a, b) for a, b in zip((C, K, R), before, strict=True))


# -- earlier edits --------------------------------------------------------------------------------


def test_preserved_adds_the_earlier_keys():
    """λ·preserved(C) = λC + K_pᵀK_p, so ridge protects them like facts whose residual is zero."""
    C, K, R = problem()
    _, earlier, _ = problem(4, seed=9)
    kept = preserved(C, earlier, 3.0)
    assert off(3.0 * kept.matrix(), 3.0 * C + earlier.T @ earlier) < TIGHT
    both = torch.cat([K, earlier])
    wishes = torch.cat([R, torch.zeros(4, D_MODEL, dtype=torch.float64)])
    protected = solve(Ridge(), kept, K, R)
    assert off(protected, solve(Ridge(), C, both, wishes)) < TIGHT
    moved = solve(Ridge(), C, K, R)
    assert (earlier @ protected).norm() < 0.9 * (earlier @ moved).norm()


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_ridge_without_a_weight_is_refused(weight):
    C, _, _ = problem()
    with pytest.raises(SolveError, match=r"must be positive.*Exact\(\)"):
        Ridge(weight).factorise(C)


@pytest.mark.parametrize("seed", range(8))
def test_a_second_moment_of_too_little_text_is_refused(seed):
    """Rank 20 of 24; rounding may leave the missing pivots on either side of zero."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(D_IN - 4, D_IN, generator=generator, dtype=torch.float64)
    _, K, R = problem()
    with pytest.raises(SolveError, match=r"C is not positive definite.*more tokens"):
        solve(Exact(), text.T @ text, K, R)
    with pytest.raises(SolveError, match=r"C is not positive definite.*more tokens"):
        Ridge().factorise(text.T @ text).dual(K, R)
    with pytest.raises(SolveError, match=r"λC \+ KᵀK is not positive definite"):
        Ridge().factorise(text.T @ text).primal(K[:1], R[:1])


def test_nan_is_refused():
    C, K, R = problem()
    C[2, 2] = float("nan")
    for solver in (Exact(), Ridge()):
        with pytest.raises(SolveError, match="check it for NaN"):
            solve(solver, C, K, R)


def test_more_facts_than_dimensions_cannot_be_exact():
    C, K, R = problem(D_IN + 1)
    with pytest.raises(SolveError, match=r"25 facts cannot .* 24 dimensions.*Ridge\(\)"):
        solve(Exact(), C, K, R)
    assert solve(Ridge(), C, K, R).isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_facts_with_one_key_cannot_be_exact(seed):
    C, K, R = problem(seed=seed)
    K[4] = K[1]
    with pytest.raises(SolveError, match=r"Two facts have the same key.*Ridge\(\)"):
        solve(Exact(), C, K, R)
    assert solve(Ridge(), C, K, R).isfinite().all()


def test_a_second_moment_that_uses_every_direction_leaves_no_null_space():
    C, _, _ = problem()
    with pytest.raises(SolveError, match=r"No eigenvalue .* below 1e-09.*raise the threshold"):
        NullSpace(threshold=1e-9).factorise(C)


# -- counting -------------------------------------------------------------------------------------


def test_half_the_products_give_the_whole_matrix():
    generator = torch.Generator().manual_seed(5)
    for d in (3, 300, 700):
        total = torch.zeros(d, d, dtype=torch.float64)
        keys = torch.randn(2, 40, d, generator=generator, dtype=torch.float64)
        for own in keys:
            solvers.add_gram(total, own)
        flat = keys.reshape(-1, d)
        assert off(solvers.mirrored(total), flat.T @ flat) < TIGHT
        if d == 700:
            assert not total[300:, :256].any()  # blocks below the diagonal were left out


def test_the_form_with_fewer_operations_is_taken(monkeypatch):
    """Few facts: triangular solves with the kept factor; more than dimensions: the primal form."""
    taken = []
    for form in ("primal", "dual"):
        real = getattr(solvers.RidgeFactor, form)

        def spy(self, keys, residuals, form=form, real=real):
            taken.append(form)
            return real(self, keys, residuals)

        monkeypatch.setattr(solvers.RidgeFactor, form, spy)
    for n in (1, D_IN // 2, 2 * D_IN):
        C, K, R = problem(n)
        factor = Ridge().factorise(C, 0.5)
        left, right = factor.factors(K, R)
        wanted = torch.linalg.solve(0.5 * C + K.T @ K, K.T @ R)
        assert off(left @ right, wanted) < 1e-8
    assert taken == ["dual", "dual", "primal"]
    few, kept = solvers.operations(10, 3072, kept=False), solvers.operations(10, 3072)
    assert few["primal"] == kept["primal"] > few["dual"] > 20 * kept["dual"]


def test_the_factor_is_computed_once(monkeypatch):
    C, K, R = problem()
    calls = []
    real = solvers.cholesky

    def counted(matrix, *what):
        if not what:  # of the second moment itself
            calls.append(1)
        return real(matrix, *what)

    monkeypatch.setattr(solvers, "cholesky", counted)
    moment = solvers.Dense(C)
    for solver in (Ridge(), Exact(), Ridge()):
        delta(solver.factorise(moment, 2.0), K[:3], R[:3])
    assert len(calls) == 1
