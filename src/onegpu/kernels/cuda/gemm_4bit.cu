// y = tail(x @ W.T + bias) for a 4-bit W in tile order (formats/tiling.py), on Hopper's warpgroup products.
//
// Compiled at run time with these macros, see gemm_4bit.py:
//   TOKENS     rows of x of one program: 32, 64, 96, ... 256
//   STAGES     tiles of x and W on their way
//   GROUPS     scales of a row in 64 columns: 2 for blocks of 32, else 1
//   GATED      the first half of W's rows gates the second
//   ACTIVATION 0 none, 1 silu, 2 gelu, 3 gelu_tanh, 4 relu
//   BFLOAT     1 for bfloat16, 0 for float16
//   PRODUCT    the PTX of one wgmma, SUMS its sums as operands: they grow with TOKENS
//
// A program owns 128 rows of W and TOKENS rows of x. Rows of W are the left operand, which wgmma takes from
// registers: a tile's bytes are in the order of exactly these registers. One warpgroup copies; two decode and
// multiply 64 rows each, the next tile's bytes decoded while the tensor cores work on this one's. A byte is looked up
// as two float32 in shared memory, in 16 copies so that no two lanes of a half warp meet in a bank; value times
// scale is rounded once in float32 and once to 16 bit: bit for bit what dequantizing gives.
//
// x is copied as it lies, so columns must be in natural order: a lane of a quad has columns 8 t to 8 t + 7 of 32, and the
// left operand wants pair t of each eight. ldmatrix and one shuffle for each word hand them over before they are looked up.
// All copies are the tensor memory accelerator's; x and codes are swizzled by it (128 bytes), so that neither the tensor
// cores nor ldmatrix meet in a bank.

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARPGROUP 128
#define CONSUMERS 2
#define THREADS (WARPGROUP * (CONSUMERS + 1))
#define ROWS 64
#define X_BYTES (TOKENS * 128)
#define CODE_BYTES (CONSUMERS * 4 * 512)
#define SCALE_BYTES (CONSUMERS * 4 * 64 * GROUPS)
#define TABLE_BYTES 32768
// 32 tokens of 64 results, a row padded by 16 bytes so that eight rows lie in different banks.
#define PART 32
#define PITCH 144
#define STAGING_BYTES (CONSUMERS * PART * PITCH)
#define HANDED_BYTES (GATED ? PART / 8 * WARPGROUP * 16 : 0)

struct Codebook {
    float value[16];
};

// A CUtensorMap.
struct alignas(64) Map {
    u64 words[16];
};

struct Problem {
    const void *bias;       // [N] of kind `bias_kind`
    const char *residual;   // [M, out], rows `residual_stride` bytes apart
    char *y;                // [M, out], rows `y_stride` bytes apart
    float *partial;         // float32 sums of the splits
    int *tickets;           // [row blocks * token blocks], 0 before and after
    long long residual_stride, y_stride;
    int M, N, K;
    int scale_shift;        // log2(tiles of one scale)
    int splits, tiles_each; // parts of K, and tiles of each
    int bias_kind;          // 0 none, 1 float32, 2 bfloat16, 3 float16
    int vectors;            // rows of y and residual lie on 16 bytes
    int overlap;            // wait for the kernel in front before reading x
};

__device__ __forceinline__ u32 shared_address(const void *p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\nbra again;\ndone: }" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_2d(u32 to, const Map *map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_3d(u32 to, const Map *map, int row, int tile, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {0, %2, %3}], [%4];"
        ::"r"(to), "l"(map), "r"(row), "r"(tile), "r"(barrier) : "memory");
}

__device__ __forceinline__ void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
#if BFLOAT
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

__device__ __forceinline__ void unpack(u32 both, float &low, float &high) {
#if BFLOAT
    low = __uint_as_float(both << 16);
    high = __uint_as_float(both & 0xffff0000u);
#else
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(both));
#endif
}

// One byte of a word, the one `place` has 0x80 in, to two weights.
__device__ __forceinline__ u32 weights(u32 word, u32 place, float scale, u32 table) {
    u32 address;
    float low, high;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(address) : "r"(word), "r"(place), "r"(table));
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(low), "=f"(high) : "r"(address));
    return pack(__fmul_rn(low, scale), __fmul_rn(high, scale));
}

