// Device functions for which no threads meet: atomics, bits, arithmetic. Included by host.h.
#pragma once

#ifndef CUDA_ON_HOST_CALL_SITE
#error "include host.h instead"
#endif

// ---- Atomics: plain operations, since only one thread runs at a time. Defined for just the types that CUDA
// has them for, so that an atomicAdd(uint64_t*), say, does not first fail under nvcc.

namespace cuda_on_host::internal {

template <class T, class... Allowed>
concept OneOf = (std::same_as<T, Allowed> || ...);

template <class T>
concept AtomicInteger = OneOf<T, int, unsigned, unsigned long long>;

template <class T, class Update>
T read_modify_write(T* address, Update update, Where at) {
  check_aligned(address, sizeof(T), at);
  interleave();
  const T before = *address;
  *address = update(before);
  interleave();
  return before;
}

}  // namespace cuda_on_host::internal

template <class T>
  requires cuda_on_host::internal::OneOf<T, int, unsigned, unsigned long long, float, double>
T atomicAdd(T* address, std::type_identity_t<T> value, CUDA_ON_HOST_CALL_SITE) {
  const auto add = [&](T before) {
    if constexpr (std::is_same_v<T, int>)  // wraps around on a device
      return static_cast<T>(static_cast<unsigned>(before) + static_cast<unsigned>(value));
    else
      return before + value;
  };
  return cuda_on_host::internal::read_modify_write(address, add, at);
}

template <class T>
  requires(cuda_on_host::internal::AtomicInteger<T> || std::same_as<T, long long>)
T atomicMin(T* address, std::type_identity_t<T> value, CUDA_ON_HOST_CALL_SITE) {
  const auto smaller = [&](T before) { return value < before ? value : before; };
  return cuda_on_host::internal::read_modify_write(address, smaller, at);
}

template <class T>
  requires(cuda_on_host::internal::AtomicInteger<T> || std::same_as<T, long long>)
T atomicMax(T* address, std::type_identity_t<T> value, CUDA_ON_HOST_CALL_SITE) {
  const auto larger = [&](T before) { return before < value ? value : before; };
  return cuda_on_host::internal::read_modify_write(address, larger, at);
}

template <cuda_on_host::internal::AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::read_modify_write(address, [&](T before) { return before | value; }, at);
}

template <cuda_on_host::internal::AtomicInteger T>
T atomicAnd(T* address, std::type_identity_t<T> value, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::read_modify_write(address, [&](T before) { return before & value; }, at);
}

template <cuda_on_host::internal::AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value,
            CUDA_ON_HOST_CALL_SITE) {
  const auto swap = [&](T before) { return before == compare ? value : before; };
  return cuda_on_host::internal::read_modify_write(address, swap, at);
}

template <class T>
  requires(cuda_on_host::internal::AtomicInteger<T> || std::same_as<T, float>)
T atomicExch(T* address, std::type_identity_t<T> value, CUDA_ON_HOST_CALL_SITE) {
  return cuda_on_host::internal::read_modify_write(address, [&](T) { return value; }, at);
}

// ---- Loads

template <class T>
T __ldg(const T* address, CUDA_ON_HOST_CALL_SITE) {
  cuda_on_host::check_aligned(address, alignof(T), at);
  return *address;
}

// ---- Bits

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
// Counted from 1, and 0 where no bit is set.
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }
inline int __ffsll(long long bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(bits)) + 1;
}

inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1) << (31 - i);
  return reversed;
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

// ---- Arithmetic: the fast variants are as exact as the others here. <math.h> has the rest.

inline float __fdividef(float a, float b) { return a / b; }

// glibc declares functions of these names to itself, and from 2.42 on it has rsqrt.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 42)
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
#endif

// By value, of the type of a + b, and where one of the arguments is NaN the other one: as CUDA has them.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr auto min(A a, B b) {
  using T = decltype(a + b);
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  return y < x || x != x ? y : x;
}

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr auto max(A a, B b) {
  using T = decltype(a + b);
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  return x < y || x != x ? y : x;
}
