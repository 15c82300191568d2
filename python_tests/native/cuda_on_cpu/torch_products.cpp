// The ops test_products.multiply and test_products.outer: TorchProducts on tensors of the CPU.
#include "cuda/torch_products.h"

using namespace unrolled_kernels;

namespace {

Tensor multiply(Tensor Q, Tensor x, bool transposed) {
  Tensor out = allocate(x, x.scalar_type(), {x.size(0), x.size(1)});
  dispatch_storage(Q.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    using C = compute_type<Storage>;
    cuda::TorchProducts<Storage> products(x, data<Storage>(Q), Q.size(0));
    products.multiply(data<C>(x), mutable_data<C>(out), x.size(0), transposed);
  });
  return out;
}

Tensor outer(Tensor a, Tensor z) {
  Tensor out = allocate(a, a.scalar_type(), {a.size(1), a.size(1)});
  dispatch_storage(a.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    using C = compute_type<Storage>;
    cuda::TorchProducts<Storage> products(a, nullptr, a.size(1));
    products.outer(data<C>(a), data<C>(z), a.size(0), mutable_data<C>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(test_products, m) {
  m.def("multiply(Tensor Q, Tensor x, bool transposed) -> Tensor");
  m.def("outer(Tensor a, Tensor z) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(test_products, CPU, m) {
  m.impl("multiply", TORCH_BOX(&multiply));
  m.impl("outer", TORCH_BOX(&outer));
}
