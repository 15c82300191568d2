"""The layers: modules that run k steps of an algorithm on the energy 1/2 yᵀQy + bᵀy that a network puts out."""

from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, overload

import torch
from torch import nn

from unrolled_kernels import _backend, _check, _torch_private, schedules
from unrolled_kernels import functional as F
from unrolled_kernels.annotations import Number, Quadratic
from unrolled_kernels.prox import Prox, check_prox, rebuild
from unrolled_kernels.regions import largest_stable_step

__all__ = ["UnrolledGD", "UnrolledMomentum", "UnrolledNAG"]


class Options(TypedDict, total=False):
    """The keyword arguments that the layers share."""

    prox: Prox | None
    learn_prox: bool
    backward: Literal["unrolled", "implicit"]
    backward_steps: int | None
    tolerance: float | None
    backend: str


class _Unrolled(nn.Module):
    """What the layers share: depth, backend, and coefficients that are fixed numbers or learned parameters."""

    _shown: tuple[str, ...] = ()

    if TYPE_CHECKING:
        # nn.Module's own call takes and returns Any
        @overload
        def __call__(
            self,
            Q: Quadratic,
            b: torch.Tensor,
            y0: torch.Tensor | None = None,
            return_trajectory: bool = False,
            return_info: Literal[False] = False,
        ) -> torch.Tensor: ...
        @overload
        def __call__(
            self,
            Q: Quadratic,
            b: torch.Tensor,
            y0: torch.Tensor | None = None,
            return_trajectory: bool = False,
            *,
            return_info: Literal[True],
        ) -> tuple[torch.Tensor, F.Info]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __init__(
        self,
        num_steps,
        backend,
        prox=None,
        learn_prox=False,
        backward="unrolled",
        backward_steps=None,
        tolerance=None,
    ):
        super().__init__()
        self.num_steps = _check.check_num_steps(num_steps)
        _backend.check_name(backend)
        self.backend = backend
        _check.check_backward(backward, backward_steps)
        _check.check_tolerance(tolerance, backward_steps)
        self.backward, self.backward_steps, self.tolerance = backward, backward_steps, tolerance
        check_prox(prox)
        if learn_prox and prox is None:
            raise ValueError("learn_prox: there is nothing to learn, got prox=None; give a prox, L1(0.1) for instance")
        self._prox_class = None if prox is None else type(prox)
        for name, value in {} if prox is None else vars(prox).items():
            if value is None:
                setattr(self, f"prox_{name}", None)
            else:
                self._coefficient(f"prox_{name}", value, learn_prox)

    @property
    def prox(self) -> Prox | None:
        """The proximal map that ends a step, of the parameters, buffers and numbers that the layer holds; or None."""
        cls = self._prox_class
        if cls is None:
            return None
        return rebuild(cls, [getattr(self, f"prox_{name}") for name in cls.__dataclass_fields__])

    def _coefficient(self, name, value, learn):
        """Register ``value``: a parameter if learned, a buffer if a fixed tensor, else the exact float."""
        _check.check_number(name, value)
        if learn:
            value = torch.as_tensor(value, dtype=torch.get_default_dtype() if not torch.is_tensor(value) else None)
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        elif isinstance(value, torch.Tensor):
            self.register_buffer(name, value.detach().clone())
        else:
            setattr(self, name, float(value))

    def _options(self, return_info):
        """What the functions take besides the problem and the schedule."""
        names = ("prox", "backward", "backward_steps", "tolerance", "backend")
        return {name: getattr(self, name) for name in names} | {"return_info": return_info}

    def extra_repr(self) -> str:
        shown = [f"num_steps={self.num_steps}", *(f"{name}={self._show(name)}" for name in self._shown)]
        if getattr(self, "stable_region", None) is not None:
            shown.append(f"stable_region={self.stable_region}")
        if self._prox_class is not None:
            fields = ", ".join(f"{name}={self._show(f'prox_{name}')}" for name in self._prox_class.__dataclass_fields__)
            shown.append(f"prox={self._prox_class.__name__}({fields})")
        if self.backward != "unrolled":
            shown.append(f"backward={self.backward!r}")
        if self.backward_steps is not None:
            shown.append(f"backward_steps={self.backward_steps}")
        if self.tolerance is not None:
            shown.append(f"tolerance={self.tolerance}")
        return ", ".join([*shown, f"backend={self.backend!r}"])

    def _show(self, name):
        value = getattr(self, name)
        if not isinstance(value, torch.Tensor):
            return str(value)
        kind = "fixed" if name in self._buffers else "learned"
        single = value.numel() == 1 and not value.is_meta
        return f"{value.item():.6g} ({kind})" if single else f"{list(value.shape)} ({kind})"


