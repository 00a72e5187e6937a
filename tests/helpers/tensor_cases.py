"""Functions of spectra, images, shapes and places, normalizations and losses: more rows for the table."""

import torch
import torch.nn.functional as F
from operation_cases import at, channels, each, grid, image, masked, positive, rows_of, square, unit


def changed(function):
    """A function that changes a tensor in place."""

    def run(h):
        value = h * 1.5
        function(value)
        return value

    return run


def _labels(n):
    return torch.arange(n) % 6


def _set_mask(v):
    v[v > 0] = 0.5


def _set_slice(v):
    v[:, :2] = v[:, 2:4].clone() ** 2


def _input_gradient(h):
    with torch.enable_grad():
        h = h if h.requires_grad else h.requires_grad_()
        return torch.autograd.grad(h.sin().square().sum(), h, create_graph=True)[0]


FOURIER = {
    "torch.fft.fft": lambda h: torch.fft.fft(h).abs(),
    "torch.fft.rfft": lambda h: torch.view_as_real(torch.fft.rfft(h)).square(),
    "torch.fft.irfft": lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.complex(at(7, 4), at(8, 4))).sin(),
    "torch.fft.fft2": lambda h: torch.fft.fft2(grid(h)).angle(),
    "torch.stft": lambda h: (
        torch.stft(channels(h)[:, 0], 4, window=torch.ones(4, dtype=h.dtype), return_complex=True).real
    ),
    "torch.complex": lambda h: torch.complex(h[:, :3], h[:, 3:]).exp().imag,
    "torch.polar": lambda h: torch.polar(positive(h[:, :3]), h[:, 3:]).real,
    "torch.view_as_complex": lambda h: torch.view_as_complex(h.unflatten(1, (3, 2))).square().real,
    "torch.sgn of complex": lambda h: torch.sgn(torch.complex(h[:, :3], h[:, 3:])).real,
}

IMAGES = {
    **each(F, "F", "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d", lambda f, h: f(image(h), 2)),
    **each(F, "F", "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d", lambda f, h: f(channels(h), 2)),
    **each(
        F,
        "F",
        "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d",
        lambda f, h: f(channels(h).unflatten(2, (2, 2, 2)), 2),
    ),
    "F.lp_pool1d": lambda h: F.lp_pool1d(channels(h), 2.0, 2),
    "F.lp_pool2d": lambda h: F.lp_pool2d(image(h).square(), 3.0, 2, stride=2),
    "F.lp_pool2d, padding": masked(lambda h: F.lp_pool2d(image(h), 2.0, 2, stride=2)),
    "F.fractional_max_pool2d": lambda h: F.fractional_max_pool2d(
        image(h), 2, output_size=2, _random_samples=torch.full((len(h), 1, 2), 0.4, dtype=h.dtype)
    ),
    "F.max_unpool2d": lambda h: F.max_unpool2d(*F.max_pool2d(image(h), 2, return_indices=True), 2),
    "F.unfold": lambda h: F.unfold(image(h), 2),
    "F.fold": lambda h: F.fold(F.unfold(image(h), 2).square(), (4, 4), 2),
    **{
        f"F.interpolate, {mode}": lambda h, mode=mode: F.interpolate(image(h), scale_factor=1.5, mode=mode)
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    },
    "F.interpolate, antialias": lambda h: F.interpolate(image(h), size=3, mode="bilinear", antialias=True),
    "F.interpolate, linear": lambda h: F.interpolate(channels(h), scale_factor=1.5, mode="linear"),
    "F.interpolate, trilinear": lambda h: F.interpolate(
        channels(h).unflatten(2, (2, 2, 2)), scale_factor=2, mode="trilinear"
    ),
    "F.grid_sample, of the image": lambda h: F.grid_sample(
        image(h), (at(9, 1, 3, 3, 2) * 0.4).expand(len(h), -1, -1, -1), align_corners=False
    ),
    "F.grid_sample, of the grid": lambda h: F.grid_sample(
        at(10, 1, 1, 4, 4).expand(len(h), -1, -1, -1), torch.tanh(h).unflatten(1, (1, 3, 2)), align_corners=False
    ),
    "F.grid_sample, of both": lambda h: F.grid_sample(
        image(h), torch.tanh(h).unflatten(1, (1, 3, 2)), padding_mode="border", align_corners=True
    ),
    "F.grid_sample, nearest": lambda h: F.grid_sample(
        image(h), (at(9, 1, 3, 3, 2) * 0.4).expand(len(h), -1, -1, -1), mode="nearest", align_corners=False
    ),
    "F.grid_sample, bicubic": lambda h: F.grid_sample(
        image(h), torch.tanh(h).unflatten(1, (1, 3, 2)), mode="bicubic", align_corners=False
    ),
    "F.grid_sample, volumes": lambda h: F.grid_sample(
        channels(h).unflatten(2, (2, 2, 2)), torch.tanh(h).unflatten(1, (1, 1, 2, 3)), align_corners=False
    ),
    "F.affine_grid": lambda h: F.affine_grid(grid(h), [len(h), 1, 2, 2], align_corners=False).sin(),
    **{
        f"F.pad, {mode}": lambda h, mode=mode: F.pad(image(h), (1, 1, 1, 1), mode=mode).sin()
        for mode in ("constant", "reflect", "replicate", "circular")
    },
    "F.pixel_shuffle": lambda h: F.pixel_shuffle(channels(h).unflatten(1, (2, 1)).reshape(len(h), 4, 2, 2), 2).sin(),
    "F.channel_shuffle": lambda h: F.channel_shuffle(image(h).reshape(len(h), 4, 2, 2), 2).sin(),
    "F.local_response_norm": lambda h: F.local_response_norm(channels(h), 2),
    **{
        f"F.conv{'_transpose' * transposed}{d}d": lambda h, d=d, transposed=transposed: getattr(
            F, f"conv{'_transpose' * transposed}{d}d"
        )((h @ at(1, 6, 16)).reshape(len(h), 2, *((8,), (4, 2), (2, 2, 2))[d - 1]), at(11, 2, 2, *(2,) * d))
        for d in (1, 2, 3)
        for transposed in (0, 1)
    },
    "F.conv2d, weights of the example": lambda h: F.conv2d(
        image(h).reshape(1, len(h), 4, 4), h[:, :4].reshape(len(h), 1, 2, 2), groups=len(h)
    ).reshape(len(h), -1),
}

