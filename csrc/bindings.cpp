// Schemas of the compiled library and the entry point of the module; nothing else.
//
// Both extension modules compile this file. calm_fast._cpu, which is loaded first, defines the schemas;
// csrc/<op>/<part>_cpu.cpp and csrc/<op>/<part>_cuda.cu add their implementations.

#include "common/module.h"

#include <torch/csrc/stable/library.h>

#ifndef CALM_FAST_CUDA_MODULE
STABLE_TORCH_LIBRARY_FRAGMENT(calm_fast, m) {
  // A kernel with SIMD code takes `lane` last: -1 for the best lane of this CPU, or a value of Lane in common/lanes.h.
  m.def("_cross_attention_native_decode(Tensor q, Tensor k, Tensor v, Tensor? lo, Tensor? hi, bool causal, float scale,"
        " int lane=-1) -> (Tensor out, Tensor lse)");
  m.def("_cross_attention_native_fwd(Tensor q, Tensor k, Tensor v, Tensor? lo, Tensor? hi, bool causal, float scale,"
        " int lane=-1) -> (Tensor out, Tensor lse)");
  m.def("_cross_attention_native_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        " Tensor? lo, Tensor? hi, bool causal, float scale, int lane=-1) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("_dual_lora_native_mix(Tensor zg, Tensor u, Tensor up, int r_pos, int lane=-1) -> Tensor");
  m.def("_dual_lora_native_update(Tensor zg, Tensor y, Tensor up, Tensor? u, Tensor? c2, int r_pos) -> Tensor");
  m.def("_dual_lora_native_weigh(Tensor zg, int r_pos) -> Tensor");
  m.def("_packed_linear_native_fwd(Tensor x, Tensor packed, int n, Tensor? add=None, int lane=-1) -> Tensor");
  m.def("_packed_linear_native_pack(Tensor w, int lane=-1) -> Tensor");
  m.def("_vote_native_fwd(Tensor answers, Tensor? scores, Tensor? valid, bool adaptive, float lam, int lane=-1)"
        " -> (Tensor winner, Tensor weight, Tensor total, Tensor margin, Tensor ties)");
  m.def("_maj_at_k_native_exact(Tensor answers, Tensor correct, Tensor? valid, int[] ks, int lane=-1) -> Tensor credit");
  m.def("_maj_at_k_native_resample(Tensor answers, Tensor correct, Tensor? scores, Tensor? valid, int[] ks,"
        " int resamples, bool adaptive, float lam, int seed, int lane=-1) -> Tensor credit");
  m.def("_linear_logprob_native_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature,"
        " float? softcap, bool want_entropy, bool want_rank, int lane=-1)"
        " -> (Tensor logprob, Tensor entropy, Tensor rank, Tensor norms)");
  m.def("_linear_logprob_native_dlogits(Tensor up, Tensor? down, Tensor hidden, Tensor weight, Tensor? bias,"
        " Tensor targets, Tensor norms, Tensor? entropy, float temperature, float? softcap, int first, Tensor(a!) out,"
        " int lane=-1) -> ()");
  m.def("_linear_logprob_native_rows(Tensor logits, Tensor? bias, Tensor targets, float temperature, float? softcap,"
        " int ignore_index, bool want_entropy, bool want_rank, bool strict, int lane=-1)"
        " -> (Tensor logprob, Tensor entropy, Tensor rank, Tensor norms)");
  m.def("_linear_logprob_native_row_gradients(Tensor up, Tensor? down, Tensor logits, Tensor? bias, Tensor targets,"
        " Tensor norms, Tensor? entropy, float temperature, float? softcap, int lane=-1) -> Tensor");
  m.def("_linear_nce_native_fwd(Tensor? student, Tensor nat, Tensor? neg, Tensor weight, Tensor? bias, Tensor targets,"
        " float temperature, float? softcap, Tensor(a!)? kept=None, int lane=-1)"
        " -> (Tensor norms, Tensor losses, Tensor references)");
  m.def("_linear_nce_native_dlogits(Tensor coefficients, Tensor student, Tensor nat, Tensor weight, Tensor? bias,"
        " Tensor targets, Tensor norms, float temperature, float? softcap, int first, Tensor(a!) out, int lane=-1) -> ()");
  m.def("_linear_nce_native_rows(Tensor? student, Tensor nat, Tensor? neg, Tensor? bias, float temperature,"
        " float? softcap, int lane=-1) -> Tensor");
  m.def("_linear_nce_native_row_gradients(Tensor coefficients, Tensor(a!) student, Tensor nat, Tensor? bias,"
        " Tensor targets, Tensor norms, float temperature, float? softcap, int lane=-1) -> ()");
  m.def("_linear_nce_native_gradient(Tensor coefficients, Tensor kept, Tensor references, Tensor weight, Tensor targets,"
        " Tensor norms, float temperature, float? softcap, int lane=-1) -> Tensor");
}
CALM_FAST_MODULE(_cpu)
#else
CALM_FAST_MODULE(_cuda)
#endif
