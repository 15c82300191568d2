"""The ensemble trainer: many independent models trained as one, each exactly as if it were alone.

The models of a chunk share hidden size and optimizer; their parameters are the rows of one matrix. Three properties of
the task make the step small:

- R is data and the loss is invariant under it, ‖y_k - y*‖ = ‖Rᵀy_k - Rᵀy*‖, so b and y* are rotated once and the
  recurrence is diagonal;
- two eigenvalues are known, so with a fixed step size their part of the loss is a constant of each sample;
- a step with φ_t = β_t = 0 leaves the state where it is, so one launch serves every depth and every schedule: a model
  shallower than the deepest of its chunk has zero coefficients at the end.

On the CPU a fixed step size lets one C++ op run the epochs; on CUDA an epoch is a captured graph.

Samples lie along the last dimension throughout: M models, n samples, h hidden units, k steps.
"""

import itertools
import math
import time

import torch

from unrolled_kernels import Diagonal
from unrolled_kernels import functional as F
from unrolled_kernels.experiments import checkpoint, native
from unrolled_kernels.experiments.study import fingerprint, trial_columns
from unrolled_kernels.experiments.synthetic import evaluation
from unrolled_kernels.experiments.synthetic.data import DIM, MU, X_DIM, L, epoch_blocks
from unrolled_kernels.experiments.synthetic.model import MINIMIZER, SCHEDULES, inner_eigenvalues, make_layer
from unrolled_kernels.experiments.synthetic.step_graph import StepGraph
from unrolled_kernels.schedules import nesterov_momentum

_STATE = ("theta", "first_moment", "second_moment", "best_theta", "best_loss", "best_epoch")
# samples of one pass of the evaluation: its activations stay in the cache
_EVALUATED_AT_ONCE = 500


