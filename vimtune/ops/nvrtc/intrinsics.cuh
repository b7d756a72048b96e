// What the kernels need of the machine, and nothing else: a test puts a C++ version of this file in its place.

// A half_word is one activation, or one time step in fp16, and a word holds two of them.
typedef unsigned short half_word;
typedef unsigned int word;
struct alignas(16) Words { word x, y, z, w; };
struct alignas(16) Quad { float x, y, z, w; };
// The numbers of the two channels that a thread has.
struct alignas(8) Pair { float a, b; };

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }
__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline void sync_block() { __syncthreads(); }

// Gives the shared memory whose size the launch says.
__device__ inline char* launched_shared() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

// Copies 16 bytes from global to shared memory, or zeros if not `valid`, without waiting.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
    const word target = (word)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid ? 16 : 0));
}
// Waits for this thread's copies.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Stores to global memory if `valid`. A branch would keep the compiler from mixing what is before and after it.
__device__ inline void store_if(bool valid, void* place, word value) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.u32 [%1], %2;}"
                 ::"r"((word)valid), "l"(place), "r"(value));
}

// Stores what this multiprocessor does not read again, so that it does not take the place of weights in its L1.
__device__ inline void store_passing(void* place, Words v) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"l"(place), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Gives the value of the lane whose number differs in this one bit.
__device__ inline float exchanged(float value, int bit) { return __shfl_xor_sync(0xffffffffu, value, bit); }

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline Pair from_fp16(word pair) {
    Pair value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(value.a), "=f"(value.b) : "r"(pair));
    return value;
}

__device__ inline word to_fp16(Pair value) {
    word pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(value.b), "f"(value.a));
    return pair;
}

// Does the same, but what is too large becomes the largest number.
__device__ inline word to_finite_fp16(Pair value) {
    word pair;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(value.b), "f"(value.a));
    return pair;
}

__device__ inline Pair from_bf16(word pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ inline word to_bf16(Pair value) {
    word pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(value.b), "f"(value.a));
    return pair;
}

// Loads values (16 x 16) from shared memory. Lane k says where eight of them are: row k % 16, from column k / 16 * 8.
__device__ inline Words load_values(const void* piece) {
    const word source = (word)__cvta_generic_to_shared(piece);
    Words values;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w) : "r"(source) : "memory");
    return values;
}

// Activations are fp16 if FP16 is set and bf16 otherwise.
#if FP16
#define ACTIVATIONS "f16"
__device__ inline Pair activation(word pair) { return from_fp16(pair); }
__device__ inline word rounded(Pair value) { return to_fp16(value); }
#else
#define ACTIVATIONS "bf16"
__device__ inline Pair activation(word pair) { return from_bf16(pair); }
__device__ inline word rounded(Pair value) { return to_bf16(value); }
#endif

// Computes sums (16 x 8) += values (16 x 16) weights (16 x 8). Each word holds two neighbours along the summed
// dimension. With row = lane / 4 and column = lane % 4 a lane holds
// values: (row, 2 column), (row + 8, 2 column), (row, 2 column + 8), (row + 8, 2 column + 8);
// weights: (2 column, row), (2 column + 8, row);
// sums: (row, 2 column), (row, 2 column + 1), (row + 8, 2 column), (row + 8, 2 column + 1).
// Any order of the summed dimension will do, if it is the same in both factors.
__device__ inline void multiply_add(Quad& sums, Words values, word weight0, word weight1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ACTIVATIONS "." ACTIVATIONS ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums.x), "+f"(sums.y), "+f"(sums.z), "+f"(sums.w)
        : "r"(values.x), "r"(values.y), "r"(values.z), "r"(values.w), "r"(weight0), "r"(weight1));
}
