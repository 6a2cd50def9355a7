// The GPU's side of mlh64.py, which says what is computed.
//
// A block of threads sums one part of a chunk and adds that to the chunk's digest; then one block of threads for each
// whole sums over its digests. Addition modulo 2^64 has no order, so the result is always the same. All c(i) are
// 2 MiB that stay in the GPU's cache: what limits it is the reading of the data.
//
// CHUNK_WORDS and PARTS, the number of parts of a chunk, are defined by whoever compiles this.

typedef unsigned long long word_t;

#define PART_WORDS ((word_t)CHUNK_WORDS / PARTS)
#define CHUNK_BYTES ((word_t)CHUNK_WORDS * 8)

__device__ __forceinline__ word_t mixed(word_t word, word_t factor)
{
    word_t product = word * factor;
    return (product ^ (product >> 32)) * factor;
}

// The sum over all threads of a block, in its first one.
__device__ __forceinline__ word_t block_sum(word_t sum)
{
    __shared__ word_t of_warps[32];
    for (int step = 16; step > 0; step >>= 1)
        sum += __shfl_down_sync(0xffffffffu, sum, step);
    if ((threadIdx.x & 31) == 0)
        of_warps[threadIdx.x >> 5] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < (blockDim.x >> 5) ? of_warps[threadIdx.x] : 0;
        for (int step = 16; step > 0; step >>= 1)
            sum += __shfl_down_sync(0xffffffffu, sum, step);
    }
    return sum;
}

// All c(i), CHUNK_WORDS of them.
extern "C" __global__ void coefficients(word_t* factors)
{
    word_t i = (word_t)blockIdx.x * blockDim.x + threadIdx.x;
    word_t z = (i + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    factors[i] = (z ^ (z >> 31)) | 1;
}

// Adds to digests[whole][chunk], which are zero before; with `targets`, copies what it reads. Grid: parts of chunks, wholes.
template <bool COPIES>
__device__ __forceinline__ void digest(
    const word_t* sources, const word_t* targets, word_t num_bytes, word_t num_chunks,
    const word_t* factors, word_t* digests)
{
    word_t chunk = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
    const word_t* words = (const word_t*)sources[blockIdx.y] + chunk * CHUNK_WORDS;
    word_t* copies = COPIES ? (word_t*)targets[blockIdx.y] + chunk * CHUNK_WORDS : 0;
    word_t left = num_bytes - chunk * CHUNK_BYTES;
    word_t num_words = left < CHUNK_BYTES ? left / 8 : CHUNK_WORDS;
    word_t first = part * PART_WORDS, end = first + PART_WORDS;
    if (end > num_words)
        end = num_words;
    word_t sum = 0;
    if ((((word_t)words | (word_t)copies) & 15) == 0 && first < end) {
        word_t num_pairs = (end - first) / 2;
        const ulonglong2* data = (const ulonglong2*)(words + first);
        const ulonglong2* pairs = (const ulonglong2*)(factors + first);
        #pragma unroll 8
        for (word_t i = threadIdx.x; i < num_pairs; i += blockDim.x) {
            ulonglong2 word = __ldcs(data + i);
            ulonglong2 factor = __ldg(pairs + i);
            if (COPIES)
                __stcs((ulonglong2*)(copies + first) + i, word);
            sum += mixed(word.x, factor.x) + mixed(word.y, factor.y);
        }
        first += num_pairs * 2;
    }
    for (word_t i = first + threadIdx.x; i < end; i += blockDim.x) {
        word_t word = words[i];
        if (COPIES)
            copies[i] = word;
        sum += mixed(word, factors[i]);
    }
    if (left < CHUNK_BYTES && left % 8 && part == num_words / PART_WORDS && threadIdx.x == 0) {
        const unsigned char* rest = (const unsigned char*)(words + num_words);
        word_t word = 0;
        for (word_t i = 0; i < left % 8; i++) {
            if (COPIES)
                ((unsigned char*)(copies + num_words))[i] = rest[i];
            word |= (word_t)rest[i] << (8 * i);
        }
        sum += mixed(word, factors[num_words]);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        atomicAdd(digests + blockIdx.y * num_chunks + chunk, sum);
}

extern "C" __global__ void __launch_bounds__(256) chunk_digests(
    const word_t* sources, word_t num_bytes, word_t num_chunks, const word_t* factors,
    word_t* digests)
{
    digest<false>(sources, 0, num_bytes, num_chunks, factors, digests);
}

extern "C" __global__ void __launch_bounds__(256) copied_digests(
    const word_t* sources, const word_t* targets, word_t num_bytes, word_t num_chunks,
    const word_t* factors, word_t* digests)
{
    digest<true>(sources, targets, num_bytes, num_chunks, factors, digests);
}

// Grid: wholes.
extern "C" __global__ void wholes(
    const word_t* digests, word_t num_bytes, word_t num_chunks, const word_t* factors,
    word_t* checksums)
{
    const word_t* mine = digests + blockIdx.x * num_chunks;
    word_t sum = 0;
    for (word_t i = threadIdx.x; i < num_chunks; i += blockDim.x)
        sum += mixed(mine[i], factors[i]);
    if (threadIdx.x == 0)
        sum += mixed(num_bytes, factors[num_chunks]);
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        checksums[blockIdx.x] = sum;
}
