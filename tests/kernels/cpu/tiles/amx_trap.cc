// Runs compiled AMX instructions on a CPU that has none: each ends in SIGILL, and is emulated there. So the object that
// engines load is tested as the compiler made it, what it believes of the memory behind a tile included.
// A library for tests: amx_trap_install() once a process; amx_trap_count() is the number of TDPBF16PS since.
#include <atomic>
#include <csignal>
#include <ucontext.h>

#include "amx_emulator.h"

namespace {

namespace amx = amx_emulator;

struct sigaction before;
std::atomic<long> dots{0};

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// A memory operand: where it is without its index, and the index, scaled.
struct Place {
  long base = 0, index = 0;
  const uint8_t *end;
};

Place place_of(const greg_t *registers, const uint8_t *modrm, bool x, bool b) {
  Place place;
  const int mod = *modrm >> 6, rm = *modrm & 7;
  const uint8_t *at = modrm + 1;
  int base = rm + (b ? 8 : 0);
  bool has_base = true;
  if (rm == 4) {
    const int sib = *at++, index = (sib >> 3 & 7) + (x ? 8 : 0);
    base = (sib & 7) + (b ? 8 : 0);
    if (index != 4) place.index = registers[kRegisters[index]] << (sib >> 6);
    has_base = (sib & 7) != 5 || mod != 0;
  }
  int32_t displacement = 0;
  const bool is_relative = mod == 0 && rm == 5;
  if (mod == 1) displacement = (int8_t)*at++;
  if (mod == 2 || is_relative || !has_base) memcpy(&displacement, at, 4), at += 4;
  place.end = at;
  place.base = displacement + (is_relative ? (long)at : has_base ? registers[kRegisters[base]] : 0);
  return place;
}

// The instruction behind this one; null: it is none of AMX.
const uint8_t *run(const greg_t *registers, const uint8_t *code) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return nullptr;  // VEX.128.0F38.W0
  const int prefix = code[2] & 3, third = ~code[2] >> 3 & 15, opcode = code[3];
  const uint8_t *modrm = code + 4;
  const bool in_memory = *modrm >> 6 != 3, x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  const int reg = *modrm >> 3 & 7, rm = *modrm & 7;
  enum { kNone, k66, kF3, kF2 };
  if (opcode == 0x5c && prefix == kF3 && !in_memory) {
    dots.fetch_add(1, std::memory_order_relaxed);
    amx::dot(reg, rm, third);
    return modrm + 1;
  }
  if (opcode == 0x49 && prefix == kF2 && !in_memory) {
    amx::zero(reg);
    return modrm + 1;
  }
  if (opcode == 0x49 && prefix == kNone && *modrm == 0xc0) {
    amx::release();
    return modrm + 1;
  }
  if (!in_memory) return nullptr;
  const Place place = place_of(registers, modrm, x, b);
  if (opcode == 0x49 && prefix == kNone && reg == 0) amx::load_config((const void *)(place.base + place.index));
  else if (opcode == 0x4b && prefix == kF2 && rm == 4) amx::load(reg, (const void *)place.base, place.index);
  else if (opcode == 0x4b && prefix == kF3 && rm == 4) amx::store(reg, (void *)place.base, place.index);
  else return nullptr;
  return place.end;
}

void trapped(int, siginfo_t *, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *next = run(registers, (const uint8_t *)registers[REG_RIP]);
  if (next) registers[REG_RIP] = (greg_t)next;
  else sigaction(SIGILL, &before, nullptr);  // it comes again, to whom it concerns
}

}  // namespace

extern "C" {
int amx_trap_install() {
  struct sigaction action = {};
  action.sa_sigaction = trapped;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, &before);
}
long amx_trap_count() { return dots; }
}
