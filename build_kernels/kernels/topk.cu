// router_topk: select top_k experts from FP32 logits [num_tokens, num_experts], and weigh them.
//
//     scores  = sqrt(softplus(logits / gate_temp))
//     ids     = the top_k largest of (scores + e_bias), descending; equal keys: lower id first
//     weights = scores[ids] / (sum(scores[ids]) + 1e-20) * routed_scaling_factor
//
// One warp routes one token. Lane l owns experts l, l + 32, l + 64, ... so that loads coalesce for
// every num_experts, row stride and alignment. num_experts is any number from top_k to MAX_EXPERTS,
// top_k from 1 to MAX_TOP_K. The build passes these two and WARPS, tokens per block, as macros: see
// shapes.py.
//
// Estimates of the keys, which approximate instructions make, leave out all experts but a few, of
// which the exact keys decide. The outputs do not depend on an estimate's value. On one H200 a
// matrix product and this kernel take 0.96 x the time that they took when each key was exact
// (geometric mean of three shapes, N = 4096 to 32768).
//
// Options are arguments: a null pointer or a neutral number disables one.
//     bias_vl, image_mask         rows with the mask set select with bias_vl instead of e_bias
//     first_image_id,             so do rows whose token id is one of num_image_ids from
//     num_image_ids               first_image_id on
//     padding_mask,               rows with the mask set, and rows from *num_valid_tokens on, are
//     num_valid_tokens            padding: id -1 and weight 0 in every column
//     tid2eid, input_ids          ids = tid2eid[input_ids[row]], in the table's order, without a
//                                 bias; a row whose token id is not in the table is padding. An
//                                 image row selects by bias_vl, and its token id is not used
//     forced_ids, forced_mask     rows with the mask set, or all without a mask, get these ids in
//                                 this order; a row that is not top_k different experts is padding
//     to_physical, logical_count  id e is stored as to_physical[e, row % logical_count[e]]
//     out_logical_ids             and as e here, in the first top_k columns
//     num_shared_slots,           columns from top_k on: id num_experts + column - top_k,
//     shared_weight               weight shared_weight
//     norm_topk_prob              0: weights = scores[ids] * routed_scaling_factor
//     gate_temp                   1: no logit is divided
//
// Guarantees
//     Every arithmetic step of a key and a weight is an IEEE operation rounded to nearest, compiled
//     with -fmad=false and fused only by fmaf. The exception is the seed of a square root, which two
//     fused steps round correctly for each of the GPUs' seeds: tests/test_approximations*.py. So a
//     score has the same bits in the emulator, in score.py and on every GPU.
//     Relative error of a score against FP64: below 4e-7 for every logit down to -170.
//     A NaN key ranks below every number. A NaN logit has score 0, +inf counts as FLT_MAX.
//     Control flow depends on the arguments, on whether a row is padding, forced or an image row,
//     and on how many candidates the estimates leave, never on tables or maps. Weights are summed
//     in rank order.
//     The logits of a padding row are not read; of a row with ids from the table, only theirs.
//     Nothing is read out of bounds, whatever values the token ids, the table and the map hold.