class _Computed(torch.Tensor):
    """A value that a layer computes from a parameter: it reads as any tensor, and refuses to be written into."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = name == "__setitem__" or (
            name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        )
        if in_place and isinstance((*args, *kwargs.values())[0], cls):
            raise RuntimeError(
                f"{name}: this value is computed from a parameter in other coordinates, and writing into it would "
                "change nothing; assign to the layer's attribute instead, layer.step_size = 0.1 for instance"
            )
        with _torch_private.ignore_tensor_subclasses():
            args = (x.as_subclass(torch.Tensor) if isinstance(x, cls) else x for x in args)
            return func(*args, **kwargs)


class _StepSize(_Unrolled):
    """A layer with one step size: fixed or learned, for all steps or per step, free or kept in a stable region.

    What a step of an optimizer must not carry out of its range is held in other coordinates, φ as ``step_size_logit``
    and μ as ``mu_log``. It reads and is assigned as what it is.
    """

    step_size: Number

    def __init__(self, num_steps, step_size, learn_step_size, per_step, stable_region, *options):
        super().__init__(num_steps, *options)
        _check.check_number("step_size", step_size)
        if per_step and not isinstance(step_size, torch.Tensor):
            step_size = torch.tensor(float(step_size))
        if per_step and step_size.dim() == 0:
            step_size = step_size.expand(self.num_steps)
        self.stable_region = None if stable_region is None else _check_region(stable_region)
        self.max_step_size = None
        if stable_region is not None:
            self.max_step_size = self.largest_stable_step(*self.stable_region)
            logit = self._step_size_logit(step_size)
            if learn_step_size:
                dtype = step_size.dtype if isinstance(step_size, torch.Tensor) else torch.get_default_dtype()
                self._coefficient("step_size_logit", logit.to(dtype), learn=True)
                self._computed = ("step_size",)
                return
        self._coefficient("step_size", step_size, learn_step_size)

    # names of the values that are held in other coordinates
    _computed: tuple[str, ...] = ()

    def _step_size_logit(self, step_size):
        """The coordinate in which ``step_size`` is held, in float64; refuses one outside the region."""
        inside = torch.as_tensor(step_size, dtype=torch.float64).detach()
        # on the meta device there is no value to check
        if not inside.is_meta and not bool(((inside > 0) & (inside < self.max_step_size)).all()):
            raise ValueError(
                f"step_size: expected a value inside the stable region (0, {self.max_step_size:.6g}) of "
                f"stable_region={self.stable_region}, got {step_size}"
            )
        return torch.logit(inside / self.max_step_size)

    def _value(self, name):
        """φ or μ as the functions take it."""
        if name not in self._computed:
            return getattr(self, name)
        return self.max_step_size * torch.sigmoid(self.step_size_logit) if name == "step_size" else self.mu_log.exp()

    def __getattr__(self, name):
        if name not in self._computed:
            return super().__getattr__(name)
        value = self._value(name)
        # torch.compile does not trace the refusals
        return value if torch.compiler.is_compiling() else value.as_subclass(_Computed)

    def __setattr__(self, name, value):
        if name not in self._computed:
            if name == "step_size" and self.max_step_size is not None:
                self._step_size_logit(value)
            return super().__setattr__(name, value)
        _check.check_number(name, value)
        if name == "step_size":
            parameter, value = self.step_size_logit, self._step_size_logit(value)
        else:
            _check.check_positive(name, value)
            parameter, value = self.mu_log, torch.as_tensor(value, dtype=torch.float64).log()
        _check.check_broadcast(name, value.shape, tuple(parameter.shape), "the shape that the layer learns")
        with torch.no_grad():
            parameter.copy_(value)


class UnrolledGD(_StepSize):
    """k steps of gradient descent as a layer.

        y_{t+1} = y_t - step_size (Q y_t + b)                  (paper, Eq. 9)

    Args:
        num_steps: k ≥ 0.
        step_size: φ, a float or a tensor that broadcasts to ``(*batch, num_steps)``.
        learn_step_size: make φ an ``nn.Parameter``.
        per_step: one φ for each step, ``[num_steps]``, all starting at ``step_size``.
        stable_region: ``(mu, L)``, bounds of the spectrum of Q: keeps a learned φ inside (0, 2/(μ+L)), the paper's
            stable region (Table 1), by φ = 2/(μ+L) · sigmoid(logit), and refuses a start outside it.
        prox: a constraint or a sparsity term of ``unrolled_kernels.prox``, whose proximal map ends every step. Its
            tensors are buffers of the layer, ``prox_lower``, ``prox_upper``, ``prox_weight`` or ``prox_threshold``.
        learn_prox: make them, and its numbers, ``nn.Parameter``s.
        backward, backward_steps: which gradients: of all steps, ``"implicit"`` ones, or those of the last steps; see
            ``functional.gradient_descent``.
        tolerance: a sample stops where its steps have become as small as this; see there, too.
        backend: ``"auto"``, ``"eager"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """

    _shown = ("step_size",)

    def __init__(
        self,
        num_steps: int,
        step_size: Number = 1.0,
        *,
        learn_step_size: bool = False,
        per_step: bool = False,
        stable_region: tuple[float, float] | None = None,
        prox: Prox | None = None,
        learn_prox: bool = False,
        backward: Literal["unrolled", "implicit"] = "unrolled",
        backward_steps: int | None = None,
        tolerance: float | None = None,
        backend: str = "auto",
    ) -> None:
        options = backend, prox, learn_prox, backward, backward_steps, tolerance
        super().__init__(num_steps, step_size, learn_step_size, per_step, stable_region, *options)

    @staticmethod
    def largest_stable_step(mu: Number, L: Number) -> Number:
        """2/(μ+L), the upper end of the paper's stable region (Table 1) for a spectrum in [μ, L]."""
        return largest_stable_step("gd", mu, L)

    def forward(
        self,
        Q: Quadratic,
        b: torch.Tensor,
        y0: torch.Tensor | None = None,
        return_trajectory: bool = False,
        return_info: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, F.Info]:
        """``y_k`` ``[*batch, d]`` or y_0 … y_k ``[num_steps + 1, *batch, d]``; see ``functional.gradient_descent``."""
        return F.gradient_descent(
            Q,
            b,
            self._value("step_size"),
            self.num_steps,
            y0=y0,
            return_trajectory=return_trajectory,
            **self._options(return_info),
        )


