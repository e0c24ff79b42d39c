// Executes the instructions of the matrix unit (AMX) on processors that have none.
#pragma once

namespace evit::tests {

// Whether amx_bf16 can be tested here: with the processor's own tiles, or executed in software, which this
// prepares and, at the first call, says. Software needs Linux and a processor with avx512_bf16, the rest of
// the level.
bool tiles_testable();

// Whether this thread's tiles are as they are before anybody configures them; only where they can be tested.
bool tiles_released();

}  // namespace evit::tests
