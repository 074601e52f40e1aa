# SPDX-License-Identifier: Apache-2.0
# cohort::cuda, where the CUDA toolkit and NCCL are found. A GPU or a driver is not needed to build.

set(cohort_cuda_missing "")
if(COHORT_CUDA)
  find_package(CUDAToolkit 12 QUIET)
  if(CUDAToolkit_FOUND)
    find_package(NCCL 2.19 QUIET)
  endif()
  if(NOT CUDAToolkit_FOUND)
    set(cohort_cuda_missing "the CUDA toolkit (12 or later) was not found")
  elseif(NOT NCCL_FOUND)
    if(NCCL_MISMATCH)
      set(cohort_cuda_missing "NCCL: ${NCCL_MISMATCH}; NCCL_ROOT names the folder of one")
    else()
      set(cohort_cuda_missing "NCCL (2.19 or later) was not found; NCCL_ROOT names its folder")
    endif()
  endif()
  if(cohort_cuda_missing AND NOT COHORT_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "COHORT_CUDA=${COHORT_CUDA}: ${cohort_cuda_missing}")
  endif()
endif()

if(COHORT_CUDA AND NOT cohort_cuda_missing)
  # Machine code for the data-centre cards, which their workstation kin run as well (8.6 and 8.9
  # that of 8.0, 10.3 that of 10.0), and PTX of the last for what comes after, 12.0 first. Unless
  # someone said otherwise: CMake's own default, which a parent that has enabled CUDA got, is nobody's
  # choice.
  if("$ENV{CUDAARCHS}" STREQUAL ""
     AND (NOT DEFINED CMAKE_CUDA_ARCHITECTURES
          OR "${CMAKE_CUDA_ARCHITECTURES}" STREQUAL "${CMAKE_CUDA_ARCHITECTURES_DEFAULT}"))
    if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
      set(CMAKE_CUDA_ARCHITECTURES "80-real;90-real;100")
    else()
      set(CMAKE_CUDA_ARCHITECTURES "80-real;90")
    endif()
  endif()
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND CUDAToolkit_NVCC_EXECUTABLE)
    set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")
  endif()
  enable_language(CUDA)
  message(STATUS "cohort::cuda: CUDA ${CUDAToolkit_VERSION}, NCCL ${NCCL_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
  add_subdirectory("${PROJECT_SOURCE_DIR}/src")
else()
  if(NOT COHORT_CUDA)
    set(cohort_cuda_missing "COHORT_CUDA=${COHORT_CUDA}")
  endif()
  message(STATUS "cohort::cuda: not built (${cohort_cuda_missing})")
endif()
