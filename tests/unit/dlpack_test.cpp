// SPDX-License-Identifier: Apache-2.0
#include "cohort/dlpack.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::says;

namespace dlpack_abi {

// As DLPack 1.1 lays them out, written anew; frameworks bring their own.
enum DLDeviceType : std::int32_t { kDLCPU = 1, kDLCUDA = 2 };
struct DLDevice {
  DLDeviceType device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
struct DLPackVersion {
  std::uint32_t major;
  std::uint32_t minor;
};
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor dl_tensor;
};

/// A producer's tensor, which counts how often it is given back.
template <class Managed>
struct Produced {
  std::array<float, 24> values{};
  std::array<std::int64_t, 2> shape{4, 6};
  int deleted = 0;
  Managed managed{};

  Produced() {
    managed.manager_ctx = &deleted;
    managed.deleter = [](Managed* self) { ++*static_cast<int*>(self->manager_ctx); };
    managed.dl_tensor = {values.data(), {kDLCPU, 0},      2, {2, 32, 1}, shape.data(),
                         nullptr,       2 * sizeof(float)};
    shape = {4, 5};
    if constexpr (requires { managed.version; }) {
      managed.version = {1, 0};
    }
  }
};

/// Counts what comes back.
class Lender : public MemoryOwner {
 public:
  void release(std::uint64_t block) noexcept override { released.push_back(block); }
  void record_stream(std::uint64_t, StreamRef) override {}

  std::vector<std::uint64_t> released;
};

}  // namespace dlpack_abi

using namespace dlpack_abi;

TEMPLATE_TEST_CASE("a tensor that came by DLPack is given back once", "[dlpack]", DLManagedTensor,
                   DLManagedTensorVersioned) {
  Produced<TestType> produced;
  {
    Tensor tensor = from_dlpack(&produced.managed);
    CHECK(tensor.data() == produced.values.data() + 2);
    CHECK(tensor.dtype() == DType::f32);
    CHECK(tensor.shape() == Dims{4, 5});
    CHECK(tensor.device() == Device{});
    CHECK_THROWS_MATCHES(tensor.record_stream({}), UsageError, says("its producer"));
    const Tensor moved = std::move(tensor);
    CHECK(produced.deleted == 0);
  }
  CHECK(produced.deleted == 1);
}

TEST_CASE("what cannot come by DLPack is refused, and stays the caller's", "[dlpack]") {
  Produced<DLManagedTensorVersioned> produced;
  auto& managed = produced.managed;
  const auto refused = [&](const auto&... parts) {
    CHECK_THROWS_MATCHES((void)from_dlpack(&managed), UsageError, says(parts...));
    CHECK(produced.deleted == 0);
    managed = Produced<DLManagedTensorVersioned>().managed;
    managed.manager_ctx = &produced.deleted;
    managed.dl_tensor.data = produced.values.data();
    managed.dl_tensor.shape = produced.shape.data();
  };
  managed.version.major = 2;
  refused("expected version 1", "got 2.0");
  managed.flags = 1;
  refused("read-only");
  managed.dl_tensor.dtype = {5, 64, 1};
  refused("code 5, 64 bits and 1 lanes");
  managed.dl_tensor.dtype = {2, 32, 4};
  refused("4 lanes");
  managed.dl_tensor.device.device_type = static_cast<DLDeviceType>(10);
  refused("device type 10");
  std::array<std::int64_t, 2> strides{1, 4};
  managed.dl_tensor.strides = strides.data();
  CHECK(view_of_dlpack(managed.dl_tensor).strides() == Dims{1, 4});
  refused("without gaps", "(1,4)");
  std::array<std::int64_t, 9> many{};
  managed.dl_tensor.shape = many.data();
  managed.dl_tensor.ndim = 9;
  refused("expected at most 8 dimensions, got 9");
  CHECK_THROWS_MATCHES((void)from_dlpack<DLManagedTensor>(nullptr), UsageError, says("got null"));
}

TEMPLATE_TEST_CASE("a tensor goes out by DLPack and comes back", "[dlpack]", DLManagedTensor,
                   DLManagedTensorVersioned) {
  std::array<std::byte, 64> memory{};
  const auto owner = std::make_shared<Lender>();
  for (const Device device : {Device{}, Device{DeviceKind::cuda, 3}}) {
    for (const auto dtype :
         {DType::f64, DType::f32, DType::f16, DType::bf16, DType::i8, DType::u8, DType::i32,
          DType::i64, DType::f8_e4m3, DType::f8_e5m2, DType::b8, DType::i16, DType::u16}) {
      INFO("dtype " << to_string(dtype) << " on " << to_string(device));
      owner->released.clear();
      const TensorView view(memory.data(), dtype, {2, 1, 4}, device);
      auto* const managed = to_dlpack<TestType>(Tensor(view, owner, 5));
      CHECK(managed->dl_tensor.data == memory.data());
      CHECK(managed->dl_tensor.device.device_type == (device == Device{} ? kDLCPU : kDLCUDA));
      CHECK(managed->dl_tensor.device.device_id == device.index);
      CHECK(managed->dl_tensor.strides[1] == 4);
      CHECK(owner->released.empty());
      {
        const Tensor back = from_dlpack(managed);
        CHECK(back.dtype() == dtype);
        CHECK(back.shape() == view.shape());
        CHECK(back.device() == device);
        CHECK(owner->released.empty());
      }
      CHECK(owner->released == std::vector<std::uint64_t>{5});
    }
  }
  CHECK(owner.use_count() == 1);
}

TEST_CASE("element types are those of DLPack", "[dlpack]") {
  CHECK(detail::to_dlpack_type(DType::f16) == detail::DlpackType{2, 16});
  CHECK(detail::to_dlpack_type(DType::bf16) == detail::DlpackType{4, 16});
  CHECK(detail::to_dlpack_type(DType::u8) == detail::DlpackType{1, 8});
  CHECK(detail::to_dlpack_type(DType::i64) == detail::DlpackType{0, 64});
  CHECK(detail::to_dlpack_type(DType::f8_e4m3) == detail::DlpackType{10, 8});  // kDLFloat8_e4m3fn
  CHECK(detail::to_dlpack_type(DType::f8_e5m2) == detail::DlpackType{12, 8});
  CHECK(detail::from_dlpack_type({6, 8}) == DType::b8);
  CHECK(detail::from_dlpack_type({5, 64}) == std::nullopt);  // complex
}