class UnrolledNAG(_StepSize):
    """k steps of Nesterov's accelerated gradient method as a layer.

        y_{t+1} = z_t - step_size (Q z_t + b),   z_{t+1} = y_{t+1} + β (y_{t+1} - y_t)
        β = (1 - √(μ step_size)) / (1 + √(μ step_size))        (paper, Eq. 9)

    Args:
        num_steps, step_size, learn_step_size, per_step, prox, learn_prox, backward, backward_steps, tolerance,
            backend: as in ``UnrolledGD``.
        mu: μ > 0, a float or a tensor that broadcasts to ``(*batch, num_steps)``; None: the smallest eigenvalue of
            each sample's Q, as in ``functional.nesterov``.
        learn_mu: learn μ, held as its logarithm so that it stays positive.
        stable_region: as in ``UnrolledGD``, with the region (0, 4/(μ+3L)) of Nesterov's method.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """

    _shown = ("step_size", "mu")
    mu: Number | None

    def __init__(
        self,
        num_steps: int,
        step_size: Number = 1.0,
        mu: Number | None = 0.1,
        *,
        learn_step_size: bool = False,
        learn_mu: bool = False,
        per_step: bool = False,
        stable_region: tuple[float, float] | None = None,
        prox: Prox | None = None,
        learn_prox: bool = False,
        backward: Literal["unrolled", "implicit"] = "unrolled",
        backward_steps: int | None = None,
        tolerance: float | None = None,
        backend: str = "auto",
    ) -> None:
        options = backend, prox, learn_prox, backward, backward_steps, tolerance
        super().__init__(num_steps, step_size, learn_step_size, per_step, stable_region, *options)
        if mu is None:
            if learn_mu:
                raise ValueError("mu: learn_mu=True needs a number to start from, got mu=None")
            self.mu = None
        else:
            _check.check_number("mu", mu)
            _check.check_positive("mu", mu)
            if learn_mu:
                # held as its logarithm, so that no update makes μ ≤ 0
                dtype = mu.dtype if isinstance(mu, torch.Tensor) else torch.get_default_dtype()
                self._coefficient("mu_log", torch.as_tensor(mu, dtype=torch.float64).log().to(dtype), learn=True)
                self._computed = (*self._computed, "mu")
            else:
                self._coefficient("mu", mu, learn=False)

    @staticmethod
    def largest_stable_step(mu: Number, L: Number) -> Number:
        """4/(μ+3L), the upper end of the paper's stable region (Table 1) for a spectrum in [μ, L]."""
        return largest_stable_step("nag", mu, L)

    def forward(
        self,
        Q: Quadratic,
        b: torch.Tensor,
        y0: torch.Tensor | None = None,
        return_trajectory: bool = False,
        return_info: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, F.Info]:
        """``y_k`` ``[*batch, d]`` or y_0 … y_k ``[num_steps + 1, *batch, d]``; see ``functional.nesterov``."""
        return F.nesterov(
            Q,
            b,
            self._value("step_size"),
            self._value("mu"),
            self.num_steps,
            y0=y0,
            return_trajectory=return_trajectory,
            **self._options(return_info),
        )


