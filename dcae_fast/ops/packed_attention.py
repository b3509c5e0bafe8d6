"""Softmax attention."""

import torch.nn.functional as F


def packed_attention(qkv, num_heads):
    b, n, w = qkv.shape
    q, k, v = qkv.view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w // 3)
