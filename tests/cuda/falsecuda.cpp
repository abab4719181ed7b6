// "cuda" on a CPU: tensors whose device is cuda:0 and whose memory is the machine's.
//
// An operation runs on the CPU, in place where the tensors lie, when it is called: the default stream is never behind.
// Copies that a GPU does on its own time (pinned memory, non_blocking) happen as late as they may: on a side stream
// when somebody waits for it, on the default stream when the next operation begins (to the device) or when the host
// waits (from it). What a GPU would not have ordered, because a wait is missing, is counted as a violation.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

namespace {

std::recursive_mutex mutex_;
using Lock = std::lock_guard<std::recursive_mutex>;

struct {
  size_t total = 24ull << 30;  // bytes
  int major = 8, minor = 9, count = 1;
  double fraction = 1;
} card;

// --- memory ------------------------------------------------------------------------------------

struct Block {
  size_t size;
  int64_t written = 0, used = 0;  // when the default stream last wrote it, or had anything to do with it
  bool shared = false;            // by record_stream: lives until the copies that were issued are done
};
using Blocks = std::map<const char*, Block>;

struct Memory {
  Blocks blocks;
  size_t requested = 0, requested_peak = 0, held = 0, held_peak = 0;  // held: in units of 512, as CUDA's allocator
};

Memory device_memory, pinned_memory;
int64_t ooms = 0, violations = 0;
int64_t late_copies = 0;  // on side streams
std::string reports;
std::string fails_with;  // what the next allocation says
int fails_as = 0, fails_after = 0;
int64_t clock_ = 0;  // of the default stream

constexpr size_t kUnit = 512, kQuarantine = 256u << 20;
std::deque<std::pair<void*, size_t>> quarantine;
size_t quarantined = 0;

void violation(const std::string& what) {
  if (violations++ < 20) reports += what + "\n";
}

Block* find(Memory& memory, const void* address, size_t size = 1) {
  auto p = static_cast<const char*>(address);
  auto it = memory.blocks.upper_bound(p);
  if (it == memory.blocks.begin()) return nullptr;
  --it;
  return p + size <= it->first + it->second.size ? &it->second : nullptr;
}

bool lives(const void* p, size_t n) { return find(device_memory, p, n) || find(pinned_memory, p, n); }

size_t rounded(size_t n) { return (n + kUnit - 1) / kUnit * kUnit; }

size_t allowed() { return static_cast<size_t>(card.fraction * card.total); }

void* take(Memory& memory, size_t n) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, n)) throw std::bad_alloc();
  std::memset(p, 0xCD, n);  // new memory holds anything
  clock_++;                 // the default stream may have used this memory for something else until now
  memory.blocks[static_cast<char*>(p)] = Block{n, clock_, clock_};
  memory.requested += n;
  memory.held += rounded(n);
  memory.requested_peak = std::max(memory.requested_peak, memory.requested);
  memory.held_peak = std::max(memory.held_peak, memory.held);
  return p;
}

void give_back(Memory& memory, void* p) {
  auto it = memory.blocks.find(static_cast<char*>(p));
  size_t n = it->second.size;
  memory.requested -= n;
  memory.held -= rounded(n);
  memory.blocks.erase(it);
  std::memset(p, 0xCB, n);  // who reads it after this reads nonsense
  quarantine.push_back({p, n});
  quarantined += n;
  while (quarantined > kQuarantine) {
    auto [old, size] = quarantine.front();
    quarantine.pop_front();
    quarantined -= size;
    std::free(old);
  }
}

std::string words(size_t n) {
  char text[32];
  if (n < 1024)
    std::snprintf(text, sizeof text, "%zu bytes", n);
  else if (n < 1 << 20)
    std::snprintf(text, sizeof text, "%.2f KiB", n / 1024.0);
  else if (n < 1 << 30)
    std::snprintf(text, sizeof text, "%.2f MiB", n / 1048576.0);
  else
    std::snprintf(text, sizeof text, "%.2f GiB", n / 1073741824.0);
  return text;
}

void refuse_if_full(size_t n) {
  if (!fails_with.empty() && fails_after-- == 0) {
    std::string text;
    text.swap(fails_with);
    if (fails_as == 1) throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 2, text);
    TORCH_CHECK(false, text);
  }
  size_t held = device_memory.held;
  if (held + rounded(n) <= allowed()) return;
  ooms++;
  std::string limit = card.fraction < 1 ? words(allowed()) + " allowed; " : "";
  TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", words(n),
                   ". GPU 0 has a total capacity of ", words(card.total), " of which ",
                   words(card.total - std::min(card.total, held)), " is free. ", limit,
                   "Including non-PyTorch memory, this process has ", words(held),
                   " memory in use. Of the allocated memory ", words(held),
                   " is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated. If reserved but "
                   "unallocated memory is "
                   "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
                   "documentation for Memory "
                   "Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html#environment-variables)");
}