class UnrolledMomentum(_Unrolled):
    """k steps of a first-order method with a free schedule as a layer.

        m_t = y_t - y_{t-1},   y_{t+1} = y_t + β_t m_t - φ_t (Q (y_t + γ_t m_t) + b)

    Args:
        num_steps: k ≥ 0.
        step_sizes, momentum, extrapolation: φ, β, γ, each a float or a tensor that broadcasts to
            ``(*batch, num_steps)``. A float becomes a schedule ``[num_steps]`` if learnable.
        learnable: make the three ``nn.Parameter``s.
        prox, learn_prox, backward, backward_steps, tolerance, backend: as in ``UnrolledGD``.
    Raises:
        TypeError, ValueError: an argument out of its range; the message names it.
    """

    _shown = ("step_sizes", "momentum", "extrapolation")
    step_sizes: Number
    momentum: Number
    extrapolation: Number

    def __init__(
        self,
        num_steps: int,
        step_sizes: Number,
        momentum: Number,
        extrapolation: Number,
        *,
        learnable: bool = True,
        prox: Prox | None = None,
        learn_prox: bool = False,
        backward: Literal["unrolled", "implicit"] = "unrolled",
        backward_steps: int | None = None,
        tolerance: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(num_steps, backend, prox, learn_prox, backward, backward_steps, tolerance)
        for name, value in (("step_sizes", step_sizes), ("momentum", momentum), ("extrapolation", extrapolation)):
            _check.check_number(name, value)
            if learnable and not isinstance(value, torch.Tensor):
                value = torch.full((self.num_steps,), float(value))
            self._coefficient(name, value, learnable)

    @classmethod
    def _start(cls, schedule, learnable, options):
        if learnable:
            schedule = (x.to(torch.get_default_dtype()) for x in schedule)
        phi, beta, gamma = schedule
        return cls(len(phi), phi, beta, gamma, learnable=learnable, **options)

    @classmethod
    def gd(cls, num_steps: int, step_size: float, *, learnable: bool = True, **options: Unpack[Options]) -> Self:
        """Start as gradient descent; see ``schedules.gd``. ``options``: the layer's other keyword arguments."""
        return cls._start(schedules.gd(num_steps, step_size), learnable, options)

    @classmethod
    def nag(
        cls, num_steps: int, step_size: float, mu: float, *, learnable: bool = True, **options: Unpack[Options]
    ) -> Self:
        """Start as Nesterov's method; see ``schedules.nag`` and ``gd``."""
        return cls._start(schedules.nag(num_steps, step_size, mu), learnable, options)

    @classmethod
    def heavy_ball(
        cls, num_steps: int, step_size: float, momentum: float, *, learnable: bool = True, **options: Unpack[Options]
    ) -> Self:
        """Start as Polyak's heavy ball; see ``schedules.heavy_ball`` and ``gd``."""
        return cls._start(schedules.heavy_ball(num_steps, step_size, momentum), learnable, options)

    @classmethod
    def fista(cls, num_steps: int, step_size: float, *, learnable: bool = True, **options: Unpack[Options]) -> Self:
        """Start with FISTA's momentum; see ``schedules.fista`` and ``gd``."""
        return cls._start(schedules.fista(num_steps, step_size), learnable, options)

    @classmethod
    def chebyshev(
        cls, num_steps: int, mu: float, L: float, *, learnable: bool = True, **options: Unpack[Options]
    ) -> Self:
        """Start as the Chebyshev semi-iteration on the spectrum [mu, L]; see ``schedules.chebyshev`` and ``gd``."""
        return cls._start(schedules.chebyshev(num_steps, mu, L), learnable, options)

    def forward(
        self,
        Q: Quadratic,
        b: torch.Tensor,
        y0: torch.Tensor | None = None,
        return_trajectory: bool = False,
        return_info: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, F.Info]:
        """``y_k`` ``[*batch, d]`` or y_0 … y_k ``[num_steps + 1, *batch, d]``; see ``functional.momentum``."""
        return F.momentum(
            Q,
            b,
            self.step_sizes,
            self.momentum,
            self.extrapolation,
            self.num_steps,
            y0=y0,
            return_trajectory=return_trajectory,
            **self._options(return_info),
        )


def _check_region(stable_region):
    try:
        mu, L = (float(x) for x in stable_region)
    except (TypeError, ValueError):
        raise TypeError(f"stable_region: expected a pair (mu, L), got {stable_region!r}") from None
    if not 0 < mu <= L:
        raise ValueError(f"stable_region: expected 0 < mu <= L, got mu={mu}, L={L}")
    return mu, L
