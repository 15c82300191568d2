"""The denoising experiment: its images and noise, its models, its training in one and two processes, its refusals."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import unrolled_kernels as uk
from unrolled_kernels.experiments import checkpoint, cli
from unrolled_kernels.experiments.denoising import apply, data, evaluation, gaps, images, measurements, report, train
from unrolled_kernels.experiments.denoising.grid import PRESETS, Grid, Training, Trial
from unrolled_kernels.experiments.denoising.model import CASES, DnCNN, StepSize, energy_layer, make_model
from unrolled_kernels.experiments.denoising.weights import to_tensors
from unrolled_kernels.experiments.study import finished_trials
from unrolled_kernels.testing import assert_as_close_as_eager

ROOT = Path(__file__).parents[1]
BSD = ROOT.parent / "shared" / "data" / "bsd400"
QUICK = Training(epochs=4, batch_size=4, crop=16)
GD = Trial("about-right", "gd", 3, 0)
# everything about a run but its wall time
TIMELESS = ["case", "algorithm", "num_steps", "seed", "epochs", "train_loss", "test_loss", "test_psnr", "step_size"]


@pytest.fixture(scope="module")
def task():
    """24 images of 32×32."""
    return data.DenoisingTask(images.photographs(32)[::97][:24].clone())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 24 PNG files of 40×36."""
    path = tmp_path_factory.mktemp("images")
    for i, tile in enumerate(images.photographs(40)[::40][:24, 0]):
        Image.fromarray((tile[:36] * 255).byte().numpy()).save(path / f"{i:02}.png")
    return path


@pytest.fixture(scope="module")
def small_run(folder, tmp_path_factory):
    """A finished run of the command, and its directory."""
    out = tmp_path_factory.mktemp("denoising") / "run"
    assert cli.main(command(folder, out)) == 0
    return out


def command(folder, out, *more, no_speed=True):
    fixed = (
        f"denoising --data {folder} --size 32 --crop 16 --batch-size 4 --depths 2 --algorithms gd --cases about-right"
    )
    fixed += " --seeds 1 --epochs 6 --workers 1 --device cpu" + " --no-speed --no-baselines" * no_speed
    return [*fixed.split(), "--out", str(out), *map(str, more)]


def table(out):
    results = pd.read_parquet(out / "results.parquet")
    return results.sort_values(["case", "algorithm", "num_steps", "seed"])[TIMELESS].reset_index(drop=True)


# -- data


def test_noise_is_weak_on_edges_and_strong_in_flat_regions():
    image = torch.zeros(1, 1, 40, 40)
    image[..., 20:] = 1.0
    sigma = data.noise_level(image)[0, 0]
    torch.testing.assert_close(sigma[:, :16], torch.full((40, 16), 50 / 255))
    torch.testing.assert_close(sigma[:, 20], torch.full((40,), 10 / 255))
    # its standard deviation is what the law says: many draws of one image of middle gray
    gray = data.DenoisingTask(torch.full((1, 1, 40, 40), 0.5))
    draws = data.add_noise(gray.clean.expand(100, 1, 40, 40), gray.sigma, [(7, i) for i in range(100)]) - 0.5
    # clipping takes 1 % of the tails
    assert draws.std() == pytest.approx(50 / 255, rel=0.03)


def test_split_noise_and_crops_are_functions_of_the_seed(task):
    train_index, test_index = task.split(3)
    assert len(train_index) == 6
    assert sorted([*train_index.tolist(), *test_index.tolist()]) == list(range(24))
    assert not torch.equal(train_index, task.split(4)[0])
    noisy = task.pairs(test_index, 3)[1]
    assert torch.equal(noisy, task.pairs(test_index, 3)[1])
    assert not torch.equal(noisy, task.pairs(test_index, 4)[1])
    # the noise of an image does not depend on which others are asked for
    assert torch.equal(noisy[5], task.pairs(test_index[5:6], 3)[1][0])


def test_folds_share_images_and_noise_and_leave_a_fixed_denoiser_no_gap(task):
    splits = [task.split(seed) for seed in range(4, 8)]
    assert torch.equal(torch.cat([train for train, _ in splits]).sort().values, torch.arange(24))
    gaps = []
    for seed, (train_index, test_index) in zip(range(4, 8), splits, strict=True):
        assert torch.equal(torch.cat([train_index, test_index]).sort().values, torch.arange(24))
        losses = [
            evaluation.squared_error(*task.pairs(index, seed)).mean().item() for index in (train_index, test_index)
        ]
        gaps.append(losses[1] - losses[0])
    assert max(map(abs, gaps)) > 1e-5
    assert sum(gaps) == pytest.approx(0, abs=1e-8)


