// y = tail(x @ W.T + bias) for a W stored as codes, on Hopper's warpgroup products: 4-bit codes in tile order
// (formats/tiling.py), or rows of int8. x is in 16 bit, or int8 as well (LLM.int8()).
//
// Compiled at run time with these macros, see gemm_codes.py:
//   BITS       of a code: 4 or 8
//   X_BITS     16, or 8 with BITS 8: x is codes too, but for some columns
//   CAPACITY   of those columns, how many are at hand in 16 bit
//   TOKENS     rows of x of one work: 32, 64, 96, ... 256
//   CONSUMERS  warpgroups that multiply, 64 rows of W each: 2, or 3 where nothing is gated
//   STAGES     tiles of x and W on their way
//   BLOCKS     programs of a processor at a time: 2 hide each other's waits, 1 has room for more stages
//   GROUPS     scales of a row in 64 columns: 2 for blocks of 32, else 1
//   SCALE_SUMS 4 bits, 1: scales multiply sums of 64 columns, 0: they multiply weights
//   GATED      the first half of W's rows gates the second
//   ACTIVATION 0 none, 1 silu, 2 gelu, 3 gelu_tanh, 4 relu
//   BFLOAT     1 for bfloat16, 0 for float16
//   WIDE       tokens of one wgmma of 16-bit floats: TOKENS, or fewer where X_BITS is 8
//   PRODUCT    its PTX, SUMS its sums as operands
//   X_PRODUCT  the same of int8 on both sides and of TOKENS, X_SUMS
//
// A work is 128 or 192 rows of W and TOKENS rows of x. Programs take works in turn; those that would leave processors
// idle in the end are cut along K, and the program that ends last adds up their parts. Rows of W are the left operand,
// which wgmma takes from registers. One warp copies W and one copies x; two or three warpgroups decode and multiply 64
// rows each, the next tile's bytes decoded while the tensor cores work on this one's.
// A byte is looked up as a pair in shared memory, in 32 copies so that no two lanes meet in a bank:
//
//   SCALE_SUMS 1   two 16-bit values, which are operands as they are: the codebook times a constant, as gemv_4bit has it
//   SCALE_SUMS 0   two whole numbers of 16 bits, the codebook to 2^-16; times the scale in float32, rounded to 16 bit
//
// Codes of 8 bits need no table: they are whole numbers that 16-bit floats hold exactly, and a row has one scale, which
// multiplies the sums of all K.
//
// Where x is codes, both operands come from shared memory, 128 columns a tile. The columns of x that its codes leave out,
// LLM.int8()'s outliers, are multiplied in 16 bit after them: up to CAPACITY as tiles of their own, any more one by one.
//
// All copies are the tensor memory accelerator's; x and codes are swizzled by it (PTX ISA, 128-byte swizzle), so that
// neither the tensor cores nor ldmatrix meet in a bank.

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARPGROUP 128
#define THREADS (WARPGROUP * (CONSUMERS + 1))
#define ROWS 64
// Registers of a copying and of a multiplying thread.
#define FEW (BLOCKS == 2 || CONSUMERS == 3 ? 32 : 40)
#define MANY (BLOCKS == 2 ? 104 : CONSUMERS == 3 ? 160 : 232)
// Where registers are few, a tile is decoded only after the one before it was multiplied: other warpgroups work then.
#define DECODE_AHEAD (BLOCKS == 1 || TOKENS <= 32)
// A tile's products are asked for before those of the tile in front are waited for, and the next tile is decoded
// between them: a warp that asks for a product whose left operand is in registers waits until the tensor cores take it.
// Not where scales multiply sums, which takes registers for the products of two tiles and was slower.
#define QUEUED (X_BITS == 16 && BLOCKS == 1 && !SCALE_SUMS && (BITS == 4 || TOKENS <= 160 || CONSUMERS == 3))
// Token blocks that are worked on at a time: their x stays in L2 while W passes by.
#define TOKEN_BLOCKS (1024 / TOKENS)
// Columns of y that a program writes.
#define WIDTH (GATED ? ROWS : ROWS * CONSUMERS)
// Columns of a tile: 128 bytes of x.
#define COLUMNS (1024 / X_BITS)
#define X_BYTES (TOKENS * 128)
#define CODE_BYTES (CONSUMERS * ROWS * COLUMNS / 8 * BITS)
// Codes of 64 outlier columns.
#define OUTLIER_BYTES (CONSUMERS * ROWS * 64)
#define SCALE_BYTES (BITS == 4 ? CONSUMERS * 4 * 64 * GROUPS : 0)
// What sums of codes of 8 bits are multiplied by: scales of a work's rows of W, and of its rows of x.
#define SIDE_BYTES (BITS == 8 ? CONSUMERS * ROWS * 4 + (X_BITS == 8 ? TOKENS * 4 : 0) : 0)
#define TABLE_BYTES (BITS == 4 ? 32768 : 0)
// Tokens that leave at a time, 64 results each, by one of three buffers by turns; swizzled as x is.
#define PART (TOKENS % 64 == 0 && TOKENS >= 128 && !GATED && X_BITS == 16 ? 64 : 32)
#define PITCH 128
#define BUFFER_BYTES (PART * PITCH)
#define BUFFERS 3
#define STAGING_BYTES (CONSUMERS * BUFFERS * BUFFER_BYTES)
#define HANDED_BYTES (GATED ? PART / 8 * WARPGROUP * 16 : 0)
// What decoded codes of 8 bits are multiples of.
#define UNIT (BFLOAT ? 1.f / 64 : 1.f / 512)
// 2^23 + 2^15: what a whole number of 16 bits is off by when its bits are those of a float32.
#define OFFSET 8421376.f