namespace {

// Enumerators, since NVRTC puts namespace-scope constants into global memory.
enum : int {
  kWarpsPerBlock = WARPS,  // one token per warp: the manifest's token_tile
  kBlocksPerSm = 8,
  kGroupSlots = 4,  // num_experts is rounded up to 32 * kGroupSlots in the registers
};
// Keys order as the floats they come from. No number maps below 0x007fffff (-inf).
enum : unsigned {
  kAllLanes = 0xffffffffu,
  kNoCandidate = 0,
  kNaNKey = 1,
};

// sqrt(softplus(x)); NaN gives NaN.
//
// q = exp(-|x| / 4), h = q^2, u = h^2 = exp(-|x|), softplus(x) = max(x, 0) + log1p(u). For x <= 0
// the square root is h * sqrt(log1p(u) / u): softplus itself is denormal from -87 on and 0 below
// -104, its root is not before -174. With q the scaling of the exponent is one integer addition.
__device__ __forceinline__ float router_score(float x) {
  // 2^n * 2^f = exp(-magnitude / 4) with f in [-1/2, 1/2]; q is 1e-37 at the clamp and h already 0.
  const float magnitude = fminf(fabsf(x), 340.0f);
  const float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low mantissa bits are n
  const float shifted = fmaf(magnitude, -0x1.715476p-2f, kRound);
  const float n = shifted - kRound;
  float f = fmaf(magnitude, -0x1.715476p-2f, -n);
  f = fmaf(magnitude, -0x1.4ae0c0p-28f, f);  // log2(e) / 4 less its FP32 value
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
  const bool negative = x <= 0.0f;  // false for NaN, which therefore reaches z
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

// An unsigned integer that orders like score + bias; a NaN orders below every number.
__device__ __forceinline__ unsigned selection_key(float score, float bias) {
  const float biased = score + bias;
  const unsigned bits = __float_as_uint(biased);
  const unsigned key = bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
  return biased != biased ? unsigned{kNaNKey} : key;
}

// The inputs of one row. gate_temp and num_experts are the same in every row.
struct Row {
  const float* logits;
  const float* bias;
  float gate_temp;
  int num_experts;
};

// An expert with its key and score. Of equal keys the lower expert is the better one.
struct Candidate {
  unsigned key;
  unsigned expert;
  float score;
};

// A warp's shared memory: experts that may be chosen, and the best ones by rank.
struct Selection {
  unsigned short experts[MAX_EXPERTS];
  Candidate best[MAX_TOP_K];
};

// Return the score of an expert.
__device__ __forceinline__ float score_of(Row row, int expert) {
  const float logit = row.logits[expert];
  return router_score(row.gate_temp != 1.0f ? __fdiv_rn(logit, row.gate_temp) : logit);
}

// Return a bit for each slot of a lane whose expert may be among the top_k. kSlots * 32 is num_experts
// rounded up to whole groups.
//
// sqrt(softplus(x)) is sqrt(ln 2 * log2(1 + 2^y)) with y = x * log2(e). So three approximate
// instructions estimate a key within kAllowance if neither |y| nor |bias| is above kLargest: by the
// PTX ISA log2 near 1 is wrong by 2^-21.5 at most, its root by 2^-10.7, and 0.84 of that counts.
// `floor` is the top_k-th largest of the lanes' best estimates, or less. So top_k keys are not below
// floor - kAllowance, and no estimate of a key among the top_k, or equal to one, is below
// floor - 2 * kAllowance. A lane with larger numbers or NaN gives all its experts.
template <int kSlots>
__device__ __forceinline__ unsigned find_candidates(Row row, int top_k, int lane) {
  const float kAllowance = 0x1p-10f, kLargest = 96.0f, log2_e = 1.44269504f;
  float logit[kSlots], bias[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    // Only the last group can be ragged.
    const bool whole = slot < kSlots - kGroupSlots;
    const int expert = slot * 32 + lane;
    logit[slot] = whole || expert < row.num_experts ? row.logits[expert] : 0.0f;
    bias[slot] = whole || expert < row.num_experts ? row.bias[expert] : 0.0f;
  }
  const float to_log2 = row.gate_temp != 1.0f ? __fdiv_rn(log2_e, row.gate_temp) : log2_e;
  float estimate[kSlots];
  float best = -kLargest, largest = 0.0f;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const float y = __fmul_rn(logit[slot], to_log2);
    float power, log2, root;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(__fadd_rn(power, 1.0f)));
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(fabsf(log2)));
    estimate[slot] = fmaf(root, 0.832554611f, bias[slot]);  // sqrt(ln 2)
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(y)));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(bias[slot])));
    const bool whole = slot < kSlots - kGroupSlots;
    const bool exists = whole || slot * 32 + lane < row.num_experts;
    best = fmaxf(best, exists ? estimate[slot] : -kLargest);
  }
  const bool in_range = largest <= kLargest;  // false for NaN
  // With twice kLargest more, floats order like their bits. Equal ones count once.
  unsigned bits = in_range ? __float_as_uint(best + 2.0f * kLargest) : 0u;
  unsigned floor_bits = 0;