def test_gaps_are_compared_image_by_image():
    random = np.random.default_rng(0)
    of_image = random.uniform(0.0, 1.0, 24)  # images differ far more than gaps
    rows = []
    for case, shift in (("under", 1e-4), ("over", 0.0)):
        for algorithm in ("gd", "nag"):
            for seed in range(4):
                losses = of_image + random.normal(0, 1e-6, 24)
                losses[data.folds(24, 0)[seed]] -= 1e-3 + shift * (algorithm == "nag")
                rows.append(
                    {"case": case, "algorithm": algorithm, "num_steps": 3, "seed": seed, "image_losses": losses}
                )
    results = pd.DataFrame(rows)
    table_ = report.gaps_table(results).splitlines()
    assert re.fullmatch(r"\| under \| 3 \| 1.0e-03 ± .* \| 1.1e-03 ± .* \| -1.0e-04 ± .* \| GD smaller \|", table_[2])
    assert table_[3].endswith("| undecided |")
    # the mean over the images of a round is that of its models, test less train
    models = results.query("case == 'under' and algorithm == 'gd'")
    means = []
    for row in models.itertuples():
        inside = np.isin(np.arange(24), data.folds(24, 0)[row.seed])
        means.append(row.image_losses[~inside].mean() - row.image_losses[inside].mean())
    assert gaps.of_images(models).mean() == pytest.approx(np.mean(means), abs=1e-15)
    # with fewer folds, of their images alone; a single model has none to compare with
    assert (~np.isnan(gaps.of_images(models[:3]))).sum() == 18
    assert np.isnan(gaps.of_images(models[:1])).all()
    assert report.gaps_table(models[:1]).splitlines()[2] == "| under | 3 | – | – | – | undecided |"
    # 3.182 is Student's t at 97.5 % with three degrees of freedom
    mean, half = gaps.interval(np.array([1.0, 2.0, np.nan, 3.0, 6.0]))
    assert (mean, half) == (3.0, pytest.approx(3.1824 * math.sqrt(14 / 3 / 4), rel=1e-4))
    assert gaps.interval(np.array([1.0]))[1] == math.inf
    assert report.folds_sentence([0, 1, 2, 3]).startswith("4 folds of 4: an image's loss")
    assert report.folds_sentence([0]).startswith("One fold")


def test_report_says_which_layers_are_behind_the_classical_methods():
    methods = {"noisy": (17, 0), "non-local means": (24, 0), "total variation": (24.7, 0), "plain DnCNN": (24, 0)}
    assert report.shortfall_sentence(methods | {"over, GD, k = 12": (25, 0)}) == ""
    text = report.shortfall_sentence(methods | {"over, GD, k = 12": (25, 0), "under, GD, k = 12": (19, 0)})
    assert text == "Not trained long enough to pass total variation (24.70 dB): under, GD, k = 12. Give more --epochs."


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_ranks_share_the_batches_of_one_process(task, noise):
    pairs = data.TrainingPairs(task, 0, 16, noise)
    alone = list(pairs.batches(2, 4))
    shares = [list(pairs.batches(2, 4, rank, 3)) for rank in range(3)]
    assert [count for *_, count in alone] == [4, 2]
    for step, (clean, noisy, count) in enumerate(alone):
        for rank, share in enumerate(shares):
            assert torch.equal(share[step][0], clean[rank::3])
            assert torch.equal(share[step][1], noisy[rank::3])
            assert share[step][2] == count
    again = [noisy for epoch in (2, 3) for _, noisy, _ in pairs.batches(epoch, 6)]
    assert not torch.equal(*again)


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_crops_are_a_function_of_seed_epoch_and_image(task, noise):
    def crops(pairs, epoch, batch_size, ranks=1):
        """Clean and noisy crops of an epoch by the training image that they are of, a window of it that is found."""
        found = {}
        for rank in range(ranks):
            for clean, noisy, _ in pairs.batches(epoch, batch_size, rank, ranks):
                for crop, other in zip(clean[:, 0], noisy[:, 0], strict=True):
                    windows = task.clean[pairs.index, 0].unfold(1, 16, 1).unfold(2, 16, 1)
                    ((position, top, left),) = (windows == crop).all((-1, -2)).nonzero().tolist()
                    assert position not in found
                    found[position] = (top, left), other
        return found

    pairs = data.TrainingPairs(task, 0, 16, noise)
    expected = crops(pairs, 3, 6)
    assert sorted(expected) == list(range(6))
    again = data.TrainingPairs(task, 0, 16, noise)
    for shared in ((4,), (1,), (4, 3)):
        for position, (corner, noisy) in crops(again, 3, *shared).items():
            assert corner == expected[position][0]
            assert torch.equal(noisy, expected[position][1])
    corners = lambda pairs, epoch: [corner for _, (corner, _) in sorted(crops(pairs, epoch, 6).items())]
    # of each image its own, and others with another epoch
    assert len(set(corners(pairs, 3))) > 3
    assert corners(pairs, 3) != corners(pairs, 4)
    if noise == "fixed":
        whole = task.pairs(pairs.index, 0)[1]
        for position, ((top, left), noisy) in expected.items():
            assert torch.equal(noisy, whole[position, 0, top : top + 16, left : left + 16])


def test_fixed_noise_stays_with_the_image(task):
    whole = {noise: data.TrainingPairs(task, 0, 32, noise) for noise in data.NOISE}
    for noise, pairs in whole.items():
        first, second = (
            {c.sum().item(): n for batch in pairs.batches(epoch, 6) for c, n in zip(*batch[:2], strict=True)}
            for epoch in (0, 1)
        )
        same = [torch.equal(noisy, second[key]) for key, noisy in first.items()]
        assert all(same) if noise == "fixed" else not any(same)


def test_photographs_are_180_squares():
    tiles = images.photographs()
    assert tiles.shape == (44, 1, 180, 180)
    assert tiles.min() >= 0
    assert tiles.max() <= 1
    assert (tiles.flatten(1).std(1) > 0.01).all()