// --- streams -----------------------------------------------------------------------------------

struct Job {
  char* to;
  const char* from;
  size_t size;
  std::string snapshot;  // of what is copied from the device on the default stream: that is in order there
  bool reported = false;
};
struct Stream {
  std::deque<Job> jobs;
  int64_t issued = 0, done = 0;
  int64_t seen = 0;  // up to where it has waited for the default stream
};
std::map<int64_t, Stream> streams;  // 0 is the default one: it has uploads here
std::deque<Job> downloads;          // of the default stream
int64_t streams_made = 0;
thread_local int64_t current_stream = 0;
thread_local int current_device = 0;

void copy_now(const Job& job) {
  bool fits = lives(job.to, job.size) && (!job.snapshot.empty() || lives(job.from, job.size));
  if (!fits) return violation("a copy found its memory given back");
  std::memcpy(job.to, job.snapshot.empty() ? job.from : job.snapshot.data(), job.size);
}

void run_until(int64_t id, int64_t position) {
  auto& stream = streams[id];
  while (stream.done < position && !stream.jobs.empty()) {
    Job job = std::move(stream.jobs.front());
    stream.jobs.pop_front();
    stream.done++;
    copy_now(job);
  }
}

void finish_uploads() { run_until(0, streams[0].issued); }

void finish_all(int64_t id) {  // what the host waits for
  run_until(id, streams[id].issued);
  if (id == 0)
    for (; !downloads.empty(); downloads.pop_front()) copy_now(downloads.front());
}

bool overlap(const char* a, size_t n, const char* b, size_t m) { return a < b + m && b < a + n; }

// Side streams' copies that are still to come and touch this memory, up to the last of which each stream is run.
void finish_what_touches(const char* p, size_t n) {
  for (auto& [id, stream] : streams) {
    int64_t last = 0, position = stream.done;
    for (auto& job : stream.jobs)
      if (position++; overlap(p, n, job.to, job.size) || overlap(p, n, job.from, job.size)) last = position;
    run_until(id, last);
  }
  for (auto it = downloads.begin(); it != downloads.end();)
    if (overlap(p, n, it->to, it->size))
      copy_now(*it), it = downloads.erase(it);
    else
      ++it;
}

void free_device(void* p) {
  if (!p) return;
  Lock lock(mutex_);
  auto& block = device_memory.blocks.at(static_cast<char*>(p));
  if (block.shared) finish_what_touches(static_cast<char*>(p), block.size);
  finish_uploads();
  give_back(device_memory, p);
}

