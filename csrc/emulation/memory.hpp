// Memory of the emulation: pointers that know their array, and a history of the accesses to each byte (see
// cuda_emulation.hpp).
#pragma once

namespace calm_fast::emulation {

// One access, or several that later checks need not tell apart.
struct Access {
  static constexpr int kNobody = -1, kLanes = -2, kThreads = -3, kBlocks = -4;
  int thread = kNobody;  // kLanes: several of one warp, kThreads: of one block, kBlocks: of several blocks
  int block = 0;
  uint64_t launch = 0, epoch = 0, warp_epoch = 0, time = 0;
  int warp = 0;
  bool atomic = false;
};

struct Byte {
  Access writer, reader;
};

enum class Use { input, output, in_out };

struct Memory {
  std::string name;
  unsigned char* base;
  size_t bytes;
  bool initialised;            // the host wrote it
  bool constant;
  std::vector<Byte> history;   // empty for constants: nobody writes them
  std::vector<unsigned char> own;

  Memory(std::string name, void* data, size_t bytes, Use use)
      : name(std::move(name)), base(static_cast<unsigned char*>(data)), bytes(bytes), initialised(use != Use::output),
        constant(use == Use::input) {
    if (!constant) history.resize(bytes);
  }
  // Shared memory: uninitialised and 16-byte aligned, as on the device.
  Memory(std::string name, size_t bytes)
      : name(std::move(name)), bytes(bytes), initialised(false), constant(false), history(bytes), own(bytes + 16, 0xcd) {
    base = own.data() + (16 - reinterpret_cast<uintptr_t>(own.data()) % 16) % 16;
  }
};

inline Access now() {
  Fiber& me = self();
  Access a;
  a.launch = g_grid->launch;
  a.thread = me.flat;
  a.block = me.block->flat;
  a.epoch = me.block->epoch;
  a.warp = me.warp();
  a.warp_epoch = me.block->warp_epochs[me.warp()];
  a.time = ++g_grid->time;
  return a;
}

// Returns true if everything in `before` happened before this thread's next access.
inline bool ordered(const Access& before) {
  const Fiber& me = self();
  if (before.thread == Access::kNobody || before.launch != g_grid->launch) return true;  // launches follow one another
  if (before.thread == Access::kBlocks) return false;
  if (before.block != me.block->flat) {
    const auto seen = [&](const std::map<int, uint64_t>& m) {
      auto it = m.find(before.block);
      return it != m.end() && before.time <= it->second;
    };
    return seen(me.acquired) || seen(me.block->acquired);
  }
  if (before.epoch < me.block->epoch || before.thread == me.flat) return true;
  if (before.thread == Access::kThreads) return false;
  return before.warp == me.warp() && before.warp_epoch < me.block->warp_epochs[me.warp()];
}

inline void add_reader(Access& reader) {
  const Access mine = now();
  if (ordered(reader)) {
    reader = mine;
  } else if (reader.thread == Access::kBlocks || reader.block != mine.block) {
    reader.thread = Access::kBlocks;
  } else if (reader.thread == Access::kThreads || reader.warp != mine.warp) {
    reader.thread = Access::kThreads;
    reader.time = mine.time;
  } else {
    reader.thread = Access::kLanes;
    reader.time = mine.time;
  }
}

inline std::string describe(const Memory& m, int64_t offset, size_t size) {
  const int64_t index = offset >= 0 ? offset / int64_t(size) : -((-offset + int64_t(size) - 1) / int64_t(size));
  return "`" + m.name + "`[" + std::to_string(index) + "] (" + std::to_string(m.bytes / size) + " elements of " +
         std::to_string(size) + " bytes)";
}

inline unsigned char* locate(Memory* m, int64_t offset, size_t size, size_t alignment, const char* what) {
  if (!m) fail(std::string(what) + " through a null pointer");
  if (offset < 0 || offset + int64_t(size) > int64_t(m->bytes)) {
    fail(std::string(what) + " outside the array: " + describe(*m, offset, size));
  }
  unsigned char* at = m->base + offset;
  if (reinterpret_cast<uintptr_t>(at) % alignment) {
    fail(std::string(what) + " at an address that is not a multiple of " + std::to_string(alignment) + ": " +
         describe(*m, offset, size));
  }
  return at;
}

inline void before_read(Memory* m, int64_t offset, size_t size, bool atomic) {
  if (m->constant) return;
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = m->history[offset + i];
    if (byte.writer.thread == Access::kNobody && !m->initialised) {
      fail("read of memory that nobody wrote: " + describe(*m, offset, size));
    }
    if (!ordered(byte.writer) && !(atomic && byte.writer.atomic)) {
      fail("race: reads what thread " + std::to_string(byte.writer.thread) + " of block " +
           std::to_string(byte.writer.block) + " writes, with nothing between the two: " + describe(*m, offset, size));
    }
    if (!atomic) add_reader(byte.reader);
  }
}

