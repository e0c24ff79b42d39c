// Rows of tensors as vectors of 16 bytes: how they are read, written, copied to shared memory and converted.
#pragma once

#include "device.cuh"

namespace evit::cuda {

// What a thread takes of a row at once: 16 bytes.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);
template <typename T>
struct alignas(16) Vector {
  uint32_t word[4];  // not elements: the compiler would take 16-bit ones apart and join them again
};

// Whether rows may be read and written 16 bytes at a time: address and strides are multiples of that.
template <typename T, typename... Strides>
bool aligned(const T* data, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides * sizeof(T) % 16 == 0) && ...);
}

// A vector from device memory that the kernel does not write. Where rows are not aligned it is read element
// by element, and where fewer than kWidth are `left` in the row the others are zeros: so a sum is formed in
// the same order however a tensor lies in memory.
template <bool kAligned, typename T>
__device__ Vector<T> load(const T* from, int64_t left) {
  Vector<T> value = {};
#ifdef EVIT_CUDA_ON_HOST
  cuda_on_host::interleave();
  if (kAligned) cuda_on_host::check_aligned(from, sizeof value);
  memcpy(static_cast<void*>(&value), from,
         sizeof(T) * min(int64_t{kAligned ? kWidth<T> : left}, int64_t{kWidth<T>}));
#else
  if constexpr (kAligned) {
    // With a plain assignment nvcc is free to make several instructions of one, and does.
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    value = {{words.x, words.y, words.z, words.w}};
  } else {
    T element[kWidth<T>] = {};
#pragma unroll
    for (int w = 0; w < kWidth<T>; ++w)
      if (w < left) element[w] = from[w];
    memcpy(&value, element, sizeof value);
  }
#endif
  return value;
}

// The reverse: to device memory, no more than is `left` of the row.
template <bool kAligned, typename T>
__device__ void store(T* to, const Vector<T>& value, int64_t left) {
#ifdef EVIT_CUDA_ON_HOST
  cuda_on_host::interleave();
  if (kAligned) cuda_on_host::check_aligned(to, sizeof value);
  memcpy(static_cast<void*>(to), &value,
         sizeof(T) * min(int64_t{kAligned ? kWidth<T> : left}, int64_t{kWidth<T>}));
#else
  if constexpr (kAligned) {
    __stcg(reinterpret_cast<uint4*>(to),
           make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]));
  } else {
    T element[kWidth<T>];
    memcpy(element, &value, sizeof value);
#pragma unroll
    for (int w = 0; w < kWidth<T>; ++w)
      if (w < left) to[w] = element[w];
  }
#endif
}

// The same from shared memory, which is always aligned.
template <typename T>
__device__ Vector<T> load_shared(const T* from) {
#ifdef EVIT_CUDA_ON_HOST
  return load<true>(from, kWidth<T>);
#else
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  return {{words.x, words.y, words.z, words.w}};
#endif
}

// Two values as a register of 16-bit elements, to nearest, ties to even.
template <typename T>
__device__ inline uint32_t narrow_pair(float low, float high) {
#ifndef EVIT_CUDA_ON_HOST
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
#else
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#endif
}

// The elements in the accumulation type, and the reverse, two 16-bit elements at a time.
template <typename T>
__device__ void widen_vector(const Vector<T>& from, accumulate_t<T> (&to)[kWidth<T>]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#pragma unroll
    for (int i = 0; i < kWidth<T> / 2; ++i) {
      to[2 * i] = __uint_as_float(from.word[i] << 16);
      to[2 * i + 1] = __uint_as_float(from.word[i] & 0xffff0000u);
    }
  } else {
    T element[kWidth<T>];
    memcpy(element, &from, sizeof from);
#pragma unroll
    for (int w = 0; w < kWidth<T>; ++w) to[w] = widen(element[w]);
  }
}

template <typename T>
__device__ Vector<T> narrow_vector(const accumulate_t<T> (&from)[kWidth<T>]) {
  Vector<T> to;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kWidth<T> / 2; ++i) to.word[i] = narrow_pair<T>(from[2 * i], from[2 * i + 1]);
  } else {
    memcpy(&to, from, sizeof to);
  }
  return to;
}

// Copies 16 bytes to shared memory, or zeros where there is nothing to copy (`from` must be a valid address
// all the same). They are complete after copies_arrived and a barrier; on their way they take no registers,
// so that any number of copies is under way at once.
template <typename T>
__device__ void copy_vector_to_shared(T* to, const T* from, bool there = true) {
#ifdef EVIT_CUDA_ON_HOST
  cuda_on_host::copy_async(to, from, sizeof(Vector<T>), there);
#else
  // Not CUDA's __pipeline_memcpy_async: it makes a branch, and two instructions, of `there`.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
#endif
}

// Copies what `load` would return to shared memory, which is complete after copies_arrived and a barrier.
// Where rows are not aligned, the way is through registers.
template <bool kAligned, typename T>
__device__ void copy_to_shared(T* to, const T* from, int64_t left) {
  if constexpr (kAligned) {
    copy_vector_to_shared(to, from);
  } else {
    const Vector<T> value = load<kAligned>(from, left);
    memcpy(static_cast<void*>(to), &value, sizeof value);
  }
}
__device__ inline void copies_arrived() {
#ifdef EVIT_CUDA_ON_HOST
  cuda_on_host::wait_for_copies();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace evit::cuda