void free_pinned(void* p) {  // torch keeps pinned memory until the copies that it issued are done
  if (!p) return;
  Lock lock(mutex_);
  finish_what_touches(static_cast<char*>(p), pinned_memory.blocks.at(static_cast<char*>(p)).size);
  give_back(pinned_memory, p);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    TORCH_CHECK(current_device == 0, "only cuda:0 of the false GPUs has memory");
    c10::Device device(c10::DeviceType::CUDA, 0);
    if (!n) return {nullptr, nullptr, &free_device, device};
    Lock lock(mutex_);
    refuse_if_full(n);
    void* p = take(device_memory, n);
    return {p, p, &free_device, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_device; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    c10::Device device(c10::DeviceType::CPU);
    if (!n) return {nullptr, nullptr, &free_pinned, device};
    Lock lock(mutex_);
    void* p = take(pinned_memory, n);
    return {p, p, &free_pinned, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

bool is_pinned(const void* p) {
  Lock lock(mutex_);
  return find(pinned_memory, p);
}

// What the default stream is about to do to a tensor's memory.
void touch(const at::Tensor& tensor, bool writes) {
  if (!tensor.defined() || !tensor.is_cuda() || !tensor.storage().nbytes()) return;
  auto p = static_cast<const char*>(tensor.storage().data());
  if (Block* block = find(device_memory, p)) {
    block->used = clock_;
    if (writes) block->written = clock_;
  }
  size_t n = tensor.storage().nbytes();
  for (auto& [id, stream] : streams)
    if (id)
      for (auto& job : stream.jobs)
        if (!job.reported && (overlap(p, n, job.to, job.size) || (writes && overlap(p, n, job.from, job.size)))) {
          job.reported = true;
          violation("the default stream used memory that a copy on stream " + std::to_string(id) +
                    " was not done with");
        }
}

struct Mark {
  int64_t stream, position;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device getDevice() const override { return {type(), static_cast<c10::DeviceIndex>(current_device)}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto old = getDevice();
    setDevice(device);
    return old;
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < card.count, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(card.count); }
  c10::Stream stream(int64_t id) const { return c10::Stream(c10::Stream::UNSAFE, {type(), 0}, id); }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    Lock lock(mutex_);
    return stream(++streams_made);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto old = current_stream;
    current_stream = next.id();
    return stream(old);
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return reinterpret_cast<void*>(s.id()); }
  bool queryStream(const c10::Stream& s) const override {
    Lock lock(mutex_);
    if (s.id() == 0) finish_all(0);  // it is said to be done, and so it is
    return streams[s.id()].done >= streams[s.id()].issued;
  }
  void synchronizeStream(const c10::Stream& s) const override {
    Lock lock(mutex_);
    finish_all(s.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    Lock lock(mutex_);
    for (auto& [id, _] : streams) finish_all(id);
    finish_all(0);
  }
  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock lock(mutex_);
    if (!*event) *event = new Mark;
    *static_cast<Mark*>(*event) = {s.id(), s.id() ? streams[s.id()].issued : clock_};
  }
  void block(void* event, const c10::Stream& s) const override {
    Lock lock(mutex_);
    auto mark = static_cast<Mark*>(event);
    if (!mark || mark->stream == s.id()) return;
    auto& waiting = streams[s.id()];
    finish_uploads();
    if (mark->stream == 0)
      waiting.seen = std::max(waiting.seen, mark->position);
    else
      run_until(mark->stream, mark->position);  // at once: the one that waits may use it in any next operation
  }
  bool queryEvent(void* event) const override {
    Lock lock(mutex_);
    auto mark = static_cast<Mark*>(event);
    if (mark && mark->stream == 0) finish_all(0);
    return !mark || mark->stream == 0 || streams[mark->stream].done >= mark->position;
  }
  void synchronizeEvent(void* event) const override {
    Lock lock(mutex_);
    auto mark = static_cast<Mark*>(event);
    if (!mark) return;
    if (mark->stream == 0)
      finish_all(0);
    else
      run_until(mark->stream, mark->position);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Mark*>(event); }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream&) const override {
    Lock lock(mutex_);
    if (Block* block = find(device_memory, data.get())) block->shared = true;
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

constexpr int kMostCards = 8;

// --- randomness --------------------------------------------------------------------------------

// A generator of its own for the device: a CPU's inside, which is what operations are given.
struct Generator final : c10::GeneratorImpl {
  at::Generator inner;
  Generator(c10::DeviceIndex index, at::Generator inner)
      : GeneratorImpl({c10::DeviceType::CUDA, index}, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(device().index(), inner.clone()); }
};

std::vector<at::Generator>& default_generators() {
  static auto& made = *new std::vector<at::Generator>;
  for (int i = static_cast<int>(made.size()); i < kMostCards; i++)
    made.push_back(at::make_generator<Generator>(static_cast<c10::DeviceIndex>(i), at::detail::createCPUGenerator()));
  return made;
}
int handed_out = 0;

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override { return index == 0; }
  int getNumGPUs() const override { return card.count; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(card.count); }
  c10::DeviceIndex current_device() const override { return getCurrentDevice(); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(::current_device); }
  void setCurrentDevice(c10::DeviceIndex index) const override { Guard().setDevice({c10::DeviceType::CUDA, index}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    auto old = getCurrentDevice();
    setCurrentDevice(index);
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return {c10::DeviceType::CUDA, 0}; }
  void deviceSynchronize(c10::DeviceIndex index) const override { Guard().synchronizeDevice(index); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generators().at(index < 0 ? getCurrentDevice() : index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    Lock lock(mutex_);
    index = index < 0 ? getCurrentDevice() : index;
    // the first ones that Python asks for, while the device is set up, are those that all operations draw from
    if (handed_out < kMostCards && index == handed_out) return default_generators().at(handed_out++);
    return at::make_generator<Generator>(index, at::detail::createCPUGenerator());
  }
};

// --- operations --------------------------------------------------------------------------------

constexpr c10::DispatchKeySet kCuda(c10::DispatchKey::CUDA);

// A tensor's memory as a CPU's; what is one already, as it is.
at::Tensor on_host(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto made = at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(),
                            at::TensorOptions().dtype(t.scalar_type()).device(at::kCPU));
  if (t.is_conj()) made._set_conj(true);
  if (t.is_neg()) made._set_neg(true);
  return made;
}

at::Tensor on_device(const at::Tensor& t) {
  if (!t.defined() || t.is_cuda()) return t;
  bool dense = t.is_non_overlapping_and_dense();
  at::Tensor made = at::detail::empty_strided_generic(t.sizes(), dense ? t.strides() : t.contiguous().strides(),
                                                      &device_allocator, kCuda, t.scalar_type());
  on_host(made).copy_(t);
  return made;
}

at::Tensor empty_memory_format(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                               std::optional<at::Device> device, std::optional<bool>,
                               std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!device || device->index() <= 0, "only cuda:0 of the false GPUs has memory");
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator, kCuda,
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  TORCH_CHECK(!device || device->index() <= 0, "only cuda:0 of the false GPUs has memory");
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_allocator, kCuda, c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  Lock lock(mutex_);
  auto id = current_stream;
  bool down = !self.is_cuda();
  bool plain = self.is_contiguous() && source.is_contiguous() && self.dtype() == source.dtype() &&
               self.numel() == source.numel() && self.numel() && !source.is_conj() && !source.is_neg();
  bool waits = non_blocking && plain &&
               (down               ? is_pinned(self.const_data_ptr())
                : source.is_cuda() ? id != 0
                                   : is_pinned(source.const_data_ptr()));
  auto& stream = streams[id];
  if (id) {  // has the side stream waited for what the default one did to this memory?
    if (source.is_cuda())
      if (Block* block = find(device_memory, source.const_data_ptr()); block && block->written > stream.seen)
        violation("a copy on stream " + std::to_string(id) + " reads what the default stream may still be writing");
    if (!down)
      if (Block* block = find(device_memory, self.const_data_ptr()); block && block->used > stream.seen)
        violation("a copy on stream " + std::to_string(id) + " writes where the default stream may still be at work");
  } else {
    finish_uploads();
    clock_++;
    touch(source, false);
    touch(self, true);
  }
  if (!waits) {
    if (id)
      run_until(id, stream.issued);
    else if (down)
      finish_all(0);
    on_host(self).copy_(on_host(source).expand_as(self));
    return self;
  }
  late_copies += id != 0;
  Job job{static_cast<char*>(self.mutable_data_ptr()),
          static_cast<const char*>(source.const_data_ptr()),
          self.nbytes(),
          {},
          false};
  if (id == 0 && down) {
    job.snapshot.assign(job.from, job.size);
    downloads.push_back(std::move(job));
  } else {
    stream.jobs.push_back(std::move(job));
    stream.issued++;
  }
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  auto target = to;
  copy_(target, self, non_blocking);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar item(const at::Tensor& t) {
  Lock lock(mutex_);
  finish_uploads();
  touch(t, false);
  finish_all(current_stream);
  return on_host(t).item();
}

void record_stream(at::Tensor& self, at::Stream) {
  Lock lock(mutex_);
  if (Block* block = find(device_memory, self.storage().data())) block->shared = true;
}

at::Tensor& set_storage_offset(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                               c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}
at::Tensor& set_storage(at::Tensor& self, at::Storage storage) { return at::native::set_(self, std::move(storage)); }
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) { return at::native::set_tensor_(self, source); }

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  size_t need = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (size_t had = impl->storage().nbytes(); need > had) {
    auto data = device_allocator.allocate(need);
    if (had) std::memcpy(data.get(), impl->storage().data(), had);
    impl->unsafe_storage().set_data_ptr_noswap(std::move(data));
    impl->unsafe_storage().unsafeGetStorageImpl()->set_nbytes(need);
  }
  return self;
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}
at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}
at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// While an operation runs that draws without being given a generator, the CPU's one is the device's.
struct Drawing {
  at::Generator device;
  c10::intrusive_ptr<c10::TensorImpl> kept;
  explicit Drawing(bool draws) {
    if (!draws) return;
    auto& cpu = at::detail::getDefaultCPUGenerator();
    device = static_cast<Generator*>(default_generators().at(0).unsafeGetGeneratorImpl())->inner;
    kept = cpu.unsafeGetGeneratorImpl()->get_state();
    set(cpu, *device.unsafeGetGeneratorImpl()->get_state());
  }
  ~Drawing() {
    if (!kept) return;
    auto& cpu = at::detail::getDefaultCPUGenerator();
    set(device, *cpu.unsafeGetGeneratorImpl()->get_state());
    set(cpu, *kept);
  }
  static void set(const at::Generator& generator, const c10::TensorImpl& state) {
    generator.unsafeGetGeneratorImpl()->set_state(state);
  }
};

