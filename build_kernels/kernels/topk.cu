// router_topk: FP32 logits [num_tokens, num_experts] to the weights and ids of top_k experts.
//
//     scores  = sqrt(softplus(logits))
//     ids     = the top_k largest of (scores + e_bias), descending; equal keys: lower id first
//     weights = scores[ids] / (sum(scores[ids]) + 1e-20) * routed_scaling_factor
//
// One warp routes one token; lane l owns experts l, l + 32, l + 64, ... so that loads are coalesced
// for every num_experts, row stride and alignment. num_experts is any number from top_k to 512,
// top_k from 1 to 8.
//
// Guarantees
//     Every arithmetic step is an IEEE operation rounded to nearest (compiled with -fmad=false, fused
//     only where fmaf says so), but for the seed of a square root that two fused steps round
//     correctly. So a score has the same bits in an emulator and on every GPU.
//     Relative error of a score against FP64: below 4e-7 for every logit down to -170.
//     A NaN key ranks below every number. A NaN logit has score 0, +inf counts as FLT_MAX.
//     Control flow depends on the sizes only, never on the data; weights are summed in rank order.

namespace {

// Enumerators, since NVRTC puts namespace-scope constants into global memory.
enum : int {
  kWarpsPerBlock = 4,  // one token each: the manifest's token_tile
  kBlocksPerSm = 8,
  kGroupSlots = 4,     // num_experts is rounded up to 32 * kGroupSlots in the registers
  kMaxSlots = 512 / 32,
  // A row of 32 keys is padded by one word: a lane's column of slots is read back by as many lanes
  // as it has slots, each then from a bank of its own.
  kKeyRow = 33,
};
// Keys order as the floats they come from. No number maps below 0x007fffff (-inf).
enum : unsigned {
  kAllLanes = 0xffffffffu,
  kNoCandidate = 0,
  kNaNKey = 1,
};

// sqrt(softplus(x)); NaN gives NaN.
//
// q = exp(-|x| / 4), h = q^2, u = h^2 = exp(-|x|), softplus(x) = max(x, 0) + log1p(u). Below 0 the
// square root is taken as h * sqrt(log1p(u) / u): softplus itself is denormal from -87 on and 0 below
// -104, its root is not before -174. Splitting q off keeps the exponent's scaling a plain integer add.
__device__ __forceinline__ float router_score(float x) {
  // 2^n * 2^f = exp(-magnitude / 4) with f in [-1/2, 1/2]; q is 1e-37 at the clamp and h already 0.
  const float magnitude = fminf(fabsf(x), 340.0f);
  const float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low mantissa bits are n
  const float shifted = fmaf(magnitude, -0x1.715476p-2f, kRound);
  const float n = shifted - kRound;
  float f = fmaf(magnitude, -0x1.715476p-2f, -n);
  f = fmaf(magnitude, -0x1.4ae0c0p-28f, f);  // what log2(e) / 4 has beyond its FP32 value
  // 2^f, minimax; relative error of these FP32 coefficients in exact arithmetic: 1.6e-8.
  float q = 1.53458121e-4f;
  q = fmaf(q, f, 1.33999314e-3f);
  q = fmaf(q, f, 9.61848896e-3f);
  q = fmaf(q, f, 5.55032878e-2f);
  q = fmaf(q, f, 2.40226469e-1f);
  q = fmaf(q, f, 6.93147206e-1f);
  q = fmaf(q, f, 1.0f);
  q = __int_as_float(__float_as_int(q) + (__float_as_int(shifted) << 23));
  const float h = q * q;
  const float u = h * h;
  // log1p(u) / u on [0, 1], likewise 8.2e-8; half of it reaches the score.
  float p = 5.23269e-3f;
  p = fmaf(p, u, -2.950524e-2f);
  p = fmaf(p, u, 7.822597e-2f);
  p = fmaf(p, u, -1.3663248e-1f);
  p = fmaf(p, u, 1.9106008e-1f);
  p = fmaf(p, u, -2.4842983e-1f);
  p = fmaf(p, u, 3.3319097e-1f);
  p = fmaf(p, u, -4.9999493e-1f);
  p = fmaf(p, u, 9.9999997e-1f);

  float largest_finite;  // min that keeps NaN
  asm("min.NaN.f32 %0, %1, 0f7F7FFFFF;" : "=f"(largest_finite) : "f"(x));
  const bool negative = x <= 0.0f;  // false for NaN, which so reaches z
  // In assembly, so that NVVM does not turn the selection below into a branch around it.
  float softplus;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(softplus) : "f"(u), "f"(p), "f"(largest_finite));
  const float z = negative ? p : softplus;
  // z is in [0.69, FLT_MAX]: one Newton step in fused arithmetic gives the correctly rounded root,
  // without the branch to a slow path that sqrtf carries for denormals.
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(z));
  float root = z * y;
  root = fmaf(fmaf(-root, root, z), 0.5f * y, root);
  return negative ? h * root : root;
}

__device__ __forceinline__ unsigned selection_key(float score, float bias) {
  const float biased = score + bias;
  const unsigned bits = __float_as_uint(biased);
  const unsigned key = bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
  return biased != biased ? unsigned{kNaNKey} : key;
}

struct Candidate {
  unsigned key;
  unsigned expert;
};