// What a lane needs to decode, the same for every tile.
struct Lane {
    u32 table, codes, scales, place[2], from[2];
    __device__ __forceinline__ Lane(u32 table, int warp, int lane) : table(table + lane % 16 * 8) {
        int row = lane % 8, line = 4 * warp + row / 2;
        codes = line * 128 + (((row % 2 * 4 + lane / 8) ^ (line & 7)) << 4);
        scales = warp * 64 * GROUPS + lane / 4 * 8;
        place[0] = 0x80u << (lane % 2 * 16), place[1] = place[0] << 8;
        from[0] = lane / 4 * 4 + lane % 4 / 2, from[1] = from[0] + 2;
        // Kept, not computed again in every tile.
        asm volatile("" : "+r"(codes), "+r"(scales), "+r"(place[0]), "+r"(place[1]), "+r"(from[0]), "+r"(from[1]));
    }
};

// This lane's part of 16 rows x 64 columns: four left operands of wgmma.
__device__ __forceinline__ void decode(u32 (&left)[16], u32 codes, u32 scales, const Lane &lane) {
    u32 word[4];
    float scale[2 * GROUPS];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(codes + lane.codes));
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(scale[2 * group]), "=f"(scale[2 * group + 1])
                     : "r"(scales + lane.scales + group * 64));
    // word[t] is word t' of lane t, t' being this lane of the quad; what is wanted of it are the pairs of columns t'.
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            u32 both = __shfl_sync(0xffffffffu, word[t], lane.from[a]);
#pragma unroll
            for (int r = 0; r < 2; ++r)
                left[8 * a + 2 * t + r] = weights(both, lane.place[r], scale[(GROUPS == 2 ? 2 * a : 0) + r], lane.table);
        }
}

// sums += left @ x.T over 16 columns; keep is 0 for the first product of a tile of y.
__device__ __forceinline__ void multiply(float (&sum)[TOKENS / 2], const u32 *left, u64 right, int keep) {
    asm volatile(PRODUCT : SUMS : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(keep));
}

__device__ __forceinline__ u64 describe(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ float load_bias(const Problem &p, int n) {
    if (p.bias_kind == 0 || n >= p.N) return 0.f;
    if (p.bias_kind == 1) return ((const float *)p.bias)[n];
    u32 bits = ((const unsigned short *)p.bias)[n];
    if (p.bias_kind == 2) return __uint_as_float(bits << 16);
    float value;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(bits));
    return value;
}

