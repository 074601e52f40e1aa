# SPDX-License-Identifier: Apache-2.0
# What every target built in this tree shares: output folders, warnings, sanitizers.

if(PROJECT_IS_TOP_LEVEL)
  if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "Build type" FORCE)
  endif()
  set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bin")
  set(CMAKE_CXX_EXTENSIONS OFF)
endif()

# Linked by the project's own programs only, so that users of the targets keep their own flags.
# nvcc compiles generated code that no warning set fits; its host compiler gets the basic one.
add_library(cohort_warnings INTERFACE)
set(cohort_cxx_warnings -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion)
set(cohort_cuda_warnings -Xcompiler=-Wall,-Wextra)
if(COHORT_WARNINGS_AS_ERRORS)
  list(APPEND cohort_cxx_warnings -Werror)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    # g++ 13 takes copies within fmt 9's big integers to be out of bounds, depending on what it inlines.
    list(APPEND cohort_cxx_warnings -Wno-error=array-bounds)
  endif()
  list(APPEND cohort_cuda_warnings --Werror=all-warnings)
endif()
target_compile_options(
  cohort_warnings INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${cohort_cxx_warnings}>"
                            "$<$<COMPILE_LANGUAGE:CUDA>:${cohort_cuda_warnings}>")

# cohort_build_quickly(LEVEL [ONE_SOURCE]): for folders of programs that are run to see that they work. At -O1 they
# take a third of the time of -O2, and those that nothing is asked of a fifth less at -O0; debug
# information is a tenth, and only the reports of sanitizers show it. Installed
# consumers and tests of a consumer's flags bring -O2 and -O3, and `--full` runs all at -O2. With
# ONE_SOURCE a program's C++ sources are compiled as one: most of the time goes into the headers.
function(cohort_build_quickly level)
  if(COHORT_QUICK_BUILD)
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${level}>")
    if(NOT COHORT_SANITIZE)
      add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-g0>")
    endif()
    if("ONE_SOURCE" IN_LIST ARGN)
      set(CMAKE_UNITY_BUILD ON PARENT_SCOPE)
      set(CMAKE_UNITY_BUILD_BATCH_SIZE 0 PARENT_SCOPE)
    endif()
  endif()
endfunction()

if(COHORT_SANITIZE)
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${COHORT_SANITIZE};-fno-omit-frame-pointer>")
  add_link_options("-fsanitize=${COHORT_SANITIZE}")
  if(COHORT_SANITIZE MATCHES "undefined")
    # Otherwise the program goes on after a finding and a test could pass.
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=undefined>")
    # Its check of virtual calls opens a pipe, and takes a process without descriptors for an error.
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize=vptr>")
  endif()
endif()

# cohort_add_program(name source...): a program of the tree, linked with what its sources include, so
# that an example without <cohort/mpi.hpp> proves that it needs no MPI. A source that can use the
# GPU parts but does not need them tests COHORT_PROGRAM_CUDA, which is 1 where cohort::cuda is built.
# Programs whose libraries are missing are left out with a message. Builds of the suite compile those
# that need MPI as one, and those that need nothing (CohortJoin).
function(cohort_add_program name)
  set(includes "")
  set(optional_cuda "")
  set(apart OFF)
  foreach(source IN LISTS ARGN)
    cmake_path(ABSOLUTE_PATH source)
    file(STRINGS "${source}" found REGEX "^#include [<\"](cohort/|mpi|CLI/|nlohmann/)")
    list(APPEND includes ${found})
    file(STRINGS "${source}" found REGEX "COHORT_PROGRAM_CUDA")
    list(APPEND optional_cuda ${found})
    file(READ "${source}" text)  # joined, main() is a function like any other, which has to end by a return
    if(NOT text MATCHES "\n +return [^\n]*\n( *}\n)*$" AND text MATCHES "\nint main")
      set(apart ON)
    endif()
  endforeach()
  set(libraries cohort::cohort)
  if(includes MATCHES "[<\"](cohort/)?mpi")
    list(APPEND libraries cohort::mpi)
  endif()
  if(includes MATCHES "[<\"]cohort/(cuda|nccl)" AND NOT optional_cuda)
    list(APPEND libraries cohort::cuda)
  endif()
  if(includes MATCHES "<CLI/")
    find_package(CLI11 QUIET)
    list(APPEND libraries CLI11::CLI11)
  endif()
  if(includes MATCHES "<nlohmann/")
    find_package(nlohmann_json QUIET)
    list(APPEND libraries nlohmann_json::nlohmann_json)
  endif()
  foreach(library IN LISTS libraries)
    if(NOT TARGET ${library})
      message(STATUS "${name}: left out, ${library} is not available")
      return()
    endif()
  endforeach()
  if(optional_cuda AND TARGET cohort::cuda)
    list(APPEND libraries cohort::cuda)
  endif()

  if(TARGET cohort_programs AND cohort::mpi IN_LIST libraries AND NOT apart)
    cohort_join_program(cohort_programs ${name} ${ARGN})
    target_link_libraries(cohort_programs PUBLIC ${libraries})
    return()
  elseif(TARGET cohort_host_programs AND libraries STREQUAL "cohort::cohort" AND NOT apart)
    cohort_join_program(cohort_host_programs ${name} ${ARGN})
    target_include_directories(cohort_host_programs PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
    return()
  endif()
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE ${libraries} cohort_warnings)
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/src/tools")  # command_line/
  if(TARGET cohort_cuda_sources)
    target_link_libraries(${name} PRIVATE cohort_cuda_sources)
  endif()
  if(optional_cuda)
    target_compile_definitions(${name} PRIVATE "COHORT_PROGRAM_CUDA=$<TARGET_EXISTS:cohort::cuda>")
  endif()
endfunction()