NORMS = {
    "F.layer_norm": lambda h: F.layer_norm(h, (6,)),
    "F.layer_norm, its affine part": lambda h: F.layer_norm(grid(h), (3,), at(12, 3), at(13, 3)),
    "F.rms_norm": lambda h: F.rms_norm(h, (6,), eps=1e-3),
    "F.rms_norm, padding": masked(lambda h: F.rms_norm(h, (6,))),
    "F.group_norm": lambda h: F.group_norm(h, 2),
    "F.instance_norm": lambda h: F.instance_norm(channels(h)),
    "F.batch_norm": lambda h: F.batch_norm(h, at(12, 6), at(13, 6).square()),
    "torch.native_layer_norm": lambda h: torch.native_layer_norm(h, (6,), None, None, 1e-5)[0],
    "torch.native_group_norm": lambda h: torch.native_group_norm(channels(h), None, None, len(h), 2, 8, 1, 1e-5)[0],
    "torch.native_batch_norm": lambda h: torch.native_batch_norm(
        h, None, None, at(12, 6), at(13, 6).square(), False, 0.1, 1e-5
    )[0],
    "torch.ops.aten.layer_norm": lambda h: torch.ops.aten.layer_norm.default(h, [6]),
    "torch._weight_norm": lambda h: (
        torch._weight_norm(square(h), h[:, :3].reshape(-1, 3, 1)[:1], 1)
        if len(h) == 1
        else torch.stack([torch._weight_norm(square(row[None])[0], row[:3, None], 0) for row in h])
    ),
}