__device__ __forceinline__ float activate(float v) {
#if ACTIVATION == 1
    return v / (1.f + expf(-v));
#elif ACTIVATION == 2
    return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
#elif ACTIVATION == 3
    return 0.5f * v * (1.f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
#elif ACTIVATION == 4
    return fmaxf(v, 0.f);
#else
    return v;
#endif
}

// Where a program's tile lies. Programs side by side share W's rows: they are read once from memory.
struct Place {
    int first_token, first_row, first_tile, tiles, index, split;
    __device__ __forceinline__ Place(const Problem &p, int work, int token_blocks) {
        int token_block = work % token_blocks, rest = work / token_blocks;
        split = rest % p.splits;
        int row_block = rest / p.splits;
        index = row_block * token_blocks + token_block;
        first_token = token_block * TOKENS;
        first_row = row_block * (GATED ? ROWS : ROWS * CONSUMERS);
        first_tile = split * p.tiles_each;
        tiles = min(p.tiles_each, p.K / 64 - first_tile);
    }
};

__device__ __forceinline__ void copy_tiles(const Problem &p, const Map *x, const Map *codes, const Map *scales,
                                           u32 x_stages, u32 code_stages, u32 scale_stages, u32 full, u32 empty,
                                           int works, int token_blocks) {
    int stage = 0, parity = 1;
    for (int work = blockIdx.x; work < works; work += gridDim.x) {
        Place at(p, work, token_blocks);
        int first = at.first_row / 16, second = (GATED ? at.first_row + p.N / 2 : at.first_row + ROWS) / 16;
        for (int column = at.first_tile; column < at.first_tile + at.tiles; ++column) {
            u32 done = full + stage * 8;
            u32 code_stage = code_stages + stage * CODE_BYTES, scale_stage = scale_stages + stage * SCALE_BYTES;
            int block = GROUPS == 2 ? 2 * column : column >> p.scale_shift;
            wait_barrier(empty + stage * 8, parity);
            expect(done, X_BYTES + CODE_BYTES + SCALE_BYTES);
            copy_3d(code_stage, codes, 4 * column, first, done);
            copy_3d(code_stage + CODE_BYTES / 2, codes, 4 * column, second, done);
            copy_3d(scale_stage, scales, block, first, done);
            copy_3d(scale_stage + SCALE_BYTES / 2, scales, block, second, done);
            copy_2d(x_stages + stage * X_BYTES, x, 64 * column, at.first_token, done);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// The sums of every part of K, added up in order by the program that comes last. False for all others.
__device__ __forceinline__ bool add_parts(const Problem &p, const Place &at, float (&sum)[TOKENS / 2], int *shared) {
    if (p.splits == 1) return true;
    int thread = threadIdx.x - WARPGROUP;
    const int count = TOKENS / 8, threads = CONSUMERS * WARPGROUP;
    float4 *parts = (float4 *)p.partial + (long long)at.index * p.splits * count * threads + thread;
    float4 *mine = parts + (long long)at.split * count * threads;
#pragma unroll
    for (int i = 0; i < count; ++i)
        __stcg(mine + i * threads, make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
    __threadfence();
    sync_threads(1, threads);
    if (thread == 0) *shared = atomicAdd(p.tickets + at.index, 1);
    sync_threads(1, threads);
    if (*shared != p.splits - 1) return false;
    __threadfence();
    if (thread == 0) p.tickets[at.index] = 0;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sum[i] = 0.f;
    for (int split = 0; split < p.splits; ++split)
#pragma unroll
        for (int i = 0; i < count; ++i) {
            float4 part = __ldcg(parts + ((long long)split * count + i) * threads);
            sum[4 * i] += part.x, sum[4 * i + 1] += part.y, sum[4 * i + 2] += part.z, sum[4 * i + 3] += part.w;
        }
    return true;
}

// Sums to y: rows of W are a lane's rows, so eight tokens by eight rows are turned around on the way (stmatrix).
__device__ __forceinline__ void finish(const Problem &p, const Place &at, float (&sum)[TOKENS / 2], char *staging,
                                       float4 *handed) {
    int thread = threadIdx.x % WARPGROUP, consumer = threadIdx.x / WARPGROUP - 1, warp = thread / 32, lane = thread % 32;
    int out = GATED ? p.N / 2 : p.N;
    int row = at.first_row + (GATED ? 0 : consumer * ROWS);
    int bias_row = (GATED ? at.first_row + consumer * (p.N / 2) : row) + warp * 16 + lane / 4;
    float bias0 = load_bias(p, bias_row), bias1 = load_bias(p, bias_row + 8);
    char *mine = staging + consumer * PART * PITCH;
    u32 corner = shared_address(mine) + (lane / 16 * 8 + lane % 8) * PITCH + (warp * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int part = 0; part < TOKENS / PART; ++part) {
        int token = at.first_token + part * PART;
        if (token >= p.M) break;
#if GATED
        // Gates and what they multiply lie in the same lanes of the two warpgroups.
        if (consumer == 1)
#pragma unroll
            for (int i = 0; i < PART / 8; ++i) {
                const float *s = sum + 4 * (part * PART / 8 + i);
                handed[i * WARPGROUP + thread] = make_float4(s[0] + bias0, s[1] + bias0, s[2] + bias1, s[3] + bias1);
            }
        sync_threads(1, CONSUMERS * WARPGROUP);
        if (consumer == 0) {
#endif
        if (p.residual) {
            for (int i = thread; i < PART * 8; i += WARPGROUP) {
                int m = token + i / 8, n = row + i % 8 * 8;
                char *to = mine + i / 8 * PITCH + i % 8 * 16;
                const char *from = p.residual + (long long)m * p.residual_stride + n * 2;
                if (m < p.M && p.vectors && n + 8 <= out)
                    *(uint4 *)to = *(const uint4 *)from;
                else
                    for (int e = 0; e < 8; ++e)
                        ((unsigned short *)to)[e] = m < p.M && n + e < out ? ((const unsigned short *)from)[e] : 0;
            }
            sync_threads(2 + consumer, WARPGROUP);
        }
#pragma unroll
        for (int pair = 0; pair < PART / 16; ++pair) {
            float v[8];
            u32 address = corner + pair * 16 * PITCH;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                int at_sum = 4 * (part * PART / 8 + pair * 2) + i;
                v[i] = activate(sum[at_sum] + (i & 2 ? bias1 : bias0));
            }
#if GATED
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float4 up = handed[(pair * 2 + i) * WARPGROUP + thread];
                v[4 * i] *= up.x, v[4 * i + 1] *= up.y, v[4 * i + 2] *= up.z, v[4 * i + 3] *= up.w;
            }
#endif
            if (p.residual) {
                u32 r[4];
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float low, high;
                    unpack(r[i], low, high);
                    v[2 * i] += low, v[2 * i + 1] += high;
                }
            }
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                         "r"(pack(v[0], v[1])), "r"(pack(v[2], v[3])), "r"(pack(v[4], v[5])), "r"(pack(v[6], v[7]))
                         : "memory");
        }
        sync_threads(2 + consumer, WARPGROUP);
        for (int i = thread; i < PART * 8; i += WARPGROUP) {
            int m = token + i / 8, n = row + i % 8 * 8;
            const char *from = mine + i / 8 * PITCH + i % 8 * 16;
            char *to = p.y + (long long)m * p.y_stride + n * 2;
            if (m >= p.M) continue;
            if (p.vectors && n + 8 <= out)
                *(uint4 *)to = *(const uint4 *)from;
            else
                for (int e = 0; e < 8; ++e)
                    if (n + e < out) ((unsigned short *)to)[e] = ((const unsigned short *)from)[e];
        }
        sync_threads(2 + consumer, WARPGROUP);
#if GATED
        }
        sync_threads(1, CONSUMERS * WARPGROUP);
#endif
    }
}

// Products of one tile with the operands in `left`, the next tile decoded into `next` meanwhile.
__device__ __forceinline__ void step(float (&sum)[TOKENS / 2], u32 (&left)[16], u32 (&next)[16], bool is_first,
                                     bool has_next, u32 x_stages, u32 codes, u32 scales, u32 full, u32 empty,
                                     int &stage, int &parity, const Lane &lane) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    u64 right = describe(x_stages + stage * X_BYTES);
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply(sum, left + 4 * j, right + 2 * j, !(is_first && j == 0));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    u32 done = empty + stage * 8;
    if (++stage == STAGES) stage = 0, parity ^= 1;
    if (has_next) {
        wait_barrier(full + stage * 8, parity);
        decode(next, codes + stage * CODE_BYTES, scales + stage * SCALE_BYTES, lane);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    // The tensor cores read these up to here, which the compiler does not see.
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" ::"r"(left[i]));
    if (threadIdx.x % 32 == 0) arrive(done);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm_4bit(const __grid_constant__ Map x, const __grid_constant__ Map w, const __grid_constant__ Map absmax,
          const __grid_constant__ Problem p, const __grid_constant__ Codebook codebook) {
    extern __shared__ char memory[];
    char *base = memory + (1024 - (shared_address(memory) & 1023)) % 1024;
    u32 x_stages = shared_address(base);
    u32 code_stages = x_stages + STAGES * X_BYTES, scale_stages = code_stages + STAGES * CODE_BYTES;
    char *table = base + STAGES * (X_BYTES + CODE_BYTES + SCALE_BYTES);
    char *staging = table + TABLE_BYTES;
    float4 *handed = (float4 *)(staging + STAGING_BYTES);
    char *tail = (char *)handed + HANDED_BYTES;
    u32 full = shared_address(tail), empty = full + STAGES * 8;
    int *shared = (int *)(tail + STAGES * 16);

    int token_blocks = (p.M + TOKENS - 1) / TOKENS;
    int width = GATED ? ROWS : ROWS * CONSUMERS, out = GATED ? p.N / 2 : p.N;
    int works = token_blocks * ((out + width - 1) / width) * p.splits;

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(full + i * 8, 1);
            init_barrier(empty + i * 8, CONSUMERS * 4);
        }
        // The copies arrive there from outside of what threads see.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    // Eight lanes write the 16 copies of an entry.
    for (int i = threadIdx.x; i < 256 * 8; i += THREADS) {
        int entry = i / 8;
        float even = codebook.value[entry >> 4], odd = codebook.value[entry & 15];
        *(float4 *)(table + i * 16) = make_float4(even, odd, even, odd);
    }
    if (p.overlap) asm volatile("griddepcontrol.wait;" ::: "memory");
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0)
            copy_tiles(p, &x, &w, &absmax, x_stages, code_stages, scale_stages, full, empty, works, token_blocks);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    int consumer = threadIdx.x / WARPGROUP - 1;
    u32 codes = code_stages + consumer * (CODE_BYTES / 2), scales = scale_stages + consumer * (SCALE_BYTES / 2);
    Lane lane(shared_address(table), threadIdx.x / 32 % 4, threadIdx.x % 32);
    int stage = 0, parity = 0;
    for (int work = blockIdx.x; work < works; work += gridDim.x) {
        Place at(p, work, token_blocks);
        float sum[TOKENS / 2];
        u32 one[16], two[16];
        wait_barrier(full + stage * 8, parity);
        decode(one, codes + stage * CODE_BYTES, scales + stage * SCALE_BYTES, lane);
        for (int k = 0; k < at.tiles; k += 2) {
            step(sum, one, two, k == 0, k + 1 < at.tiles, x_stages, codes, scales, full, empty, stage, parity, lane);
            if (k + 1 < at.tiles)
                step(sum, two, one, false, k + 2 < at.tiles, x_stages, codes, scales, full, empty, stage, parity,
                     lane);
        }
        if (add_parts(p, at, sum, shared)) finish(p, at, sum, staging, handed);
    }
}
