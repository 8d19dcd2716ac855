// Runs CUDA C++ on a CPU, to find bugs and not to be fast. A thread of a block is a fiber, and one fiber runs at a
// time.
//
// It is never part of a device build: csrc/common/simt.cuh includes it where CALM_FAST_EMULATED is defined, which only
// the tests and `calm-fast verify` do. On every schedule it finds
//   - an index outside its array: every pointer knows its array (Pointer, memory.hpp)
//   - a missing barrier: two threads access one byte, one of them writes, and no barrier, __syncwarp or fence with an
//     atomic orders the two
//   - a read of memory that nobody wrote
//   - a barrier or a warp collective that only part of the threads reach, or that threads reach at different lines
//   - a deadlock, a misaligned wide load, a shuffle from a lane that takes no part
// See docs/native.md.
#pragma once

#if defined(__CUDACC__)
#error "cuda_emulation.hpp is for the CPU alone"
#endif

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace calm_fast::emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;

// forward: threads take turns, lowest first. reverse: the highest thread runs as far as it can. random: any order, and
// a thread may yield at every memory access.
enum class Order : int { forward = 0, reverse = 1, random = 2 };

struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 0;
  int resident = 1;  // blocks that run at the same time
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Block;
struct Memory;

struct Fiber {
  ucontext_t context{};
  void* stack = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  dim3 index;
  int flat = 0;
  const char* waits = nullptr;  // the barrier or collective it waits for; null while it can run
  const char* site = "";
  bool done = false;
  uint64_t fence = 0;                 // time of its last __threadfence
  std::map<int, uint64_t> acquired;   // block -> time up to which that block's writes are visible to this thread
  int warp() const { return flat / kWarp; }
  int lane() const { return flat % kWarp; }
};

// A collective of one warp at which some lanes wait.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  int unread = 0;
  bool open = false;
  const char* what = "";
  const char* site = "";
  uint64_t values[kWarp] = {};
};

struct Block {
  dim3 index;
  int flat = 0;
  std::deque<Fiber> fibers;
  int alive = 0;
  uint64_t epoch = 1;                  // barriers passed by all threads
  std::vector<uint64_t> warp_epochs;   // __syncwarp passed by all lanes of a warp
  std::vector<std::deque<Meeting>> meetings;
  int at_barrier = 0;
  long votes = 0, vote_result = 0;
  std::map<int, uint64_t> acquired;
  std::map<std::string, std::unique_ptr<Memory>> statics;
  std::vector<std::unique_ptr<Memory>> pool;
  size_t pool_bytes = 0;
};

struct Grid {
  dim3 grid, block;
  size_t shared_bytes = 0;
  Schedule schedule;
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::deque<Fiber*> ready;
  std::mt19937_64 random;
  std::string failure;
  uint64_t time = 1, launch = 0;
  std::map<const void*, std::map<int, uint64_t>> releases;  // address of an atomic -> block -> time it published
  std::vector<void*> stacks;
};

inline uint64_t g_launches = 0;
inline std::vector<void*> g_stacks;  // reused from launch to launch: mapping them costs more than a small kernel
inline Grid* g_grid = nullptr;
inline Fiber* g_self = nullptr;

inline Fiber& self() { return *g_self; }

