// A processor without tiles stops at each of their instructions with SIGILL. The handler here reads the
// instruction, does to a thread's tiles in memory what Intel's manual (Software Developer's Manual, volume 2)
// says of it, and goes on behind it: it is the compiled kernel that is tested, to the last operand. Loads and
// stores are plain C++, so that the sanitizers see them.
#include "tiles.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../evit/cpu/simd/simd_level.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

namespace evit::tests {
namespace {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_of_row[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

// Of a thread, and constructed without a lock or memory: a handler may run anywhere.
struct Tiles {
  Config config;
  alignas(64) uint8_t data[8][16][64];
};
thread_local Tiles tiles;

[[noreturn]] void give_up(const char* why) {
  std::fprintf(stderr, "a tile instruction cannot be executed: %s\n", why);
  std::abort();
}

// Rows and bytes of a row of a tile, which must have been configured.
int rows(int tile) {
  if (tiles.config.palette != 1) give_up("the tiles are not configured");
  return tiles.config.rows[tile];
}
int bytes_of_row(int tile) { return tiles.config.bytes_of_row[tile]; }

// Writes a row, and zeros behind it and, after the last, below it.
void write_row(int tile, int row, const void* from) {
  std::memset(tiles.data[tile][row], 0, 64);
  std::memcpy(tiles.data[tile][row], from, bytes_of_row(tile));
}
void zero_below(int tile) {
  for (int row = rows(tile); row < 16; ++row) std::memset(tiles.data[tile][row], 0, 64);
}

void configure(const void* from) {
  Config config;
  std::memcpy(&config, from, sizeof config);
  if (config.palette > 1) give_up("of palettes there are 0 and 1");
  for (int tile = 0; tile < 16; ++tile) {
    const bool none = config.rows[tile] == 0 && config.bytes_of_row[tile] == 0;
    if (tile >= 8 && !none) give_up("a configuration has more than eight tiles");
    if (config.rows[tile] > 16 || config.bytes_of_row[tile] > 64)
      give_up("a tile is larger than 16 by 64 bytes");
  }
  std::memset(&tiles, 0, sizeof tiles);
  if (config.palette == 1) tiles.config = config;
}

void zero(int tile) {
  if (rows(tile) == 0) give_up("a tile without rows");
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

void load(int tile, const uint8_t* base, int64_t stride) {
  for (int row = 0; row < rows(tile); ++row) write_row(tile, row, base + row * stride);
  zero_below(tile);
}

void store(int tile, uint8_t* base, int64_t stride) {
  for (int row = 0; row < rows(tile); ++row)
    std::memcpy(base + row * stride, tiles.data[tile][row], bytes_of_row(tile));
}

float element(const uint8_t* row, int i) {
  uint16_t half;
  std::memcpy(&half, row + 2 * i, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// tdpbf16ps: the even products and the odd ones are summed apart, then both are added to the sum that was
// there. A product of two bfloat16 is exact in float32, so that rounding after it and after the sum is that
// of the fused one, but where the product is subnormal: it is 0 here.
void multiply_add(int sums, int left, int right) {
  if (sums == left || sums == right || left == right) give_up("the tiles of a product are not three");
  const int pairs = bytes_of_row(left) / 4, columns = bytes_of_row(sums) / 4;
  if (rows(sums) != rows(left) || rows(right) != pairs || bytes_of_row(right) != bytes_of_row(sums))
    give_up("the tiles of a product do not fit");
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // subnormal numbers are 0 as operands and as results; to nearest even; no exceptions
  for (int row = 0; row < rows(sums); ++row) {
    float even[16] = {}, odd[16] = {}, total[16];
    for (int k = 0; k < pairs; ++k)
      for (int n = 0; n < columns; ++n) {
        even[n] += element(tiles.data[left][row], 2 * k) * element(tiles.data[right][k], 2 * n);
        odd[n] += element(tiles.data[left][row], 2 * k + 1) * element(tiles.data[right][k], 2 * n + 1);
      }
    std::memcpy(total, tiles.data[sums][row], sizeof total);
    for (int n = 0; n < columns; ++n) total[n] += even[n] + odd[n];
    write_row(sums, row, total);
  }
  zero_below(sums);
  _mm_setcsr(mode);
}

// Registers in the order of their numbers.
constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction with a three-byte VEX prefix, read as far as those of tiles go.
class Instruction {
 public:
  Instruction(const uint8_t* code, const greg_t* registers) : code_(code), registers_(registers) {
    valid = code[0] == 0xc4 && (code[1] & 31) == 2 && (code[2] & 0x84) == 0;  // 0F38, W0, 128 bits
    if (!valid) return;
    prefix = code[2] & 3;
    third = ~(code[2] >> 3) & 15;
    operation = code[3];
    const uint8_t modrm = code[4];
    mod = modrm >> 6;
    reg = modrm >> 3 & 7;
    rm = modrm & 7;
    size = 5;
    if (mod != 3) read_address();
  }
  bool valid;
  int prefix, third, operation, mod, reg, rm;  // `third` is the prefix' own register
  int size;
  uint8_t* address = nullptr;
  int64_t stride = 0;  // of loads and stores: the index, scaled

 private:
  int64_t register_at(int number) const { return registers_[kRegisters[number]]; }
  template <typename T>
  int64_t take() {
    T value;
    std::memcpy(&value, code_ + size, sizeof value);
    size += sizeof value;
    return value;
  }
  void read_address() {
    const int high_base = code_[1] & 0x20 ? 0 : 8, high_index = code_[1] & 0x40 ? 0 : 8;
    int64_t base = 0;
    bool displaced = mod == 2;
    if (rm == 4) {
      const int sib = static_cast<int>(take<uint8_t>());
      const int index = (sib >> 3 & 7) | high_index;
      if (index != 4) stride = register_at(index) * (1 << (sib >> 6));
      displaced = displaced || (mod == 0 && (sib & 7) == 5);
      if (mod != 0 || (sib & 7) != 5) base = register_at((sib & 7) | high_base);
    } else if (mod == 0 && rm == 5) {  // from the next instruction
      base = take<int32_t>();
      base += reinterpret_cast<int64_t>(code_) + size;
    } else {
      base = register_at(rm | high_base);
    }
    if (mod == 1) base += take<int8_t>();
    if (displaced) base += take<int32_t>();
    address = reinterpret_cast<uint8_t*>(base);
  }

  const uint8_t* code_;
  const greg_t* registers_;
};

// Executes it; false if it is none of tiles.
bool execute(const Instruction& instruction) {
  constexpr int kNone = 0, k66 = 1, kF3 = 2, kF2 = 3;
  const bool memory = instruction.mod != 3;
  const int prefix = instruction.prefix, reg = instruction.reg;
  switch (instruction.valid ? instruction.operation : 0) {
    case 0x49:
      if (memory && prefix == kNone && reg == 0)
        configure(instruction.address);
      else if (memory && prefix == k66 && reg == 0)
        std::memcpy(instruction.address, &tiles.config, sizeof tiles.config);
      else if (!memory && prefix == kNone && reg == 0)
        std::memset(&tiles, 0, sizeof tiles);
      else if (!memory && prefix == kF2)
        zero(reg);
      else
        return false;
      return true;
    case 0x4b:
      if (!memory || instruction.rm != 4) return false;
      if (prefix == kF2 || prefix == k66)
        load(reg, instruction.address, instruction.stride);
      else if (prefix == kF3)
        store(reg, instruction.address, instruction.stride);
      else
        return false;
      return true;
    case 0x5c:
      if (memory || prefix != kF3) return false;
      multiply_add(reg, instruction.rm, instruction.third);
      return true;
    default:
      return false;
  }
}

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  if (!execute(instruction)) give_up("it is another instruction, which this processor has not");
  registers[REG_RIP] += instruction.size;
}

}  // namespace

bool tiles_testable() {
  static const bool testable = [] {
    if (cpu::simd_level_available(cpu::SimdLevel::amx_bf16)) {
      const cpu::SimdLevel before = cpu::simd_level();
      cpu::set_simd_level(cpu::SimdLevel::amx_bf16);  // asks the system
      cpu::set_simd_level(before);
      std::printf("amx_bf16: on this processor's tiles\n");
      return true;
    }
    if (!cpu::simd_level_available(cpu::SimdLevel::avx512_bf16)) return false;
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    std::printf("amx_bf16: with tiles in software\n");
    return sigaction(SIGILL, &action, nullptr) == 0;
  }();
  return testable;
}

bool tiles_released() {
  Config config;
  asm volatile("sttilecfg %0" : "=m"(config)::"memory");
  return config.palette == 0;
}

}  // namespace evit::tests

#else

namespace evit::tests {
bool tiles_testable() { return false; }
bool tiles_released() { return true; }
}  // namespace evit::tests

#endif