struct Codebook {
    float value[16];
    float inverse; // what sums, or scales, are multiplied by
};

// A CUtensorMap.
struct alignas(64) Map {
    u64 words[16];
};

struct Problem {
    const void *bias;       // [N] of kind `bias_kind`
    const float *row_stats; // 8 bits: [N], 127 times what a row's codes are multiplied by
    const char *residual;   // [M, out], rows `residual_stride` bytes apart
    char *y;                // [M, out], rows `y_stride` bytes apart
    float4 *parts;          // [cut works, splits, TOKENS / 8, 256], sums
    int *tickets;           // [cut works], all 0 before and after
    const float *x_stats;   // X_BITS 8: [M], 127 times what codes of a row of x are multiplied by
    const int *outlier_count, *outlier_columns; // how many columns its codes leave out, and which, or null
    const char *x;          // x in 16 bit, rows `x_stride` bytes apart
    const signed char *codes; // W's, rows `code_stride` bytes apart
    long long residual_stride, y_stride, x_stride, code_stride;
    int M, N, K;
    int scale_shift;        // log2(tiles of one scale)
    int whole;              // works that are not cut; the others are, into
    int splits, tiles_each; // parts of so many tiles, the last one of what is left
    int in_order;           // all parts are worked on at a time
    int bias_kind;          // 0 none, 1 float32, 2 bfloat16, 3 float16
    int vectors;            // rows of y and residual lie on 16 bytes
    int early;              // W may be read before the kernel in front has ended, of which x may be a result
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

__device__ __forceinline__ void prefetch(const Map *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// To L2 only, which sees what others still write.
__device__ __forceinline__ void prefetch_2d(const Map *map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
}

__device__ __forceinline__ void prefetch_3d(const Map *map, int row, int tile) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {0, %1, %2}];"
                 ::"l"(map), "r"(row), "r"(tile) : "memory");
}

__device__ __forceinline__ void store_2d(const Map *map, u32 from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
                 "cp.async.bulk.commit_group;" ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}

// Until at most `count` of this thread's stores have still to read shared memory.
template <int count> __device__ __forceinline__ void wait_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(count) : "memory");
}

__device__ __forceinline__ void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void wait_for_kernel_in_front() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
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

#if BITS == 4
// The table's entry for a byte of codes, the even column's in the lower half.
__device__ __forceinline__ u32 entry(const Codebook &codebook, int byte) {
    float even = codebook.value[byte >> 4], odd = codebook.value[byte & 15];
#if SCALE_SUMS
    return pack(even, odd);
#else
    return (u32)((int)even + 32768) | (u32)((int)odd + 32768) << 16;
#endif
}

// What a lane needs to decode, the same for every tile.
struct Lane {
    u32 table, codes, scales;
    __device__ __forceinline__ Lane(u32 table, int warp, int lane) : table(table + lane * 4) {
        // ldmatrix gives lane t' of quad g word t' of lane 4 g + t: columns 8 t + 2 t' of both halves of 64.
        int row = lane % 8, line = 4 * warp + row / 2;
        codes = line * 128 + (((row % 2 * 4 + lane / 8) ^ (line & 7)) << 4);
        scales = warp * 64 * GROUPS + lane / 4 * 8;
        // Kept, not computed again in every tile.
        asm volatile("" : "+r"(codes), "+r"(scales));
    }
};

// A lane's part of 16 rows x 64 columns: four left operands of wgmma, and the scales of its two rows.
struct Operand {
    u32 left[16];
    float scale[2];
};

// The same before it is decoded.
struct Codes {
    u32 word[4];
    float factor[GROUPS][2], offset[GROUPS][2];

    __device__ __forceinline__ void load(u32 codes, u32 scales, const Lane &lane, float inverse, Operand &to) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(codes + lane.codes));
#pragma unroll
        for (int a = 0; a < GROUPS; ++a) {
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(to.scale[0]), "=f"(to.scale[1]) : "r"(scales + lane.scales + a * 64));
#if !SCALE_SUMS
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                // To 15 bits, so that OFFSET times it is exact, and zero stays zero.
                factor[a][r] = __uint_as_float((__float_as_uint(to.scale[r] * inverse) + 0x100u) & 0xfffffe00u);
                offset[a][r] = -OFFSET * factor[a][r];
            }