bool takes_cpu_tensors(const std::string& name) {  // beside the device's
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
         name.starts_with("aten::_foreach");
}

// Any other operation: the CPU's kernel, on the device's memory.
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  std::unique_lock<std::recursive_mutex> lock(mutex_);
  finish_uploads();
  clock_++;
  bool mixing = takes_cpu_tensors(schema.name());
  auto writes = [](const c10::Argument& a) { return a.alias_info() && a.alias_info()->isWrite(); };
  auto check = [&](const at::Tensor& t, bool written) {
    if (!t.defined()) return;
    touch(t, written);
    TORCH_CHECK(t.is_cuda() || t.is_meta() || t.dim() == 0 || mixing,
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                t.device(), "! (", schema.name(), ")");
  };
  size_t begin = stack->size() - arguments.size();
  bool empty_out = false;
  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = (*stack)[begin + i];
    bool written = writes(arguments[i]);
    empty_out |= arguments[i].is_out() && value.isTensor() && !value.toTensor().numel();
    if (value.isTensor())
      check(value.toTensor(), written);
    else if (value.isTensorList())
      for (const at::Tensor& t : value.toTensorList()) check(t, written);
    else if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        if (t) check(*t, written);
  }
  lock.unlock();  // a kernel in Python wants Python's own lock
  Drawing drawing(op.hasTag(at::Tag::nondeterministic_seeded));
  if (empty_out) return at::native::cpu_fallback(op, stack);  // it has to be made larger

  std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor())
      value = on_host(value.toTensor());
    else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(on_host(t));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
        list.push_back(t ? std::optional<at::Tensor>(on_host(*t)) : std::nullopt);
      value = std::move(list);
    } else if (value.isDevice())
      value = c10::Device(c10::DeviceType::CPU);
    else if (value.isGenerator() && value.toGenerator().device().is_cuda())
      value = static_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl())->inner;
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  const auto& returns = schema.returns();
  begin = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); i++) {
    auto& value = (*stack)[begin + i];
    if (returns[i].alias_info()) {
      TORCH_CHECK(writes(returns[i]), schema.name(), " gives a view, which the false GPU does not know");
      for (size_t k = 0; k < arguments.size(); k++)
        if (writes(arguments[k]) && arguments[k].alias_info()->beforeSets() == returns[i].alias_info()->beforeSets())
          value = given[k];
    } else if (value.isTensor())
      value = on_device(value.toTensor());
    else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorList()) list.push_back(on_device(t));
      value = std::move(list);
    }
  }
}

