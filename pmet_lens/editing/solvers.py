"""Keys, residuals and a second moment in, weight delta out. No model, no files.

Row convention: a projection maps `value = key @ W`, so `W` and every delta are `[d_in, d_model]`,
keys `K` are `[fact, d_in]`, residuals `R` are `[fact, d_model]` and the second moment
`C = E[k kᵀ]` is `[d_in, d_in]`.

All solvers minimise how much the answers to *other* keys change while the facts' keys get their
residuals; they differ in how strictly the second is required. `factorise` does the part that
depends on `C` alone and can be kept, `factors` the part that depends on the facts. Δ is linear in
R, so it comes as two thin factors: its rank is at most the number of facts.

Everything is computed in float64: with λ = 30 a float32 inverse is off by 2.5e-4, with λ = 0.01
by 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Keys = Float[Tensor, "fact d_in"]
Residuals = Float[Tensor, "fact d_model"]
Square = Float[Tensor, "d_in d_in"]
Thin = tuple[Float[Tensor, "d_in fact"], Float[Tensor, "fact d_model"]]

_MORE_TEXT = (
    "Take the second moment over more tokens than its size (ten times as many is a good start), "
    "or check it for NaN."
)


class SolveError(ValueError):
    """A system that has no unique solution; the message says what to relax."""


@runtime_checkable
class Factor(Protocol):
    """A second moment made ready for solving."""

    def factors(self, keys: Keys, residuals: Residuals) -> Thin:
        """The weight change for these facts as thin float64 factors: Δ = left @ right."""
        ...


@runtime_checkable
class SecondMoment(Protocol):
    """A second moment that may lie on disk: what a solver asks for is read when it is needed."""

    def matrix(self, device: torch.device | None = None) -> Square:
        """C itself, on `device` (None: where it is)."""
        ...

    def cholesky(self, device: torch.device | None = None) -> Square:
        """Its lower Cholesky factor, float64, likewise; computed on that device, and kept, so that
        only the first edit pays for it."""
        ...


@runtime_checkable
class Solver(Protocol):
    """How the facts are weighed against everything else the projection stores."""

    def factorise(
        self, moment: Square | SecondMoment, weight: float = 1.0, earlier: Keys | None = None
    ) -> Factor:
        """Prepare `moment`; `weight` is λ. `earlier` are keys of facts edited before, whose answers
        are to survive: KₚᵀKₚ joins λC (sequential editing)."""
        ...


@dataclass(frozen=True)
class Ridge:
    """Δ = (λC + KᵀK)⁻¹ KᵀR: least squares with the old memories as a penalty (MEMIT, PMET).

    `weight` fixes λ; `None` takes the λ of the hyper-parameters. Source: MEMIT (arXiv 2210.07229)
    eq. 14; PMET (arXiv 2308.08742) keeps it.
    """

    weight: float | None = None

    def factorise(
        self, moment: Square | SecondMoment, weight: float = 1.0, earlier: Keys | None = None
    ) -> RidgeFactor:
        """See `Solver.factorise`."""
        weight = self.weight if self.weight is not None else weight
        return RidgeFactor(preserved(moment, earlier, weight), weight)


class RidgeFactor:
    """Solves in the cheaper of two equal forms (`operations`): primal, which factorises `λC + KᵀK`
    for every new set of facts, or dual (Woodbury), with the factor of `C`, computed once and kept.
    """

    def __init__(self, moment: SecondMoment, weight: float) -> None:
        if not weight > 0:
            raise SolveError(
                f"second_moment_weight (λ) must be positive, not {weight}; the limit λ → 0 is the "
                "solver Exact()."
            )
        self.moment, self.weight = moment, weight

    def factors(self, keys: Keys, residuals: Residuals) -> Thin:
        """The weight change, by the form with fewer operations."""
        cost = operations(len(keys), keys.shape[1])
        solve = self.dual if cost["dual"] < cost["primal"] else self.primal
        return solve(keys, residuals)

    def primal(self, keys: Keys, residuals: Residuals) -> Thin:
        """(λC + KᵀK)⁻¹ Kᵀ, R."""
        keys, residuals = keys.double(), residuals.double()
        system = self.weight * self.moment.matrix(keys.device).double() + keys.T @ keys
        cure = f"{_MORE_TEXT} A larger second_moment_weight (λ) helps where C itself is sound."
        return torch.cholesky_solve(keys.T, cholesky(system, "λC + KᵀK", cure)), residuals

    def dual(self, keys: Keys, residuals: Residuals) -> Thin:
        """C⁻¹Kᵀ, (λI + K C⁻¹ Kᵀ)⁻¹ R."""
        factor = self.moment.cholesky(keys.device)
        return _dual(factor, keys, residuals, self.weight, "λI + K C⁻¹ Kᵀ", _MORE_TEXT)


@dataclass(frozen=True)
class Exact:
    """Δ = C⁻¹Kᵀ (K C⁻¹ Kᵀ)⁻¹ R: every key gets its residual exactly, the limit λ → 0.

    One fact: ROME (arXiv 2202.05262, eq. 2); many: EMMET (arXiv 2403.14236). Needs linearly
    independent keys, so at most d_in facts.
    """

    def factorise(
        self, moment: Square | SecondMoment, weight: float = 1.0, earlier: Keys | None = None
    ) -> ExactFactor:
        """See `Solver.factorise`; `weight` only scales what `earlier` adds."""
        return ExactFactor(preserved(moment, earlier, weight).cholesky())


@dataclass(frozen=True, eq=False)
class ExactFactor:
    """Holds the lower Cholesky factor of the second moment."""

    cholesky: Square

    def factors(self, keys: Keys, residuals: Residuals) -> Thin:
        """The smallest change, measured by C, with `keys @ delta == residuals`."""
        if keys.shape[0] > keys.shape[1]:
            raise SolveError(
                f"{keys.shape[0]} facts cannot be stored exactly in {keys.shape[1]} dimensions; "
                "use Ridge() or fewer facts."
            )
        cure = "Two facts have the same key, or one that follows from others: use Ridge()."
        return _dual(self.cholesky.to(keys.device), keys, residuals, 0.0, "K C⁻¹ Kᵀ", cure)


@dataclass(frozen=True)
class NullSpace:
    """Ridge with identity weight in the directions that old keys hardly use (AlphaEdit).

    Eigenvectors of `C` with an eigenvalue below `threshold` span the coordinates in which the
    change may live; `l2` is the weight of the identity there. Source: AlphaEdit (arXiv 2410.02355,
    eq. 12). `None` takes the value of the hyper-parameters (in an edit; both depend on the size of
    the model's keys) or the released one (2e-2, 10).
    """

    threshold: float | None = None
    l2: float | None = None

    def factorise(
        self, moment: Square | SecondMoment, weight: float = 1.0, earlier: Keys | None = None
    ) -> NullSpaceFactor:
        """See `Solver.factorise`; `weight` is not used."""
        threshold = 0.02 if self.threshold is None else self.threshold
        l2 = 10.0 if self.l2 is None else self.l2
        values, vectors = torch.linalg.eigh(preserved(moment, None, 1.0).matrix().double())
        basis = vectors[:, values < threshold]
        if basis.shape[1] == 0:
            raise SolveError(
                f"No eigenvalue of the second moment lies below {threshold} (the smallest is "
                f"{float(values[0]):.3g}); raise the threshold of NullSpace."
            )
        inside = None if earlier is None else earlier.double() @ basis
        identity = torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
        return NullSpaceFactor(basis, RidgeFactor(preserved(identity, inside, l2), l2))


@dataclass(frozen=True, eq=False)
class NullSpaceFactor:
    """Ridge in the directions that may change."""

    basis: Float[Tensor, "d_in free"]
    ridge: RidgeFactor

    def factors(self, keys: Keys, residuals: Residuals) -> Thin:
        """Ridge in the coordinates of the basis, mapped back."""
        left, right = self.ridge.factors(keys.double() @ self.basis, residuals)
        return self.basis @ left, right

    def weighted(self, l2: float) -> NullSpaceFactor:
        """The same directions with another weight of the identity."""
        return NullSpaceFactor(self.basis, RidgeFactor(self.ridge.moment, l2))


def _dual(
    factor: Square, keys: Keys, residuals: Residuals, weight: float, what: str, cure: str
) -> Thin:
    """C⁻¹Kᵀ, (λI + K C⁻¹ Kᵀ)⁻¹ R with `weight` λ, from the lower Cholesky `factor` of C."""
    keys, residuals = keys.double(), residuals.double()
    # Not `cholesky_solve`, which copies the factor in every call: longer than a few facts' solve.
    inner = torch.linalg.solve_triangular(factor, keys.T, upper=False)
    whitened = torch.linalg.solve_triangular(factor.mT, inner, upper=True)
    gram = keys @ whitened
    gram.diagonal().add_(weight)
    return whitened, torch.cholesky_solve(residuals, cholesky(gram, what, cure))


def operations(facts: int, d_in: int, kept: bool = True) -> dict[str, float]:
    """Floating-point operations of the two equal forms of the ridge solve, without what both need.

    "primal": KᵀK, a factorisation of d_in, two triangular solves per fact. "dual": two triangular
    solves per fact, the Gram matrix of the keys and its factorisation; that of C unless it is kept.
    """
    n, d = float(facts), float(d_in)
    primal = 2 * n * d**2 + d**3 / 3 + 2 * n * d**2
    dual = 2 * n * d**2 + 2 * n**2 * d + n**3 / 3 + (0 if kept else d**3 / 3)
    return {"primal": primal, "dual": dual}


class Dense:
    """A `SecondMoment` in memory; its Cholesky factor is kept once it has been asked for."""

    def __init__(self, value: Square) -> None:
        self._value = value
        self._factor: Tensor | None = None

    def matrix(self, device: torch.device | None = None) -> Square:
        return self._value.to(device or self._value.device)

    def cholesky(self, device: torch.device | None = None) -> Square:
        if self._factor is None:
            self._factor = cholesky(self.matrix(device)).to(self._value.device)
        return self._factor.to(device or self._factor.device)


@dataclass(frozen=True)
class On:
    """A `SecondMoment` that is used on another device than it lies on."""

    moment: SecondMoment
    device: torch.device

    def matrix(self, device: torch.device | None = None) -> Square:
        return self.moment.matrix(device or self.device)

    def cholesky(self, device: torch.device | None = None) -> Square:
        return self.moment.cholesky(device or self.device)


def preserved(moment: Square | SecondMoment, earlier: Keys | None, weight: float) -> SecondMoment:
    """The second moment that also protects earlier edits: `C + KₚᵀKₚ / λ`, so that λ times it is
    `λC + KₚᵀKₚ` (sequential editing). Without any it is `moment`, and nothing is read."""
    lazy = Dense(moment) if isinstance(moment, Tensor) else moment
    if earlier is None:
        return lazy
    if not weight > 0:
        raise SolveError(f"second_moment_weight (λ) must be positive, not {weight}.")
    earlier = earlier.double()
    return Dense(lazy.matrix().to(earlier) + earlier.T @ earlier / weight)


def add_gram(total: Square, keys: Keys) -> None:
    """Add KᵀK to `total` in place, the upper blocks only (half the operations); `mirrored` then
    copies them down."""
    keys = keys.to(total.dtype)
    size = max(256, -(-len(total) // 8))
    for start in range(0, len(total), size):
        block = keys[:, start : start + size]
        total[start : start + size, start:].addmm_(block.T, keys[:, start:])


def mirrored(total: Square) -> Square:
    """The symmetric matrix of which `total` holds the upper triangle."""
    return total.triu() + total.triu(1).T


def cholesky(matrix: Square, what: str = "The second moment C", cure: str = _MORE_TEXT) -> Square:
    """The lower Cholesky factor, float64.

    Raises:
        SolveError: for a matrix that is singular or not finite, with `what` it is and the `cure`.
    """
    matrix = matrix.double()
    factor, info = torch.linalg.cholesky_ex(matrix)
    # Rounding can leave a missing pivot just above zero; what is left then is noise.
    noise = 10 * len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal()
    if int(info) or not bool((factor.diagonal().square() > noise).all()):
        raise SolveError(f"{what} is not positive definite. {cure}")
    return factor
