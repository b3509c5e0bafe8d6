// The launchers of this extension: raw pointers and a stream in, an error code out, no torch.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

enum class DType { kFloat16, kBFloat16 };

// out = c[:, :M] * silu(c[:, M:]) with c = depthwise_conv3x3(x, weight) + bias, padding 1, accumulated in fp32.
//
// x: [batch, height, width, 2M]; weight: [2M, 3, 3]; bias: [2M] or null; out: [batch, height, width, M]; all dense, of
// one dtype, M = channels a positive multiple of 8, x aligned to 16 bytes and the others to 8.
cudaError_t launch_depthwise_glu(const void* x, const void* weight, const void* bias, void* out, int64_t batch,
                                 int height, int width, int channels, DType dtype, cudaStream_t stream);