#endif
        }
    }

    // The left operand of one wgmma: 16 columns.
    __device__ __forceinline__ void decode(int step, const Lane &lane, Operand &to) const {
        const int a = step / 2, group = a < GROUPS ? a : 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int t = step % 2 * 2 + i / 2, r = i % 2;
            u32 address, both;
            asm("dp4a.u32.u32 %0, %1, %2, %3;"
                : "=r"(address) : "r"(word[t]), "r"(0x80u << (16 * a + 8 * r)), "r"(lane.table));
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(both) : "r"(address));
#if SCALE_SUMS
            to.left[4 * step + i] = both;
#else
            float even = __uint_as_float(__byte_perm(both, 0x4b000000u, 0x7610));
            float odd = __uint_as_float(__byte_perm(both, 0x4b000000u, 0x7632));
            to.left[4 * step + i] = pack(__fmaf_rn(even, factor[group][r], offset[group][r]),
                                         __fmaf_rn(odd, factor[group][r], offset[group][r]));
#endif
        }
    }
};
#else
struct Lane {
    u32 codes;
    __device__ __forceinline__ Lane(u32, int warp, int lane) {
        // Row g of a quad, and pair t of the first eight columns; 16 bytes lie where TMA's 64-byte swizzle has them.
        int row = warp * 16 + lane / 4;
        codes = row * 64 + ((row >> 1 & 3) << 4) + lane % 4 * 2;
        // Kept, not computed again in every tile.
        asm volatile("" : "+r"(codes));
    }
};

// Two codes times UNIT as 16-bit floats, of halves that are 128 more: as floats these are subnormal, which a product and a
// sum in one make exact.
__device__ __forceinline__ u32 widen(u32 halves) {
    u32 both;
#if BFLOAT
    // times 2^127, less 2
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(halves), "r"(0x7f007f00u), "r"(0xc000c000u));
#else
    // times 2^15, less 1/4
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(halves), "r"(0x78007800u), "r"(0xb400b400u));
#endif
    return both;
}

struct Operand {
    u32 left[16];
};

struct Codes {
    u32 from;

    __device__ __forceinline__ void load(u32 codes, u32, const Lane &lane, float, Operand &) { from = codes + lane.codes; }

    // Two codes at a time, as the tensor cores want them; no two quads meet in a bank.
    __device__ __forceinline__ void decode(int step, const Lane &, Operand &to) const {
        u32 sixteen = from ^ (step << 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Rows g and g + 8 of the first eight columns, then of the others.
            u32 pair;
            asm volatile("ld.shared.u16 %0, [%1];" : "=r"(pair) : "r"(sixteen + i % 2 * 512 + i / 2 * 8));
            to.left[4 * step + i] = widen(__byte_perm(pair, 0, 0x4140) ^ 0x00800080u);
        }
    }
};
#endif

