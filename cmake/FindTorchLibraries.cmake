# SPDX-License-Identifier: Apache-2.0
# Finds LibTorch in the folder TORCH_ROOT, such as site-packages/torch, or on CMAKE_PREFIX_PATH, and
# gives the target TorchLibraries::torch. Torch's own package is not asked: that of a build with CUDA
# fails where no toolkit is installed, and brings flags of its own.

find_path(TORCH_INCLUDE_DIR torch/library.h HINTS "${TORCH_ROOT}/include" PATH_SUFFIXES include)
find_library(TORCH_CPU_LIBRARY torch_cpu HINTS "${TORCH_ROOT}/lib")
find_library(TORCH_C10_LIBRARY c10 HINTS "${TORCH_ROOT}/lib")
mark_as_advanced(TORCH_INCLUDE_DIR TORCH_CPU_LIBRARY TORCH_C10_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchLibraries
                                  REQUIRED_VARS TORCH_CPU_LIBRARY TORCH_C10_LIBRARY TORCH_INCLUDE_DIR)

if(TorchLibraries_FOUND AND NOT TARGET TorchLibraries::torch)
  add_library(TorchLibraries::torch INTERFACE IMPORTED)
  target_include_directories(TorchLibraries::torch SYSTEM INTERFACE "${TORCH_INCLUDE_DIR}")
  target_link_libraries(TorchLibraries::torch INTERFACE "${TORCH_CPU_LIBRARY}" "${TORCH_C10_LIBRARY}")
endif()