// --- products and attention: what CUDA alone has -------------------------------------------------

at::Tensor empty_on_device(c10::IntArrayRef size, at::ScalarType dtype) {
  return at::detail::empty_generic(size, &device_allocator, kCuda, dtype, std::nullopt);
}

// What an operation of our own does before it reads these.
void begin(std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors) {
  Lock lock(mutex_);
  finish_uploads();
  clock_++;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK(!t.defined() || t.is_cuda(),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                t.device(), "!");
    touch(t, false);
  }
}

void check_out_dtype(const at::Tensor& a, at::ScalarType dtype) {
  bool half = a.scalar_type() == at::kHalf || a.scalar_type() == at::kBFloat16;
  TORCH_CHECK(dtype == a.scalar_type() || (dtype == at::kFloat && half),
              "out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs");
}

// Sums in fp32, rounded once.
at::Tensor mm_dtype(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  begin({a, b});
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "input dtypes must be the same");
  check_out_dtype(a, dtype);
  return on_device(at::mm(on_host(a).to(at::kFloat), on_host(b).to(at::kFloat)).to(dtype));
}
at::Tensor bmm_dtype(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  begin({a, b});
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "input dtypes must be the same");
  check_out_dtype(a, dtype);
  return on_device(at::bmm(on_host(a).to(at::kFloat), on_host(b).to(at::kFloat)).to(dtype));
}
at::Tensor addmm_dtype(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                       const at::Scalar& beta, const at::Scalar& alpha) {
  begin({c, a, b});
  check_out_dtype(a, dtype);
  TORCH_CHECK(c.scalar_type() == dtype || c.scalar_type() == a.scalar_type(),
              "self dtype must match either out_dtype or mat1 dtype");
  return on_device(
      at::addmm(on_host(c).to(at::kFloat), on_host(a).to(at::kFloat), on_host(b).to(at::kFloat), beta, alpha)
          .to(dtype));
}
at::Tensor& addmm_dtype_out(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                            const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
  return out.copy_(addmm_dtype(c, a, b, dtype, beta, alpha));
}