// sums (keep ? += : =) left @ x.T over 16 columns.
__device__ __forceinline__ void multiply(float (&sum)[WIDE / 2], const u32 *left, u64 right, int keep) {
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

// Where a work, or a part of it, lies. Works side by side share rows of W, which are read from memory once for TOKEN_BLOCKS.
struct Place {
    int first_token, first_row, first_tile, tiles, cut, split;
    __device__ __forceinline__ Place(const Problem &p, int index, int token_blocks) {
        bool is_whole = index < p.whole;
        cut = is_whole ? -1 : (index - p.whole) / p.splits;
        split = is_whole ? 0 : index - p.whole - cut * p.splits;
        first_tile = split * p.tiles_each;
        tiles = is_whole || split == p.splits - 1 ? p.K / COLUMNS - first_tile : p.tiles_each;
        int work = is_whole ? index : p.whole + cut;
        int each = TOKEN_BLOCKS * row_blocks(p), group = work / each;
        int first_block = group * TOKEN_BLOCKS, here = min(TOKEN_BLOCKS, token_blocks - first_block);
        int rest = work - group * each;
        first_token = (first_block + rest % here) * TOKENS;
        first_row = rest / here * WIDTH;
    }
    static __device__ __forceinline__ int row_blocks(const Problem &p) {
        return ((GATED ? p.N / 2 : p.N) + WIDTH - 1) / WIDTH;
    }
    // Works that are whole, and parts of the others.
    static __device__ __forceinline__ int count(const Problem &p, int token_blocks) {
        return p.whole + (token_blocks * row_blocks(p) - p.whole) * p.splits;
    }
};

struct Shared {
    u32 x, codes, scales, full, empty, side_full, side_empty, last;
    float *side; // [128] scales of W's rows, [TOKENS] of x's
};

// Outlier columns, and tiles of those at hand, which the first part of K multiplies.
__device__ __forceinline__ int outliers(const Problem &p) {
    return X_BITS == 8 && p.outlier_count ? *p.outlier_count : 0;
}

__device__ __forceinline__ int outlier_tiles(int columns, const Place &at) {
    return at.split == 0 ? (min(columns, CAPACITY) + 63) / 64 : 0;
}

// Calls copy(stage, k, place) for all tiles of this program's works, each when its stage is free; outliers' come last.
template <class Copy>
__device__ __forceinline__ void copy_tiles(const Problem &p, u32 empty, int works, int token_blocks, Copy copy) {
    int stage = 0, parity = 1;
    for (int work = blockIdx.x; work < works; work += gridDim.x) {
        Place at(p, work, token_blocks);
        int tiles = at.tiles;
#pragma unroll 1
        for (int k = 0; k < tiles; ++k) {
            wait_barrier(empty + stage * 8, parity);
            copy(stage, k, at);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (X_BITS == 8 && k + 1 == at.tiles) {
                // How many columns there are is what a kernel in front has found.
                wait_for_kernel_in_front();
                tiles += outlier_tiles(outliers(p), at);
            }
        }
    }
}

// Scales of this program's works, each when those of the one before are no longer needed; called by a warp.
__device__ __forceinline__ void copy_sides(const Problem &p, const Shared &shared, int works, int token_blocks) {
    int lane = threadIdx.x % 32, parity = 1;
    for (int work = blockIdx.x; work < works; work += gridDim.x, parity ^= 1) {
        Place at(p, work, token_blocks);
        wait_barrier(shared.side_empty, parity);
#pragma unroll
        for (int i = lane; i < CONSUMERS * ROWS; i += 32) {
            int row = at.first_row + i / ROWS * (GATED ? p.N / 2 : ROWS) + i % ROWS;
            shared.side[i] = row < p.N ? p.row_stats[row] / (X_BITS == 8 ? 127.f : 127.f * UNIT) : 0.f;
        }
#if X_BITS == 8
        wait_for_kernel_in_front();
#pragma unroll
        for (int i = lane; i < TOKENS; i += 32) {
            int token = at.first_token + i;
            shared.side[CONSUMERS * ROWS + i] = token < p.M ? p.x_stats[token] / 127.f : 0.f;
        }
#endif
        arrive(shared.side_full);
    }
}

// One tile of W, into a stage or, as a prefetch, into L2. Where half of its rows gate the others, the halves lie apart.
template <bool is_prefetch>
__device__ __forceinline__ void copy_weights(const Problem &p, const Map *codes, const Map *scales, const Shared &shared,
                                             int stage, int column, int first) {
    u32 done = shared.full + stage * 8, to = shared.codes + stage * CODE_BYTES;
    if (!is_prefetch) expect(done, CODE_BYTES + SCALE_BYTES);
#pragma unroll
    for (int half = 0; half <= GATED; ++half) {
        int row = first + half * (p.N / 2);
#if BITS == 4
        u32 scale_to = shared.scales + stage * SCALE_BYTES;
        int block = GROUPS == 2 ? 2 * column : column >> p.scale_shift;
        if (is_prefetch) {
            prefetch_3d(codes, 4 * column, row / 16);
            prefetch_3d(scales, block, row / 16);
        } else {
            copy_3d(to + half * (CODE_BYTES / 2), codes, 4 * column, row / 16, done);
            copy_3d(scale_to + half * (SCALE_BYTES / 2), scales, block, row / 16, done);
        }
#else
        if (is_prefetch)
            prefetch_2d(codes, COLUMNS * column, row);
        else
            copy_2d(to + half * (CODE_BYTES / 2), codes, COLUMNS * column, row, done);
#endif
    }
}

// Place of 16 bytes, eight results of a token, in a buffer.
__device__ __forceinline__ u32 place(int token, int eighth) {
    return token * PITCH + ((eighth ^ (token & 7)) << 4);
}

// A warpgroup's results of COUNT x 16 tokens and 64 rows of W to y. Rows of W are a lane's rows, so eight tokens by eight
// rows are turned around on the way (stmatrix).
template <int COUNT>
__device__ __forceinline__ void leave(const Problem &p, const Map *y, float (&v)[COUNT][8], int token, int row, int out,
                                      char *buffer, int consumer, bool is_first) {
    int thread = threadIdx.x % WARPGROUP, warp = thread / 32, lane = thread % 32;
    u32 corner = shared_address(buffer);
    bool bulk = p.vectors && COUNT * 16 == PART;
    // An earlier store was from this buffer, of another tile of y perhaps the last one.
    if (bulk && thread == 0) {
        if (is_first)
            wait_stores<0>();
        else
            wait_stores<BUFFERS - 1>();
    }
    if (bulk || p.residual) sync_threads(2 + consumer, WARPGROUP);
    if (p.residual) {
        for (int i = thread; i < COUNT * 16 * 8; i += WARPGROUP) {
            int m = token + i / 8, n = row + i % 8 * 8;
            char *to = buffer + place(i / 8, i % 8);
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
    for (int pair = 0; pair < COUNT; ++pair) {
        u32 address = corner + place(pair * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), r[4];
        if (p.residual) {
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float low, high;
                unpack(r[i], low, high);
                v[pair][2 * i] += low, v[pair][2 * i + 1] += high;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = pack(v[pair][2 * i], v[pair][2 * i + 1]);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
    }
    if (bulk) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        sync_threads(2 + consumer, WARPGROUP);
        // What lies outside of y is not written.
        if (thread == 0) store_2d(y, corner, row, token);
        return;
    }
    sync_threads(2 + consumer, WARPGROUP);
#pragma unroll
    for (int i = thread; i < COUNT * 16 * 8; i += WARPGROUP) {
        int m = token + i / 8, n = row + i % 8 * 8;
        const char *from = buffer + place(i / 8, i % 8);
        char *to = p.y + (long long)m * p.y_stride + n * 2;
        if (m >= p.M) continue;
        if (p.vectors && n + 8 <= out)
            *(uint4 *)to = *(const uint4 *)from;
        else
            for (int e = 0; e < 8; ++e)
                if (n + e < out) ((unsigned short *)to)[e] = ((const unsigned short *)from)[e];
    }
    sync_threads(2 + consumer, WARPGROUP);
}

// Sums of a whole K to y.
__device__ __forceinline__ void finish(const Problem &p, const Map *y, const Place &at, float (&sum)[TOKENS / 2],
                                       char *staging, float4 *handed, const float *side) {
    int thread = threadIdx.x % WARPGROUP, consumer = threadIdx.x / WARPGROUP - 1;
    int out = GATED ? p.N / 2 : p.N, row = at.first_row + (GATED ? 0 : consumer * ROWS);
    int of_lane = thread / 32 * 16 + thread % 32 / 4;
    int bias_row = at.first_row + consumer * (GATED ? p.N / 2 : ROWS) + of_lane;
    float bias[2] = {load_bias(p, bias_row), load_bias(p, bias_row + 8)};
    const float *side_of_lane = side + consumer * ROWS + of_lane;
    float scale[2] = {BITS == 8 ? side_of_lane[0] : 1.f, BITS == 8 ? side_of_lane[8] : 1.f};
#pragma unroll
    for (int part = 0; part < TOKENS / PART; ++part) {
        int token = at.first_token + part * PART;
        if (token >= p.M) break;
        float v[PART / 16][8];
#pragma unroll
        for (int i = 0; i < PART / 2; ++i) v[i / 8][i % 8] = __fmaf_rn(sum[part * PART / 2 + i], scale[i / 2 % 2], bias[i / 2 % 2]);
#if GATED
        // Gates and what they multiply lie in the same lanes of the two warpgroups.
        if (consumer == 1)
#pragma unroll
            for (int i = 0; i < PART / 8; ++i) {
                const float *s = v[i / 2] + i % 2 * 4;
                handed[i * WARPGROUP + thread] = make_float4(s[0], s[1], s[2], s[3]);
            }
        sync_threads(1, CONSUMERS * WARPGROUP);
        if (consumer == 0) {
#endif
#pragma unroll
            for (int i = 0; i < PART / 2; ++i) v[i / 8][i % 8] = activate(v[i / 8][i % 8]);
#if GATED
#pragma unroll
            for (int i = 0; i < PART / 8; ++i) {
                float4 up = handed[i * WARPGROUP + thread];
                float *s = v[i / 2] + i % 2 * 4;
                s[0] *= up.x, s[1] *= up.y, s[2] *= up.z, s[3] *= up.w;
            }
#endif
            leave<PART / 16>(p, y, v, token, row, out, staging + (BUFFERS * consumer + part % BUFFERS) * BUFFER_BYTES,
                              consumer, part == 0);
#if GATED
        }
        sync_threads(1, CONSUMERS * WARPGROUP);
#endif
    }
}

// Leaves the sums of a part of K to one of the programs that have its parts, and there adds them up: whether so.
//
// Where all parts are worked on at a time, by programs in their order, the last part's program waits for the others: these
// began before it, so it cannot wait in vain, and its own sums need not be written. Else the program that ends last adds
// up all parts in their order, and none waits.
__device__ __forceinline__ bool collect(const Problem &p, const Place &at, float (&sum)[TOKENS / 2], u32 last) {
    const int threads = CONSUMERS * WARPGROUP, quads = TOKENS / 8;
    const int together = BLOCKS == 2 ? (GATED ? 2 : 4) : TOKENS > 224 || CONSUMERS == 3 ? 8 : 16;
    int thread = threadIdx.x - WARPGROUP, ended;
    float4 *parts = p.parts + (long long)at.cut * p.splits * quads * threads + thread;
    float4 *mine = parts + at.split * quads * threads;
    int *ticket = p.tickets + at.cut, begin = 0, end = p.splits - 1;
    if (!p.in_order || at.split != end)
#pragma unroll
        for (int i = 0; i < quads; ++i)
            __stcg(mine + i * threads, make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
    sync_threads(1, threads);
    if (p.in_order) {
        // Releases what all threads wrote before the barrier, or acquires what the other programs released.
        if (at.split != end) {
            if (thread == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(ticket) : "memory");
            return false;
        }
        if (thread == 0) {
            do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(ended) : "l"(ticket) : "memory");
            while (ended != end);
            *ticket = 0;
        }
        sync_threads(1, threads);
    } else {
        if (thread == 0) {
            asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(ended) : "l"(ticket) : "memory");
            if (ended == end) *ticket = 0;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(last), "r"(ended) : "memory");
        }
        sync_threads(1, threads);
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(ended) : "r"(last) : "memory");
        if (ended != end) return false;
        end = p.splits;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sum[i] = 0.f;
    }
#pragma unroll
    for (int first = 0; first < quads; first += together)
        for (int part = begin; part < end; ++part) {
            const float4 *from = parts + (part * quads + first) * threads;
            float4 f[together];
#pragma unroll
            for (int i = 0; i < together; ++i)
                if (first + i < quads) f[i] = __ldcg(from + i * threads);
#pragma unroll
            for (int i = 0; i < together; ++i)
                if (first + i < quads) {
                    float *s = sum + 4 * (first + i);
                    s[0] += f[i].x, s[1] += f[i].y, s[2] += f[i].z, s[3] += f[i].w;
                }
        }
    return true;
}

