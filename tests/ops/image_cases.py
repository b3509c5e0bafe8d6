"""A case is a call of an operator of images as a function of tensors, and the shapes of these tensors."""

import torch

from dcae_fast import ops


def rms_norm_case(b, c, h, w, act, residual=True, norm_dtype=None):
    def op(x, weight, bias, *rest):
        return ops.rms_norm(x, weight, bias, 1e-5, act, *rest, dtype=norm_dtype)

    return op, [(b, c, h, w), (c,), (c,)] + [(b, c, h, w)] * residual


def bias_act_case(b, c, h, w, act, norm=False, residual=False):
    def op(x, bias, *rest):
        rest, statistics = list(rest), {}
        if norm:
            ramp = torch.linspace(-1, 1, c, device=x.device, dtype=x.dtype)
            statistics = {"scale": rest.pop(0), "mean": ramp, "variance": ramp.square() + 0.1, "eps": 1e-5}
        return ops.bias_act(x, bias, act, rest.pop(0) if residual else None, **statistics)

    return op, [(b, c, h, w), (c,)] + [(c,)] * norm + [(b, c, h, w)] * residual


def batch_norm_case(b, c, h, w, act, residual=False):
    def op(x, scale, bias, *rest):
        return ops.batch_norm_act(x, scale, bias, 1e-5, act, *rest)[0]

    return op, [(b, c, h, w), (c,), (c,)] + [(b, c, h, w)] * residual


def attention_case(b, heads, h, w, scales, head_dim=32):
    def op(*qkvs):
        return ops.relu_linear_attention(list(qkvs), head_dim)

    return op, [(b, heads * 3 * head_dim, h, w)] * scales


def glu_case(b, m, h, w):
    return ops.depthwise_glu, [(b, 2 * m, h, w), (2 * m, 1, 3, 3), (2 * m,)]


def average_case(x, main, factor=2, bias=True):
    def op(*tensors):
        tensors = list(tensors)
        return ops.unshuffle_average_add(
            tensors.pop(0) if x else None, tensors.pop(0), tensors.pop(0) if bias else None, factor
        )

    return op, [shape for shape in (x, main, (main[1],) if bias else None) if shape]


def duplicate_case(x, main, factor=2, bias=True):
    def op(*tensors):
        tensors = list(tensors)
        return ops.duplicate_shuffle_add(
            tensors.pop(0) if x else None, tensors.pop(0), tensors.pop(0) if bias else None, factor
        )

    return op, [shape for shape in (x, main, (main[1],) if bias else None) if shape]