@pytest.mark.skipif(not BSD.is_dir(), reason=f"the BSD images are not in {BSD}")
def test_bsd_is_split_into_100_and_300():
    clean, skipped = images.load_folder(BSD)
    assert clean.shape == (400, 1, 180, 180)
    assert skipped == 0
    assert [len(index) for index in data.DenoisingTask(clean).split(0)] == [100, 300]


def test_folder_takes_colour_and_16_bits_and_the_middle(tmp_path):
    ramp = np.arange(40, dtype=np.uint16) * 1000
    Image.fromarray(np.tile(ramp, (36, 1))).save(tmp_path / "deep.png")
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (50, 32), (255, 255, 255)).save(tmp_path / "inner" / "white.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    clean, skipped = images.load_folder(tmp_path, 32)
    assert skipped == 0
    torch.testing.assert_close(clean[0, 0, 0], torch.from_numpy(ramp[4:36].astype(np.float32)) / 65535)
    assert (clean[1] > 0.99).all()


# -- images as people have them


def written(path, pixels, mode=None, **options):
    Image.fromarray(pixels, mode).save(path, **options) if mode else Image.fromarray(pixels).save(path, **options)
    return images.read_gray(path)


RAMP = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)


def png(path, pixels):
    """A PNG of 16 bits a channel, ``[H, W, channels]``, which Pillow itself does not write."""
    height, width, channels = pixels.shape
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return images.read_gray(path)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16], ids=["8 bits", "16 bits"])
def test_gray_of_8_and_16_bits(tmp_path, suffix, dtype):
    white = np.iinfo(dtype).max
    pixels = (RAMP * white).round().astype(dtype)
    gray = written(tmp_path / f"x.{suffix}", pixels)
    assert gray.dtype == np.float32
    np.testing.assert_array_equal(gray, pixels.astype(np.float32) / white)


def test_float_tiff_is_read_as_it_is_or_refused(tmp_path):
    np.testing.assert_array_equal(written(tmp_path / "x.tiff", RAMP), RAMP)
    for wrong in (RAMP * 255, RAMP - 0.5, np.where(RAMP > 0.9, np.nan, RAMP)):
        with pytest.raises(ValueError, match=r"floating-point numbers .* expected finite ones in \[0, 1\]; scale them"):
            written(tmp_path / "x.tiff", wrong.astype(np.float32))


def test_integers_of_32_bits_are_those_of_16_or_refused(tmp_path):
    pixels = (RAMP * 65535).round().astype(np.int32)
    np.testing.assert_array_equal(written(tmp_path / "x.tiff", pixels), pixels.astype(np.float32) / 65535)
    for wrong in (pixels * 1000, pixels // 300, pixels - 1):
        with pytest.raises(ValueError, match=r"32-bit integers .* whose white is not known"):
            written(tmp_path / "x.tiff", wrong)


def test_colours_of_16_bits(tmp_path):
    pixels = (RAMP * 65535).round().astype(np.uint16)
    for channels in (1, 3):
        gray = png(tmp_path / "x.png", np.repeat(pixels[..., None], channels, 2))
        np.testing.assert_allclose(gray, RAMP, atol=1 / 255)
    opaque = np.full_like(pixels, 65535)
    for layers in ([pixels, opaque], [pixels, pixels, pixels, opaque]):
        np.testing.assert_allclose(png(tmp_path / "x.png", np.stack(layers, 2)), RAMP, atol=1 / 255)


def test_colours_become_luminance(tmp_path):
    colours = np.zeros((1, 4, 3), np.uint8)
    colours[0, :3] = np.eye(3) * 255
    gray = written(tmp_path / "x.png", colours)
    np.testing.assert_allclose(gray[0], [0.299, 0.587, 0.114, 0], atol=1 / 255)


def test_alpha_is_laid_over_white(tmp_path):
    layers = np.zeros((1, 3, 4), np.uint8)
    layers[..., 3] = [0, 128, 255]
    np.testing.assert_allclose(written(tmp_path / "x.png", layers)[0], [1, 127 / 255, 0], atol=1 / 255)
    np.testing.assert_allclose(
        written(tmp_path / "x.png", layers[..., [0, 3]], "LA")[0], [1, 127 / 255, 0], atol=1 / 255
    )


def test_palettes_are_the_colours_they_stand_for(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8), "P")
    image.putpalette([200, 200, 200, 10, 10, 10, 255, 255, 255, 0, 0, 0])
    for suffix, options in (("png", {}), ("gif", {}), ("png", {"transparency": 3})):
        image.save(tmp_path / f"x.{suffix}", **options)
        last = 1 if options else 0
        np.testing.assert_allclose(
            images.read_gray(tmp_path / f"x.{suffix}")[0], [200 / 255, 10 / 255, 1, last], atol=1 / 255
        )