LOSSES_OF_TORCH = {
    "F.mse_loss": lambda h: F.mse_loss(h, torch.zeros_like(h), reduction="none"),
    "F.l1_loss": lambda h: F.l1_loss(h, torch.zeros_like(h), reduction="none") * h,
    "F.smooth_l1_loss": lambda h: F.smooth_l1_loss(h, torch.zeros_like(h), reduction="none", beta=0.5),
    "F.huber_loss": lambda h: F.huber_loss(h, torch.zeros_like(h), reduction="none", delta=0.5),
    "F.kl_div": lambda h: F.kl_div(h, F.softmax(h.sin(), 1), reduction="none"),
    "F.binary_cross_entropy": lambda h: F.binary_cross_entropy(unit(h), torch.ones_like(h) * 0.3, reduction="none"),
    "F.binary_cross_entropy_with_logits": lambda h: F.binary_cross_entropy_with_logits(
        h, torch.ones_like(h) * 0.3, reduction="none"
    ),
    "F.poisson_nll_loss": lambda h: F.poisson_nll_loss(h, torch.ones_like(h), reduction="none"),
    "F.gaussian_nll_loss": lambda h: F.gaussian_nll_loss(h[:, :3], h[:, :3] * 0, positive(h[:, 3:]), reduction="none"),
    "F.soft_margin_loss": lambda h: F.soft_margin_loss(h, torch.ones_like(h), reduction="none"),
    "F.hinge_embedding_loss": lambda h: F.hinge_embedding_loss(h, -torch.ones_like(h), reduction="none") * h,
    "F.margin_ranking_loss": lambda h: F.margin_ranking_loss(
        h[:, :3], h[:, 3:], torch.ones_like(h[:, :3]), reduction="none", margin=0.1
    ),
    "F.nll_loss": lambda h: F.nll_loss(F.log_softmax(h, 1), _labels(len(h)), reduction="none")[:, None],
    "F.cross_entropy": lambda h: F.cross_entropy(h, _labels(len(h)), reduction="none")[:, None],
    "F.cross_entropy, smoothed": lambda h: F.cross_entropy(h, _labels(len(h)), reduction="none", label_smoothing=0.2)[
        :, None
    ],
    "F.multi_margin_loss": lambda h: F.multi_margin_loss(h, _labels(len(h)), reduction="none")[:, None],
    "F.multi_margin_loss, p=2": lambda h: F.multi_margin_loss(h, _labels(len(h)), p=2, reduction="none")[:, None],
    "F.multilabel_margin_loss": lambda h: F.multilabel_margin_loss(
        h, torch.tensor([[1, 3, -1, 0, 0, 0]]).expand(len(h), -1), reduction="none"
    )[:, None],
    "F.multilabel_soft_margin_loss": lambda h: F.multilabel_soft_margin_loss(h, torch.ones_like(h), reduction="none")[
        :, None
    ],
    "F.cosine_embedding_loss": lambda h: F.cosine_embedding_loss(
        h[:, :3], h[:, 3:], torch.ones(len(h)), reduction="none"
    )[:, None],
    "F.triplet_margin_loss": lambda h: F.triplet_margin_loss(
        h[:, :2], h[:, 2:4], h[:, 4:], margin=3.0, reduction="none"
    )[:, None],
    "F.ctc_loss": lambda h: F.ctc_loss(
        F.log_softmax(channels(h).permute(2, 0, 1), 2),
        torch.ones(len(h), 2, dtype=torch.long),
        torch.full((len(h),), 8),
        torch.full((len(h),), 2),
        reduction="none",
    )[:, None],
}