inline std::string text(const dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

inline std::string name_of(const Fiber& f) { return "block " + text(f.block->index) + " thread " + text(f.index); }

// ---- switching between fibers ---------------------------------------------------------------------------------------

// Returns to the scheduler.
inline void leave() {
  Fiber& me = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(
      me.done ? nullptr : &me.fake_stack, g_grid->scheduler_stack, g_grid->scheduler_stack_bytes);
#endif
  swapcontext(&me.context, &g_grid->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self().fake_stack, &g_grid->scheduler_stack, &g_grid->scheduler_stack_bytes);
#endif
}

[[noreturn]] inline void fail(const std::string& what) {
  if (g_grid->failure.empty()) g_grid->failure = name_of(self()) + ": " + what;
  leave();
  std::abort();  // nobody resumes a fiber after a failure
}

inline void make_ready(Fiber& f) {
  f.waits = nullptr;
  g_grid->ready.push_back(&f);
}

inline void wait_for(const char* what, const char* site) {
  self().waits = what;
  self().site = site;
  leave();
}

inline void yield_turn() {
  make_ready(self());
  leave();
}

inline void maybe_yield_turn() {
  if (g_grid->schedule.order == Order::random && g_grid->random() % 16 == 0) yield_turn();
}

// ---- barriers and collectives ---------------------------------------------------------------------------------------

inline long barrier(const char* what, const char* site, long vote = 0, int kind = 0) {
  Block& block = *self().block;
  const int threads = static_cast<int>(block.fibers.size());
  if (block.alive < threads) {
    fail(std::string(what) + " at " + site + " is reached by part of the block: " +
         std::to_string(threads - block.alive) + " of its threads have returned");
  }
  for (const Fiber& other : block.fibers) {
    if (block.at_barrier && other.waits && !std::strncmp(other.waits, "__syncthreads", 13)) {
      if (std::strcmp(other.site, site)) {
        fail(std::string("threads of one block wait at different barriers: ") + site + " and " + other.site);
      }
      break;
    }
  }
  if (block.at_barrier == 0) block.votes = 0;
  block.votes += kind == 0 ? 0 : vote != 0;
  if (++block.at_barrier < threads) {
    wait_for(what, site);
  } else {
    block.at_barrier = 0;
    block.vote_result = block.votes;
    ++block.epoch;
    for (Fiber& f : block.fibers) {
      for (auto [from, time] : f.acquired) block.acquired[from] = std::max(block.acquired[from], time);
    }
    for (Fiber& f : block.fibers) {
      if (&f != g_self) make_ready(f);
    }
    yield_turn();
  }
  return block.vote_result;
}

// Waits until every lane of `mask` has arrived. Returns all lanes' values, which are valid until `release` is called.
inline Meeting& meet(const char* what, const char* site, unsigned mask, uint64_t value) {
  Fiber& me = self();
  Block& block = *me.block;
  const int first = me.warp() * kWarp;
  const int lanes = std::min<int>(kWarp, static_cast<int>(block.fibers.size()) - first);
  const unsigned existing = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  mask &= existing;
  if (!(mask >> me.lane() & 1)) fail(std::string(what) + " at " + site + ": the calling lane is not in its own mask");
  for (int lane = 0; lane < lanes; ++lane) {
    if ((mask >> lane & 1) && block.fibers[first + lane].done) {
      fail(std::string(what) + " at " + site + " names lane " + std::to_string(lane) + ", which has returned");
    }
  }
  auto& list = block.meetings[me.warp()];
  Meeting* meeting = nullptr;
  for (Meeting& m : list) {
    if (m.open && (m.mask & mask)) {
      if (m.mask != mask || std::strcmp(m.what, what) || std::strcmp(m.site, site)) {
        fail("lanes of one warp meet at different collectives: " + std::string(what) + " at " + site + " and " +
             m.what + " at " + m.site);
      }
      meeting = &m;
    }
  }
  if (!meeting) {
    for (Meeting& m : list) {
      if (!m.open && !m.unread) meeting = &m;
    }
    if (!meeting) meeting = &list.emplace_back();
    *meeting = Meeting{mask, 0, 0, true, what, site, {}};
  }
  meeting->arrived |= 1u << me.lane();
  meeting->values[me.lane()] = value;
  if (meeting->arrived != mask) {
    wait_for(what, site);
  } else {
    meeting->open = false;
    meeting->unread = __builtin_popcount(mask);
    if (mask == existing && !std::strcmp(what, "__syncwarp")) ++block.warp_epochs[me.warp()];
    for (int lane = 0; lane < lanes; ++lane) {
      Fiber& f = block.fibers[first + lane];
      if ((mask >> lane & 1) && &f != g_self) make_ready(f);
    }
    yield_turn();
  }
  return *meeting;
}

inline void release(Meeting& meeting) { --meeting.unread; }

// ---- running a grid -------------------------------------------------------------------------------------------------

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g_grid->scheduler_stack, &g_grid->scheduler_stack_bytes);
#endif
  try {
    (*g_grid->body)();
  } catch (const std::exception& problem) {
    fail(std::string("exception: ") + problem.what());
  }
  Fiber& me = self();
  Block& block = *me.block;
  if (block.at_barrier) {
    for (const Fiber& other : block.fibers) {
      if (other.waits && !std::strncmp(other.waits, "__syncthreads", 13)) {
        fail("returned while other threads of its block wait at the barrier at " + std::string(other.site));
      }
    }
  }
  for (const Meeting& m : block.meetings[me.warp()]) {
    if (m.open && (m.mask >> me.lane() & 1)) {
      fail("returned while its warp waits for it at " + std::string(m.what) + " at " + m.site);
    }
  }
  me.done = true;
  --block.alive;
  leave();
  std::abort();
}

inline void* take_stack() {
  if (!g_grid->stacks.empty()) {
    void* stack = g_grid->stacks.back();
    g_grid->stacks.pop_back();
    return stack;
  }
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* stack = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, kGuard, PROT_NONE);  // an overflow faults instead of writing into a neighbour
  return stack;
}

