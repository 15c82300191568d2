"""A learned model-predictive controller: a layer that solves a quadratic program with bounds, trained by imitation.

An expert drives x⁺ = A x + B u, |u| ≤ 1, over T steps by the u that minimises Σ x_tᵀ diag(q) x_t + r u_tᵀ u_t. With the
states written as functions of u ∈ R^d, d = T m, that is a quadratic program in a box,

    min 1/2 uᵀ Q u + bᵀu,   -1 ≤ u ≤ 1,     Q = Γᵀ diag(q) Γ + r I,   b = Γᵀ diag(q) Φ x,

with one Q for all states x. The learner knows A and B, sees what the expert does, and learns q and r through the
solution, which Nesterov's method with prox=Box(-1, 1) computes for a batch of states at once.

Run: python examples/box_qp.py        (compares with quadprog and qpth where they are installed)
"""

import argparse
import importlib.util
import time

import torch
from torch import nn

import unrolled_kernels.functional as F
from unrolled_kernels.prox import Box


class Controller(nn.Module):
    """The plan u ``[B, d]`` for states x ``[B, n]``: k steps on the quadratic program of q and r."""

    def __init__(self, A, B, horizon, state_cost, input_cost, num_steps=50):
        super().__init__()
        n, m = B.shape
        powers = [torch.eye(n, dtype=A.dtype)]
        for _ in range(horizon):
            powers.append(A @ powers[-1])
        # x_1 … x_T, stacked, are Φ x + Γ u
        Gamma = torch.zeros(horizon, n, horizon, m, dtype=A.dtype)
        for t in range(horizon):
            for s in range(t + 1):
                Gamma[t, :, s] = powers[t - s] @ B
        self.register_buffer("Phi", torch.cat(powers[1:]))
        self.register_buffer("Gamma", Gamma.reshape(horizon * n, horizon * m))
        self.horizon, self.num_steps = horizon, num_steps
        self.log_state_cost = nn.Parameter(state_cost.log())
        self.log_input_cost = nn.Parameter(torch.as_tensor(input_cost, dtype=A.dtype).log())

    def program(self, x):
        """Q ``[d, d]`` and b ``[B, d]`` of the quadratic program."""
        weighted = self.Gamma.mT * self.log_state_cost.exp().repeat(self.horizon)
        Q = weighted @ self.Gamma
        return Q + self.log_input_cost.exp() * torch.eye(len(Q), dtype=Q.dtype), x @ (weighted @ self.Phi).mT

    def forward(self, x):
        Q, b = self.program(x)
        # the program is scaled so that its largest eigenvalue is 1, which changes no solution
        largest = torch.linalg.matrix_norm(Q.detach(), 2)
        mu = self.log_input_cost.detach().exp() / largest
        return F.nesterov(Q / largest, b / largest, 1.0, mu, self.num_steps, prox=Box(-1.0, 1.0))

    def loop(self, x):
        """The same in plain torch, for comparison."""
        Q, b = self.program(x)
        largest = torch.linalg.matrix_norm(Q.detach(), 2)
        root = (self.log_input_cost.detach().exp() / largest).sqrt()
        beta, u, previous = (1 - root) / (1 + root), torch.zeros_like(b), torch.zeros_like(b)
        for _ in range(self.num_steps):
            z = u + beta * (u - previous)
            u, previous = (z - (z @ (Q / largest).mT + b / largest)).clamp(-1.0, 1.0), u
        return u


