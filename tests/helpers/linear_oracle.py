"""Linear models with their P weights and A_ν as matrices, in float64; nothing here imports alignreg."""

import torch


def value(f, y, loss):
    total = 0.0
    for fi, yi in zip(f, y, strict=True):
        total = total + ((fi - yi) ** 2 / 2 if loss == "squared" else torch.log(1 + torch.exp(-yi * fi)))
    return total / len(y)


def gradient(f, y, loss):
    f = f.detach().clone().requires_grad_()
    return torch.autograd.grad(value(f, y, loss), f)[0]


class Explicit:
    """w and Φ as they are in the current parametrization; T maps given features φ to the current ones, T φ."""

    def __init__(self, phi, y, lr, loss, gauge=None, eps=1e-12, dropped=0):
        self.phi, self.y, self.lr, self.loss, self.gauge, self.eps = phi.double(), y.double(), lr, loss, gauge, eps
        self.rank = min(phi.shape) - dropped
        P = phi.shape[1]
        self.w = torch.zeros(P, dtype=torch.float64)
        self.T = torch.eye(P, dtype=torch.float64)
        # The singular vectors do not change; taking them once keeps the modes in one order.
        U, _, Vh = torch.linalg.svd(self.phi, full_matrices=False)
        self.U, self.V = U[:, : self.rank], Vh[: self.rank].T
        self.complexity = 0.0

    def eigenvalues(self):
        return torch.stack([(self.U[:, j] @ self.phi @ self.V[:, j]) ** 2 for j in range(self.rank)])

    def step(self):
        change = -self.lr * self.phi.T @ gradient(self.phi @ self.w, self.y, self.loss)
        self.complexity += float(change.norm() * self.phi.norm()) / len(self.y)
        self.w = self.w + change
        if self.gauge is None:
            return
        a = (self.U.T @ gradient(self.phi @ self.w, self.y, self.loss)).abs()
        mean = a.mean()
        a = a.clamp(min=float(self.eps * a.max()))
        lam = self.eigenvalues()
        if self.gauge == "max":
            kappa = (lam * a).max() / lam.max()
        elif self.gauge == "trace":
            kappa = (lam * a).sum() / lam.sum()
        else:
            kappa = mean if self.gauge == "mean" else self.gauge
        nu = kappa / a
        A = torch.eye(len(self.w), dtype=torch.float64) - self.V @ self.V.T
        for j in range(self.rank):
            A = A + nu[j].sqrt() * torch.outer(self.V[:, j], self.V[:, j])
        before = self.phi @ self.w
        inverse = torch.linalg.inv(A)
        self.w, self.phi, self.T = A.T @ self.w, (inverse @ self.phi.T).T, inverse @ self.T
        torch.testing.assert_close(self.phi @ self.w, before, rtol=1e-9, atol=1e-9)

    def predict(self, phi):
        return (self.T @ phi.double().T).T @ self.w