SHAPES = {
    "indexing": lambda h: h.sin()[:, [0, 0, 2]],
    "indexing with a mask": lambda h: h.sin()[:, torch.tensor([True, False, True, True, False, True])],
    "indexing with lists of rows": lambda h: h.sin()[torch.arange(len(h))[:, None], torch.tensor([[1, 3, 5]])],
    "boolean values": rows_of(lambda row: row[row > row.median()].sum()[None]),
    "torch.gather": lambda h: torch.gather(h.sin(), 1, h.argsort(1)[:, :3]),
    "torch.take_along_dim": lambda h: torch.take_along_dim(h.sin(), h.argsort(1)[:, :3], 1),
    "torch.index_select": lambda h: torch.index_select(h.sin(), 1, torch.tensor([1, 1, 4])),
    "torch.masked_select": lambda h: torch.masked_select(
        h.sin(), torch.tensor([True, False, True, True, False, True])
    ).reshape(len(h), 4),
    "torch.take": rows_of(lambda row: torch.take(row.sin(), torch.tensor([1, 1, 4]))),
    "torch.scatter": lambda h: torch.scatter(h.sin(), 1, torch.tensor([[1, 4]]).expand(len(h), -1), h[:, :2] ** 2),
    "torch.index_add": lambda h: torch.index_add(h.sin(), 1, torch.tensor([0, 0]), h[:, :2] ** 2),
    "torch.index_copy": lambda h: torch.index_copy(h.sin(), 1, torch.tensor([0, 3]), h[:, :2] ** 2),
    "torch.index_put": lambda h: torch.index_put(
        h.sin(), (torch.arange(len(h)), torch.full((len(h),), 2)), h[:, 0] ** 2, accumulate=True
    ),
    "torch.masked_scatter": lambda h: torch.masked_scatter(
        h.sin(), torch.tensor([True, False, True, True, False, True]).expand_as(h), h.square()
    ),
    "torch.roll": lambda h: torch.roll(h.sin(), 2, 1),
    "torch.flip": lambda h: torch.flip(h.sin(), [1]),
    "torch.rot90": lambda h: torch.rot90(grid(h).sin(), 1, [1, 2]),
    "torch.tril": lambda h: torch.tril(grid(h).sin()),
    "torch.diagonal": lambda h: torch.diagonal(square(h).sin(), dim1=1, dim2=2),
    "torch.diag_embed": lambda h: torch.diag_embed(h[:, :3].sin()),
    "torch.block_diag": rows_of(lambda row: torch.block_diag(row[None, :3], row[None, 3:])),
    "torch.combinations": rows_of(lambda row: torch.combinations(row.sin())),
    "torch.cartesian_prod": rows_of(lambda row: torch.cartesian_prod(row[:2].sin(), row[2:4])),
    "torch.meshgrid": rows_of(lambda row: torch.stack(torch.meshgrid(row[:2].sin(), row[2:4], indexing="ij"))),
    "torch.repeat_interleave": lambda h: torch.repeat_interleave(h.sin(), 2, dim=1),
    "torch.tile": lambda h: torch.tile(h.sin(), (1, 2)),
    "torch.unfold": lambda h: h.sin().unfold(1, 3, 2),
    "torch.as_strided": lambda h: h.sin().contiguous().as_strided((len(h), 3), (6, 2), 1),
    "torch.stack and split": lambda h: torch.stack(torch.split(h.sin(), 2, 1), 2),
    "torch.bucketize": lambda h: torch.bucketize(h, torch.tensor([0.0, 0.5], dtype=h.dtype)) * h.square(),
    "torch.select_scatter": lambda h: torch.select_scatter(h.sin(), h[:, 0] ** 2, 1, 2),
    "torch.slice_scatter": lambda h: torch.slice_scatter(h.sin(), h[:, :2] ** 2, 1, 2, 4),
    "torch.utils.checkpoint": lambda h: torch.utils.checkpoint.checkpoint(torch.sin, h, use_reentrant=False),
    "torch.to float32 and back": lambda h: h.float().double().sin(),
    "torch.vmap": torch.vmap(lambda row: row.sin() * row[0]),
    "torch.func.grad": torch.func.vmap(torch.func.grad(lambda row: row.sin().prod())),
    "torch.autograd.grad": _input_gradient,
    "sparse product": lambda h: torch.sparse.mm(torch.eye(6, dtype=h.dtype).to_sparse(), h.T).T.sin(),
    "nested": lambda h: torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([h[0], h[1, :3], *h[2:]]), 0.0),
}

IN_PLACE = {
    "add_": changed(lambda v: v.add_(v.clone().square())),
    "mul_": changed(lambda v: v.mul_(v[:, :1].clone())),
    "relu_": changed(torch.relu_),
    "F.elu, inplace": changed(lambda v: F.elu(v, inplace=True)),
    "F.hardsigmoid, inplace": changed(lambda v: F.hardsigmoid(v, inplace=True)),
    "F.hardswish, inplace": changed(lambda v: F.hardswish(v, inplace=True)),
    "sin_": changed(torch.sin_),
    "clamp_": changed(lambda v: v.clamp_(-0.3, 0.4)),
    "exp_": changed(torch.exp_),
    "sqrt_": changed(lambda v: v.square_().add_(0.1).sqrt_()),
    "logit_": changed(lambda v: v.mul_(0.2).add_(0.5).logit_()),
    "masked_fill_": changed(lambda v: v.masked_fill_(v > 0.5, 0.0)),
    "index_fill_": changed(lambda v: v.index_fill_(1, torch.tensor([0, 2]), 0.3)),
    "scatter_add_": changed(lambda v: v.scatter_add_(1, v.detach()[:, :2].long() * 0, v[:, :2].clone() ** 2)),
    "slice assignment": changed(_set_slice),
    "mask assignment": changed(_set_mask),
    "copy_": changed(lambda v: v[:, 0].copy_(v[:, 1].clone() ** 2)),
    "zero_ of a view": changed(lambda v: v[:, 1:3].zero_()),
    "fill_diagonal_": lambda h: (square(h) * 1.5).reshape(-1, 3).clone().reshape(len(h), 3, 3).mul_(2).tril_().sin_(),
    "renorm_": changed(lambda v: v.renorm_(2, 0, 0.8)),
    "lerp_": changed(lambda v: v.lerp_(v.clone().square(), 0.3)),
    "addcmul_": changed(lambda v: v.addcmul_(v[:, :1].clone().sin(), v[:, :1].clone().cos())),
    "transpose_ and unsqueeze_": lambda h: (h * 2).unsqueeze_(1).transpose_(1, 2).sin_(),
}

TENSOR_OPERATIONS = {**FOURIER, **IMAGES, **NORMS, **LOSSES_OF_TORCH, **SHAPES, **IN_PLACE}