def system(d, dtype=torch.float32, num_steps=50):
    """Four masses in a row joined by springs, pushed at both ends, planned d/2 steps ahead: expert, and a learner."""
    n, m = 8, 2
    stiffness = 2 * torch.eye(4, dtype=dtype) - torch.diag(torch.ones(3, dtype=dtype), 1)
    stiffness = stiffness - torch.diag(torch.ones(3, dtype=dtype), -1)
    zero, eye = torch.zeros(4, 4, dtype=dtype), torch.eye(4, dtype=dtype)
    A = torch.linalg.matrix_exp(0.5 * torch.cat([torch.cat([zero, eye], 1), torch.cat([-stiffness, -0.1 * eye], 1)]))
    B = torch.zeros(n, m, dtype=dtype)
    B[4, 0] = B[7, 1] = 0.5
    true_cost = torch.tensor([1.0, 0.1, 0.1, 1.0, 0.3, 0.1, 0.1, 0.3], dtype=dtype)
    return tuple(
        Controller(A, B, d // m, q, r, num_steps) for q, r in ((true_cost, 0.3), (torch.ones(n, dtype=dtype), 1.0))
    )


def solve_with_quadprog(Q, b):
    """The exact solutions, one program after another (Goldfarb, Idnani 1983)."""
    import numpy as np
    import quadprog

    Q, b = Q.detach().double().numpy(), b.detach().double().numpy()
    d = len(Q)
    C, c = np.concatenate([np.eye(d), -np.eye(d)], 1), -np.ones(2 * d)
    return torch.from_numpy(np.stack([quadprog.solve_qp(Q, -row, C, c)[0] for row in b]))


def solve_with_qpth(Q, b):
    """A batch of programs by the interior-point layer of Amos and Kolter (2017)."""
    from qpth.qp import QPFunction

    d = len(Q)
    G, h = torch.cat([torch.eye(d), -torch.eye(d)]).to(Q), torch.ones(2 * d).to(Q)
    nothing = torch.empty(0, dtype=Q.dtype)
    return QPFunction(verbose=-1)(Q, b, G, h, nothing, nothing)


def milliseconds(function, repeats=5):
    """The fastest of some calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times[1:])


def train(d=16, steps=300, batch=256):
    """Imitate the expert; returns both controllers."""
    torch.manual_seed(0)
    expert, learner = system(d)
    optimizer = torch.optim.Adam(learner.parameters(), lr=2e-2)
    for _ in range(steps):
        x = 3 * torch.randn(batch, 8)
        with torch.no_grad():
            target = expert(x)
        loss = (learner(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return expert, learner


def main(d=16, steps=300, batch=256):
    expert, learner = train(d, steps, batch)
    x = 3 * torch.randn(1000, 8)
    with torch.no_grad():
        wanted, planned = expert(x), learner(x)
    error = (planned - wanted).abs().mean().item()
    ratio = lambda c: (c.log_state_cost.exp() / c.log_input_cost.exp()).detach()
    print(
        f"d = {d}: mean |u - expert's u| {error:.4f} on new states, {(wanted.abs() == 1).float().mean():.0%} at a bound"
    )
    print("state costs over input cost, expert: ", *(f"{v:.2f}" for v in ratio(expert)))
    print("                             learner:", *(f"{v:.2f}" for v in ratio(learner)))

    x = x[:batch]
    fused, loop = (milliseconds(lambda f=f: f(x).square().sum().backward()) for f in (learner, learner.loop))
    print(f"forward + backward of {batch} plans, {learner.num_steps} steps: {fused:.2f} ms, loop {loop / fused:.1f}x")
    Q, b = (t.detach() for t in learner.program(x))
    if importlib.util.find_spec("quadprog"):
        exact = system(d, torch.float64, num_steps=2000)[0]
        difference = (exact(x.double()) - solve_with_quadprog(*exact.program(x.double()))).abs().max().item()
        one_by_one = milliseconds(lambda: solve_with_quadprog(Q, b), 1)
        with torch.no_grad():
            forward = milliseconds(lambda: learner(x))
        print(f"quadprog, one after another, forward: {one_by_one / forward:.1f}x; largest difference {difference:.1e}")
    if importlib.util.find_spec("qpth"):

        def run():
            Q, b = learner.program(x)
            solve_with_qpth(Q, b).square().sum().backward()

        print(f"qpth, forward + backward: {milliseconds(run, 2) / fused:.1f}x")
    return error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=16, help="inputs of a plan, two for each step: 8 to 64")
    parser.add_argument("--steps", type=int, default=300, help="of the optimizer")
    main(**vars(parser.parse_args()))