// Write the keys of a lane's experts to keys[slot * kKeyRow + lane] and return its best one; the
// lowest expert among equals. kSlots * 32 is num_experts rounded up to a whole number of groups.
template <int kSlots>
__device__ __forceinline__ Candidate score_row(const float* row, const float* e_bias,
                                               int num_experts, int lane, unsigned* keys) {
  float logit[kSlots];
  float bias[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    // Only the last group can be ragged.
    const bool whole = slot < kSlots - kGroupSlots;
    const int expert = slot * 32 + lane;
    logit[slot] = whole || expert < num_experts ? row[expert] : 0.0f;
    bias[slot] = whole || expert < num_experts ? e_bias[expert] : 0.0f;
  }
  Candidate best = {kNoCandidate, 0};
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const bool whole = slot < kSlots - kGroupSlots;
    const int expert = slot * 32 + lane;
    unsigned key = selection_key(router_score(logit[slot]), bias[slot]);
    key = whole || expert < num_experts ? key : unsigned{kNoCandidate};
    keys[slot * kKeyRow + lane] = key;
    const bool better = key > best.key;
    best.key = better ? key : best.key;
    best.expert = better ? expert : best.expert;
  }
  return best;
}

}  // namespace

// logits            [num_tokens, num_experts] FP32, rows logits_stride elements apart
// e_bias            [num_experts] FP32
// out_weights       [num_tokens, top_k] FP32, rows out_weights_stride elements apart
// out_ids           [num_tokens, top_k] int32, rows out_ids_stride elements apart
// Launch: block 128, grid ceil(num_tokens / 4). Programmatic dependent launch is legal.
//
// 8 blocks an SM leave 64 registers: enough for every load of a row to be in flight before the first
// result is used. Left to itself ptxas takes 32 and spreads the loads over the arithmetic.
extern "C" __global__ void __launch_bounds__(32 * kWarpsPerBlock, kBlocksPerSm)
    router_topk(const float* logits, const float* e_bias, float* out_weights, int* out_ids,
                int num_tokens, int num_experts, int top_k, float routed_scaling_factor,
                int logits_stride, int out_weights_stride, int out_ids_stride) {
  __shared__ unsigned shared_keys[kWarpsPerBlock][kMaxSlots * kKeyRow];

  // The kernel before may still be writing logits, or reading what this one overwrites.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const long long token = static_cast<long long>(blockIdx.x) * kWarpsPerBlock + warp;
  if (token >= num_tokens) {
    return;
  }

  // ------------------------------------------------------------------ score
  const float* row = logits + token * logits_stride;
  unsigned* keys = shared_keys[warp];
  const int num_groups = (num_experts + 32 * kGroupSlots - 1) / (32 * kGroupSlots);
  Candidate best;
  switch (num_groups) {
    case 1: best = score_row<kGroupSlots>(row, e_bias, num_experts, lane, keys); break;
    case 2: best = score_row<2 * kGroupSlots>(row, e_bias, num_experts, lane, keys); break;
    case 3: best = score_row<3 * kGroupSlots>(row, e_bias, num_experts, lane, keys); break;
    default: best = score_row<4 * kGroupSlots>(row, e_bias, num_experts, lane, keys); break;
  }
  __syncwarp();

  // ------------------------------------------------------------------ select
  // Each round takes the warp's best candidate and strikes it out. Only its owner then lacks a
  // candidate, and the whole warp finds it there: lane s looks at the owner's slot s. From here on
  // row s of the keys is touched by lane s alone, so the rounds need no barrier between them.
  const int num_slots = num_groups * kGroupSlots;
  int my_expert = 0;
#pragma unroll 1
  for (int rank = 0; rank < top_k; ++rank) {
    const unsigned best_key = __reduce_max_sync(kAllLanes, best.key);
    const unsigned expert =
        __reduce_min_sync(kAllLanes, best.key == best_key ? best.expert : 0xffffffffu);
    my_expert = lane == rank ? static_cast<int>(expert) : my_expert;

    const int owner = expert % 32;
    unsigned key = kNoCandidate;
    if (lane < num_slots) {
      unsigned* slot_key = keys + lane * kKeyRow + owner;
      key = *slot_key;
      key = lane == static_cast<int>(expert / 32) ? unsigned{kNoCandidate} : key;
      *slot_key = key;
    }
    const unsigned next_key = __reduce_max_sync(kAllLanes, key);
    const int next_slot = __ffs(__ballot_sync(kAllLanes, key == next_key)) - 1;
    const unsigned next_expert = next_slot * 32 + owner;
    best.key = lane == owner ? next_key : best.key;
    best.expert = lane == owner ? next_expert : best.expert;
  }

  // ------------------------------------------------------------------ weigh and store
  // Lane r < top_k holds rank r. The score is computed again, from a logit that is in L1, instead of
  // being kept in shared memory for every expert.
  float score = lane < top_k ? router_score(row[my_expert]) : 0.0f;
  score = score != score ? 0.0f : score;
  float sum = 0.0f;
#pragma unroll
  for (int rank = 0; rank < 8; ++rank) {
    sum += __shfl_sync(kAllLanes, score, rank);  // adds 0 from top_k on
  }
  if (lane < top_k) {
    out_weights[token * out_weights_stride + lane] =
        __fdiv_rn(score, sum + 1e-20f) * routed_scaling_factor;
    out_ids[token * out_ids_stride + lane] = my_expert;
  }
}
