// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <cstddef>
#include <memory>
#include <vector>

/// \file
/// What torch's autograd and its transforms are told of the operators: that they have no
/// derivative, what they write, and that each is one call, whatever it is given.

namespace cohort::python {

/// Calls `visit` with each tensor among an operator's arguments, which end the stack, and whether
/// the operator writes it.
template <class Visit>
void for_each_tensor(const c10::OperatorHandle& op, const torch::jit::Stack& stack,
                     const Visit& visit) {
  const auto& arguments = op.schema().arguments();
  const std::size_t first = stack.size() - arguments.size();
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = stack[first + i];
    const auto* alias = arguments[i].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (value.isTensor() && value.toTensor().defined()) {
      visit(value.toTensor(), written);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) {
        visit(tensor, written);
      }
    }
  }
}

/// The kernel under vmap, whose fallback would make a call for each example.
inline void refuse_vmap(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              " is not for torch.vmap: call it with the whole batch");
}

/// The kernel below autograd: a write is seen by whoever has kept the tensor for a backward, and
/// one to a tensor of inference mode outside of it is refused, as torch does both.
inline void count_writes(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                         torch::jit::Stack* stack) {
  for_each_tensor(op, *stack, [](const at::Tensor& tensor, bool written) {
    if (written) {
      torch::autograd::increment_version(tensor);
    }
  });
  const at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

/// The kernel of autograd: a backward through what an operator returns or has written is refused by
/// the operator's name, and so is forward differentiation.
inline void refuse_backward(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                            torch::jit::Stack* stack) {
  std::vector<at::Tensor> read;
  std::vector<at::Tensor> written;
  const bool grad = c10::GradMode::is_enabled();
  bool needed = false;
  for_each_tensor(op, *stack, [&](const at::Tensor& tensor, bool writes) {
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(tensor), op.schema().name(),
                                " has no forward derivative");
    if (grad) {
      needed = needed || tensor.requires_grad();
      (writes ? written : read).push_back(tensor);
    }
  });
  std::shared_ptr<torch::autograd::Node> node;
  if (needed) {
    for (const at::Tensor& tensor : written) {
      torch::autograd::check_inplace(tensor, true);
    }
    // What is written over is gone, and its history with it, but in place.
    if (read.empty()) {
      read = written;
    }
    node = std::shared_ptr<torch::autograd::Node>(
        new torch::autograd::NotImplemented(op.schema().name()), torch::autograd::deleteNode);
    node->set_next_edges(torch::autograd::collect_next_edges(read));
  }
  {
    const at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  if (!node) {
    return;
  }
  for (const at::Tensor& tensor : written) {
    if (torch::autograd::isDifferentiableType(tensor.scalar_type())) {
      torch::autograd::rebase_history(tensor, node);
    }
  }
  const std::size_t results = op.schema().returns().size();
  for (std::size_t i = stack->size() - results; i < stack->size(); ++i) {
    const c10::IValue& value = (*stack)[i];
    if (value.isTensor() && torch::autograd::isDifferentiableType(value.toTensor().scalar_type())) {
      torch::autograd::set_history(value.toTensor(), node);
    }
  }
}

}  // namespace cohort::python