inline void before_write(Memory* m, int64_t offset, size_t size, bool atomic) {
  if (m->constant) fail("write to an input: " + describe(*m, offset, size));
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = m->history[offset + i];
    if (!ordered(byte.writer) && !(atomic && byte.writer.atomic)) {
      fail("race: writes what thread " + std::to_string(byte.writer.thread) + " of block " +
           std::to_string(byte.writer.block) + " writes, with nothing between the two: " + describe(*m, offset, size));
    }
    if (!ordered(byte.reader)) {
      fail("race: writes what " +
           (byte.reader.thread >= 0 ? "thread " + std::to_string(byte.reader.thread) : std::string("other threads")) +
           " may still read: " + describe(*m, offset, size));
    }
    byte.writer = now();
    byte.writer.atomic = atomic;
    byte.reader = Access{};
  }
}

template <class V>
V read(Memory* m, int64_t offset) {
  maybe_yield_turn();
  const unsigned char* at = locate(m, offset, sizeof(V), alignof(V), "read");
  before_read(m, offset, sizeof(V), false);
  V value;
  std::memcpy(&value, at, sizeof(V));
  return value;
}

template <class V>
void write(Memory* m, int64_t offset, const V& value) {
  maybe_yield_turn();
  unsigned char* at = locate(m, offset, sizeof(V), alignof(V), "write");
  before_write(m, offset, sizeof(V), false);
  std::memcpy(at, &value, sizeof(V));
}

// Orders what other blocks published by a fence before an atomic on the same address (the last-block pattern).
inline void meet_releases(const void* at, bool releases) {
  auto& published = g_grid->releases[at];
  Fiber& me = self();
  for (auto [block, time] : published) me.acquired[block] = std::max(me.acquired[block], time);
  if (releases && me.fence) published[me.block->flat] = std::max(published[me.block->flat], me.fence);
}

template <class V, class F>
V read_modify_write(Memory* m, int64_t offset, F change) {
  maybe_yield_turn();
  unsigned char* at = locate(m, offset, sizeof(V), alignof(V), "atomic");
  before_read(m, offset, sizeof(V), true);
  before_write(m, offset, sizeof(V), true);
  meet_releases(at, true);
  V before;
  std::memcpy(&before, at, sizeof(V));
  const V after = change(before);
  std::memcpy(at, &after, sizeof(V));
  return before;
}

template <class T>
class Pointer;

// The result of p[i], through which reads and writes are checked. `auto x = p[i]` does not work on purpose: name the
// type.
template <class T>
class Reference {
 public:
  using Value = std::remove_const_t<T>;
  Reference(Memory* m, int64_t offset) : memory_(m), offset_(offset) {}
  Reference(const Reference&) = delete;
  operator Value() && { return read<Value>(memory_, offset_); }
  Value operator=(Value v) && { return write<Value>(memory_, offset_, v), v; }
  Value operator=(Reference&& other) && { return std::move(*this) = static_cast<Value>(std::move(other)); }
  template <class U>
  Value operator=(Reference<U>&& other) && {
    return std::move(*this) = static_cast<Value>(static_cast<typename Reference<U>::Value>(std::move(other)));
  }
  Value operator+=(Value v) && { return update([v](Value x) { return Value(x + v); }); }
  Value operator-=(Value v) && { return update([v](Value x) { return Value(x - v); }); }
  Value operator*=(Value v) && { return update([v](Value x) { return Value(x * v); }); }
  Value operator|=(Value v) && { return update([v](Value x) { return Value(x | v); }); }
  Value operator++() && { return update([](Value x) { return Value(x + 1); }); }
  Pointer<T> operator&() && { return Pointer<T>(memory_, offset_); }