def conv2d_case(b, c, k, h, w, act="none", residual=False, stride=1, padding=1, size=3):
    def op(x, weight, bias, *rest):
        return ops.conv2d(x, weight, bias, act, *rest, stride=stride, padding=padding)

    p, q = ((side + 2 * padding - size) // stride + 1 for side in (h, w))
    return op, [(b, c, h, w), (k, c, size, size), (k,)] + [(b, k, p, q)] * residual


def folded_norm_case(b, c, k, h, w):
    """A convolution with a batch norm folded in."""

    def op(x, weight, bias, scale):
        ramp = torch.linspace(-1, 1, k, device=x.device, dtype=x.dtype)
        folded, shift = ops.fold_batch_norm(weight, bias, scale, ramp, ramp.square() + 0.1, 1e-5)
        return ops.conv2d(x, folded, shift, padding=1)

    return op, [(b, c, h, w), (k, c, 3, 3), (k,), (k,)]


def upsample_conv2d(x, weight):
    return ops.upsample_conv2d(x, ops.subpixel_weights(weight))


def norm_conv2d_case(b, c, n, h, w, act="none", bias=True):
    def op(x, norm_weight, norm_bias, weight, *rest):
        return ops.rms_norm_conv2d(x, norm_weight, norm_bias, weight, *rest, act=act)

    return op, [(b, c, h, w), (c,), (c,), (n, c, 3, 3)] + [(n,)] * bias


def res_block_case(b, c, m, h, w, act, norm):
    def op(x, w1, b1, w2, shift, scale=None):
        return ops.res_block(x, w1, b1, act, w2, norm, scale, shift, 1e-5)[0]

    return op, [(b, c, h, w), (m, c, 3, 3), (m,), (c, m, 3, 3), (c,)] + [(c,)] * (norm != "none")


CASES = {
    "rms_norm": rms_norm_case(2, 64, 5, 7, "none"),
    "rms_norm-silu": rms_norm_case(1, 257, 3, 5, "silu"),
    "rms_norm-relu-no_residual": rms_norm_case(3, 3, 4, 3, "relu", residual=False),
    "rms_norm-one_pixel": rms_norm_case(1, 1024, 1, 1, "none"),
    "rms_norm-wide": rms_norm_case(1, 2048, 2, 3, "none"),
    "rms_norm-empty": rms_norm_case(0, 64, 5, 7, "none"),
    "bias_act-silu": bias_act_case(2, 64, 5, 7, "silu"),
    "bias_act-relu-residual": bias_act_case(1, 40, 3, 5, "relu", residual=True),
    "bias_act-norm-residual": bias_act_case(2, 33, 4, 3, "none", norm=True, residual=True),
    "bias_act-norm-silu": bias_act_case(1, 64, 3, 3, "silu", norm=True),
    "bias_act-many_channels": bias_act_case(1, 2500, 2, 2, "silu"),
    "bias_act-empty": bias_act_case(0, 64, 5, 7, "silu"),
    "batch_norm_act-residual": batch_norm_case(2, 33, 4, 3, "none", residual=True),
    "batch_norm_act-relu": batch_norm_case(3, 64, 5, 7, "relu"),
    "batch_norm_act-silu": batch_norm_case(1, 40, 3, 5, "silu", residual=True),
    "batch_norm_act-many_channels": batch_norm_case(2, 2500, 2, 3, "none"),
    "batch_norm_act-several_splits": batch_norm_case(3, 40, 11, 17, "relu"),
    "conv2d-relu": conv2d_case(2, 16, 24, 5, 7, "relu"),
    "conv2d-silu": conv2d_case(1, 8, 16, 4, 6, "silu"),
    "conv2d-folded_norm": folded_norm_case(2, 16, 16, 3, 5),
    "conv2d-residual": conv2d_case(1, 24, 24, 4, 4, "relu", residual=True),
    "conv2d-pointwise": conv2d_case(2, 16, 40, 3, 3, "silu", size=1, padding=0),
    "conv2d-stride_2": conv2d_case(1, 16, 8, 6, 8, stride=2),
    "conv2d-odd": conv2d_case(1, 3, 5, 3, 4, "silu"),
    "conv2d-empty": conv2d_case(0, 8, 8, 4, 4, "silu"),
    "conv2d-few_channels": conv2d_case(1, 3, 136, 2, 70, "silu"),
    "conv2d-few_channels-stride_2": conv2d_case(1, 4, 8, 9, 6, "relu", stride=2),
    "conv2d-few_channels-window": conv2d_case(2, 2, 16, 6, 8, stride=3, padding=2, size=5),
    "conv2d-one_channel-pointwise": conv2d_case(3, 1, 5, 3, 9, size=1, padding=0),
    "conv2d-few_channels-empty": conv2d_case(0, 3, 8, 4, 4),
    "conv2d_unshuffle": (ops.conv2d_unshuffle, [(2, 3, 6, 10), (8, 3, 3, 3), (8,)]),
    "conv2d_unshuffle-wide": (ops.conv2d_unshuffle, [(1, 4, 2, 134), (35, 4, 3, 3)]),
    "conv2d_unshuffle-many_channels": (ops.conv2d_unshuffle, [(1, 6, 4, 2), (4, 6, 3, 3), (4,)]),
    "conv2d_unshuffle-empty": (ops.conv2d_unshuffle, [(0, 3, 4, 4), (4, 3, 3, 3), (4,)]),
    "res_block-conv2d-rms": res_block_case(2, 16, 24, 5, 7, "silu", "rms"),
    "res_block-conv2d-batch": res_block_case(2, 24, 16, 3, 5, "relu", "batch"),
    "res_block-conv2d-none": res_block_case(1, 16, 16, 4, 3, "relu", "none"),
    "res_block-conv2d-no_activation": res_block_case(1, 5, 67, 3, 4, "none", "rms"),
    "res_block-conv2d-empty": res_block_case(0, 8, 8, 4, 4, "silu", "rms"),
    "rms_norm_conv2d": norm_conv2d_case(2, 64, 12, 9, 35, "relu"),
    "rms_norm_conv2d-silu-no_bias": norm_conv2d_case(1, 24, 3, 17, 5, "silu", bias=False),
    "rms_norm_conv2d-many_channels": norm_conv2d_case(1, 272, 16, 3, 7),
    "rms_norm_conv2d-many_filters": norm_conv2d_case(1, 16, 17, 3, 4),
    "rms_norm_conv2d-one_pixel": norm_conv2d_case(3, 16, 1, 1, 1),
    "rms_norm_conv2d-empty": norm_conv2d_case(0, 32, 3, 5, 7),
    "upsample_conv2d": (upsample_conv2d, [(2, 16, 3, 5), (24, 16, 3, 3)]),
    "upsample_conv2d-odd": (upsample_conv2d, [(1, 3, 4, 1), (5, 3, 3, 3)]),
    "transposed_weights": (ops.transposed_weights, [(40, 33, 3, 3)]),
    "transposed_weights-one_filter": (ops.transposed_weights, [(1, 70, 3, 3)]),
    "transposed_weights-empty": (ops.transposed_weights, [(0, 16, 3, 3)]),
    "multiscale_qkv": (ops.multiscale_qkv, [(2, 64, 5, 7), (64, 1, 5, 5), (64, 32, 1, 1)]),
    "multiscale_qkv-one_pixel": (ops.multiscale_qkv, [(1, 48, 1, 1), (48, 1, 3, 3), (48, 16, 1, 1)]),
    "multiscale_qkv-tiles": (ops.multiscale_qkv, [(1, 32, 9, 18), (32, 1, 5, 5), (32, 32, 1, 1)]),
    "multiscale_qkv-odd_groups": (ops.multiscale_qkv, [(1, 24, 4, 4), (24, 1, 3, 3), (24, 8, 1, 1)]),
    "multiscale_qkv-pointwise": (ops.multiscale_qkv, [(1, 64, 3, 2), (64, 1, 1, 1), (64, 64, 1, 1)]),
    "multiscale_qkv-7x7_window": (ops.multiscale_qkv, [(1, 16, 4, 5), (16, 1, 7, 7), (16, 16, 1, 1)]),
    "multiscale_qkv-empty": (ops.multiscale_qkv, [(0, 64, 5, 7), (64, 1, 5, 5), (64, 32, 1, 1)]),
    "attention": attention_case(2, 1, 9, 11, 1),
    "attention-two_scales": attention_case(1, 2, 13, 7, 2),
    "attention-32_positions": attention_case(2, 1, 4, 8, 1),
    "attention-one_position": attention_case(2, 1, 1, 1, 2),
    "attention-head_dim_16": attention_case(1, 2, 6, 7, 1, head_dim=16),
    "attention-empty": attention_case(0, 2, 5, 7, 1),
    "depthwise_glu": glu_case(1, 24, 9, 5),
    "depthwise_glu-wide": glu_case(1, 72, 3, 9),
    "depthwise_glu-one_pixel": glu_case(2, 5, 1, 1),
    "depthwise_glu-empty": glu_case(0, 8, 4, 4),
    "average-unshuffled_main": average_case((2, 32, 6, 10), (2, 16, 6, 10)),
    "average-main_at_output": average_case((1, 96, 2, 14), (1, 48, 1, 7), bias=False),
    "average-group_of_one": average_case((1, 16, 4, 6), (1, 64, 2, 3)),
    "average-factor_1": average_case((2, 64, 3, 5), (2, 16, 3, 5), factor=1),
    "average-main_alone": average_case(None, (1, 12, 6, 4)),
    "average-empty": average_case((0, 32, 6, 10), (0, 16, 6, 10)),
    "duplicate-shuffled_main": duplicate_case((2, 32, 3, 5), (2, 64, 3, 5)),
    "duplicate-main_at_output": duplicate_case((1, 48, 1, 7), (1, 96, 2, 14), bias=False),
    "duplicate-factor_1": duplicate_case((2, 16, 3, 5), (2, 64, 3, 5), factor=1),
    "duplicate-main_alone": duplicate_case(None, (1, 12, 3, 2)),
    "duplicate-planes": duplicate_case((2, 16, 3, 5), (8, 8, 3, 5)),
    "duplicate-empty": duplicate_case((0, 32, 3, 5), (0, 64, 3, 5)),
}
