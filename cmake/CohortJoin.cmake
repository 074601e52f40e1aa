# SPDX-License-Identifier: Apache-2.0
# cohort_join_tests(VAR NAME test...): one source that holds many test files, for builds of the whole
# suite, where most of the time goes into compiling the same headers again and again. It includes
# what the files include first, so that their own includes are empty; then each file lies in a
# namespace of its own, so that their helpers cannot meet. Paths are relative to the calling folder;
# VAR is set to the source's path.
#
# A file keeps its tag [#file] (Catch's --filenames-as-tags), by which its tests are run alone. One
# that must not share a program stays out: see cohort_joins.

# Sets VAR to whether a test file can share a program: not where it replaces a function of the
# system, defines macros or brings main().
function(cohort_joins var test)
  file(STRINGS "${test}" apart REGEX "^extern \"C\"|^#define|^int main")
  if(COHORT_QUICK_BUILD AND NOT apart)
    set(${var} ON PARENT_SCOPE)
  else()
    set(${var} OFF PARENT_SCOPE)
  endif()
endfunction()

function(cohort_join_tests var name)
  set(includes "")
  set(bodies "")
  set(number 0)
  foreach(test IN LISTS ARGN)
    file(STRINGS "${CMAKE_CURRENT_SOURCE_DIR}/${test}" found REGEX "^#include ")
    list(APPEND includes ${found})
    math(EXPR number "${number} + 1")
    string(APPEND bodies "namespace test_file_${number} {\n"
           "#include \"${CMAKE_CURRENT_SOURCE_DIR}/${test}\"\n" "}  // namespace test_file_${number}\n")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
                                           "${CMAKE_CURRENT_SOURCE_DIR}/${test}")
  endforeach()
  list(REMOVE_DUPLICATES includes)
  list(JOIN includes "\n" includes)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/${name}.cpp")
  file(CONFIGURE OUTPUT "${source}" CONTENT "@includes@\n@bodies@" @ONLY)
  set(${var} "${source}" PARENT_SCOPE)
endfunction()

# Sets VAR to the arguments by which a joined program runs one file's tests, hidden ones only where
# a tag asks for them.
function(cohort_joined_arguments var test tags)
  cmake_path(GET test STEM stem)
  if(tags)
    set(${var} --filenames-as-tags "[#${stem}]${tags}" PARENT_SCOPE)
  else()
    set(${var} --filenames-as-tags "[#${stem}]~[.]" PARENT_SCOPE)
  endif()
endfunction()