class Ensemble:
    """The state of M models in training.

    Args:
        task, trials, training: as in ``train_chunk``.
    """

    def __init__(self, task, trials, training):
        self.task, self.trials, self.training = task, list(trials), training
        first = self.trials[0]
        self.device, self.dtype = task.x.device, task.x.dtype
        self.learned = training.learn_step_size
        self.adam = first.optimizer == "adam"
        self.num_steps = max(trial.num_steps for trial in self.trials)
        self.depths = self._column([trial.num_steps for trial in self.trials])
        self.learning_rates = self._column([trial.learning_rate for trial in self.trials])
        self.accelerated = self._column([trial.algorithm == "nag" for trial in self.trials])
        self.minimizers = self._column([trial.algorithm == MINIMIZER for trial in self.trials]).bool()
        self.schedules = None if self.learned else self._schedules()
        self.seeds = sorted({trial.seed for trial in self.trials})
        self.seed_of_model = torch.tensor([self.seeds.index(trial.seed) for trial in self.trials], device=self.device)
        self._initial_parameters()
        self._eigenbasis()
        self._training_samples()
        self.epoch = 0
        self.seconds = 0.0
        # what one epoch reads and writes stays in place: on CUDA it is a captured graph
        self._order = torch.zeros(self.samples.shape[::2], dtype=torch.int64, device=self.device)  # [S, n]
        self._epochs_done = torch.zeros((), dtype=torch.int64, device=self.device)
        self._run_epoch = StepGraph(self._epoch, self.device)
        self.init = self.training_loss(), self.evaluate()[0].mean(1)

    def _column(self, values):
        return torch.tensor(values, dtype=self.dtype, device=self.device).unsqueeze(1)

    def _schedules(self):
        """φ_t, β_t, γ_t of each model, ``[M, k, 3]`` float64, zeros behind its last step."""
        table = torch.zeros(len(self.trials), self.num_steps, 3, dtype=torch.float64)
        for row, trial in zip(table, self.trials, strict=True):
            if trial.algorithm != MINIMIZER:
                schedule = SCHEDULES[trial.algorithm](trial.num_steps, self.training.step_size)
                row[: trial.num_steps] = torch.stack(schedule, 1)
        return table.to(self.device)

    # -- parameters: one row of theta for each model, seen through one leaf tensor for each weight

    def _initial_parameters(self):
        rows, max_step_sizes = [], []
        for trial in self.trials:
            row = [p.flatten() for layer in self.task.initial_weights(trial.hidden, trial.seed) for p in layer]
            if self.learned:
                layer = make_layer(trial.algorithm, trial.num_steps, self.training.step_size, learn_step_size=True)
                max_step_sizes.append(layer.max_step_size)
                row.append(layer.step_size_logit.detach().flatten())
            rows.append(torch.cat(row))
        self.max_step_size = self._column(max_step_sizes)
        self.theta = torch.stack(rows).to(self.device, self.dtype)  # [M, P]
        self.first_moment = torch.zeros_like(self.theta)
        self.second_moment = torch.zeros_like(self.theta)
        self.best_theta = self.theta.clone()
        self.best_loss = self.theta.new_full((len(self.trials),), self.task.largest_loss)
        self.best_epoch = torch.zeros(len(self.trials), dtype=torch.int64, device=self.device)

    def _views(self, theta):
        """Views of theta ``[M, P]``: weights ``[M, out, in]``, biases ``[M, out, 1]``, logits of φ ``[M, 1]``."""
        hidden = self.trials[0].hidden
        sizes = (X_DIM, hidden, DIM - 2) if hidden else (X_DIM, DIM - 2)
        shapes = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            shapes += [(fan_out, fan_in), (fan_out, 1)]
        shapes += [(1,)] * self.learned
        parts = theta.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    # -- data

    def _eigenbasis(self):
        """Rotate b and y* once, and keep the part of the spectrum that is computed at every step."""
        inner = slice(None) if self.learned else slice(1, -1)
        task = self.task
        b_hat, y_hat = (torch.einsum("nij,ni->jn", task.R, v) for v in (task.b, task.y_star))  # [d, N]
        self.everything = torch.cat([task.x.T, b_hat[inner], y_hat[inner]])  # [F, N]
        self.true_inner = task.eigenvalues.T[1:-1]  # [d-2, N]
        self.fixed = None
        if not self.learned:
            edge = torch.tensor([[L], [MU]], dtype=self.dtype, device=self.device)
            b_edge, y_edge = b_hat[[0, -1]], y_hat[[0, -1]]
            b_edge = b_edge.expand(len(self.trials), -1, -1)
            y = self._run(edge.expand_as(b_edge), b_edge, None)
            self.fixed = (y - y_edge).square().sum(1)  # [M, N]

    def _training_samples(self):
        index = torch.stack([self.task.train_index(seed) for seed in self.seeds]).to(self.device)  # [S, n]
        self.train_index = index[self.seed_of_model]  # [M, n]
        self.samples = self.everything[:, index].movedim(0, 1).contiguous()  # [S, F, n]
        # in one order for every epoch: equal parameters must give equal losses, or rounding would choose among them
        self.evaluated = self.samples[self.seed_of_model]  # [M, F, n]
        self.fixed_samples = None if self.fixed is None else self.fixed.gather(1, self.train_index)

    def minibatch_orders(self, block):
        """``[256, S, n]``, the orders of a block of epochs for each seed."""
        orders = [self.task.minibatch_orders(seed, block) for seed in self.seeds]
        return torch.stack(orders, 1).to(self.device)

    # -- the model

    def _step_sizes(self, logit):
        """φ of each model, ``[M, 1]``."""
        if logit is None:
            return torch.full_like(self.depths, self.training.step_size)
        return self.max_step_size * torch.sigmoid(logit)

    def _run(self, eigenvalues, b, logit):
        """Each model's own steps, from zero: eigenvalues and b ``[M, *, n]`` to y ``[M, *, n]``."""
        if self.learned:
            active = torch.arange(self.num_steps, device=self.device) < self.depths  # [M, k]
            step_size = self._step_sizes(logit)
            phi = (step_size * active).unsqueeze(1)
            beta = gamma = (nesterov_momentum(step_size, MU) * self.accelerated * active).unsqueeze(1)
        else:
            phi, beta, gamma = self.schedules.to(self.dtype).unsqueeze(1).unbind(-1)  # [M, 1, k] each
        y = F.momentum(Diagonal(eigenvalues), b, phi, beta, gamma, self.num_steps)
        return torch.where(self.minimizers.unsqueeze(2), -b / eigenvalues, y)

    def _inner_eigenvalues(self, views, x):
        """x ``[M, 10, n]`` to the learned eigenvalues ``[M, d-2, n]``."""
        weights = views[: len(views) - self.learned]
        out = torch.baddbmm(weights[1], weights[0], x)
        if len(weights) > 2:
            out = torch.baddbmm(weights[3], weights[2], out.relu_())
        return inner_eigenvalues(out, dim=1)

    def _losses(self, views, samples, fixed):
        """The loss of each sample, ``[M, n]``, of samples ``[M or 1, F, n]``, and the learned eigenvalues."""
        inner = self._inner_eigenvalues(views, samples[:, :X_DIM].expand(len(self.trials), -1, -1))
        return self._distances(inner, views, samples, fixed), inner

    def _distances(self, inner, views, samples, fixed):
        """‖y_k - y*‖ ``[M, n]`` where the inner eigenvalues are ``[M, d-2, n]``."""
        b, y_star = samples[:, X_DIM:].chunk(2, dim=1)
        eigenvalues = inner
        if self.learned:
            edge = torch.ones_like(inner[:, :1])
            eigenvalues = torch.cat([L * edge, inner, MU * edge], 1)
        y = self._run(eigenvalues, b.expand_as(eigenvalues), views[-1] if self.learned else None)
        squared = (y - y_star).square().sum(1)
        return (squared if fixed is None else squared + fixed).sqrt()

    # -- training

    def train(self, orders):
        """Train for some epochs, each of which visits every training sample once, and keep what is best so far.

        Args:
            orders: ``[epochs, S, n]`` int64, from ``minibatch_orders``.
        """
        start = time.perf_counter()
        if self.runs_natively:
            self._train_natively(orders)
        else:
            self._epochs_done.fill_(self.epoch)
            for order in orders:
                self._order.copy_(order)
                self._run_epoch()
        self.epoch += len(orders)
        self.seconds += time.perf_counter() - start

    @property
    def runs_natively(self):
        """Whether the C++ op runs the epochs: backend "cpu", a fixed step size, float32 or float64."""
        return not self.learned and self.dtype in (torch.float32, torch.float64) and native.runs_on(self.device)

    def _train_natively(self, orders):
        """The epochs of ``orders`` in one call, the same bit for bit whatever the number of threads."""
        training = self.training
        torch.ops.unrolled_kernels.synthetic_training(
            self.theta,
            self.first_moment,
            self.second_moment,
            self.best_theta,
            self.best_loss,
            self.best_epoch,
            self.seed_of_model,
            orders.contiguous(),
            torch.where(self.minimizers, -1, self.depths).flatten().long(),
            self.learning_rates.flatten(),
            training.weight_decay,
            self.adam,
            training.batch_size,
            self.epoch,
            self.samples,
            self.fixed_samples,
            self.schedules,
            self.trials[0].hidden,
            MU,
            L,
        )

    def _epoch(self):
        samples = self.samples.gather(2, self._order.unsqueeze(1).expand_as(self.samples))[self.seed_of_model]
        fixed = None if self.fixed is None else self.fixed_samples.gather(1, self._order[self.seed_of_model])
        size, steps = self.training.batch_size, math.ceil(samples.shape[2] / self.training.batch_size)
        for i in range(steps):
            batch = slice(i * size, (i + 1) * size)
            step = self._epochs_done * steps + i + 1
            self._step(step, samples[:, :, batch], None if fixed is None else fixed[:, batch])
        self._epochs_done += 1
        with torch.no_grad():
            loss = self._losses(self._views(self.theta), self.evaluated, self.fixed_samples)[0].mean(1)
            # false for NaN and for what explodes: a model that diverged keeps its last good parameters
            better = loss < self.best_loss
            torch.where(better, loss, self.best_loss, out=self.best_loss)
            self.best_epoch.masked_fill_(better, self._epochs_done)
            torch.where(better.unsqueeze(1), self.theta, self.best_theta, out=self.best_theta)

    def _step(self, step, samples, fixed):
        """Optimizer step ``step``, counted from 1, of each model on its minibatch, samples ``[M, F, batch]``."""
        leaves = [view.detach().requires_grad_() for view in self._views(self.theta)]
        losses, _ = self._losses(leaves, samples, fixed)
        # the sum over models keeps their gradients apart
        grads = torch.autograd.grad(losses.mean(1).sum(), leaves)
        grad = torch.cat([g.flatten(1) for g in grads], 1)
        grad.add_(self.theta, alpha=self.training.weight_decay)
        if self.adam:
            self._adam(step.double(), grad)
        else:
            self.theta.addcmul_(grad, self.learning_rates, value=-1)

    def _adam(self, step, grad, beta1=0.9, beta2=0.999, eps=1e-8):
        """Adam as in torch.optim, with a learning rate for each row; ``step`` is a float64 tensor."""
        self.first_moment.lerp_(grad, 1 - beta1)
        self.second_moment.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = self.second_moment.sqrt().div_((1 - beta2**step).sqrt()).add_(eps)
        update = torch.div(self.first_moment, denominator, out=grad)
        self.theta.addcmul_(update, self.learning_rates / (1 - beta1**step), value=-1)

    # -- evaluation

    @torch.no_grad()
    def training_loss(self):
        return self._losses(self._views(self.best_theta), self.evaluated, self.fixed_samples)[0].mean(1)

    @torch.no_grad()
    def evaluate(self):
        """The kept parameters on all samples.

        Returns:
            ``[M, N]`` each: the loss, the loss of the same layer on Q*, and the spectral and the squared Frobenius
            norm of Q_θ - Q*.
        """
        views = self._views(self.best_theta)
        parts = []
        for lo in range(0, self.everything.shape[1], _EVALUATED_AT_ONCE):
            part = slice(lo, lo + _EVALUATED_AT_ONCE)
            fixed = None if self.fixed is None else self.fixed[:, part]
            samples, true = self.everything[None, :, part], self.true_inner[:, part]
            loss, inner = self._losses(views, samples, fixed)
            on_true = self._distances(true.expand_as(inner), views, samples, fixed)
            parts.append((loss, on_true, *evaluation.spectrum_errors(inner, true, dim=1)))
        return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))

    def results(self):
        """One row of the results table for each model."""
        start = time.perf_counter()
        train, (loss, *others) = self.training_loss(), self.evaluate()
        on_test = torch.stack([x.mean(1) for x in others], 1).tolist()
        on_train = torch.stack([x.gather(1, self.train_index).mean(1) for x in others], 1).tolist()
        step_size = self._step_sizes(self._views(self.best_theta)[-1] if self.learned else None)
        seconds = (self.seconds + time.perf_counter() - start) / len(self.trials)
        weights = self.best_theta.float().cpu().numpy()
        # a model that diverged has no loss
        lost = (self.best_epoch == 0) & (self.epoch > 0)
        losses = [x.masked_fill(lost, math.nan) for x in (train, loss.mean(1), loss.square().mean(1))]
        columns = [x.flatten().tolist() for x in (self.best_epoch, *losses, *self.init, step_size)]
        rows = []
        for i, (trial, best_epoch, *losses, init_train, init_test, phi) in enumerate(
            zip(self.trials, *columns, strict=True)
        ):
            rows.append(
                trial_columns(trial)
                | evaluation.result_columns(
                    epochs=self.epoch,
                    best_epoch=best_epoch,
                    losses=losses,
                    on_train=on_train[i],
                    on_test=on_test[i],
                    init=(init_train, init_test),
                    step_size=phi,
                    seconds=seconds,
                    weights=weights[i],
                )
            )
        return rows

    # -- checkpoints

    def state(self):
        """Everything that training goes on from: copies of tensors by name, and a dict of progress."""
        tensors = {name: getattr(self, name).clone() for name in _STATE}
        return tensors, {"epoch": self.epoch, "seconds": self.seconds}

    def load(self, file):
        """Continue from ``file``; raises ValueError, which names it, if it is damaged or of other models."""
        state, progress = checkpoint.read(file, fingerprint(self.trials), (*_STATE, "epoch", "seconds"))
        for name in _STATE:
            getattr(self, name).copy_(state[name])
        self.epoch, self.seconds = progress["epoch"], progress["seconds"]


def train_chunk(task, trials, training, *, checkpoint_file=None, checkpoint_seconds=120, on_epochs=lambda count: None):
    """Train the models of one chunk together.

    Args:
        task: the data, on the device to train on.
        trials: models of one hidden size and optimizer.
        training: what all models share.
        checkpoint_file: what keeps the state of unfinished training; continued from if it is there.
        checkpoint_seconds: how often it is written.
        on_epochs: called now and then with the number of epochs done since the last call.
    Returns:
        The rows of the results table, one dict for each trial.
    Raises:
        ValueError: the checkpoint is damaged or belongs to other models; the message names it.
    """
    ensemble = Ensemble(task, trials, training)
    if checkpoint_file is not None and checkpoint_file.exists():
        ensemble.load(checkpoint_file)
        on_epochs(ensemble.epoch)
    with checkpoint.kept(checkpoint_file, fingerprint(trials), checkpoint_seconds) as keep:
        for block, rows in epoch_blocks(ensemble.epoch, training.epochs):
            ensemble.train(ensemble.minibatch_orders(block)[rows])
            keep(ensemble.state)
            on_epochs(rows.stop - rows.start)
    return ensemble.results()