// Which kernel scaled_dot_product_attention takes: torch's rules for a card of this capability.
int64_t choose_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const std::optional<at::Tensor>& mask, double dropout, bool is_causal, std::optional<double>,
                         bool enable_gqa) {
  sdp::sdp_params p{q, k, v, mask, dropout, is_causal, enable_gqa};
  auto type = q.scalar_type();
  bool half = type == at::kHalf || type == at::kBFloat16, ampere = card.major >= 8;
  bool alike = q.dim() == 4 && type == k.scalar_type() && type == v.scalar_type() && q.size(-1) == k.size(-1) &&
               sdp::check_tensor_shapes(p, false) && sdp::check_nonzero_sequence_lengths_dense(p, false) &&
               sdp::check_last_dim_stride_equals_1_dense<true>(p, false);
  auto& context = at::globalContext();
  bool square = !is_causal || q.size(-2) == k.size(-2);
  if (alike && context.userEnabledFlashSDP() && ampere && half && !mask && square && q.size(-1) <= 256 &&
      q.size(-1) == v.size(-1) && sdp::check_batch_size_and_num_heads_dense<true>(p, false))
    return static_cast<int64_t>(at::SDPBackend::flash_attention);
  int64_t unit = ampere ? (half ? 8 : 4) : half ? 8 : 1;
  bool takes = type == at::kFloat || type == at::kHalf || (type == at::kBFloat16 && ampere);
  if (alike && context.userEnabledMemEfficientSDP() && takes && q.size(-1) % unit == 0 && v.size(-1) % unit == 0 &&
      sdp::check_batch_size_and_num_heads_dense<false>(p, false))
    return static_cast<int64_t>(at::SDPBackend::efficient_attention);
  TORCH_CHECK(context.userEnabledMathSDP(), "No available kernel. Aborting execution.");
  return static_cast<int64_t>(at::SDPBackend::math);
}

// Keys or values, [batch, heads, tokens, width], on the host, once for each of q's heads.
at::Tensor repeated(const at::Tensor& t, const at::Tensor& q) {
  return on_host(t).repeat_interleave(q.size(1) / t.size(1), 1);
}

// As the kernels lay it out: [batch, tokens, heads, width], seen as [batch, heads, tokens, width].
at::Tensor empty_like_heads(const at::Tensor& t, int64_t width) {
  return empty_on_device({t.size(0), t.size(2), t.size(1), width}, t.scalar_type()).transpose(1, 2);
}

std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const std::optional<at::Tensor>& mask, double dropout, bool is_causal,
                                          std::optional<double> scale) {
  TORCH_CHECK(dropout == 0, "the false GPU's attention has no dropout");
  auto bias = mask ? std::optional<at::Tensor>(on_host(*mask).to(q.scalar_type())) : std::nullopt;
  return at::_scaled_dot_product_flash_attention_for_cpu(on_host(q), repeated(k, q), repeated(v, q), 0, is_causal, bias,
                                                         scale);
}

