// A test harness of one header: the C++ tests build with nothing but a compiler.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace evit::tests {

struct Test {
  const char* name;
  std::function<void()> run;
};

inline std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool add_test(const char* name, std::function<void()> run) {
  registry().push_back({name, std::move(run)});
  return true;
}

inline void fail(const char* file, int line, const std::string& message) {
  std::printf("%s:%d: %s\n", file, line, message.c_str());
  ++failures();
}

// Equal as far as a comparison of numbers goes: NaN is near NaN, infinities only to themselves.
inline bool near(double actual, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (std::isinf(expected)) return actual == expected;
  return std::abs(actual - expected) <= tolerance * (1 + std::abs(expected));
}

}  // namespace evit::tests

#define TEST(name)                                                                    \
  static void test_##name();                                                          \
  static const bool registered_##name = ::evit::tests::add_test(#name, &test_##name); \
  static void test_##name()

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) ::evit::tests::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)

#define CHECK_NEAR(actual, expected, tolerance)                                                \
  do {                                                                                         \
    const double check_a = (actual), check_e = (expected);                                     \
    if (!::evit::tests::near(check_a, check_e, tolerance))                                     \
      ::evit::tests::fail(                                                                     \
          __FILE__, __LINE__,                                                                  \
          #actual " is " + std::to_string(check_a) + ", expected " + std::to_string(check_e)); \
  } while (false)