def test_bilevel_and_cmyk(tmp_path):
    Image.fromarray(RAMP > 0.5).save(tmp_path / "x.png")
    np.testing.assert_array_equal(images.read_gray(tmp_path / "x.png"), (RAMP > 0.5).astype(np.float32))
    gray = Image.fromarray((RAMP * 255).astype(np.uint8))
    for suffix in ("tiff", "jpg"):
        gray.convert("RGB").convert("CMYK").save(
            tmp_path / f"x.{suffix}", **({"quality": 100} if suffix == "jpg" else {})
        )
        np.testing.assert_allclose(images.read_gray(tmp_path / f"x.{suffix}"), RAMP, atol=4 / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path, orientation):
    image = Image.fromarray((RAMP * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    # how the camera held the picture, undone by the reader
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(orientation, [])
    for operation in undo:
        image = image.transpose(Image.Transpose(operation))
    image.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_allclose(images.read_gray(tmp_path / "x.png"), RAMP, atol=1 / 255)


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff", "webp"])
def test_animations_are_refused_by_name(tmp_path, suffix):
    frames = [Image.fromarray((RAMP * level).astype(np.uint8)) for level in (255, 100, 30)]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 3 frames; save the one that is meant"):
        images.read_gray(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "gif", "bmp", "webp"])
def test_damaged_files_are_refused_by_name(tmp_path, suffix):
    whole = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(whole)
    content = whole.read_bytes()
    for kept in (0, 1, 20, len(content) // 2, len(content) - 40):
        whole.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"cannot be read: ."):
            images.read_gray(whole)
    with pytest.raises(FileNotFoundError):
        images.read_gray(tmp_path / "none.png")


def test_tiny_and_huge_images(tmp_path, monkeypatch):
    assert written(tmp_path / "x.png", np.full((1, 1), 51, np.uint8)).tolist() == [[pytest.approx(0.2)]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert written(tmp_path / "x.png", np.zeros((4, 4), np.uint8)).shape == (4, 4)
    with pytest.raises(ValueError, match=r"cannot be read: DecompressionBombError: Image size \(64 pixels\) exceeds"):
        written(tmp_path / "x.png", np.zeros((8, 8), np.uint8))


def test_folder_names_what_it_leaves_out(tmp_path):
    for name in ("a", "b"):
        written(tmp_path / f"{name}.png", np.zeros((8, 8), np.uint8))
    written(tmp_path / "small.png", np.zeros((3, 8), np.uint8))
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.warns(UserWarning, match="skipped") as caught:
        clean, skipped = images.load_folder(tmp_path, 8)
    assert (len(clean), skipped) == (2, 2)
    assert "small.png: 8×3 pixels" in str(caught[0].message)
    assert "torn.png: cannot be read" in str(caught[1].message)


# -- models


@pytest.mark.parametrize("algorithm", ["gd", "nag"])
def test_energy_layer_minimises_the_energy(task, algorithm):
    X = task.clean[:2].double()
    f, g = torch.rand(2, *X.shape, dtype=torch.float64)
    y = energy_layer(f, g, X, algorithm=algorithm, num_steps=200, step_size=0.4)
    torch.testing.assert_close(y, (X - g) / (1 + f * f), rtol=1e-10, atol=1e-12)
    without = energy_layer(f, None, X, algorithm=algorithm, num_steps=200, step_size=0.4)
    torch.testing.assert_close(without, X / (1 + f * f), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["gd", "nag"])
def test_energy_layer_and_its_gradients_are_those_of_the_eager_loop(task, algorithm):
    inputs = [*torch.randn(2, 3, 1, 8, 8), task.clean[:3, :, :8, :8]]

    def run(dtype, backend):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        step = torch.linspace(0.05, 0.2, 3, dtype=dtype).reshape(3, 1, 1, 1).requires_grad_()
        y = energy_layer(*leaves, algorithm=algorithm, num_steps=7, step_size=step, backend=backend)
        grads = torch.autograd.grad((y * y.detach().cos()).sum(), [*leaves, step])
        return y.detach(), *grads

    exact, eager, fused = run(torch.float64, "eager"), run(torch.float32, "eager"), run(torch.float32, "auto")
    for name, *values in zip(("y", "f", "g", "X", "step_size"), fused, exact, eager, strict=True):
        assert_as_close_as_eager(*values, what=name)


def test_sizes_are_those_of_the_cases():
    convolutions = lambda net: [m for m in net if isinstance(m, torch.nn.Conv2d)]
    for case, size in CASES.items():
        model = make_model(Trial(case, "gd", 3, 0), QUICK)
        assert [m.out_channels for m in convolutions(model.f)] == [size.f_channels] * 3 + [1]
        assert (model.g is None) == (case == "under")
    hybrid, plain = (make_model(Trial(case, "gd", 3, 0), QUICK) for case in ("about-right", "dncnn"))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (hybrid, plain)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.25)
    rows = convolutions(DnCNN(20))[1].weight.flatten(1).double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(20, dtype=torch.float64), atol=1e-5, rtol=0)


def test_initial_weights_are_paired_by_seed_and_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    first, deeper, other = (
        make_model(Trial("over", *rest), QUICK) for rest in (("gd", 1, 5), ("nag", 9, 5), ("gd", 1, 6))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.f[0].weight, deeper.f[0].weight)
    assert not torch.equal(first.f[0].weight, other.f[0].weight)


@pytest.mark.parametrize("case", ["about-right", "over", "dncnn"])
def test_residuals_start_near_zero(task, case):
    noisy = task.pairs(torch.arange(24), 0)[1]
    for seed in range(3):
        model = make_model(Trial(case, "gd", 3, seed), QUICK).train()
        residual = (model.h if case == "dncnn" else model.g)(noisy)
        assert 0.05 * noisy.norm() < residual.norm() < 0.3 * noisy.norm()


