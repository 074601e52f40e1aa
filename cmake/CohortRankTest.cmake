# SPDX-License-Identifier: Apache-2.0
# cohort_add_rank_test(name
#   SOURCES file...            compiled into the program `name` in the build's bin folder
#   RANKS n...                 one test per rank count: ranks.<name>.n<count>
#   [FULL_RANKS n...]          rank counts that only the long run takes
#   [LIBRARIES target...]      beyond cohort::mpi
#   [ARGS arg...]              arguments of the program
#   [MPIRUN_ARGS arg...]       further options of mpirun, such as --enable-recovery
#   [PASS_REGEX regex...]      judge by the output instead of the exit status (a rank dies on purpose)
#   [FAIL_REGEX regex...]      output that fails the test whatever the exit status
#   [TIMEOUT seconds]          default 120
#   [LABELS label...]          beyond "ranks"
#   [VARIANT text]             a further test of a program that is already built: ranks.<name>.<text>.n<count>
#   [PROGRAM target]           a joined program that holds <name>_test.cpp, instead of SOURCES
#   [OWN_MAIN])                the sources bring main(); otherwise they are Catch test cases that
#                              every rank runs, with tests/support/ranks.hpp
#
# One line registers a test:  cohort_add_rank_test(all_gather SOURCES all_gather_test.cpp RANKS 1 2 4)

file(STRINGS "${PROJECT_SOURCE_DIR}/cmake/mpi_env.sh" cohort_mpi_environment REGEX "^export ")
list(TRANSFORM cohort_mpi_environment REPLACE "^export " "")

# Environment of every test: sanitizer findings fail, except the suppressed ones of other libraries.
set(cohort_test_environment
    "LSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/support/lsan.supp:print_suppressions=0"
    "TSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/support/tsan.supp:halt_on_error=1"
    "UBSAN_OPTIONS=print_stacktrace=1")
# MPI unloads its components before leaks are looked for, which leaves frames without a name; the
# slow unwinder goes on to the libraries behind them, whose names the suppressions know.
list(APPEND cohort_mpi_environment ${cohort_test_environment} "ASAN_OPTIONS=fast_unwind_on_malloc=0")

if(MPIEXEC_EXECUTABLE AND NOT DEFINED COHORT_MPIRUN_IS_OPEN_MPI)
  execute_process(COMMAND "${MPIEXEC_EXECUTABLE}" --version OUTPUT_VARIABLE version ERROR_QUIET)
  string(REGEX MATCH "Open MPI|OpenRTE" open_mpi "${version}")
  if(open_mpi)
    set(COHORT_MPIRUN_IS_OPEN_MPI ON CACHE INTERNAL "mpirun is Open MPI's")
  else()
    set(COHORT_MPIRUN_IS_OPEN_MPI OFF CACHE INTERNAL "mpirun is Open MPI's")
  endif()
endif()

# A program of Catch test cases that every rank runs.
function(cohort_add_rank_program program)
  add_executable(${program} ${ARGN})
  target_link_libraries(${program} PRIVATE cohort_test_rank_main cohort::mpi cohort_warnings)
  target_precompile_headers(${program} REUSE_FROM cohort_test_rank_main)
endfunction()

function(cohort_add_rank_test name)
  cmake_parse_arguments(
    PARSE_ARGV 1 arg "OWN_MAIN" "TIMEOUT;VARIANT;PROGRAM"
    "SOURCES;RANKS;FULL_RANKS;LIBRARIES;ARGS;MPIRUN_ARGS;PASS_REGEX;FAIL_REGEX;LABELS")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "cohort_add_rank_test(${name}): unknown ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()

  set(program ${name})
  if(arg_PROGRAM)
    set(program ${arg_PROGRAM})
    cohort_joined_arguments(arg_ARGS "${name}_test.cpp" "${arg_ARGS}")
  elseif(TARGET ${name})
    # built for another of its tests
  elseif(arg_OWN_MAIN)
    add_executable(${name} ${arg_SOURCES})
    target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} cohort::mpi cohort_warnings)
    target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/tests")
  elseif(arg_LIBRARIES)  # they may bring flags that the shared header was not built with
    add_executable(${name} ${arg_SOURCES})
    target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} cohort_test_rank_main cohort::mpi
                                          cohort_warnings)
  else()
    cohort_add_rank_program(${name} ${arg_SOURCES})
  endif()

  set(mpirun "${MPIEXEC_EXECUTABLE}")
  if(COHORT_MPIRUN_IS_OPEN_MPI)
    # mpirun's own limit ends the ranks in order; ctest's, a little later, is the last resort.
    list(APPEND mpirun --tag-output --timeout ${arg_TIMEOUT})
  elseif(arg_MPIRUN_ARGS)
    message(STATUS "${name}: left out, its mpirun options are Open MPI's")
    return()
  endif()
  math(EXPR last_resort "${arg_TIMEOUT} + 15")

  set(test_prefix "ranks.${name}")
  if(arg_VARIANT)
    string(APPEND test_prefix ".${arg_VARIANT}")
  endif()
  foreach(ranks IN LISTS arg_RANKS arg_FULL_RANKS)
    set(test "${test_prefix}.n${ranks}")
    set(labels ranks ${arg_LABELS})
    if(ranks IN_LIST arg_FULL_RANKS)
      list(APPEND labels full)
    endif()
    add_test(NAME "${test}" COMMAND ${mpirun} ${MPIEXEC_NUMPROC_FLAG} ${ranks} ${arg_MPIRUN_ARGS}
                                    $<TARGET_FILE:${program}> ${arg_ARGS})
    set_tests_properties(
      "${test}"
      PROPERTIES PROCESSORS ${ranks}
                 TIMEOUT ${last_resort}
                 LABELS "${labels}"
                 ENVIRONMENT "${cohort_mpi_environment}")
    if(arg_PASS_REGEX)
      set_property(TEST "${test}" APPEND PROPERTY ENVIRONMENT "COHORT_TEST_NOT_ADDED_UP=1")
      set_tests_properties("${test}" PROPERTIES PASS_REGULAR_EXPRESSION "${arg_PASS_REGEX}")
    endif()
    if(arg_FAIL_REGEX)
      set_tests_properties("${test}" PROPERTIES FAIL_REGULAR_EXPRESSION "${arg_FAIL_REGEX}")
    endif()
  endforeach()
endfunction()
