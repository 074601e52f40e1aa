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
  # Its first lines show of some headers that they compile alone (tests/style).
  get_property(chains GLOBAL PROPERTY COHORT_HEADER_CHAINS)
  list(POP_FRONT chains includes)
  set_property(GLOBAL PROPERTY COHORT_HEADER_CHAINS ${chains})
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

# cohort_add_joined_library(LIBRARY target...): a library that compiles the sources of several programs
# as one, linked with the targets; cohort_join_program adds them. Nothing asks such programs for speed.
# A text in the library's property JOINED_FIRST comes before all they include.
function(cohort_add_joined_library library)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/${library}.cpp")
  file(GENERATE OUTPUT "${source}"
       CONTENT "$<TARGET_PROPERTY:${library},JOINED_FIRST>$<TARGET_PROPERTY:${library},JOINED_INCLUDES>\n$<TARGET_PROPERTY:${library},JOINED_SOURCES>")
  add_library(${library} STATIC EXCLUDE_FROM_ALL "${source}")
  set_target_properties(${library} PROPERTIES UNITY_BUILD OFF)
  target_compile_options(${library} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-O0>")
  if(NOT COHORT_SANITIZE)
    target_compile_options(${library} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-g0>")
  endif()
  target_compile_definitions(${library} PRIVATE "COHORT_PROGRAM_CUDA=$<TARGET_EXISTS:cohort::cuda>")
  target_include_directories(${library} PRIVATE "${PROJECT_SOURCE_DIR}/src/tools")
  target_link_libraries(${library} PUBLIC ${ARGN} PRIVATE cohort_warnings)
  if(TARGET cohort_cuda_sources)
    target_link_libraries(${library} PRIVATE cohort_cuda_sources)
  endif()
endfunction()

# cohort_join_sources(LIBRARY PROGRAM source...): adds sources to the library. One with a namespace of
# its own keeps it, any other lies in one made for it. A main(), which has to end by a return, becomes
# PROGRAM_main().
function(cohort_join_sources library program)
  foreach(source IN LISTS ARGN)
    cmake_path(ABSOLUTE_PATH source)
    if(source MATCHES "\\.cu$")
      target_sources(${library} PRIVATE "${source}")
      continue()
    endif()
    cmake_path(GET source PARENT_PATH folder)
    cmake_path(GET source STEM stem)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")

    file(STRINGS "${source}" lines REGEX "^#(include|if|el|endif)")
    foreach(line IN LISTS lines)
      string(REGEX REPLACE "^#include \"(.*)\".*" "\\1" path "${line}")
      if(EXISTS "${folder}/${path}")
        cmake_path(ABSOLUTE_PATH path BASE_DIRECTORY "${folder}" NORMALIZE)
        set(line "#include \"${path}\"")
      endif()
      set_property(TARGET ${library} APPEND_STRING PROPERTY JOINED_INCLUDES "${line}\n")
    endforeach()

    file(STRINGS "${source}" own REGEX "^namespace [a-z]")
    file(STRINGS "${source}" main REGEX "^int main")
    set(body "#include \"${source}\"\n")
    set(declaration "int ${program}_main(int argc, char** argv);\n")
    set(scope "")
    if(main)
      set(body "#define main ${program}_main\n${body}#undef main\n")
    endif()
    if(NOT own)
      set(begin "namespace ${program}_${stem} {\n")
      set(end "}  // namespace ${program}_${stem}\n")
      set(body "${begin}${body}${end}")
      set(declaration "${begin}${declaration}${end}")
      set(scope "${program}_${stem}::")
    endif()
    set_property(TARGET ${library} APPEND_STRING PROPERTY JOINED_SOURCES "${body}")
    if(main)
      set(text "${declaration}int main(int argc, char** argv) { return ${scope}${program}_main(argc, argv); }\n")
      file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/${program}_main.cpp" CONTENT "@text@" @ONLY)
    endif()
  endforeach()
endfunction()

# cohort_join_program(LIBRARY PROGRAM source...): the same, and the program.
function(cohort_join_program library program)
  cohort_join_sources(${library} ${program} ${ARGN})
  add_executable(${program} "${CMAKE_CURRENT_BINARY_DIR}/${program}_main.cpp")
  target_link_libraries(${program} PRIVATE ${library})
endfunction()