@pytest.mark.parametrize("algorithm", ["gd", "nag"])
def test_guarded_step_is_inside_the_stable_region_of_every_image(algorithm):
    f = torch.tensor([0.0, 1.0, 30.0, 1e4]).reshape(4, 1, 1, 1) * torch.rand(4, 1, 8, 8)
    step = StepSize("guarded", algorithm, 0.9)
    with torch.no_grad():
        step.value.fill_(-9.0)  # as far as training may push it
    L = 1 + f.square().amax((1, 2, 3))
    limit = 2 / (1 + L) if algorithm == "gd" else 4 / (1 + 3 * L)
    assert (step(f).flatten() < limit).all()
    y = energy_layer(f, None, torch.ones_like(f), algorithm=algorithm, num_steps=500, step_size=step(f))
    assert (y.abs() <= 2).all()


def test_guard_prevents_the_divergence_of_the_unguarded_run(task):
    losses = measurements.guard(task, dataclasses.replace(QUICK, learning_rate=1e-2))
    assert losses["learned"][-1] == math.inf
    assert len(losses["guarded"]) == 3
    assert losses["guarded"][-1] < losses["guarded"][0] < 1


def test_what_is_kept_for_backward_does_not_grow_with_the_steps(task):
    saved = measurements.saved_for_backward(task)
    assert saved["eager"][48] > 3 * saved["eager"][12]
    if "cpu" in uk.available_backends():
        assert len(set(saved["auto"].values())) == 1


def test_speed_is_measured(task):
    rows = measurements.speed(task)
    assert [row["what"] for row in rows] == ["GD, layer", "GD, training step", "NAG, layer", "NAG, training step"]
    assert all(row["eager_ms"] > 0 and row["fused_ms"] > 0 for row in rows)


# -- quality


def test_quality_is_psnr_and_ssim_of_each_image(task):
    clean = task.clean[:3]
    noisy = (clean + 0.1).clamp(0, 1)
    psnr, ssim = evaluation.quality(clean, noisy)
    torch.testing.assert_close(psnr, -10 * torch.log10((noisy - clean).square().mean((1, 2, 3))))
    torch.testing.assert_close(evaluation.quality(clean, clean)[1], torch.ones(3))
    assert (ssim < 1).all()


def test_classical_methods_beat_the_noisy_image(task):
    clean, noisy = task.pairs(task.split(0)[0], 0)
    restored = evaluation.ClassicalMethods(clean, noisy).restore(noisy)
    before = evaluation.quality(clean, noisy)[0].mean()
    assert restored.keys() == {"non-local means", "total variation"}
    for images_ in restored.values():
        assert evaluation.quality(clean, images_)[0].mean() > before + 1


def test_training_denoises_images_it_never_saw():
    task = data.DenoisingTask(images.photographs(60)[::5].clone())
    training = Training(epochs=25, batch_size=2, crop=32, noise="fresh", learning_rate=2e-2)
    row = train.train_one(task, Trial("about-right", "nag", 6, 0), training)
    assert row["test_psnr"] > row["test_psnr_noisy"] + 3
    assert row["gap"] == row["test_loss"] - row["train_loss"]
    assert not row["diverged"]


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_mixed_precision_trains(task, autocast):
    rows = [train.train_one(task, GD, dataclasses.replace(QUICK, epochs=20, autocast=x)) for x in ("none", autocast)]
    assert rows[1]["test_psnr"] == pytest.approx(rows[0]["test_psnr"], abs=1.5)


def test_recording_graphs_leaves_the_model_as_it_was(task, monkeypatch):
    def make_graphed_callables(module, sample):
        # what a recording does to a model: steps of its own, in training mode
        for _ in range(3):
            module(*sample).sum().backward()
        module.zero_grad()
        assert module.training
        assert sample[0].shape == (2, 1, 16, 16)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(train, "check_graphs", lambda *arguments: None)
    training = dataclasses.replace(QUICK, batch_size=2)
    rows = [train.train_one(task, GD, training, graphs=graphs) for graphs in (False, True)]
    assert [rows[0][name] for name in TIMELESS] == [rows[1][name] for name in TIMELESS]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device, and there is none")
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_cuda_graphs_train_as_launches_do(task, autocast):
    training = dataclasses.replace(QUICK, batch_size=2, autocast=autocast)
    rows = [train.train_one(task, GD, training, device="cuda", graphs=graphs) for graphs in (False, True)]
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=1e-3 if autocast == "none" else 0.05)


def test_cuda_graphs_are_refused_where_they_cannot_be_recorded(folder, tmp_path, monkeypatch, capsys):
    assert cli.main(command(folder, tmp_path / "run", "--graphs")) == 1
    assert "--graphs: CUDA graphs need --device cuda; got cpu" in capsys.readouterr().err
    gpu = torch.device("cuda")
    train.check_graphs(gpu, 100, 10)
    with pytest.raises(ValueError, match="100 training images are no multiple of --batch-size 8"):
        train.check_graphs(gpu, 100, 8)
    monkeypatch.setattr(train.ranks, "ranks", lambda: 2)
    with pytest.raises(ValueError, match="one process trains a model, got 2"):
        train.check_graphs(gpu, 100, 10)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_schedule_is_a_function_of_the_epoch(schedule):
    rates = [train.learning_rate(Training(100, schedule=schedule), epoch) for epoch in range(100)]
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert (rates[-1] < 1e-3) == (schedule != "constant")


