# SPDX-License-Identifier: Apache-2.0
# cohort::torch, where LibTorch is found.

if(COHORT_TORCH)
  if(COHORT_TORCH STREQUAL "AUTO")
    find_package(TorchLibraries QUIET)
  else()
    find_package(TorchLibraries REQUIRED)
  endif()
endif()

if(COHORT_TORCH AND TorchLibraries_FOUND)
  add_library(cohort_torch INTERFACE)
  add_library(cohort::torch ALIAS cohort_torch)
  set_target_properties(cohort_torch PROPERTIES EXPORT_NAME torch)
  target_link_libraries(cohort_torch INTERFACE cohort TorchLibraries::torch)
  # Torch's headers bring an fmt of their own, whose library nobody has.
  target_compile_definitions(cohort_torch INTERFACE FMT_HEADER_ONLY=1)
else()
  message(STATUS "cohort::torch: not built (COHORT_TORCH=${COHORT_TORCH})")
endif()
