// Small kernels for tests/native/test_emulation.py, some correct and some with one bug each. Only g++ compiles them.
#include "emulation/call.hpp"

using namespace calm_fast::simt;
using calm_fast::emulation::Use;

namespace {

constexpr int kBlock = 64;

__global__ void right_sum(Global<const float> x, Global<float> out, int n) {  // one block sums x
  SIMT_SHARED(float, cells, kBlock / 32);
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % 32 == 0) cells[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = cells[0] + cells[1];
}

__global__ void no_barrier(Global<const float> x, Global<float> out) {
  SIMT_SHARED(float, cells, kBlock);
  cells[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = cells[kBlock - 1 - threadIdx.x];
}

__global__ void late_write(Global<const float> x, Global<float> out) {  // no barrier between a read and the next write
  SIMT_SHARED(float, cells, kBlock);
  cells[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float other = cells[kBlock - 1 - threadIdx.x];
  cells[threadIdx.x] = other;
  __syncthreads();
  out[threadIdx.x] = cells[threadIdx.x];
}

__global__ void shuffle_is_no_barrier(Global<const float> x, Global<float> out) {
  SIMT_SHARED(float, cells, kBlock);
  cells[threadIdx.x] = x[threadIdx.x];
  const float mine = __shfl_xor_sync(kAllLanes, float(cells[threadIdx.x]), 1);
  out[threadIdx.x] = mine + cells[threadIdx.x ^ 1];
}

__global__ void warp_barrier(Global<const float> x, Global<float> out, bool across) {
  SIMT_SHARED(float, cells, kBlock);
  cells[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = cells[across ? kBlock - 1 - threadIdx.x : threadIdx.x ^ 31];
}

__global__ void shared_index(Global<float> out, int at) {
  SIMT_SHARED(float, cells, kBlock);
  SIMT_SHARED(float, neighbour, kBlock);
  cells[threadIdx.x] = neighbour[threadIdx.x] = 1.0f;
  if (threadIdx.x == 3) cells[at] = 2.0f;
  __syncthreads();
  out[threadIdx.x] = cells[threadIdx.x];
}

__global__ void global_index(Global<const float> x, Global<float> out, int at) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = x[i + at];
}

__global__ void unwritten(Global<float> out) {
  SIMT_SHARED(float, cells, kBlock);
  if (threadIdx.x != 5) cells[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = cells[threadIdx.x];
}

__global__ void divergent_barrier(Global<float> out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void early_return(Global<float> out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(Global<float> out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void absent_lane(Global<float> out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

__global__ void partial_shuffle(Global<float> out) {  // the mask names lanes that never arrive
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
}

__global__ void same_element(Global<float> out) { out[0] = float(threadIdx.x); }

__global__ void blocks_collide(Global<float> out) {
  if (threadIdx.x == 0) out[0] = float(blockIdx.x);
}

__global__ void misaligned(Global<const float> x, Global<float> out, int at) {
  const float4 four = load<float4>(x + at);
  if (threadIdx.x == 0) out[0] = four.x + four.w;
}

__global__ void atomic_count(Global<unsigned> count) { atomicAdd(&count[0], 1u); }

// Every block writes its part; the last one to arrive adds up the parts.
__global__ void last_block(
    Global<const float> x, Global<float> parts, Global<unsigned> count, Global<float> out, bool fence) {
  SIMT_SHARED(int, last, 1);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = x[blockIdx.x] * 2.0f;
    if (fence) __threadfence();
    *last = atomicInc(&count[0], gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (*last && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];
    out[0] = sum;
  }
}

// Every block waits until all have arrived, so all must be resident at once.
__global__ void wait_for_all(Global<unsigned> count, Global<float> out) {
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&count[0], 1u);
    int patience = 100000;
    while (load_acquire(count) < gridDim.x && --patience) {
    }
    out[blockIdx.x] = patience ? 1.0f : 0.0f;
  }
}

__global__ void too_much_shared(Global<float> out, int n) {
  SharedPool pool;
  Shared<float> cells = pool.take<float>(n, "cells");
  cells[threadIdx.x] = 1.0f;
  out[threadIdx.x] = cells[threadIdx.x];
}

__global__ void writes_input(Global<float> x) { x[threadIdx.x] = 0.0f; }

__global__ void halves(
    Global<const bfloat16> b, Global<const float16> h, Global<float> out, Global<bfloat16> b_out,
    Global<float16> h_out) {
  const int i = threadIdx.x;
  const bfloat16 bf = b[i];
  const float16 hf = h[i];
  out[i] = to_float(bf) + to_float(hf);
  b_out[i] = from_float<bfloat16>(to_float(bf) * 1.001f);
  h_out[i] = from_float<float16>(to_float(hf) * 1.001f);
}

}  // namespace

// tensors: x (64) float, out (64) float, count (1) unsigned, parts (64) float; integers: which, argument
CALM_EMULATED(probes) {
  auto x = in.tensor<const float>(0, "x", Use::input);
  auto out = in.tensor<float>(1, "out", Use::output);
  auto count = in.tensor<unsigned>(2, "count", Use::in_out);
  auto parts = in.tensor<float>(3, "parts", Use::output);
  auto x_again = in.tensor<float>(0, "x", Use::input);
  auto b = in.tensor<const bfloat16>(4, "b", Use::input);
  auto h = in.tensor<const float16>(5, "h", Use::input);
  auto b_out = in.tensor<bfloat16>(6, "b_out", Use::output);
  auto h_out = in.tensor<float16>(7, "h_out", Use::output);
  const int at = static_cast<int>(in.integers[1]);
  const Stream s = in.schedule();
  switch (in.integers[0]) {
    case 0: return SIMT_LAUNCH(right_sum, 1, kBlock, 0, s, x.get(), out.get(), at);
    case 1: return SIMT_LAUNCH(no_barrier, 1, kBlock, 0, s, x.get(), out.get());
    case 2: return SIMT_LAUNCH(late_write, 1, kBlock, 0, s, x.get(), out.get());
    case 3: return SIMT_LAUNCH(shuffle_is_no_barrier, 1, kBlock, 0, s, x.get(), out.get());
    case 4: return SIMT_LAUNCH(warp_barrier, 1, kBlock, 0, s, x.get(), out.get(), at != 0);
    case 5: return SIMT_LAUNCH(shared_index, 1, kBlock, 0, s, out.get(), at);
    case 6: return SIMT_LAUNCH(global_index, 1, kBlock, 0, s, x.get(), out.get(), at);
    case 7: return SIMT_LAUNCH(unwritten, 1, kBlock, 0, s, out.get());
    case 8: return SIMT_LAUNCH(divergent_barrier, 1, kBlock, 0, s, out.get());
    case 9: return SIMT_LAUNCH(early_return, 1, kBlock, 0, s, out.get());
    case 10: return SIMT_LAUNCH(two_barriers, 1, kBlock, 0, s, out.get());
    case 11: return SIMT_LAUNCH(absent_lane, 1, kBlock, 0, s, out.get());
    case 12: return SIMT_LAUNCH(partial_shuffle, 1, kBlock, 0, s, out.get());
    case 13: return SIMT_LAUNCH(same_element, 1, kBlock, 0, s, out.get());
    case 14: return SIMT_LAUNCH(blocks_collide, 3, kBlock, 0, s, out.get());
    case 15: return SIMT_LAUNCH(misaligned, 1, kBlock, 0, s, x.get(), out.get(), at);
    case 16: return SIMT_LAUNCH(atomic_count, 5, kBlock, 0, s, count.get());
    case 17: return SIMT_LAUNCH(last_block, 4, kBlock, 0, s, x.get(), parts.get(), count.get(), out.get(), at != 0);
    case 18: return SIMT_LAUNCH(wait_for_all, 3, kBlock, 0, s, count.get(), out.get());
    case 19: return SIMT_LAUNCH(too_much_shared, 1, kBlock, SharedBytes().add<float>(kBlock).total(), s, out.get(), at);
    case 20: return SIMT_LAUNCH(writes_input, 1, kBlock, 0, s, x_again.get());
    case 21: return SIMT_LAUNCH(right_sum, 1, at, 0, s, x.get(), out.get(), 0);
    case 22: return SIMT_LAUNCH(halves, 1, kBlock, 0, s, b.get(), h.get(), out.get(), b_out.get(), h_out.get());
    default: return "no such probe";
  }
}