# -- runs


def test_run_writes_table_figures_weights_and_report(small_run):
    results = pd.read_parquet(small_run / "results.parquet")
    assert results["case"].tolist() == ["about-right", "dncnn"]
    assert sorted(figure.name for figure in small_run.glob("*.png")) == [
        "figure7_generalization_gap.png",
        "figure7_images.png",
        "quality.png",
    ]
    assert "| about-right | GD | 2 | 465 |" in (small_run / "report.md").read_text()
    assert len(list((small_run / "models").iterdir())) == 2
    assert not (small_run / "checkpoints").exists()
    settings = json.loads((small_run / "config.json").read_text())["settings"]
    assert (settings["images"], settings["noise"]) == (24, "fresh")


def test_report_compares_methods_speed_and_guard(small_run, folder, capsys):
    # the same run, finished: nothing is trained again
    assert cli.main(command(folder, small_run, no_speed=False)) == 0
    text = (small_run / "report.md").read_text()
    for phrase in ("non-local means", "plain DnCNN", "NAG, training step", "kept for backward", "(diverged)"):
        assert phrase in text
    # six epochs do not pass the classical methods, and the report does not hide it
    classical = json.loads((small_run / "baselines.json").read_text())
    strongest = max(("non-local means", "total variation"), key=lambda name: classical[name][0])
    layers = pd.read_parquet(small_run / "results.parquet").query("case != 'dncnn'")
    assert layers["test_psnr"].item() < classical[strongest][0]
    assert f"Not trained long enough to pass {strongest} (" in text


def test_apply_restores_an_image_with_trained_weights(small_run, task, tmp_path, capsys):
    noisy = task.pairs(torch.tensor([0]), 0)[1][0, 0, :21, :30]
    Image.fromarray((noisy * 255).round().byte().numpy()).save(tmp_path / "noisy.png")
    (file,) = (small_run / "models").glob("about-right-*")
    arguments = ["denoising", "apply", "--model", str(file), str(tmp_path / "noisy.png"), str(tmp_path / "out.tiff")]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out.tiff")
    model = make_model(Trial("about-right", "gd", 2, 0), QUICK)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in checkpoint.read(file, "about-right-gd-2-0")[0].items()}
    )
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images.read_gray(tmp_path / "noisy.png"))[None, None])[0, 0]
    actual = images.read_gray(tmp_path / "out.tiff")
    np.testing.assert_allclose(actual, expected.clamp(0, 1), atol=0.51 / 255)
    assert not np.allclose(actual, noisy, atol=0.05)


@pytest.mark.parametrize("name", ["about-right", "over"])
def test_models_of_the_package_restore_photographs_they_never_saw(name, tmp_path):
    photographs = data.DenoisingTask(images.photographs()[:2])
    clean, noisy = photographs.pairs(torch.tensor([0, 1]), 0)
    before, after = (evaluation.psnr(clean, x) for x in (noisy, evaluation.restore(apply.load(name), noisy)))
    assert (after > before + 5).all()
    written = tmp_path / "noisy.png"
    Image.fromarray((noisy[0, 0] * 255).round().byte().numpy()).save(written)
    assert cli.main(["denoising", "apply", "--model", name, str(written), str(tmp_path / "restored.png")]) == 0
    restored = torch.from_numpy(images.read_gray(tmp_path / "restored.png"))[None, None]
    assert evaluation.psnr(clean[:1], restored).item() == pytest.approx(after[0].item(), abs=0.1)
    assert sum(file.stat().st_size for file in apply.TRAINED.values()) < 100e3