#pragma unroll 1
  for (int rank = 0; rank < top_k; ++rank) {
    floor_bits = __reduce_max_sync(kAllLanes, bits);
    bits = bits == floor_bits ? 0u : bits;
  }
  const float floor = __uint_as_float(floor_bits) - 2.0f * kLargest;
  const float limit = in_range ? floor - 2.0f * kAllowance : -__int_as_float(0x7f800000);

  unsigned passed = 0;  // a bit per slot
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    passed |= !(estimate[slot] < limit) ? 1u << slot : 0u;
  }
  const int num_slots = (row.num_experts - lane + 31) >> 5;  // of the lane's experts
  passed &= (1u << num_slots) - 1;  return passed;
}

// Return the candidate of rank `lane` in a row; that of a lane from top_k on has no meaning.
__device__ __forceinline__ Candidate select_experts(Row row, int top_k, int lane,
                                                    Selection& selection) {
  // ------------------------------------------------------------------ estimate
  const unsigned num_groups = (row.num_experts + 32u * kGroupSlots - 1) / (32 * kGroupSlots);
  unsigned passed;
  switch (num_groups) {
    case 1: passed = find_candidates<kGroupSlots>(row, top_k, lane); break;
    case 2: passed = find_candidates<2 * kGroupSlots>(row, top_k, lane); break;
    case 3: passed = find_candidates<3 * kGroupSlots>(row, top_k, lane); break;
    default: passed = find_candidates<4 * kGroupSlots>(row, top_k, lane); break;
  }
  // A lane's experts go behind those of lower lanes, counted by the bits of their numbers.
  const unsigned count = __popc(passed);
  unsigned place = 0, end = 0;
#pragma unroll
  for (int bit = 0; (1 << bit) <= MAX_EXPERTS / 32; ++bit) {
    const unsigned lanes = __ballot_sync(kAllLanes, (count >> bit & 1) != 0);
    place += __popc(lanes & ((1u << lane) - 1)) << bit;
    end += __popc(lanes) << bit;
  }
  const int total = end;
#pragma unroll 1
  for (; passed != 0; passed &= passed - 1) {
    selection.experts[place++] = (__ffs(passed) - 1) * 32 + lane;
  }
  __syncwarp();

  // ------------------------------------------------------------------ score and rank
  // The first MAX_TOP_K lanes keep the best so far. The others score candidates: mostly one batch.
  Candidate own = {kNoCandidate, 0, 0.0f};
#pragma unroll 1
  for (int first = 0; first < total; first += 32 - MAX_TOP_K) {
    const int number = first + lane - MAX_TOP_K;
    if (lane >= MAX_TOP_K) {
      own.key = kNoCandidate;
      if (number < total) {
        own.expert = selection.experts[number];
        own.score = score_of(row, own.expert);
        own.key = selection_key(own.score, row.bias[own.expert]);
      }
    }
    int rank = own.key != kNoCandidate ? 0 : 32;  // the number of better candidates
    const int last = min(MAX_TOP_K + total - first, 32);
#pragma unroll 1
    for (int other = first != 0 ? 0 : MAX_TOP_K; other < last; ++other) {
      const unsigned key = __shfl_sync(kAllLanes, own.key, other);
      const unsigned expert = __shfl_sync(kAllLanes, own.expert, other);
      rank += key > own.key || (key == own.key && expert < own.expert);
    }
    if (rank < top_k) {
      selection.best[rank] = own;
    }
    __syncwarp();
    if (lane < top_k) {
      own = selection.best[lane];
    }
    __syncwarp();
  }
  return own;
}

// Elements from the first row to another.
__device__ __forceinline__ long long offset(int row, int stride) {
  return static_cast<long long>(row) * stride;
}

__device__ __forceinline__ unsigned long long address(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer);
}

__device__ __forceinline__ long long read_id(const void* ids, long long index, int is_int64) {
  return is_int64 ? static_cast<const long long*>(ids)[index] : static_cast<const int*>(ids)[index];
}

}  // namespace