struct Multiplier {
    Shared shared;
    Lane lane;
    float inverse;
    int stage, parity;
    u32 used; // the stage of a tile whose products were asked for and not yet taken

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }

    // The codes of the next tile, once they have arrived.
    __device__ __forceinline__ void load(Codes &next, Operand &to) {
        wait_barrier(shared.full + stage * 8, parity);
        next.load(shared.codes + stage * CODE_BYTES, shared.scales + stage * SCALE_BYTES, lane, inverse, to);
    }

    __device__ __forceinline__ void decode(Operand &operand) {
        Codes codes;
        load(codes, operand);
#pragma unroll
        for (int j = 0; j < 4; ++j) codes.decode(j, lane, operand);
    }

#if X_BITS == 16
    // Waits for the products of a tile, after which `behind` more were asked for, and gives back its stage.
    template <int behind> __device__ __forceinline__ void take(const Operand &of, u32 done) {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(behind) : "memory");
        // The tensor cores read these up to here, which the compiler does not see.
#pragma unroll
        for (int i = 0; i < 16; ++i) asm volatile("" ::"r"(of.left[i]));
        if (threadIdx.x % 32 == 0) arrive(done);
    }

#if QUEUED
    // Asks for the products of one tile, takes those of the one in front and decodes the next one in its place. What is
    // first and what has a next one are constants: the compiler has to see which products are on their way.
    template <bool is_first, bool has_next>
    __device__ __forceinline__ void step(float (&sum)[TOKENS / 2], const Operand &now, Operand &other) {
        u64 right = describe(shared.x + stage * X_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        multiply(sum, now.left, right, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (!is_first) take<1>(other, used);
        used = shared.empty + stage * 8;
        advance();
        Codes next;
        if (has_next) load(next, other);
#pragma unroll
        for (int j = 1; j < 4; ++j) {
            multiply(sum, now.left + 4 * j, right + 2 * j, 1);
            if (has_next && j == 1) next.decode(0, lane, other);
            if (has_next) next.decode(j, lane, other);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }

    // Sums of all tiles of a work.
    __device__ __forceinline__ void multiply_tiles(float (&sum)[TOKENS / 2], int tiles) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sum[i] = 0.f;
        Operand one, two;
        decode(one);
        if (tiles == 1) {
            step<true, false>(sum, one, two);
            return take<0>(one, used);
        }
        step<true, true>(sum, one, two);
        for (int k = 2;; k += 2) {
            if (k == tiles) {
                step<false, false>(sum, two, one);
                return take<0>(two, used);
            }
            step<false, true>(sum, two, one);
            if (k + 1 == tiles) {
                step<false, false>(sum, one, two);
                return take<0>(one, used);
            }
            step<false, true>(sum, one, two);
        }
    }
#else
    // Products of one tile, the next one decoded meanwhile, or, where that takes registers that are not there, after it.
    __device__ __forceinline__ void step(float (&sum)[TOKENS / 2], Operand &now, Operand &next, bool is_first,
                                         bool has_next) {
#if SCALE_SUMS
        float product[TOKENS / 2];
#endif
        u64 right = describe(shared.x + stage * X_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < 4; ++j)
#if SCALE_SUMS
            multiply(product, now.left + 4 * j, right + 2 * j, j > 0);
#else
            multiply(sum, now.left + 4 * j, right + 2 * j, !(is_first && j == 0));
#endif
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        u32 done = shared.empty + stage * 8;
        advance();
        if (DECODE_AHEAD && has_next) decode(next);
        take<0>(now, done);
#if SCALE_SUMS
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sum[i] = __fmaf_rn(product[i], now.scale[i / 2 % 2], sum[i]);
#endif
        if (!DECODE_AHEAD && has_next) decode(now);
    }

    // Sums of all tiles of a work.
    __device__ __forceinline__ void multiply_tiles(float (&sum)[TOKENS / 2], int tiles) {
#if SCALE_SUMS
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sum[i] = 0.f;
#endif
        Operand one, two;
        decode(one);
        for (int k = 0; k < tiles; k += 2) {
            step(sum, one, two, k == 0, k + 1 < tiles);
            if (k + 1 < tiles) step(sum, DECODE_AHEAD ? two : one, one, false, k + 2 < tiles);
        }
    }
#endif
#endif
};

#if X_BITS == 8
// sums (keep ? += : =) left @ x.T over 32 columns.
__device__ __forceinline__ void multiply(int (&sum)[TOKENS / 2], u64 left, u64 right, int keep) {
    asm volatile(X_PRODUCT : X_SUMS : "l"(left), "l"(right), "r"(keep));
}

__device__ __forceinline__ float load_x(const char *from, bool is_row) {
    if (!is_row) return 0.f;
    float low, high;
    unpack(*(const unsigned short *)from, low, high);
    return low;
}

// Sums of a work: products of codes times the scales of x's rows, and what its codes leave out.
__device__ __forceinline__ void multiply_codes(const Problem &p, const Place &at, Multiplier &m, u32 outlier_codes,
                                               int side_parity, float (&sum)[TOKENS / 2]) {
    int product[TOKENS / 2], lane = threadIdx.x % 32;
    u32 used = 0;
    for (int k = 0; k < at.tiles; ++k) {
        wait_barrier(m.shared.full + m.stage * 8, m.parity);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        u64 left = describe(m.shared.codes + m.stage * CODE_BYTES), right = describe(m.shared.x + m.stage * X_BYTES);
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(product, left + 2 * j, right + 2 * j, k > 0 || j > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k > 0 && lane == 0) arrive(used);
        used = m.shared.empty + m.stage * 8;
        m.advance();
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (lane == 0) arrive(used);
    int first = at.first_token + lane % 4 * 2;
    wait_barrier(m.shared.side_full, side_parity);
    const float *scales = m.shared.side + CONSUMERS * ROWS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            float scale = scales[8 * i + b];
            sum[4 * i + b] = (float)product[4 * i + b] * scale;
            sum[4 * i + 2 + b] = (float)product[4 * i + 2 + b] * scale;
        }
    if (at.split != 0) return;
    int columns = outliers(p);
    for (int t = outlier_tiles(columns, at); t > 0; --t) {
        wait_barrier(m.shared.full + m.stage * 8, m.parity);
        Codes raw;
        Operand codes;
        raw.load(outlier_codes + m.stage * CODE_BYTES, 0, m.lane, 0.f, codes);
#pragma unroll
        for (int j = 0; j < 4; ++j) raw.decode(j, m.lane, codes);
        u64 right = describe(m.shared.x + m.stage * X_BYTES);
        // WIDE tokens at a time: sums and int8 products, both in a row of registers, would not lie in the same ones.
#pragma unroll
        for (int first = 0; first < TOKENS; first += WIDE) {
            float part[WIDE / 2];
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply(part, codes.left + 4 * j, right + first * 8 + 2 * j, j > 0);
            asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
            for (int i = 0; i < WIDE / 2; ++i) sum[first / 2 + i] += part[i] * (1.f / UNIT);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) asm volatile("" ::"r"(codes.left[i]));
        if (lane == 0) arrive(m.shared.empty + m.stage * 8);
        m.advance();
    }
    int row = at.first_row + threadIdx.x / WARPGROUP * ROWS - ROWS + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
#pragma unroll 1
    for (int c = CAPACITY; c < columns; ++c) {
        int column = p.outlier_columns[c];
        float code[2];
#pragma unroll
        for (int r = 0; r < 2; ++r)
            code[r] = row + 8 * r < p.N ? (float)p.codes[(row + 8 * r) * p.code_stride + column] : 0.f;
        const char *from = p.x + first * p.x_stride + 2 * column;
        // Found anew for each column: so many addresses would not stay in registers.
        asm volatile("" : "+l"(from));
#pragma unroll
        for (int i = 0; i < TOKENS / 8; ++i, from += 8 * p.x_stride)
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                float value = load_x(from + b * p.x_stride, first + 8 * i + b < p.M);
                sum[4 * i + b] = __fmaf_rn(value, code[0], sum[4 * i + b]);
                sum[4 * i + 2 + b] = __fmaf_rn(value, code[1], sum[4 * i + 2 + b]);
            }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gemm_codes(const __grid_constant__ Map x, const __grid_constant__ Map w,
           const __grid_constant__ Map absmax, // X_BITS 8: codes of W's outlier columns
           const __grid_constant__ Map outlier_x, const __grid_constant__ Map y, const __grid_constant__ Problem p,
           const __grid_constant__ Codebook codebook) {
    // Aligned as swizzled tiles want it, which holds as the system's own part before it is 1 KiB.
    extern __shared__ __align__(1024) char base[];
    if (shared_address(base) & 1023) __trap();
    char *staging = base + STAGES * (X_BYTES + CODE_BYTES);
    char *table = staging + STAGING_BYTES;
    float4 *handed = (float4 *)(table + TABLE_BYTES + STAGES * SCALE_BYTES);
    Shared shared;
    shared.x = shared_address(base);
    shared.codes = shared.x + STAGES * X_BYTES;
    shared.scales = shared_address(table) + TABLE_BYTES;
    shared.side = (float *)((char *)handed + HANDED_BYTES);
    shared.full = shared_address(shared.side) + SIDE_BYTES;
    shared.empty = shared.full + STAGES * 8;
    shared.side_full = shared.empty + STAGES * 8, shared.side_empty = shared.side_full + 8;
    shared.last = shared.side_empty + 8;

    int token_blocks = (p.M + TOKENS - 1) / TOKENS;
    int works = Place::count(p, token_blocks);

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        prefetch(&w), prefetch(&x);
        if (BITS == 4) prefetch(&absmax);
        if (p.vectors) prefetch(&y);
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(shared.full + i * 8, 2);
            init_barrier(shared.empty + i * 8, CONSUMERS * 4);
        }
        init_barrier(shared.side_full, 32), init_barrier(shared.side_empty, CONSUMERS * 4);
        // The copies arrive there from outside of what threads see.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
        if (!p.early) {
            Place at(p, blockIdx.x, token_blocks);
            if (threadIdx.x == 0)
                for (int k = 0; k < min(STAGES, at.tiles); ++k)
                    copy_weights<true>(p, &w, &absmax, shared, 0, at.first_tile + k, at.first_row);
            wait_for_kernel_in_front();
        }
        if (threadIdx.x == 0)
            copy_tiles(p, shared.empty, works, token_blocks, [&](int stage, int k, const Place &at) {
                if (X_BITS == 16 || k < at.tiles) {
                    copy_weights<false>(p, &w, &absmax, shared, stage, at.first_tile + k, at.first_row);
                } else {
                    u32 done = shared.full + stage * 8;
                    expect(done, OUTLIER_BYTES);
                    copy_2d(shared.codes + stage * CODE_BYTES, &absmax, 64 * (k - at.tiles), at.first_row, done);
                }
            });
        if (threadIdx.x == 32) {
            wait_for_kernel_in_front();
            copy_tiles(p, shared.empty, works, token_blocks, [&](int stage, int k, const Place &at) {
                u32 done = shared.full + stage * 8, to = shared.x + stage * X_BYTES;
                expect(done, X_BYTES);
                if (X_BITS == 16 || k < at.tiles)
                    copy_2d(to, &x, COLUMNS * (at.first_tile + k), at.first_token, done);
                else
                    copy_2d(to, &outlier_x, 64 * (k - at.tiles), at.first_token, done);
            });
        }
        if (BITS == 8 && threadIdx.x / 32 == 2) copy_sides(p, shared, works, token_blocks);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
    int consumer = threadIdx.x / WARPGROUP - 1;
#if BITS == 4
    // The 32 copies of an entry, lanes side by side in other banks.
    int byte = threadIdx.x - WARPGROUP;
    if (byte < 256) {
        u32 both = entry(codebook, byte);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            *(uint4 *)(table + byte * 128 + (byte + i & 7) * 16) = make_uint4(both, both, both, both);
    }
    sync_threads(1, CONSUMERS * WARPGROUP);
#endif
    wait_for_kernel_in_front();
    Shared mine = shared;
    mine.codes += consumer * (CODE_BYTES / CONSUMERS), mine.scales += consumer * (SCALE_BYTES / CONSUMERS);
    Lane lane(shared_address(table), threadIdx.x / 32 % 4, threadIdx.x % 32);
    Multiplier multiplier{mine, lane, codebook.inverse, 0, 0, 0};
    int side_parity = 0;
    for (int work = blockIdx.x; work < works; work += gridDim.x, side_parity ^= 1) {
        Place at(p, work, token_blocks);
        float sum[TOKENS / 2];
#if X_BITS == 8
        multiply_codes(p, at, multiplier, shared.codes + consumer * (OUTLIER_BYTES / CONSUMERS), side_parity, sum);
#else
        multiplier.multiply_tiles(sum, at.tiles);
#if SCALE_SUMS
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sum[i] *= codebook.inverse;
#endif
#endif
        bool all = at.cut < 0 || collect(p, at, sum, shared.last);
        if (BITS == 8) wait_barrier(shared.side_full, side_parity);
        if (all) finish(p, &y, at, sum, staging, handed, shared.side);
        if (BITS == 8) {
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive(shared.side_empty);
        }
    }
    // Shared memory stays until the stores have read it.
    if (threadIdx.x % WARPGROUP == 0) wait_stores<0>();
}