@pytest.fixture
def publish():
    """The script beside the pages."""
    spec = importlib.util.spec_from_file_location("publish", ROOT / "docs" / "denoising" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_published_numbers_are_those_of_the_tables(publish):
    text = publish.sections()
    for page in (file.read_text(encoding="utf-8") for file in publish.PAGES):
        assert {name for name in text if f"<!-- generated: {name} -->" in page} == set(text)
        assert publish.report.filled(page, text) == page
        for figure in re.findall(r"\]\((\S+\.png)\)", page):
            assert (publish.FOLDER / figure).is_file()
    for models in map(publish.read, ("models", "fixed")):
        assert not models.duplicated(publish.IDENTITY).any()
        np.testing.assert_allclose(models["gap"], models["test_loss"] - models["train_loss"], atol=1e-12)


def test_a_run_is_collected_and_published(publish, small_run, folder, tmp_path, monkeypatch, capsys):
    assert cli.main(command(folder, small_run, no_speed=False)) == 0
    page = tmp_path / "README.md"
    page.write_text(
        "<!-- generated: protocol -->\nan earlier table\n<!-- end -->\n<!-- generated: methods -->\n<!-- end -->\n"
    )
    monkeypatch.setattr(publish, "FOLDER", tmp_path)
    monkeypatch.setattr(publish, "PAGES", (page,))
    assert publish.main(["--collect", "models", str(small_run)]) == 0
    text = page.read_text()
    assert "| about right | 1 of 80 | 2 | 1 | 6 | 16 | fresh |" in text
    assert "| about-right, GD, k = 2 |" in text
    assert "an earlier table" not in text
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_methods_are_compared_on_the_same_images(publish, folder, tmp_path, monkeypatch):
    few = images.photographs(40)[::60]
    monkeypatch.setattr(publish, "FOLDER", tmp_path)
    monkeypatch.setattr(publish.images, "SIZE", 32)
    monkeypatch.setattr(publish.images, "photographs", lambda: few)
    (tmp_path / "results").mkdir()
    rows = pd.read_parquet(publish.compare(folder))
    # a quarter of 24 images is trained on, and every sixth of the others looked at
    assert rows.groupby("set")["image"].nunique().to_dict() == {"bsd": 3, "photographs": len(few)}
    assert not rows.duplicated(["set", "method", "image"]).any()
    assert rows.groupby("method")["strength"].count()["noisy"] == 0
    assert rows.groupby("method")["strength"].count()["total variation"] == 3 + len(few)
    table = publish.compared(rows)
    (noisy,) = (line for line in table.splitlines() if line.startswith("| photographs") and "| noisy |" in line)
    psnr = rows[rows["set"] == "photographs"].pivot(index="image", columns="method", values="psnr")
    assert f"| {psnr['noisy'].mean():.2f} | +0.00 |" in noisy
    assert f"| {(psnr['over, GD, k = 12'] - psnr['noisy']).mean():+.2f} ±" in noisy


def test_apply_refuses_by_name(small_run, tmp_path, capsys):
    (file,) = (small_run / "models").glob("dncnn-*")
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "x.png").read_bytes()[:30])
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:100])
    checkpoint.write(tmp_path / "other.safetensors", "mlp-16-adam-gd-3-100", {"a": torch.ones(1)}, {})
    for model, source, target, message in (
        (file, "x.png", "x.doc", "OUT: .*x.doc: expected the suffix of an image"),
        (file, "torn.png", "y.png", "IN: .*torn.png: cannot be read"),
        (file, "none.png", "y.png", "none.png"),
        (tmp_path / "none.safetensors", "x.png", "y.png", "none.safetensors: not a readable model"),
        (tmp_path / "torn.safetensors", "x.png", "y.png", "torn.safetensors: not a readable model"),
        (
            tmp_path / "other.safetensors",
            "x.png",
            "y.png",
            "other.safetensors: holds 'mlp-.*', which is no denoising model",
        ),
    ):
        arguments = ["denoising", "apply", "--model", model, tmp_path / source, tmp_path / target]
        assert cli.main(list(map(str, arguments))) == 1
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize("autocast", ["none", "float16"])
def test_checkpoint_holds_the_whole_state(task, tmp_path, autocast):
    training = dataclasses.replace(QUICK, epochs=6, noise="fresh", autocast=autocast)
    whole, first, second = (train.Trainer(task, GD, training) for _ in range(3))
    for _ in range(6):
        whole.train_epoch()
    for _ in range(2):
        first.train_epoch()
    checkpoint.write(tmp_path / "state.safetensors", GD.name, *first.state())
    second.load(tmp_path / "state.safetensors")
    assert second.epoch == 2
    for _ in range(4):
        second.train_epoch()
    assert second.losses == whole.losses
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name


def test_interrupted_run_ends_with_the_same_table(small_run, folder, tmp_path, monkeypatch, capsys):
    whole, step, epochs = train.Trainer.train_epoch, train.Trainer.train_step, []

    def interrupted(self, *batch):
        loss = step(self, *batch)
        # in the middle of an epoch of the second model, whose weights are then of no epoch
        if len(epochs) == 10:
            raise KeyboardInterrupt
        return loss

    def counted(self):
        epochs.append(self.epoch)
        return whole(self)

    out = tmp_path / "run"
    monkeypatch.setattr(train.Trainer, "train_epoch", counted)
    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    assert cli.main(command(folder, out)) == 130
    assert len(pd.read_parquet(out / "results.parquet")) == 1
    assert len(list((out / "checkpoints").iterdir())) == 1
    epochs.clear()
    monkeypatch.setattr(train.Trainer, "train_step", step)
    assert cli.main(command(folder, out)) == 0
    assert epochs == [3, 4, 5]
    pd.testing.assert_frame_equal(table(out), table(small_run), check_exact=True)


def test_workers_train_the_same_models(small_run, folder, tmp_path):
    assert cli.main(command(folder, tmp_path / "run", "--workers", 2)) == 0
    pd.testing.assert_frame_equal(table(tmp_path / "run"), table(small_run), check_exact=True)


def test_model_that_diverges_says_so_and_the_others_go_on(folder, tmp_path, capsys):
    free = ["--step-size", "fixed", "--step-size-start", 1.6, "--depths", 2, 40]
    assert cli.main(command(folder, tmp_path / "run", *free)) == 0
    results = pd.read_parquet(tmp_path / "run" / "results.parquet").set_index("num_steps")
    assert results["diverged"].to_dict() == {40: True, 2: False, 0: False}
    # it is no part of a mean
    (line,) = (line for line in (tmp_path / "run" / "report.md").read_text().splitlines() if "1 of 1" in line)
    assert line.count("–") == 5


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_model_that_explodes_to_a_number_has_diverged(folder, tmp_path, capsys, kind):
    """No two images differ by a squared error of more than 1 a pixel."""
    assert cli.main(command(folder, tmp_path / "run", "--step-size", kind, "--step-size-start", 50)) == 1
    assert "every model with a layer diverged; take a smaller" in capsys.readouterr().err
    results = pd.read_parquet(tmp_path / "run" / "results.parquet").set_index("num_steps")
    assert 1 < results.loc[2, "train_loss"] < np.inf
    assert results["diverged"].to_dict() == {2: True, 0: False}