// logits            [num_tokens, num_experts] FP32, rows logits_stride elements apart
// e_bias            [num_experts] FP32; null with tid2eid
// bias_vl           [num_experts] FP32, or null
// image_mask        [num_tokens] bytes, or null; only with bias_vl
// padding_mask      [num_tokens] bytes, or null
// num_valid_tokens  one int32, any number, or null
// tid2eid           [vocab_size, top_k] int32 in [0, num_experts), or null
// input_ids         [num_tokens] int32 or int64, any numbers; null without tid2eid and image ids
// forced_ids        [num_tokens, top_k] int32 or int64, any numbers, rows forced_ids_stride apart;
//                   or null
// forced_mask       [num_tokens] bytes, or null; only with forced_ids
// to_physical       [num_experts, max_replicas] int32 or int64, or null; of an int64 the low word
// logical_count     [num_experts] likewise, clamped to 1..max_replicas; null without to_physical
// out_weights       [num_tokens, top_k + num_shared_slots] FP32 or BF16, rows out_weights_stride
//                   elements apart; at most 32 columns
// out_ids           [num_tokens, top_k + num_shared_slots] int32 or int64, rows out_ids_stride
//                   elements apart
// out_logical_ids   [num_tokens, top_k] int32, rows out_logical_ids_stride elements apart; or null
// gate_temp is finite and above 0. Flags are 0 or 1.
// Launch: block 32 * WARPS, grid ceil(num_tokens / WARPS). Programmatic dependent launch is legal.
//
// 8 blocks per SM leave 64 registers: enough for all loads of a row to be in flight before the
// first result is used. Without the bound ptxas takes 32 and spreads the loads over the arithmetic.
extern "C" __global__ void __launch_bounds__(32 * kWarpsPerBlock, kBlocksPerSm)
    router_topk(const float* logits, const float* e_bias, const float* bias_vl,
                const unsigned char* image_mask, const unsigned char* padding_mask,
                const int* num_valid_tokens, const int* tid2eid, const void* input_ids,
                const void* forced_ids, const unsigned char* forced_mask, const int* to_physical,
                const int* logical_count, void* out_weights, void* out_ids, int* out_logical_ids,
                int num_tokens, int num_experts, int top_k, float routed_scaling_factor,
                float gate_temp, int norm_topk_prob, float shared_weight, int vocab_size,
                int input_ids_are_int64, int max_replicas, int map_is_int64, int num_shared_slots,
                int weights_are_bfloat16, int ids_are_int64, int forced_ids_are_int64,
                int first_image_id, int num_image_ids, int logits_stride, int out_weights_stride,
                int out_ids_stride, int out_logical_ids_stride, int forced_ids_stride) {
  __shared__ Selection selections[kWarpsPerBlock];

  // The kernel before may still be writing logits, or reading the memory of the outputs:
  // https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const unsigned index = blockIdx.x * kWarpsPerBlock + warp;  // an int may end before the grid does
  if (index >= static_cast<unsigned>(num_tokens)) {
    return;
  }
  const int token = static_cast<int>(index);

  // ------------------------------------------------------------------ row flags
  bool from_table = tid2eid != nullptr;
  const float* row_bias = e_bias;
  unsigned long long token_id = 0;  // a negative one is beyond every table
  bool padded = false;
  bool forced = false;
  int forced_expert = 0;
  // One test for all of them, because most launches have none.
  if ((address(image_mask) | address(padding_mask) | address(num_valid_tokens) |
       address(input_ids) | address(forced_ids)) != 0) {
    // Every lane loads the same words, and the first three before it uses one.
    int image = image_mask != nullptr ? image_mask[token] : 0;
    const int padding = padding_mask != nullptr ? padding_mask[token] : 0;
    const int num_valid = num_valid_tokens != nullptr ? *num_valid_tokens : num_tokens;
    if (input_ids != nullptr) {
      token_id = read_id(input_ids, token, input_ids_are_int64);
      image |= token_id - first_image_id < static_cast<unsigned>(num_image_ids);
    }
    row_bias = image != 0 ? bias_vl : e_bias;
    from_table = from_table && image == 0;
    bool unknown = from_table && token_id >= static_cast<unsigned>(vocab_size);
    if (forced_ids != nullptr && (forced_mask == nullptr || forced_mask[token] != 0)) {
      forced = true;
      long long id = lane - MAX_TOP_K;  // no two lanes the same
      if (lane < top_k) {
        id = read_id(forced_ids, offset(token, forced_ids_stride) + lane, forced_ids_are_int64);
        unknown = static_cast<unsigned long long>(id) >= static_cast<unsigned>(num_experts);
      } else {
        unknown = false;
      }
      const int own = static_cast<int>(id);
#pragma unroll
      for (int slot = 0; slot < MAX_TOP_K - 1; ++slot) {
        const bool same = __shfl_sync(kAllLanes, own, slot) == own;
        unknown |= same && slot < lane && lane < top_k;
      }
      unknown = __any_sync(kAllLanes, unknown);
      // In assembly, so that no register holds both a forced and a selected expert: a test follows
      // what branches depend on by register.
      asm("mov.b32 %0, %1;" : "=r"(forced_expert) : "r"(own));
    }
    padded = padding != 0 || token >= num_valid || unknown;
  }

  int id = -1;
  int logical_id = -1;
  float weight = 0.0f;
  if (!padded) {
    // ---------------------------------------------------------------- select
    // Lane r < top_k gets the expert of rank r.
    const Row row = {logits + offset(token, logits_stride), row_bias, gate_temp, num_experts};
    int expert = forced_expert;
    float score = 0.0f;
    if (!forced && !from_table) {
      const Candidate selected = select_experts(row, top_k, lane, selections[warp]);
      // In assembly, for the same reason as forced_expert.
      asm("mov.b32 %0, %1;" : "=r"(expert) : "r"(selected.expert));
      asm("mov.b32 %0, %1;" : "=f"(score) : "f"(selected.score));
    } else if (lane < top_k) {
      if (!forced) {
        expert = min(static_cast<unsigned>(tid2eid[token_id * top_k + lane]), num_experts - 1u);
      }
      score = score_of(row, expert);
    }

    // ---------------------------------------------------------------- weights and physical ids
    if (lane < top_k) {
      id = logical_id = expert;
      if (to_physical != nullptr) {
        // The low word of an int64 is the first one.
        const int count = logical_count[expert << map_is_int64];
        const unsigned replicas = min(max(count, 1), max_replicas);
        const unsigned replica = index % replicas;
        id = to_physical[(offset(expert, max_replicas) + replica) << map_is_int64];
      }
      score = score != score ? 0.0f : score;
    } else {
      score = 0.0f;
    }
    float sum = 0.0f;
#pragma unroll
    for (int rank = 0; rank < MAX_TOP_K; ++rank) {
      sum += __shfl_sync(kAllLanes, score, rank);  // adds 0 from top_k on
    }
    if (lane < top_k) {
      const float divisor = norm_topk_prob ? sum + 1e-20f : 1.0f;  // division by 1 is exact
      weight = __fdiv_rn(score, divisor) * routed_scaling_factor;
    } else {
      id = num_experts + lane - top_k;  // a shared expert's, or not stored
      weight = shared_weight;
    }
  }

  // ------------------------------------------------------------------ store
  if (lane < top_k + num_shared_slots) {
    const long long weight_at = offset(token, out_weights_stride) + lane;
    if (weights_are_bfloat16) {
      unsigned short rounded;
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(weight));
      static_cast<unsigned short*>(out_weights)[weight_at] = rounded;
    } else {
      static_cast<float*>(out_weights)[weight_at] = weight;
    }
    const long long at = offset(token, out_ids_stride) + lane;
    if (ids_are_int64) {
      static_cast<long long*>(out_ids)[at] = id;
    } else {
      static_cast<int*>(out_ids)[at] = id;
    }
    if (out_logical_ids != nullptr && lane < top_k) {
      out_logical_ids[offset(token, out_logical_ids_stride) + lane] = logical_id;
    }
  }
}
