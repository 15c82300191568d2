"""The trainer of one model: plain PyTorch around the algorithm layer, in one process or in many."""

import contextlib
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from unrolled_kernels.experiments import checkpoint, ranks, study
from unrolled_kernels.experiments.denoising import distributed, evaluation
from unrolled_kernels.experiments.denoising.data import TrainingPairs
from unrolled_kernels.experiments.denoising.model import count_parameters, make_model
from unrolled_kernels.experiments.denoising.weights import load_model, load_optimizer, to_tensors
from unrolled_kernels.experiments.study import trial_columns


@dataclass(frozen=True)
class Files:
    """Where the state of a model is kept, each may be None.

    Attributes:
        checkpoint: of one in training; continued from where it is there.
        model: the weights of a finished one.
        logs: folder of TensorBoard logs.
    """

    checkpoint: Path | None = None
    model: Path | None = None
    logs: Path | None = None


class Trainer:
    """A model in training.

    Args:
        task: the images.
        trial, training: which model, and how it is trained.
        device, backend: where it runs.
        model, graphs: as in ``train_one``.
    """

    def __init__(self, task, trial, training, device="cpu", backend="auto", model=None, graphs=False):
        self.task, self.trial, self.training, self.device = task, trial, training, torch.device(device)
        self.model = (make_model(trial, training, backend) if model is None else model).to(self.device)
        self.parallel = distributed.data_parallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=training.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.autocast == "float16")
        self.pairs = TrainingPairs(task, trial.seed, training.crop, training.noise, self.device)
        self.epoch, self.seconds, self.losses = 0, 0.0, []
        if graphs:
            self._record()

    @property
    def lost(self):
        """Whether the loss has become infinite or NaN, from which nothing returns."""
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    @property
    def diverged(self):
        """Whether the last loss, a squared error for each pixel, is above 1: between images in [0, 1] none is."""
        return bool(self.losses) and study.diverged(self.losses[-1], 1.0)

    def train_epoch(self):
        """See every training image once; returns the mean loss of its minibatches."""
        start = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, self.epoch)
        total = torch.zeros((), device=self.device)
        for clean, noisy, count in self.pairs.batches(
            self.epoch, self.training.batch_size, ranks.rank(), ranks.ranks()
        ):
            total += self.train_step(clean, noisy, count)
        self.epoch += 1
        self.losses.append(distributed.sum_over_ranks(total).item() / len(self.pairs.index))
        self.seconds += time.perf_counter() - start
        return self.losses[-1]

    def train_step(self, clean, noisy, count):
        """One step of Adam on this rank's share of a batch of ``count`` images; returns the sum of its losses."""
        with self._autocast():
            restored = self.parallel(noisy)
        loss = mse_loss(restored.float(), clean, reduction="sum") / math.prod(clean.shape[1:])
        self.optimizer.zero_grad()
        # gradients are averaged over ranks, whose shares may differ in size
        self.scaler.scale(loss * (ranks.ranks() / count)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _autocast(self):
        if self.training.autocast == "none":
            return contextlib.nullcontext()
        # a cache of converted weights does not outlive the step that it is made in, nor may a graph keep one
        return torch.autocast(self.device.type, getattr(torch, self.training.autocast), cache_enabled=False)

    def _record(self):
        """Let the model replay CUDA graphs of its forward and backward pass in training."""
        check_graphs(self.device, len(self.pairs.index), self.training.batch_size)
        sample = torch.zeros(self.training.batch_size, 1, self.pairs.crop, self.pairs.crop, device=self.device)
        # recording runs the model, which moves the running statistics
        before = copy.deepcopy(self.model.state_dict())
        with self._autocast():
            torch.cuda.make_graphed_callables(self.model.train(), (sample,))
        self.model.load_state_dict(before)

    def state(self):
        """Everything that training goes on from: copies of tensors by name, and a dict of progress."""
        progress = {"epoch": self.epoch, "seconds": self.seconds, "losses": list(self.losses)}
        progress["scaler"] = self.scaler.state_dict()
        return to_tensors(self.model, self.optimizer), progress

    def load(self, file):
        """Go on from ``file``, read by rank 0 alone; raises ValueError, which names it, if it does not fit."""
        expected = ("epoch", "seconds", "losses", "scaler")
        tensors, progress = ranks.on_first_rank(lambda: checkpoint.read(file, self.trial.name, expected))
        load_model(file, self.trial, self.model, tensors)
        load_optimizer(self.optimizer, tensors)
        self.epoch, self.seconds, self.losses = (progress[name] for name in expected[:3])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(progress["scaler"])

    def result(self):
        """The row of the results table, of the model as it is after its last epoch."""
        columns = trial_columns(self.trial) | {"epochs": self.epoch, "diverged": self.diverged}
        losses = torch.empty(len(self.task.clean))
        for name, index in zip(("train", "test"), self.task.split(self.trial.seed), strict=True):
            clean, noisy, restored = self._restored(index)
            losses[index] = evaluation.squared_error(clean, restored)
            columns[f"{name}_loss"] = losses[index].mean().item()
        # those of the test images from here on
        psnr, ssim = evaluation.quality(clean, restored)
        columns |= {"test_psnr": psnr.mean().item(), "test_ssim": ssim.mean().item()}
        columns["test_psnr_noisy"] = evaluation.psnr(clean, noisy).mean().item()
        columns["gap"] = columns["test_loss"] - columns["train_loss"]
        columns["image_losses"] = losses.tolist()
        columns["parameters"] = count_parameters(self.model)
        columns |= self._spectrum(noisy)
        return columns | {"seconds": self.seconds}

    def _restored(self, index):
        """Clean, noisy and restored images ``[n, 1, H, W]``."""
        clean, noisy = self.task.pairs(index, self.trial.seed)
        return clean, noisy, evaluation.restore(self.model, noisy, self.device)

    @torch.no_grad()
    def _spectrum(self, noisy):
        """What the layer meets on these images: the largest 1 + f², and the mean φ."""
        if not hasattr(self.model, "f"):
            return {"largest_eigenvalue": math.nan, "step_size": math.nan}
        f = torch.cat([self.model.f(part.to(self.device)) for part in noisy.split(20)])
        return {
            "largest_eigenvalue": 1 + f.square().max().item(),
            "step_size": self.model.step_size(f).mean().item(),
        }


def train_one(
    task,
    trial,
    training,
    *,
    device="cpu",
    backend="auto",
    model=None,
    files=None,
    checkpoint_seconds=30,
    on_epoch=None,
    graphs=False,
):
    """Train one model to the end; a loss that is not finite ends it before.

    Args:
        task: the images.
        trial: the model.
        training: what all models share.
        device, backend: where it runs.
        model: a module that maps noisy images ``[B, 1, H, W]`` to restored ones, in place of the trial's; it is trained
            in place, and the names in the trial are free.
        files: a ``Files``.
        checkpoint_seconds: how often the state is written.
        on_epoch: called as ``on_epoch(count, loss=…, psnr=…)`` for the epochs done since the last call.
        graphs: replay CUDA graphs of the model, see ``check_graphs``.
    Returns:
        The row of the results table, a dict; None in every rank but the first.
    Raises:
        ValueError: the checkpoint is damaged or of another model; the message names it. Or graphs cannot be recorded.
    """
    files, on_epoch = files or Files(), on_epoch or (lambda count, **shown: None)
    trainer = Trainer(task, trial, training, device, backend, model, graphs)
    first = ranks.rank() == 0
    if ranks.on_first_rank(lambda: files.checkpoint is not None and files.checkpoint.exists()):
        trainer.load(files.checkpoint)
        on_epoch(trainer.epoch)
    file = files.checkpoint if first else None
    with checkpoint.kept(file, trial.name, checkpoint_seconds) as keep, _log(files.logs if first else None) as log:
        while trainer.epoch < training.epochs and not trainer.lost:
            loss = trainer.train_epoch()
            keep(trainer.state)
            psnr = -10 * math.log10(loss) if loss > 0 else math.inf
            on_epoch(1, loss=f"{loss:.2e}", psnr=f"{psnr:.1f} dB")
            log(trainer, loss, psnr)
    # a model that diverged takes part in the bar to the end
    on_epoch(training.epochs - trainer.epoch)
    if not first:
        return None
    row = trainer.result()
    if files.model is not None:
        notes = {"epoch": trainer.epoch, "step_size": training.step_size}
        checkpoint.write(files.model, trial.name, to_tensors(trainer.model), notes)
    return row


def check_graphs(device, images, batch_size):
    """Refuse what CUDA graphs, each of one device and one size of the minibatch, cannot be recorded for.

    Raises:
        ValueError: the device is not a GPU, several ranks share the work, or an epoch ends with a smaller minibatch.
    """
    if device.type != "cuda":
        raise ValueError(f"--graphs: CUDA graphs need --device cuda; got {device.type}")
    if ranks.ranks() > 1:
        raise ValueError(f"--graphs: one process trains a model, got {ranks.ranks()}; start without torchrun")
    if images % batch_size:
        raise ValueError(
            f"--graphs: {images} training images are no multiple of --batch-size {batch_size}; give a divisor"
        )


def learning_rate(training, epoch):
    """Adam's rate in an epoch: a function of the epoch alone, so that a resumed run needs no state of it."""
    done = epoch / training.epochs
    if training.schedule == "cosine":
        return training.learning_rate * (1 + math.cos(math.pi * done)) / 2
    if training.schedule == "step":
        return training.learning_rate * 0.2 ** ((done >= 0.6) + (done >= 0.85))
    return training.learning_rate


@contextlib.contextmanager
def _log(folder):
    """A function that writes an epoch to TensorBoard; one that does nothing without a folder."""
    if folder is None:
        yield lambda trainer, loss, psnr: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:

        def log(trainer, loss, psnr):
            rate = trainer.optimizer.param_groups[0]["lr"]
            for name, value in {"loss": loss, "psnr": psnr, "learning_rate": rate}.items():
                writer.add_scalar(f"train/{name}", value, trainer.epoch)

        yield log
