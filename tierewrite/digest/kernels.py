"""The CUDA source of the two kernels that `cuda` compiles. Nothing else."""

SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

// BLAKE3 constants (the specification, sections 2.1 to 2.4).
#define CHUNK_START 1u
#define CHUNK_END 2u
#define PARENT 4u
#define ROOT 8u
#define IV0 0x6A09E667u
#define IV1 0xBB67AE85u
#define IV2 0x3C6EF372u
#define IV3 0xA54FF53Au
#define IV4 0x510E527Fu
#define IV5 0x9B05688Cu
#define IV6 0x1F83D9ABu
#define IV7 0x5BE0CD19u
#define ROOT_BIT (1ull << 63)

// One multiply-add by a 1 that the compiler cannot see through. Hopper runs IMAD on the FMA pipe, which is
// idle here, while additions, XORs and rotations all queue for the ALU pipe.
__device__ __forceinline__ u32 add_fma(u32 x, u32 y, u32 one) {
    u32 r;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(one), "r"(y));
    return r;
}

__device__ __forceinline__ void g(u32& a, u32& b, u32& c, u32& d, u32 x, u32 y, u32 one) {
    a = add_fma(b, add_fma(x, a, one), one);
    d = __byte_perm(d ^ a, 0, 0x1032);
    c = add_fma(d, c, one);
    b = __funnelshift_r(b ^ c, b ^ c, 12);
    a = add_fma(b, add_fma(y, a, one), one);
    d = __byte_perm(d ^ a, 0, 0x0321);
    c = add_fma(d, c, one);
    b = __funnelshift_r(b ^ c, b ^ c, 7);
}

#define ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15) \
    g(v0, v4, v8, v12, m[s0], m[s1], one);                                           \
    g(v1, v5, v9, v13, m[s2], m[s3], one);                                           \
    g(v2, v6, v10, v14, m[s4], m[s5], one);                                          \
    g(v3, v7, v11, v15, m[s6], m[s7], one);                                          \
    g(v0, v5, v10, v15, m[s8], m[s9], one);                                          \
    g(v1, v6, v11, v12, m[s10], m[s11], one);                                        \
    g(v2, v7, v8, v13, m[s12], m[s13], one);                                         \
    g(v3, v4, v9, v14, m[s14], m[s15], one);

// The compression function, its output cut to a chaining value: h is key or previous value in, new value out.
__device__ __forceinline__ void compress(u32 h[8], const u32 m[16], u64 counter, u32 length, u32 flags, u32 one) {
    u32 v0 = h[0], v1 = h[1], v2 = h[2], v3 = h[3], v4 = h[4], v5 = h[5], v6 = h[6], v7 = h[7];
    u32 v8 = IV0, v9 = IV1, v10 = IV2, v11 = IV3;
    u32 v12 = (u32)counter, v13 = (u32)(counter >> 32), v14 = length, v15 = flags;
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1)
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6)
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4)
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7)
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13)
    h[0] = v0 ^ v8;
    h[1] = v1 ^ v9;
    h[2] = v2 ^ v10;
    h[3] = v3 ^ v11;
    h[4] = v4 ^ v12;
    h[5] = v5 ^ v13;
    h[6] = v6 ^ v14;
    h[7] = v7 ^ v15;
}

__device__ __forceinline__ void start(u32 h[8]) {
    h[0] = IV0; h[1] = IV1; h[2] = IV2; h[3] = IV3;
    h[4] = IV4; h[5] = IV5; h[6] = IV6; h[7] = IV7;
}

__device__ __forceinline__ void store(uint4* to, const u32 h[8]) {
    to[0] = make_uint4(h[0], h[1], h[2], h[3]);
    to[1] = make_uint4(h[4], h[5], h[6], h[7]);
}

// The last i of starts[0..n) with starts[i] <= x; starts ascends and starts[0] is 0.
__device__ __forceinline__ u32 find(const u64* __restrict__ starts, u32 n, u64 x) {
    u32 low = 0, high = n;
    while (high - low > 1) {
        u32 middle = (low + high) >> 1;
        if (starts[middle] <= x) low = middle; else high = middle;
    }
    return low;
}

// 0 <= length <= 64 bytes from any address into 16 little-endian words, zeros after the end. Reads aligned
// 16-byte vectors, but the last one bytewise when `tail` says that less than 15 bytes of ours follow. What is read
// before the address belongs to the same allocation, whose start is aligned.
__device__ __forceinline__ void load(u32 m[16], u64 address, u32 length, bool tail) {
    const u32 shift = (u32)address & 15u;
    const uint4* from = (const uint4*)(address - shift);
    if (shift == 0 && length == 64) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 q = __ldg(from + i);
            m[4 * i] = q.x; m[4 * i + 1] = q.y; m[4 * i + 2] = q.z; m[4 * i + 3] = q.w;
        }
        return;
    }
    u32 w[20];
    const u32 end = length ? shift + length : 0;
    const u32 vectors = tail ? end >> 4 : (end + 15) >> 4;
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        const uint4 q = i < vectors ? __ldg(from + i) : make_uint4(0, 0, 0, 0);
        w[4 * i] = q.x; w[4 * i + 1] = q.y; w[4 * i + 2] = q.z; w[4 * i + 3] = q.w;
    }
    if (tail && (end & 15u)) {
        const unsigned char* bytes = (const unsigned char*)(from + vectors);
        u32 t[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < 15; ++k)
            if (k < (end & 15u)) t[k >> 2] |= (u32)__ldg(bytes + k) << (8 * (k & 3));
#pragma unroll
        for (int i = 0; i < 20; ++i) w[i] = i >> 2 == vectors ? t[i & 3] : w[i];
    }
    const u32 bits = (shift & 3u) * 8;
    switch (shift >> 2) {  // a branch per word offset keeps w in registers
#define TAKE(k)                                                                                        \
    case k:                                                                                            \
        _Pragma("unroll") for (int i = 0; i < 16; ++i) m[i] =                                           \
            __funnelshift_r(w[i + k], i + k < 19 ? w[i + k + 1] : 0u, bits);                           \
        break;
        TAKE(0) TAKE(1) TAKE(2) TAKE(3)
#undef TAKE
    }
    if (length < 64) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int have = (int)length - 4 * i;
            m[i] = have >= 4 ? m[i] : have <= 0 ? 0u : m[i] & (0xFFFFFFFFu >> (32 - 8 * have));
        }
    }
}