inline void begin_block(Block& block, dim3 index, int flat) {
  block.index = index;
  block.flat = flat;
  const dim3 d = g_grid->block;
  const int threads = static_cast<int>(d.x * d.y * d.z);
  block.alive = threads;
  block.warp_epochs.assign((threads + kWarp - 1) / kWarp, 1);
  block.meetings.resize((threads + kWarp - 1) / kWarp);
  for (int t = 0; t < threads; ++t) {
    Fiber& f = block.fibers.emplace_back();
    f.block = &block;
    f.flat = t;
    f.index = dim3(t % d.x, t / d.x % d.y, t / (d.x * d.y));
    f.stack = take_stack();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = static_cast<char*>(f.stack) + kGuard;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
    make_ready(f);
  }
}

inline Fiber* next_ready() {
  auto& ready = g_grid->ready;
  if (ready.empty()) return nullptr;
  if (g_grid->schedule.order == Order::random) std::swap(ready.front(), ready[g_grid->random() % ready.size()]);
  const bool from_back = g_grid->schedule.order == Order::reverse;
  Fiber* chosen = from_back ? ready.back() : ready.front();
  from_back ? ready.pop_back() : ready.pop_front();
  return chosen;
}

inline std::string describe_deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string message = "deadlock:";
  int named = 0;
  for (const auto& block : blocks) {
    for (const Fiber& f : block->fibers) {
      if (f.waits && named++ < 6) message += " " + name_of(f) + " waits at " + f.waits + " at " + f.site + ";";
    }
  }
  return message + (named > 6 ? " and " + std::to_string(named - 6) + " more" : "");
}

// Runs `body` once per thread of the grid; throws Failure with the first bug found.
inline void run(
    dim3 grid_size, dim3 block_size, size_t shared_bytes, Schedule schedule, const std::function<void()>& body) {
  const size_t threads = size_t(block_size.x) * block_size.y * block_size.z;
  if (!threads || threads > 1024) throw Failure("a block must have 1 to 1024 threads, got " + std::to_string(threads));
  if (!grid_size.x || !grid_size.y || !grid_size.z || grid_size.y > 65535 || grid_size.z > 65535) {
    throw Failure("a grid must have 1 to 65535 blocks in y and z and at least 1 in x, got " + text(grid_size));
  }
  if (shared_bytes > 227 * 1024) {
    throw Failure("shared memory must be at most 232448 bytes, got " + std::to_string(shared_bytes));
  }
  Grid grid;
  grid.grid = grid_size;
  grid.block = block_size;
  grid.shared_bytes = shared_bytes;
  grid.schedule = schedule;
  grid.body = &body;
  grid.launch = ++g_launches;
  grid.random.seed(schedule.seed);
  g_grid = &grid;
  grid.stacks.swap(g_stacks);
  std::vector<int> order(size_t(grid_size.x) * grid_size.y * grid_size.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  if (schedule.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::random) std::shuffle(order.begin(), order.end(), grid.random);
  std::vector<std::unique_ptr<Block>> running;
  size_t begun = 0;
  while (grid.failure.empty()) {
    while (begun < order.size() && running.size() < size_t(std::max(1, schedule.resident))) {
      const unsigned flat = order[begun++];
      const dim3 at(flat % grid_size.x, flat / grid_size.x % grid_size.y, flat / (grid_size.x * grid_size.y));
      begin_block(*running.emplace_back(std::make_unique<Block>()), at, static_cast<int>(flat));
    }
    if (running.empty()) break;
    g_self = next_ready();
    if (!g_self) {
      grid.failure = describe_deadlock(running);
      break;
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&grid.scheduler_fake_stack, g_self->context.uc_stack.ss_sp, kStack);
#endif
    swapcontext(&grid.scheduler, &g_self->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(grid.scheduler_fake_stack, nullptr, nullptr);
#endif
    if (g_self->done && g_self->block->alive == 0) {
      for (Fiber& f : g_self->block->fibers) grid.stacks.push_back(f.stack);
      std::erase_if(running, [](const auto& block) { return block->alive == 0; });
    }
  }
  for (auto& block : running) {
    for (Fiber& f : block->fibers) grid.stacks.push_back(f.stack);
  }
#if defined(__SANITIZE_ADDRESS__)
  for (void* stack : grid.stacks) munmap(stack, kStack + kGuard);  // clears what the sanitizer marked on them
#else
  g_stacks.swap(grid.stacks);
#endif
  g_grid = nullptr;
  g_self = nullptr;
  if (!grid.failure.empty()) throw Failure(grid.failure);
}

}  // namespace calm_fast::emulation

#include "emulation/memory.hpp"
#include "emulation/device.hpp"
