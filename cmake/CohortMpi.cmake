# SPDX-License-Identifier: Apache-2.0
# cohort::mpi, where MPI is found.

if(COHORT_MPI)
  # The library calls MPI's C interface; the C++ bindings would only add a library to link.
  set(MPI_CXX_SKIP_MPICXX ON)
  if(COHORT_MPI STREQUAL "AUTO")
    find_package(MPI COMPONENTS CXX)
  else()
    find_package(MPI REQUIRED COMPONENTS CXX)
  endif()
endif()

if(MPI_CXX_FOUND AND COHORT_MPI)
  add_library(cohort_mpi INTERFACE)
  add_library(cohort::mpi ALIAS cohort_mpi)
  set_target_properties(cohort_mpi PROPERTIES EXPORT_NAME mpi)
  target_link_libraries(cohort_mpi INTERFACE cohort MPI::MPI_CXX)
else()
  message(STATUS "cohort::mpi: not built (COHORT_MPI=${COHORT_MPI}, MPI found: ${MPI_CXX_FOUND})")
endif()
