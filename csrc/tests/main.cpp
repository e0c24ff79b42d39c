// Runs every test, or those whose names contain the first argument. Exit code 1 if any failed.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../evit/cpu/simd/simd_level.h"
#include "check.h"
#include "tiles.h"

int main(int argc, char** argv) {
  using namespace evit::tests;
  // Line by line also into a file: what is said before an abort, or before a kernel hangs, must be in it.
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  const char* wanted = std::getenv("EVIT_CPU_CAPABILITY");
  if (wanted != nullptr && std::strcmp(wanted, "amx_bf16") == 0 && tiles_testable())
    evit::cpu::set_simd_level(evit::cpu::SimdLevel::amx_bf16);
  const char* level = evit::cpu::simd_level_name(evit::cpu::simd_level());
  std::printf("instruction level: %s\n", level);
  if (wanted != nullptr && std::strcmp(wanted, level) != 0) {
    std::printf("not run: this processor has no %s\n", wanted);
    return 77;  // what CMakeLists.txt declares as skipped
  }
  int passed = 0, failed = 0;
  for (const Test& test : registry()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = failures();
    test.run();
    const bool ok = failures() == before;
    std::printf("%s %s\n", ok ? "ok    " : "FAILED", test.name);
    ++(ok ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
