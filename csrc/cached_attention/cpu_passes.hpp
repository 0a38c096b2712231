// The same pass, compiled for several instruction sets; cpu.cpp takes the best one this processor has.
#pragma once

#include "cached_attention/api.hpp"

namespace megarpt::cached_attention {

namespace baseline {
void attend_step(const Strided<4>&, const Strided<4>&, const Cache&, double, const Strided<4>&);
}
namespace avx2 {
void attend_step(const Strided<4>&, const Strided<4>&, const Cache&, double, const Strided<4>&);
}
namespace avx512 {
void attend_step(const Strided<4>&, const Strided<4>&, const Cache&, double, const Strided<4>&);
}

}  // namespace megarpt::cached_attention