def test_presets_cover_figure_7():
    grid, training = PRESETS["paper"]
    assert training.epochs == 3000
    assert training.crop == 180
    trials = grid.trials()
    assert len(trials) == 3 * 2 * len(grid.depths) * grid.seeds + grid.seeds
    assert 12 in PRESETS["quick"][0].depths
    assert finished_trials(pd.DataFrame(), Trial) == set()
    assert Grid((1,), 1).trials(7)[0].seed == 7


# -- many processes


def torchrun(folder, out, *more, restarts=0):
    arguments = [str(x) for x in command(folder, out, *more)[1:]]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}",
            "--standalone", "-m", "unrolled_kernels.experiments.denoising", *arguments]  # fmt: skip


def test_two_processes_train_as_one(folder, tmp_path):
    # a batch of 4 and one of 2, shared by two ranks, batch normalisation included; with a sixth epoch this seed seems
    # to meet a kink of the energy, taken on different sides: 9e-4 instead of 2e-6; other starts do not
    epochs = ("--epochs", 5)
    run = subprocess.run(torchrun(folder, tmp_path / "run", *epochs), capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert cli.main(command(folder, tmp_path / "whole", *epochs)) == 0
    pd.testing.assert_frame_equal(table(tmp_path / "run"), table(tmp_path / "whole"), rtol=2e-5)


@pytest.mark.slow
def test_killed_rank_restarts_from_the_checkpoint(folder, tmp_path):
    out, more = tmp_path / "run", ("--epochs", 60, "--checkpoint-seconds", 0.05)
    log = (tmp_path / "log.txt").open("w")
    run = subprocess.Popen(torchrun(folder, out, *more, restarts=1), cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/*.safetensors")):
        assert run.poll() is None, (tmp_path / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert run.wait(timeout=240) == 0, (tmp_path / "log.txt").read_text()
    uninterrupted = tmp_path / "whole"
    assert cli.main(command(folder, uninterrupted, *more)) == 0
    pd.testing.assert_frame_equal(table(out), table(uninterrupted), rtol=1e-3)


# -- refusals


def test_broken_and_small_images_are_named_and_counted(folder, tmp_path, capsys):
    for file in sorted(folder.iterdir())[:4]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "truncated.png").write_bytes((tmp_path / "00.png").read_bytes()[:200])
    Image.new("L", (31, 90)).save(tmp_path / "small.png")
    with pytest.warns(UserWarning, match="skipped") as warned:
        clean, skipped = images.load_folder(tmp_path, 32)
    assert (len(clean), skipped) == (4, 2)
    said = [str(warning.message) for warning in warned]
    assert any("truncated.png" in message for message in said)
    assert any("small.png: 31×90 pixels, expected at least 32×32" in message for message in said)


@pytest.mark.filterwarnings("ignore:--data")
def test_folder_without_usable_images_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(command(tmp_path / "nowhere", out)) == 1
    assert f"--data: {tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.main(command(empty, out)) == 1
    assert "expected at least 2 images of 32×32 pixels or more, found 0 (0 skipped)" in capsys.readouterr().err
    assert cli.main(command(folder, out, "--size", 37)) == 1
    assert "found 0 (24 skipped); give another folder or a smaller --size" in capsys.readouterr().err
    assert not out.exists()


def test_damaged_or_foreign_checkpoint_names_the_file(task, tmp_path):
    file = tmp_path / "state.safetensors"
    checkpoint.write(file, GD.name, *train.Trainer(task, GD, QUICK).state())
    other = dataclasses.replace(GD, num_steps=4)
    files = train.Files(checkpoint=file)
    with pytest.raises(
        ValueError, match=r"state\.safetensors: a checkpoint of model about-right-gd-3-0, expected .*-4-0"
    ):
        train.train_one(task, other, QUICK, files=files)
    wider = make_model(Trial("over", "gd", 3, 0), QUICK)
    checkpoint.write(file, GD.name, to_tensors(wider), train.Trainer(task, GD, QUICK).state()[1])
    with pytest.raises(ValueError, match=r"state\.safetensors: a checkpoint of another model"):
        train.train_one(task, GD, QUICK, files=files)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"state\.safetensors: not a readable checkpoint \(truncated"):
        train.train_one(task, GD, QUICK, files=files)


def test_directory_of_another_run_is_refused(small_run, folder, capsys):
    assert cli.main(command(folder, small_run, "--learning-rate", 0.5)) == 1
    message = capsys.readouterr().err
    assert "learning_rate (there 0.02, asked 0.5)" in message
    assert "sha256" not in message


def test_tensorboard_writes_logs_or_says_how_to_get_it(folder, tmp_path, capsys):
    code = cli.main(command(folder, tmp_path / "run", "--tensorboard"))
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert code == 1
        assert "pip install tensorboard" in capsys.readouterr().err
    else:
        assert code == 0
        assert len(list((tmp_path / "run" / "tensorboard").rglob("events*"))) == 2


def test_example_denoises():
    example = runpy.run_path(str(ROOT / "examples" / "denoising_layer.py"))
    before, after = example["main"](steps=150)
    assert after < 0.2 * before