 private:
  template <class F>
  Value update(F f) {
    const Value v = f(read<Value>(memory_, offset_));
    write<Value>(memory_, offset_, v);
    return v;
  }
  Memory* memory_;
  int64_t offset_;
};

// The T* of device code.
template <class T>
class Pointer {
 public:
  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(Memory* m, int64_t offset) : memory_(m), offset_(offset) {}
  template <class U, class = std::enable_if_t<std::is_same_v<T, const U>>>
  Pointer(const Pointer<U>& other) : memory_(other.memory()), offset_(other.offset()) {}
  Reference<T> operator[](int64_t i) const { return {memory_, offset_ + i * int64_t(sizeof(T))}; }
  Reference<T> operator*() const { return (*this)[0]; }
  Pointer operator+(int64_t i) const { return {memory_, offset_ + i * int64_t(sizeof(T))}; }
  Pointer operator-(int64_t i) const { return *this + -i; }
  Pointer& operator+=(int64_t i) { return *this = *this + i; }
  explicit operator bool() const { return memory_ != nullptr; }
  bool operator==(std::nullptr_t) const { return memory_ == nullptr; }
  Memory* memory() const { return memory_; }
  int64_t offset() const { return offset_; }

 private:
  Memory* memory_ = nullptr;
  int64_t offset_ = 0;
};

// A host array that is passed to a kernel.
template <class T>
class Buffer {
 public:
  Buffer(const char* name, void* data, int64_t count, Use use)
      : memory_(data ? std::make_unique<Memory>(name, data, size_t(count) * sizeof(T), use) : nullptr) {}
  Pointer<T> get() const { return {memory_.get(), 0}; }

 private:
  std::unique_ptr<Memory> memory_;
};

// Returns the array of `__shared__ T name[count]`, one per block and source line.
template <class T>
Pointer<T> static_shared(const char* site, size_t count, const char* name) {
  auto& slot = self().block->statics[std::string(site) + name];
  if (!slot) slot = std::make_unique<Memory>(name, count * sizeof(T));
  return {slot.get(), 0};
}

// Cuts dynamic shared memory into arrays. Every thread of a block must cut the same ones.
class SharedPool {
 public:
  template <class T>
  Pointer<T> take(int64_t count, const char* name) {
    Block& block = *self().block;
    const size_t bytes = size_t(count) * sizeof(T);
    if (taken_ == block.pool.size()) {
      block.pool_bytes += (bytes + 15) / 16 * 16;
      if (block.pool_bytes > g_grid->shared_bytes) {
        fail("dynamic shared memory: `" + std::string(name) + "` ends at byte " + std::to_string(block.pool_bytes) +
             ", the launch gives " + std::to_string(g_grid->shared_bytes));
      }
      block.pool.push_back(std::make_unique<Memory>(name, bytes));
    }
    Memory* memory = block.pool[taken_++].get();
    if (memory->bytes != bytes) fail("threads of one block cut `" + std::string(name) + "` to different sizes");
    return {memory, 0};
  }

 private:
  size_t taken_ = 0;
};

// Cuts global scratch memory in the same way; each array has its own bounds. Not for memory that blocks share.
class ScratchPool {
 public:
  explicit ScratchPool(Pointer<unsigned char> bytes) : next_(bytes) {}
  template <class T>
  Pointer<T> take(int64_t count, const char* name) {
    const size_t bytes = size_t(count) * sizeof(T);
    if (!bytes) return nullptr;
    auto& slot = self().block->statics["scratch " + std::to_string(next_.offset())];
    if (!slot) {
      unsigned char* at = locate(next_.memory(), next_.offset(), bytes, alignof(T), "cutting scratch");
      slot = std::make_unique<Memory>(name, at, bytes, Use::output);
    }
    if (slot->bytes != bytes) fail("threads of one block cut `" + std::string(name) + "` to different sizes");
    next_ += int64_t(bytes + 15) / 16 * 16;
    return {slot.get(), 0};
  }

 private:
  Pointer<unsigned char> next_;
};

}  // namespace calm_fast::emulation