// Gradients on the host; those of shared keys and values one for each head.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attend_backward(const at::Tensor& gradient, const at::Tensor& q,
                                                               const at::Tensor& k, const at::Tensor& v,
                                                               const at::Tensor& out, const at::Tensor& sums,
                                                               const std::optional<at::Tensor>& mask, bool is_causal,
                                                               std::optional<double> scale) {
  auto bias = mask ? std::optional<at::Tensor>(on_host(*mask).to(q.scalar_type())) : std::nullopt;
  auto lse = on_host(sums).narrow(2, 0, q.size(2)).contiguous();
  return at::_scaled_dot_product_flash_attention_for_cpu_backward(on_host(gradient).contiguous(), on_host(q),
                                                                  repeated(k, q), repeated(v, q), on_host(out), lse, 0,
                                                                  is_causal, bias, scale);
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor, at::Tensor, at::Tensor>
flash(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double dropout, bool is_causal, bool,
      std::optional<double> scale) {
  begin({q, k, v});
  auto out = empty_like_heads(q, v.size(-1));
  auto sums = empty_on_device({q.size(0), q.size(1), q.size(2)}, at::kFloat);
  auto [result, lse] = attend(q, k, v, std::nullopt, dropout, is_causal, scale);
  on_host(out).copy_(result);
  on_host(sums).copy_(lse);
  auto seed = empty_on_device({2}, at::kUInt64), unused = empty_on_device({}, at::kUInt64),
       debug = empty_on_device({0}, q.scalar_type());
  return {out, sums, at::Tensor(), at::Tensor(), q.size(2), k.size(2), seed, unused, debug};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_backward(const at::Tensor& gradient, const at::Tensor& q,
                                                              const at::Tensor& k, const at::Tensor& v,
                                                              const at::Tensor& out, const at::Tensor& sums,
                                                              const at::Tensor&, const at::Tensor&, c10::SymInt,
                                                              c10::SymInt, double, bool is_causal, const at::Tensor&,
                                                              const at::Tensor&, std::optional<double> scale) {
  auto taken = gradient.transpose(1, 2).contiguous();
  begin({taken, q, k, v, out, sums});
  int64_t batch = q.size(0), heads = q.size(1), width = q.size(3), tokens = round_up(q.size(2), 128);
  auto dq = empty_like_heads(q, width), dk = empty_like_heads(k, width), dv = empty_like_heads(v, width);
  auto d = empty_on_device({batch, heads, tokens}, at::kFloat);
  auto dq_sum = empty_on_device({batch, tokens, heads, round_up(width, width <= 128 ? 32 : 64)}, at::kFloat);
  at::Tensor dk_expanded, dv_expanded;
  if (heads != k.size(1)) {
    dk_expanded = empty_on_device({batch, k.size(2), heads, width}, k.scalar_type());
    dv_expanded = empty_on_device({batch, k.size(2), heads, width}, v.scalar_type());
  }
  auto [gq, gk, gv] = attend_backward(taken.transpose(1, 2), q, k, v, out, sums, std::nullopt, is_causal, scale);
  on_host(dq).copy_(gq);
  on_host(dk).copy_(gk.unflatten(1, {k.size(1), -1}).sum(2));
  on_host(dv).copy_(gv.unflatten(1, {v.size(1), -1}).sum(2));
  return {dq, dk, dv};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> efficient(const at::Tensor& q, const at::Tensor& k,
                                                                     const at::Tensor& v,
                                                                     const std::optional<at::Tensor>& mask,
                                                                     bool keeps_sums, double dropout, bool is_causal,
                                                                     std::optional<double> scale) {
  begin({q, k, v});
  auto out = empty_like_heads(q, v.size(-1));
  auto sums = empty_on_device({q.size(0), q.size(1), keeps_sums ? round_up(q.size(2), 32) : 0}, at::kFloat);
  auto [result, lse] = attend(q, k, v, mask, dropout, is_causal, scale);
  on_host(out).copy_(result);
  if (keeps_sums) on_host(sums).narrow(2, 0, q.size(2)).copy_(lse);
  return {out, sums, at::zeros({}, at::kLong), at::zeros({}, at::kLong)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> efficient_backward(
    const at::Tensor& gradient, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
    const at::Tensor& out, const at::Tensor& sums, const at::Tensor&, const at::Tensor&, double,
    std::array<bool, 4> wanted, bool is_causal, std::optional<double> scale) {
  if (!gradient.defined()) return {};
  TORCH_CHECK(!wanted[3], "the false GPU gives no gradient of a mask");
  auto taken = gradient.transpose(1, 2).contiguous();
  begin({taken, q, k, v, out, sums});
  int64_t batch = q.size(0), heads = q.size(1), width = q.size(3);
  auto dq = empty_like_heads(q, width), dk = empty_like_heads(k, width), dv = empty_like_heads(v, v.size(3));
  bool half = q.scalar_type() != at::kFloat;
  at::Tensor products = half ? at::Tensor() : empty_on_device({batch, q.size(2), heads, v.size(3)}, at::kFloat);
  auto d = empty_on_device({batch, heads, q.size(2)}, at::kFloat);
  products = at::Tensor();
  auto dq_sum = half ? empty_on_device({batch, heads, round_up(q.size(2), 64), width}, at::kFloat) : at::Tensor();
  auto given = mask.defined() ? std::optional<at::Tensor>(mask) : std::nullopt;
  auto [gq, gk, gv] = attend_backward(taken.transpose(1, 2), q, k, v, out, sums, given, is_causal, scale);
  on_host(dq).copy_(gq);
  on_host(dk).copy_(gk);
  on_host(dv).copy_(gv);
  return {dq, dk, dv, at::Tensor()};
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty_memory_format));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(item));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage_offset));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  // torch makes it of others where a device has no kernel of its own
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  m.impl("mm.dtype", TORCH_FN(mm_dtype));
  m.impl("bmm.dtype", TORCH_FN(bmm_dtype));
  m.impl("addmm.dtype", TORCH_FN(addmm_dtype));
  m.impl("addmm.dtype_out", TORCH_FN(addmm_dtype_out));
  m.impl("_fused_sdp_choice", TORCH_FN(choose_attention));
  m.impl("_scaled_dot_product_flash_attention", TORCH_FN(flash));
  m.impl("_scaled_dot_product_flash_attention_backward", TORCH_FN(flash_backward));
  m.impl("_scaled_dot_product_efficient_attention", TORCH_FN(efficient));
  m.impl("_scaled_dot_product_efficient_attention_backward", TORCH_FN(efficient_backward));
}