// One thread, one chunk (at most 1,024 bytes) -> its chaining value.
// jobs: 4 rows of n: address, bytes, first chunk in this launch, chunk counter of the first | ROOT_BIT.
// A job of one chunk is ready: its 32 bytes go to out[job]; the others' go to cvs[chunk].
extern "C" __global__ void __launch_bounds__(128, 8)
chunks(const u64* __restrict__ jobs, u32 n, u64 total, uint4* __restrict__ cvs, uint4* __restrict__ out, u32 one) {
    const u64 me = (u64)blockIdx.x * 128 + threadIdx.x;
    if (me >= total) return;
    const u32 job = find(jobs + 2 * (u64)n, n, me);
    const u64 index = me - jobs[2 * (u64)n + job];
    const u64 bytes = jobs[n + (u64)job];
    const u64 tag = jobs[3 * (u64)n + job];
    const u64 counter = (tag & ~ROOT_BIT) + index;
    const bool single = bytes <= 1024;
    const u32 last = single && (tag & ROOT_BIT) ? CHUNK_END | ROOT : CHUNK_END;
    u64 address = jobs[job] + index * 1024;
    const u64 rest = bytes - index * 1024;
    u32 left = rest < 1024 ? (u32)rest : 1024u;
    u32 ahead = rest < 2048 ? (u32)rest : 2048u;  // bytes of the job from here on, or enough
    u32 h[8];
    start(h);
    u32 flags = CHUNK_START;
    bool more;
#pragma unroll 1
    do {
        u32 m[16];
        const u32 length = left < 64 ? left : 64u;
        more = left > 64;
        load(m, address, length, ahead < 64 + 15);
        if (!more) flags |= last;
        compress(h, m, counter, length, flags, one);
        flags = 0;
        address += 64;
        left -= length;
        ahead -= length;
    } while (more);
    store(single ? out + 2 * (u64)job : cvs + 2 * me, h);
}

// One block of 128 threads, up to 1,024 chaining values of one job -> the value of their subtree, by pairing
// neighbours and carrying an odd last one up, which is BLAKE3's tree.
// jobs: 4 rows of n: first value in from, values, first group in this launch, job number | ROOT_BIT.
// A job of one group is ready: its 32 bytes go to out[job number]; the others' go to next[group].
extern "C" __global__ void __launch_bounds__(128)
parents(const u64* __restrict__ jobs, u32 n, const uint4* __restrict__ from, uint4* __restrict__ next,
        uint4* __restrict__ out, u32 one) {
    __shared__ __align__(16) u32 nodes[8 * 512 + 8 * 256];  // word-major: word w of node i at w * size + i
    const u64 group = blockIdx.x;
    const u32 row = find(jobs + 2 * (u64)n, n, group);
    const u64 skipped = (group - jobs[2 * (u64)n + row]) * 1024;
    const u64 values = jobs[n + (u64)row];
    const u64 tag = jobs[3 * (u64)n + row];
    const bool ready = values <= 1024;
    const bool root = ready && (tag & ROOT_BIT);
    u32 count = values - skipped < 1024 ? (u32)(values - skipped) : 1024u;
    from += 2 * (jobs[row] + skipped);
    uint4* to = ready ? out + 2 * (tag & ~ROOT_BIT) : next + 2 * group;
    if (count == 1) {  // a last group of one: carried up as it is
        if (threadIdx.x < 2) to[threadIdx.x] = from[threadIdx.x];
        return;
    }
    bool leaves = true;
    u32 source = 0, width = 0;
    u32 target = 0, room = 512;
#pragma unroll 1
    while (true) {
        const u32 half = (count + 1) >> 1;
#pragma unroll 1
        for (u32 i = threadIdx.x; i < half; i += 128) {
            u32 h[8];
            const bool pair = 2 * i + 1 < count;
            u32 m[16];
            if (leaves) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const uint4 q = k < 2 || pair ? from[4 * i + k] : make_uint4(0, 0, 0, 0);
                    m[4 * k] = q.x; m[4 * k + 1] = q.y; m[4 * k + 2] = q.z; m[4 * k + 3] = q.w;
                }
            } else {
#pragma unroll
                for (int w = 0; w < 8; ++w) {
                    const uint2 q = *(const uint2*)&nodes[source + w * width + 2 * i];
                    m[w] = q.x;
                    m[w + 8] = q.y;
                }
            }
            if (pair) {
                start(h);
                compress(h, m, 0, 64, count == 2 && root ? PARENT | ROOT : PARENT, one);
            } else {
#pragma unroll
                for (int w = 0; w < 8; ++w) h[w] = m[w];
            }
            if (half == 1) {
                store(to, h);
            } else {
#pragma unroll
                for (int w = 0; w < 8; ++w) nodes[target + w * room + i] = h[w];
            }
        }
        if (half == 1) return;
        __syncthreads();
        count = half;
        leaves = false;
        source = target;
        width = room;
        if (target == 0) { target = 8 * 512; room = 256; } else { target = 0; room = 512; }
    }
}
"""