// In fp16 first, whatever is wanted.
void int8_mm_dequant(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& dtype = torch::jit::peek(*stack, 3, 5);
  auto wanted = dtype.isNone() ? at::kHalf : dtype.toScalarType();
  dtype = static_cast<int64_t>(at::kHalf);
  run_on_cpu(op, stack);
  stack->back() = stack->back().toTensor().to(wanted);
}

// Outliers are looked for with a mask.
void int8_vectorwise_quant(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto a = torch::jit::peek(*stack, 0, 2).toTensor();
  double threshold = stack->back().toDouble();
  TORCH_CHECK(a.scalar_type() == at::kHalf, "A must be float16, got ", a.scalar_type());
  run_on_cpu(op, stack);
  if (threshold > 0) a.abs().ge(threshold);
}

// What bitsandbytes has kernels for on CUDA. Its fallback in Python would make more tensors than they do, and compute
// in what autocast says. gemm_4bit stays: for many rows it is a dequantized weight and a product there, too.
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {
  for (auto name : {"int8_linear_matmul", "int8_linear_matmul.out", "quantize_blockwise", "dequantize_blockwise",
                    "dequantize_blockwise.out", "quantize_4bit", "dequantize_4bit", "dequantize_4bit.out", "gemv_4bit",
                    "gemv_4bit.out"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  m.impl("int8_mm_dequant", torch::CppFunction::makeFromBoxedFunction<&int8_mm_dequant>());
  m.impl("int8_vectorwise_quant", torch::CppFunction::makeFromBoxedFunction<&int8_vectorwise_quant>());
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

}  // namespace

namespace at {
namespace native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}
using ::CUDAHooks;  // torch looks for this name
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

// --- for Python --------------------------------------------------------------------------------

extern "C" {
void false_start(size_t total, int major, int minor, int count) {
  card.total = total, card.major = major, card.minor = minor, card.count = count;
  c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator, 100);
}
void false_set_total(size_t n) { card.total = n; }
double false_fraction() { return card.fraction; }
void false_set_fraction(double fraction) { card.fraction = fraction; }
// kind 1: torch.AcceleratorError, else RuntimeError; after so many allocations that succeed
void false_fail(const char* text, int kind, int after) { fails_with = text, fails_as = kind, fails_after = after; }

size_t false_total() { return card.total; }
size_t false_held() { return device_memory.held; }
size_t false_held_peak() { return device_memory.held_peak; }
size_t false_requested() { return device_memory.requested; }
size_t false_requested_peak() { return device_memory.requested_peak; }
size_t false_pinned() { return pinned_memory.requested; }
size_t false_pinned_peak() { return pinned_memory.requested_peak; }
void false_reset_peak() {
  device_memory.held_peak = device_memory.held;
  device_memory.requested_peak = device_memory.requested;
}
void false_reset_pinned_peak() { pinned_memory.requested_peak = pinned_memory.requested; }
int64_t false_ooms() { return ooms; }
void false_reset_ooms() { ooms = 0; }
int64_t false_violations() { return violations; }
const char* false_reports() { return reports.c_str(); }
int64_t false_late_copies() { return late_copies; }

int false_device() { return current_device; }
void false_set_device(int index) {
  Guard().uncheckedSetDevice({c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)});
}
int64_t false_stream() { return current_stream; }
void false_set_stream(int64_t id) { current_stream = id; }
void false_synchronize() { Guard().synchronizeDevice(0); }
}
